// Owns the CUDA kernels of the lion stem and their launcher.
// Knows nothing of tensors.
#include "core/update.cuh"
#include "lion/lion_math.h"

namespace deepcore {

const char* launch_lion(const UpdateArgs& args, void* stream) noexcept { return launch_update<Lion>(args, stream); }

}  // namespace deepcore
