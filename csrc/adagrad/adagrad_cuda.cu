// Owns the CUDA kernels of the adagrad stem and their launcher.
// Knows nothing of tensors.
#include "adagrad/adagrad_math.h"
#include "core/update.cuh"

namespace deepcore {

const char* launch_adagrad(const UpdateArgs& args, void* stream) noexcept {
    return launch_update<Adagrad>(args, stream);
}

}  // namespace deepcore
