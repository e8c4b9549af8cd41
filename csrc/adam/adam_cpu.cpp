// Owns the CPU kernels of the adam stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "adam/adam_math.h"
#include "cast/cast_random_cpu.h"
#include "core/update_cpu.h"

namespace deepcore {
namespace DEEPCORE_ISA {

void adam_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<Adam>(args, begin, end);
}

void adam_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept { apply_range<Adam>(args, begin, end); }

void adam_stochastic_prepare(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<StochasticAdam>(args, begin, end);
}

void adam_stochastic_apply(const UpdateArgs& args, int64_t begin, int64_t end) noexcept {
    apply_range<StochasticAdam, AtRandom>(args, begin, end);
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
