// Owns the CUDA kernels of the sgd stem and their launcher.
// Knows nothing of tensors.
#include "core/update.cuh"
#include "sgd/sgd_math.h"

namespace deepcore {

const char* launch_sgd(const UpdateArgs& args, void* stream) noexcept { return launch_update<Sgd>(args, stream); }

}  // namespace deepcore
