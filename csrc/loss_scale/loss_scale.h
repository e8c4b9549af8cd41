// Owns the contract of the loss_scale stem: the arguments of its kernel and how to start it.
// Knows nothing of tensors; deepcore/ops/reference/loss_scale.py says what the operation means.
#pragma once

#include <stdint.h>

#include "core/cpu_dispatch.h"

namespace deepcore {

struct LossScaleArgs {
    float* state;       // (3,): scale, steps taken since the last skip, hysteresis left; on the device
    const float* skip;  // (1,), not 0 if the step was skipped; on the device
    float window, hysteresis;
    bool consecutive;  // hysteresis is refilled by every step taken
    float minimum;     // of the scale
};

DEEPCORE_FOR_EACH_ISA(void loss_scale_update(const LossScaleArgs& args) noexcept;)

// On a CUDA stream. Returns null, or the CUDA runtime's text for what went wrong.
const char* launch_loss_scale(const LossScaleArgs& args, void* stream) noexcept;

}  // namespace deepcore
