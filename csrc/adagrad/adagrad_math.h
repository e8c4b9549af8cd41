// Owns the formula of Adagrad for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory. Source: Duchi, Hazan & Singer 2011, in its diagonal form.
#pragma once

#include "adagrad/adagrad.h"

namespace deepcore {

template <class V>
struct AdagradFactors {  // AdagradScalars, spread over the lanes of V
    V grad_scale, decay, step_size, eps;
};

struct Adagrad {
    enum Column { kLr, kLrDecay, kEps, kWeightDecay, kColumns };  // as in reference/adagrad.py
    static constexpr int kStates = 1, kForms = 2;                 // form 1: with decay
    static constexpr bool kReadsGrads = true, kWritesStates = true, kNarrowStates = false;
    using Scalars = AdagradScalars;
    template <class V>
    using Factors = AdagradFactors<V>;

    DEEPCORE_FN constexpr int states(int) { return kStates; }

    DEEPCORE_FN AdagradScalars scalars(const double* row, double t, float grad_scale, int) {
        AdagradScalars s;
        s.grad_scale = grad_scale;
        s.decay = static_cast<float>(row[kWeightDecay]);
        s.step_size = static_cast<float>(row[kLr] / (1 + (t - 1) * row[kLrDecay]));
        s.eps = static_cast<float>(row[kEps]);
        s.form = row[kWeightDecay] != 0 ? 1 : 0;
        return s;
    }

    template <class V>
    DEEPCORE_FN AdagradFactors<V> spread(const AdagradScalars& s) {
        AdagradFactors<V> f;
        splat(s.grad_scale, f.grad_scale);
        splat(s.decay, f.decay);
        splat(s.step_size, f.step_size);
        splat(s.eps, f.eps);
        return f;
    }

    // In fp32, in place. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&states)[kMaxStates], const AdagradFactors<V>& f, Form form) {
        V& sum = states[0];
        g = g * f.grad_scale;
        if (form == 1) g = g + p * f.decay;
        sum = sum + g * g;
        p = p - g / (root(sum) + f.eps) * f.step_size;
    }
};

}  // namespace deepcore
