// Owns the formula of SGD for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory. Sources: Polyak 1964; Sutskever et al. 2013.
#pragma once

#include <math.h>

#include "sgd/sgd.h"

namespace deepcore {

template <class V>
struct SgdFactors {  // SgdScalars, spread over the lanes of V
    V grad_scale, decay, momentum, rest, lr;
};

struct Sgd {
    enum Column { kLr, kMomentum, kDampening, kNesterov, kWeightDecay, kColumns };  // as in reference/sgd.py
    enum Mode { kPlain, kFirst, kFirstNesterov, kLater, kLaterNesterov, kModes };
    static constexpr int kStates = 1, kForms = 2 * kModes;  // form = 2 * mode + (1 where there is decay)
    static constexpr bool kReadsGrads = true, kWritesStates = true, kNarrowStates = false;
    using Scalars = SgdScalars;
    template <class V>
    using Factors = SgdFactors<V>;

    DEEPCORE_FN constexpr int states(int form) { return form / 2 == kPlain ? 0 : 1; }

    // Momentum without its buffers cannot be refused where the table is on a GPU: what it would give is not a number.
    DEEPCORE_FN SgdScalars scalars(const double* row, double t, float grad_scale, int num_states) {
        const bool has_states = num_states > 0;
        const bool moves = row[kMomentum] != 0 && has_states, nesterov = row[kNesterov] != 0;
        const int mode = !moves ? kPlain : (t == 1 ? kFirst : kLater) + (nesterov ? 1 : 0);
        SgdScalars s;
        s.grad_scale = grad_scale;
        s.decay = static_cast<float>(row[kWeightDecay]);
        s.momentum = static_cast<float>(row[kMomentum]);
        s.rest = static_cast<float>(1 - row[kDampening]);
        s.lr = row[kMomentum] != 0 && !has_states ? NAN : static_cast<float>(row[kLr]);
        s.form = 2 * mode + (row[kWeightDecay] != 0 ? 1 : 0);
        return s;
    }

    template <class V>
    DEEPCORE_FN SgdFactors<V> spread(const SgdScalars& s) {
        SgdFactors<V> f;
        splat(s.grad_scale, f.grad_scale);
        splat(s.decay, f.decay);
        splat(s.momentum, f.momentum);
        splat(s.rest, f.rest);
        splat(s.lr, f.lr);
        return f;
    }

    // In fp32, in place. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&states)[kMaxStates], const SgdFactors<V>& f, Form form) {
        const int mode = form / 2;
        V& b = states[0];
        g = g * f.grad_scale;
        if (form % 2) g = g + p * f.decay;
        if (mode == kFirst || mode == kFirstNesterov) b = g;
        if (mode == kLater || mode == kLaterNesterov) b = b * f.momentum + g * f.rest;
        if (mode == kFirst || mode == kLater) g = b;
        if (mode == kFirstNesterov || mode == kLaterNesterov) g = g + b * f.momentum;
        p = p - g * f.lr;
    }
};

}  // namespace deepcore
