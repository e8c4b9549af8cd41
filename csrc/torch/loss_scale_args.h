// Owns the checks of loss_scale_update_'s arguments and their translation to LossScaleArgs, for CPU and CUDA alike.
// Knows nothing of how the kernel is started.
#pragma once

#include "loss_scale/loss_scale.h"
#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

inline LossScaleArgs loss_scale_args(const Tensor& state, const Tensor& skip, int64_t window, int64_t hysteresis,
                                     bool consecutive, double minimum, Device device) {
    if (window < 1) fail("window: got %lld, expected at least 1", (long long)window);
    if (hysteresis < 1) fail("hysteresis: got %lld, expected at least 1", (long long)hysteresis);
    LossScaleArgs args = {};
    args.state = table_of<float>("state", state, ScalarType::Float, {3}, device);
    args.skip = table_of<const float>("skip", skip, ScalarType::Float, {1}, device);
    args.window = static_cast<float>(window);
    args.hysteresis = static_cast<float>(hysteresis);
    args.consecutive = consecutive;
    args.minimum = static_cast<float>(minimum);
    return args;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
