// Owns the CUDA kernels of the adam stem and their launcher.
// Knows nothing of tensors.
#include "adam/adam_math.h"
#include "cast/cast_random.cuh"
#include "core/update.cuh"

namespace deepcore {

const char* launch_adam(const UpdateArgs& args, void* stream) noexcept { return launch_update<Adam>(args, stream); }

const char* launch_adam_stochastic(const UpdateArgs& args, void* stream) noexcept {
    return launch_update<StochasticAdam, AtRandom>(args, stream);
}

}  // namespace deepcore
