// Owns the CPU kernels of the sgd stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "core/update_cpu.h"
#include "sgd/sgd_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

void sgd_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept { prepare_range<Sgd>(args, begin, end); }

void sgd_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept { apply_range<Sgd>(args, begin, end); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
