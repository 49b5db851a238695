#include "loss/kernel.h"

namespace amtss {
extern const Kernel kernel_avx512 = {"avx512", tile_rows, loss_rows, scratch_of, exp_all};
}
