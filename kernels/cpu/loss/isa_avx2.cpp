#include "loss/kernel.h"

namespace amtss {
extern const Kernel kernel_avx2 = {"avx2", tile_rows, loss_rows, scratch_of, exp_all};
}
