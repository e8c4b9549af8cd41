// Owns the CUDA binding of loss_scale_update_: checks, launches on the current stream.
// Knows nothing of the state machine.
#include "torch/box.h"
#include "torch/cuda_stream.h"
#include "torch/loss_scale_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void loss_scale_update_(const Tensor& state, const Tensor& skip, int64_t window, int64_t hysteresis, bool consecutive,
                        double minimum) {
    const Device device = cuda_device_of("state", state);
    const LossScaleArgs args = loss_scale_args(state, skip, window, hysteresis, consecutive, minimum, device);
    launch_on(device, "loss_scale_update_", [&](void* stream) { return launch_loss_scale(args, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CUDA, m) { m.impl("loss_scale_update_", boxed<&loss_scale_update_>); }
