// Owns the check of elementwise optimizer kernels: every variant gives the bits of the formula for one element.
// Knows nothing of any one formula.
#pragma once

#include <math.h>
#include <string.h>

#include <vector>

#include "check.h"
#include "core/update.h"
#include "variants.h"

namespace deepcore_test {

using namespace deepcore;

constexpr int64_t kNumel = kChunkNumel + 77;

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// NaN is NaN: whose bits it has is left to the order in which a compiler puts the operands.
template <class T>
bool same_numbers(const T* a, const T* b, size_t numel) {
    for (size_t i = 0; i < numel; ++i) {
        if (memcmp(a + i, b + i, sizeof(T)) != 0 && !(isnan(a[i]) && isnan(b[i]))) return false;
    }
    return true;
}

inline bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return same_numbers(a.data(), b.data(), a.size());
}

struct State {
    std::vector<float> p = std::vector<float>(kNumel), g = p, s0 = p, s1 = p, s2 = p;
    std::vector<bf16> copy = std::vector<bf16>(kNumel);
    bool operator==(const State& other) const {
        return same(p, other.p) && same(s0, other.s0) && same(s1, other.s1) && same(s2, other.s2) &&
               same(copy, other.copy);
    }
};

// states are not negative, as those under a square root are
inline State random_state() {
    Random random;
    State state;
    for (int64_t i = 0; i < kNumel; ++i) {
        state.p[i] = random.uniform();
        state.g[i] = random.uniform() * 8;
        state.s0[i] = fabsf(random.uniform());
        state.s1[i] = fabsf(random.uniform());
        state.s2[i] = fabsf(random.uniform());
    }
    return state;
}

// The same with numbers that formulas seldom meet, where most lines of a vector have one.
inline State special_state() {
    constexpr float kSpecial[] = {0, -0.0f, 1e-40f, -1e-45f, 1e-30f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
    Random random;
    State state = random_state();
    for (std::vector<float>* values : {&state.p, &state.g, &state.s0, &state.s1, &state.s2}) {
        for (float& value : *values) {
            if (random.below(16) == 0) value = kSpecial[random.below(10)];
        }
    }
    return state;
}

// Three segments with gaps: the first two with a hyperparameter row each, the last not active.
struct UpdateRun {
    Segment segments[3] = {
        {0, 1, kChunkNumel + 5, 0, 0}, {0, kChunkNumel + 7, 50, 1, 2}, {0, kChunkNumel + 60, 9, 0, 3}};
    int64_t chunk_offsets[2] = {0, 4};
    float steps[3] = {0, 41, 7};
    uint8_t active[3] = {1, 1, 0};
    float grad_scale = 0.7f, skip = 0;
    double scratch[64] = {};  // room for the scalars of any formula
    UpdateTensor tensors[3] = {};
    std::vector<float> grads[3];

    // apart: each segment's gradient is in memory of its own, addressed as if it were part of a longer one.
    UpdateArgs args(State& state, const double* rows, bool apart = false) {
        for (int row = 0; row < 3; ++row) {
            tensors[row] = {
                state.p.data(), state.g.data(), {state.s0.data(), state.s1.data(), state.s2.data()}, state.copy.data()};
            if (!apart) continue;
            const Segment& segment = segments[row];
            const auto first = state.g.begin() + segment.begin;
            grads[row].assign(first, first + segment.numel);
            tensors[row].grad = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(grads[row].data()) -
                                                              segment.begin * sizeof(float));
        }
        return {DType::f32, DType::f32, DType::f32, DType::bf16, tensors, 1,       chunk_offsets, segments, 3,
                rows,       steps,      active,     &grad_scale, &skip,   scratch, kMaxStates,    apart};
    }
};

