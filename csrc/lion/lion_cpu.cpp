// Owns the CPU kernels of the lion stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "core/update_cpu.h"
#include "lion/lion_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

void lion_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<Lion>(args, begin, end);
}

void lion_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept { apply_range<Lion>(args, begin, end); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
