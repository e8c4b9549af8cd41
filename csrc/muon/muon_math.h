// Owns the formulas of Muon's two passes for one element, and the scalars that a segment needs, for CPU and CUDA alike.
// Knows nothing of memory, nor of the matrix products between the passes. Source: Jordan et al. 2024.
#pragma once

#include "muon/muon.h"

namespace deepcore {

template <class V>
struct MuonFactors {  // MuonScalars, spread over the lanes of V
    V grad_scale, rest, keep, rate;
};

struct MuonMomentum {
    enum Column { kLr, kMomentum, kNesterov, kWeightDecay, kColumns = 8 };  // as in reference/muon.py
    static constexpr int kStates = 1, kForms = 2;                           // form 1: looks ahead
    static constexpr bool kReadsGrads = true, kWritesStates = true, kNarrowStates = false;
    using Scalars = MuonScalars;
    template <class V>
    using Factors = MuonFactors<V>;

    DEEPCORE_FN constexpr int states(int) { return kStates; }

    DEEPCORE_FN MuonScalars scalars(const double* row, double, float grad_scale, int) {
        MuonScalars s;
        s.grad_scale = grad_scale;
        s.rest = static_cast<float>(1 - row[kMomentum]);
        s.keep = static_cast<float>(1 - row[kLr] * row[kWeightDecay]);
        s.rate = 0;
        s.form = row[kNesterov] != 0 ? 1 : 0;
        return s;
    }

    template <class V>
    DEEPCORE_FN MuonFactors<V> spread(const MuonScalars& s) {
        MuonFactors<V> f;
        splat(s.grad_scale, f.grad_scale);
        splat(s.rest, f.rest);
        splat(s.keep, f.keep);
        splat(s.rate, f.rate);
        return f;
    }

    // p receives what is to be orthogonalised. Every operation rounds on its own: compile without contraction.
    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&states)[kMaxStates], const MuonFactors<V>& f, Form form) {
        V& m = states[0];
        g = g * f.grad_scale;
        m = m + (g - m) * f.rest;
        p = m;
        if (form == 1) p = m + (g - m) * f.rest;
    }
};

// The gradient is the orthogonalised matrix.
struct MuonApply {
    static constexpr int kStates = 1, kForms = 1;
    static constexpr bool kReadsGrads = true, kWritesStates = false, kNarrowStates = false;
    using Scalars = MuonScalars;
    template <class V>
    using Factors = MuonFactors<V>;

    DEEPCORE_FN constexpr int states(int) { return 0; }

    template <class V>
    DEEPCORE_FN MuonFactors<V> spread(const MuonScalars& s) {
        return MuonMomentum::spread<V>(s);
    }

    template <class V, class Form>
    DEEPCORE_FN void element(V& p, V g, V (&)[kMaxStates], const MuonFactors<V>& f, Form) {
        p = p * f.keep;
        p = p - g * f.rate;
    }
};

// One segment of the second pass: the first has counted the step.
DEEPCORE_FN void prepare_muon_apply(const MuonApplyArgs& args, int64_t index) {
    MuonScalars& scalars = static_cast<MuonScalars*>(args.scalars)[index];
    scalars.form = kLeftAlone;
    if (*args.skip != 0 || args.active[index] == 0) return;
    const double* row = args.hyper + args.segments[index].hyper * MuonMomentum::kColumns;
    scalars = MuonMomentum::scalars(row, 0, 1, 0);
    scalars.rate = static_cast<float>(row[MuonMomentum::kLr] * args.ratios[index]);
    scalars.form = 0;
}

}  // namespace deepcore
