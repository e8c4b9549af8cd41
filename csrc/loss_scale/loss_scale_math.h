// Owns one transition of the dynamic loss scaler, for CPU and CUDA alike.
// Knows nothing of gradients. Source: Micikevicius et al. 2018, section 3.2.
#pragma once

#include <math.h>

#include "core/host_device.h"
#include "loss_scale/loss_scale.h"

namespace deepcore {

DEEPCORE_FN void advance_loss_scale(const LossScaleArgs& args) {
    enum { kScale, kGoodSteps, kHysteresis };
    float* const state = args.state;
    const float scale = state[kScale], left = state[kHysteresis];
    if (*args.skip != 0) {
        state[kGoodSteps] = 0;
        if (left <= 1) {
            const float half = scale / 2;
            state[kScale] = half < args.minimum ? args.minimum : half;
        } else {
            state[kHysteresis] = left - 1;
        }
        return;
    }
    const float counted = state[kGoodSteps] + 1, grown = scale * 2;
    const bool grows = fmodf(counted, args.window) == 0;
    state[kGoodSteps] = counted;
    if (grows && grown - grown == 0) state[kScale] = grown;
    if (grows || args.consecutive) state[kHysteresis] = args.hysteresis;
}

}  // namespace deepcore