template <class Formula>
State expected_state(const State& before, const double* rows) {
    State after = before;
    UpdateRun run;
    for (int64_t index = 0; index < 3; ++index) {
        if (!run.active[index]) continue;
        const Segment& segment = run.segments[index];
        const auto scalars = Formula::scalars(rows + segment.hyper * Formula::kColumns, run.steps[index] + 1,
                                              run.grad_scale, kMaxStates);
        const auto factors = Formula::template spread<float>(scalars);
        for (int64_t i = segment.begin; i < segment.begin + segment.numel; ++i) {
            float states[kMaxStates] = {after.s0[i], after.s1[i], after.s2[i]};
            Formula::element(after.p[i], after.g[i], states, factors, scalars.form);
            after.s0[i] = states[0], after.s1[i] = states[1], after.s2[i] = states[2];
            store(&after.copy[i], after.p[i]);
        }
    }
    return after;
}

// Chunks one by one; all at once, gradients apart; a skipped step.
template <class Formula, class Pass>
void variant_gives_the_bits_of_the_formula(const State& before, const double* rows, Pass prepare, Pass apply) {
    const State expected = expected_state<Formula>(before, rows);
    static_assert(sizeof(typename Formula::Scalars) * 3 <= sizeof(UpdateRun::scratch), "the scratch is too small");
    for (int64_t step : {1, 4}) {
        State state = before;
        UpdateRun run;
        const UpdateArgs args = run.args(state, rows, step == 4);
        prepare(args, 0, 3);
        for (int64_t chunk = 0; chunk < 4; chunk += step) apply(args, chunk, chunk + step);
        CHECK(state == expected);
        CHECK(run.steps[0] == 1 && run.steps[1] == 42 && run.steps[2] == 7);
    }
    State state = before;
    UpdateRun run;
    run.skip = NAN;
    const UpdateArgs args = run.args(state, rows);
    prepare(args, 0, 3);
    apply(args, 0, 4);
    CHECK(state == before && run.steps[0] == 0);
}

// The values in 16 bits, to which they are rounded themselves.
template <class T>
std::vector<T> narrowed(std::vector<float>& values) {
    std::vector<T> narrow(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
        store(&narrow[i], values[i]);
        load(&narrow[i], values[i]);
    }
    return narrow;
}

template <class T>
bool rounded(const std::vector<T>& narrow, std::vector<float> values) {
    std::vector<float> wide(narrow.size());
    for (size_t i = 0; i < narrow.size(); ++i) load(&narrow[i], wide[i]);
    narrowed<T>(values);
    return same(wide, values);
}

// Gradients of 16 bits, with parameters of 16 bits, or with a copy of those of fp32.
template <class Formula, class T, class Pass>
void variant_rounds(State before, const double* rows, DType dtype, Pass prepare, Pass apply) {
    const std::vector<T> grads = narrowed<T>(before.g), params = narrowed<T>(before.p);
    const State expected = expected_state<Formula>(before, rows);
    for (bool wide : {false, true}) {
        State state = before;
        std::vector<T> narrow = params;
        UpdateRun run;
        UpdateArgs args = run.args(state, rows);
        args.grad_dtype = dtype;
        run.tensors[0].grad = grads.data();
        args.param_dtype = wide ? DType::f32 : dtype;
        args.copy_dtype = wide ? dtype : DType::none;
        (wide ? run.tensors[0].copy : run.tensors[0].param) = narrow.data();
        prepare(args, 0, 3);
        apply(args, 0, 4);
        CHECK(rounded(narrow, expected.p) && same(state.p, wide ? expected.p : before.p));
        CHECK(same(state.s0, expected.s0) && same(state.s1, expected.s1) && same(state.s2, expected.s2));
    }
}

// prepare and apply: of the variant that is active.
template <class Formula, class Pass>
void variant_gives_the_bits_of_the_formula(const double* rows, Pass prepare, Pass apply) {
    for (const State& before : {random_state(), special_state()}) {
        variant_gives_the_bits_of_the_formula<Formula>(before, rows, prepare, apply);
        variant_rounds<Formula, bf16>(before, rows, DType::bf16, prepare, apply);
        variant_rounds<Formula, f16>(before, rows, DType::f16, prepare, apply);
    }
}

}  // namespace deepcore_test
