// Owns the formulas of LAMB's two passes for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory. Source: You et al. 2020.
#pragma once

#include <math.h>

#include "lamb/lamb.h"

namespace deepcore {

template <class V>
struct LambFactors {  // LambScalars, spread over the lanes of V
    V grad_scale, beta1, rest1, beta2, rest2, unbias1, unbias2, eps, decay, step_size;
};

// The update that both passes compute, so that nobody has to store it. form 1: with decay.
template <class V, class Form>
DEEPCORE_FN V lamb_update(V p, V m, V v, const LambFactors<V>& f, Form form) {
    const V u = m * f.unbias1 / (root(v) * f.unbias2 + f.eps);
    if (form == 1) return u + p * f.decay;
    return u;
}

struct LambMoments {
    enum Column { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kBiasCorrection, kMinCoeff, kMaxCoeff, kColumns };
    static constexpr int kStates = 2, kForms = 2;
    using Scalars = LambScalars;
    template <class V>
    using Factors = LambFactors<V>;

    DEEPCORE_FN LambScalars scalars(const double* row, double t, float grad_scale, int) {
        const bool correct = row[kBiasCorrection] != 0;
        LambScalars s;
        s.grad_scale = grad_scale;
        s.beta1 = static_cast<float>(row[kBeta1]);
        s.rest1 = static_cast<float>(1 - row[kBeta1]);
        s.beta2 = static_cast<float>(row[kBeta2]);
        s.rest2 = static_cast<float>(1 - row[kBeta2]);
        s.unbias1 = static_cast<float>(correct ? 1 / (1 - pow(row[kBeta1], t)) : 1.0);
        s.unbias2 = static_cast<float>(correct ? 1 / sqrt(1 - pow(row[kBeta2], t)) : 1.0);
        s.eps = static_cast<float>(row[kEps]);
        s.decay = static_cast<float>(row[kWeightDecay]);
        s.step_size = 0;
        s.form = row[kWeightDecay] != 0 ? 1 : 0;
        return s;
    }

    template <class V>
    DEEPCORE_FN LambFactors<V> spread(const LambScalars& s) {
        LambFactors<V> f;
        splat(s.grad_scale, f.grad_scale);
        splat(s.beta1, f.beta1);
        splat(s.rest1, f.rest1);
        splat(s.beta2, f.beta2);
        splat(s.rest2, f.rest2);
        splat(s.unbias1, f.unbias1);
        splat(s.unbias2, f.unbias2);
        splat(s.eps, f.eps);
        splat(s.decay, f.decay);
        splat(s.step_size, f.step_size);
        return f;
    }

    // m and v in place; returns the update. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN V element(V p, V g, V& m, V& v, const LambFactors<V>& f, Form form) {
        g = g * f.grad_scale;
        m = m * f.beta1 + g * f.rest1;
        v = v * f.beta2 + g * f.rest2 * g;
        return lamb_update(p, m, v, f, form);
    }
};

struct LambApply {
    static constexpr int kStates = 2, kForms = 2;
    static constexpr bool kReadsGrads = false, kWritesStates = false, kNarrowStates = false;
    using Scalars = LambScalars;
    template <class V>
    using Factors = LambFactors<V>;

    DEEPCORE_FN constexpr int states(int) { return kStates; }

    template <class V>
    DEEPCORE_FN LambFactors<V> spread(const LambScalars& s) {
        return LambMoments::spread<V>(s);
    }

    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V, V (&states)[kMaxStates], const LambFactors<V>& f, Form form) {
        p = p - lamb_update(p, states[0], states[1], f, form) * f.step_size;
    }
};

// By how much a tensor trusts its update. row: of hyperparameters; squares: the sums over the weights and the update.
DEEPCORE_FN double lamb_trust_ratio(const double* row, const double* squares) {
    const double weights = sqrt(squares[0]), update = sqrt(squares[1]);
    if (!(weights > 0 && update > 0)) return 1;
    const double ratio = weights / update, least = row[LambMoments::kMinCoeff], most = row[LambMoments::kMaxCoeff];
    return ratio < least ? least : ratio > most ? most : ratio;
}

// One segment of the second pass: `steps` hold what the first pass has counted.
DEEPCORE_FN void prepare_lamb_apply(const LambApplyArgs& args, int64_t index) {
    LambScalars& scalars = static_cast<LambScalars*>(args.scalars)[index];
    scalars.form = kLeftAlone;
    if (*args.skip != 0 || args.active[index] == 0) return;
    const double* row = args.hyper + args.segments[index].hyper * LambMoments::kColumns;
    scalars = LambMoments::scalars(row, args.steps[index], 1, LambMoments::kStates);
    scalars.step_size = static_cast<float>(row[LambMoments::kLr] * lamb_trust_ratio(row, args.squares + 2 * index));
}

}  // namespace deepcore
