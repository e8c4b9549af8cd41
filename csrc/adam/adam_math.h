// Owns the formulas of Adam, AdamW and AMSGrad for one element, and the scalars that a segment needs, for CPU and CUDA
// alike. Knows nothing of memory. Sources: Kingma & Ba 2015; Loshchilov & Hutter 2019; Reddi, Kale & Kumar 2018.
#pragma once

#include <math.h>

#include "adam/adam.h"

namespace deepcore {

template <class V>
struct AdamFactors {  // AdamScalars, spread over the lanes of V
    V grad_scale, beta1, rest1, beta2, rest2, decay, keep, step_size, unbias2, eps;
};

struct Adam {
    // as in reference/adam.py
    enum Column { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kDecoupled, kBiasCorrection, kAmsgrad, kColumns };
    static constexpr int kStates = 3, kForms = 4;  // form = (2 where AMSGrad) + (1 where decay is coupled)
    static constexpr bool kReadsGrads = true, kWritesStates = true, kNarrowStates = true;
    using Scalars = AdamScalars;
    template <class V>
    using Factors = AdamFactors<V>;

    DEEPCORE_FN constexpr int states(int form) { return form / 2 ? 3 : 2; }

    // AMSGrad without its state cannot be refused where the table is on a GPU: what it would give is not a number.
    DEEPCORE_FN AdamScalars scalars(const double* row, double t, float grad_scale, int num_states) {
        const double lr = row[kLr], decay = row[kWeightDecay];
        const bool correct = row[kBiasCorrection] != 0, decoupled = row[kDecoupled] != 0;
        const bool amsgrad = row[kAmsgrad] != 0, possible = !amsgrad || num_states == kStates;
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
        s.step_size = possible ? static_cast<float>(lr / unbias1) : NAN;
        s.unbias2 = static_cast<float>(unbias2);
        s.eps = static_cast<float>(row[kEps]);
        s.form = (amsgrad && possible ? 2 : 0) + (decay != 0 && !decoupled ? 1 : 0);
        return s;
    }

    template <class V>
    DEEPCORE_FN AdamFactors<V> spread(const AdamScalars& s) {
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

    // In fp32, in place. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&states)[kMaxStates], const AdamFactors<V>& f, Form form) {
        V &m = states[0], &v = states[1], &largest = states[2];
        g = g * f.grad_scale;
        if (form % 2) g = g + p * f.decay;
        m = m * f.beta1 + g * f.rest1;
        v = v * f.beta2 + g * f.rest2 * g;
        if (form / 2) largest = larger(largest, v);
        p = p * f.keep;
        p = p - m / (root(form / 2 ? largest : v) * f.unbias2 + f.eps) * f.step_size;
    }
};

// The same formula; what it gives is stored rounded at random.
struct StochasticAdam : Adam {
    using Scalars = StochasticAdamScalars;

    DEEPCORE_FN Scalars scalars(const double* row, double t, float grad_scale, int num_states) {
        return {Adam::scalars(row, t, grad_scale, num_states), {}};
    }
};

}  // namespace deepcore
