// Owns the Adam and AdamW formula for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory. Sources: Kingma & Ba 2015; Loshchilov & Hutter 2019.
#pragma once

#include <math.h>

#include "adam/adam.h"

namespace deepcore {

// Columns of a hyperparameter row, as in deepcore/ops/reference/adam.py.
enum HyperColumn { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kBiasCorrection };

// t: this step's number, 1 at the first. fp64 throughout; each result is rounded to fp32 once.
DEEPCORE_FN AdamScalars adam_scalars(const double* row, double t, float grad_scale) {
    const double lr = row[kLr], decay = row[kWeightDecay];
    const bool correct = row[kBiasCorrection] != 0, decoupled = row[kDecoupled] != 0;
    const double unbias1 = correct ? 1 - pow(row[kBeta1], t) : 1.0;
    const double unbias2 = correct ? 1 / sqrt(1 - pow(row[kBeta2], t)) : 1.0;

    AdamScalars s;
    s.grad_scale = grad_scale;
    s.beta1 = static_cast<float>(row[kBeta1]);
    s.rest1 = static_cast<float>(1 - row[kBeta1]);
    s.beta2 = static_cast<float>(row[kBeta2]);
    s.rest2 = static_cast<float>(1 - row[kBeta2]);
    s.decay = static_cast<float>(decay);
    s.keep = decay != 0 && decoupled ? static_cast<float>(1 - lr * decay) : 1.0f;
    s.step_size = static_cast<float>(lr / unbias1);
    s.unbias2 = static_cast<float>(unbias2);
    s.eps = static_cast<float>(row[kEps]);
    s.enabled = 1;
    s.coupled = decay != 0 && !decoupled;
    return s;
}

// One segment of the prepare pass: advances its step count and writes its scalars.
DEEPCORE_FN void adam_prepare_segment(const AdamArgs& args, int64_t index) {
    if (*args.skip != 0 || args.active[index] == 0) {
        args.scalars[index].enabled = 0;
        return;
    }
    const float t = args.steps[index] + 1;
    args.steps[index] = t;
    const double* row = args.hyper + args.segments[index].hyper * kHyperColumns;
    args.scalars[index] = adam_scalars(row, t, *args.grad_scale);
}

template <class V>
struct AdamFactors {  // AdamScalars, spread over the lanes of V
    V grad_scale, beta1, rest1, beta2, rest2, decay, keep, step_size, unbias2, eps;
};

template <class V>
DEEPCORE_FN AdamFactors<V> adam_factors(const AdamScalars& s) {
    AdamFactors<V> f;
    splat(s.grad_scale, f.grad_scale);
    splat(s.beta1, f.beta1);
    splat(s.rest1, f.rest1);
    splat(s.beta2, f.beta2);
    splat(s.rest2, f.rest2);
    splat(s.decay, f.decay);
    splat(s.keep, f.keep);
    splat(s.step_size, f.step_size);
    splat(s.unbias2, f.unbias2);
    splat(s.eps, f.eps);
    return f;
}

// p, m, v in fp32, updated in place. Every operation rounds on its own: compile without contraction.
template <bool coupled, class V>
DEEPCORE_FN void adam_element(V& p, V g, V& m, V& v, const AdamFactors<V>& f) {
    g = g * f.grad_scale;
    if (coupled) g = g + p * f.decay;
    m = m * f.beta1 + g * f.rest1;
    v = v * f.beta2 + g * f.rest2 * g;
    p = p * f.keep;
    p = p - m / (root(v) * f.unbias2 + f.eps) * f.step_size;
}

}  // namespace deepcore
