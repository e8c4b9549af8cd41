// Owns the CUDA kernel of the loss_scale stem and its launcher.
// Knows nothing of tensors. Capturable: state and skip flag are read from device memory.
#include "core/launch.h"
#include "loss_scale/loss_scale_math.h"

namespace deepcore {
namespace {

__global__ void update_kernel(LossScaleArgs args) { advance_loss_scale(args); }

}  // namespace

const char* launch_loss_scale(const LossScaleArgs& args, void* stream) noexcept {
    update_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return error_text(cudaGetLastError());
}

}  // namespace deepcore
