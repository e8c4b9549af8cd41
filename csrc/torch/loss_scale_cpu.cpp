// Owns the CPU binding of loss_scale_update_: checks, runs the kernel.
// Knows nothing of the state machine.
#include "torch/direct.h"
#include "torch/isa.h"
#include "torch/loss_scale_args.h"

namespace {

using namespace deepcore;
using namespace deepcore::binding;

void loss_scale_update_(const Tensor& state, const Tensor& skip, int64_t window, int64_t hysteresis, bool consecutive,
                        double minimum) {
    const LossScaleArgs args = loss_scale_args(state, skip, window, hysteresis, consecutive, minimum, cpu_device());
    DEEPCORE_PICK(loss_scale_update)(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepcore, CPU, m) { serve<&loss_scale_update_>(m, "loss_scale_update_"); }
