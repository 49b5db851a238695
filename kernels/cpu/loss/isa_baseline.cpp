#include "loss/kernel.h"

namespace amtss {
#if defined(__x86_64__)
extern const Kernel kernel_baseline = {"sse2", tile_rows, loss_rows, scratch_of, exp_all};
#else
extern const Kernel kernel_baseline = {"neon", tile_rows, loss_rows, scratch_of, exp_all};
#endif
}
