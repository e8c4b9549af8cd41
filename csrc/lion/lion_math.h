// Owns the formula of Lion for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory. Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms".
#pragma once

#include "lion/lion.h"

namespace deepcore {

template <class V>
struct LionFactors {  // LionScalars, spread over the lanes of V
    V grad_scale, beta1, rest1, beta2, rest2, keep, lr;
};

struct Lion {
    enum Column { kLr, kBeta1, kBeta2, kWeightDecay, kColumns };  // as in reference/lion.py
    static constexpr int kStates = 1, kForms = 1;
    static constexpr bool kReadsGrads = true, kWritesStates = true, kNarrowStates = false;
    using Scalars = LionScalars;
    template <class V>
    using Factors = LionFactors<V>;

    DEEPCORE_FN constexpr int states(int) { return kStates; }

    DEEPCORE_FN LionScalars scalars(const double* row, double, float grad_scale, int) {
        LionScalars s;
        s.grad_scale = grad_scale;
        s.beta1 = static_cast<float>(row[kBeta1]);
        s.rest1 = static_cast<float>(1 - row[kBeta1]);
        s.beta2 = static_cast<float>(row[kBeta2]);
        s.rest2 = static_cast<float>(1 - row[kBeta2]);
        s.keep = row[kWeightDecay] != 0 ? static_cast<float>(1 - row[kLr] * row[kWeightDecay]) : 1.0f;
        s.lr = static_cast<float>(row[kLr]);
        s.form = 0;
        return s;
    }

    template <class V>
    DEEPCORE_FN LionFactors<V> spread(const LionScalars& s) {
        LionFactors<V> f;
        splat(s.grad_scale, f.grad_scale);
        splat(s.beta1, f.beta1);
        splat(s.rest1, f.rest1);
        splat(s.beta2, f.beta2);
        splat(s.rest2, f.rest2);
        splat(s.keep, f.keep);
        splat(s.lr, f.lr);
        return f;
    }

    // In fp32, in place. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&states)[kMaxStates], const LionFactors<V>& f, Form) {
        V& m = states[0];
        g = g * f.grad_scale;
        const V c = m * f.beta1 + g * f.rest1;
        p = p * f.keep;
        p = p - sign(c) * f.lr;
        m = m * f.beta2 + g * f.rest2;
    }
};

}  // namespace deepcore
