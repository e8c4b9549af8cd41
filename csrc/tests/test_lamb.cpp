// Owns the check of the lamb kernels: every variant gives the bits of the formulas, and sums in the order that is
// promised. Knows nothing of torch.
#include "core/lanes.h"
#include "lamb/lamb_math.h"
#include "update_check.h"

using namespace deepcore;
using namespace deepcore_test;

namespace {

constexpr double kRows[] = {1e-2, 0.9, 0.999, 1e-6, 0.1, 1, 0, 10, 3e-3, 0.8, 0.95, 1e-8, 0, 0, 0, 10};
constexpr double kSquares[] = {1, 4, 9, 1, 0, 0};
constexpr double kRatios[] = {0.5, 3, 1};

void trust_ratio_keeps_its_bounds() {
    const double row[LambMoments::kColumns] = {1, 0, 0, 0, 0, 0, 0.5, 2};
    const double pairs[][2] = {{4, 4}, {0, 1}, {1, 0}, {NAN, 1}, {1, 1e6}, {1e6, 1}, {9, 4}};
    const double expected[] = {1, 1, 1, 1, 0.5, 2, 1.5};
    for (int i = 0; i < 7; ++i) CHECK(lamb_trust_ratio(row, pairs[i]) == expected[i]);
    const double unbounded[] = {INFINITY, INFINITY};
    CHECK(isnan(lamb_trust_ratio(row, unbounded)));
}

struct Expected {
    State moments, applied;
    double squares[6] = {};
};

// One segment with the formulas for one element, its squares summed lane by lane and chunk by chunk.
void expect_segment(const UpdateRun& run, int64_t index, Expected& expected) {
    const Segment& segment = run.segments[index];
    const double* row = kRows + segment.hyper * LambMoments::kColumns;
    LambScalars s = LambMoments::scalars(row, run.steps[index] + 1, run.grad_scale, kMaxStates);
    s.step_size = static_cast<float>(row[LambMoments::kLr] * kRatios[index]);
    const auto factors = LambMoments::spread<float>(s);
    State& now = expected.moments;
    for (int64_t begin = 0; begin < segment.numel; begin += kChunkNumel) {
        double weights[kLanes] = {}, updates[kLanes] = {};
        for (int64_t k = begin; k < segment.numel && k < begin + kChunkNumel; ++k) {
            const int64_t i = segment.begin + k;
            const float p = now.p[i];
            const double u = LambMoments::element(p, now.g[i], now.s0[i], now.s1[i], factors, s.form);
            weights[k % kLanes] += static_cast<double>(p) * p;
            updates[k % kLanes] += u * u;
            float states[kMaxStates] = {now.s0[i], now.s1[i], 0};
            LambApply::element(expected.applied.p[i], 0.0f, states, factors, s.form);
            store(&expected.applied.copy[i], expected.applied.p[i]);
        }
        expected.squares[2 * index] += fold_lanes(weights);
        expected.squares[2 * index + 1] += fold_lanes(updates);
    }
}

Expected expect(const State& before) {
    Expected expected = {before, before};
    UpdateRun run;
    for (int64_t index = 0; index < 2; ++index) expect_segment(run, index, expected);
    return expected;
}

void variant_gives_the_bits_of_the_formulas(const State& before) {
    const Expected expected = expect(before);
    for (int64_t step : {1, 4}) {
        State state = before;
        UpdateRun run;
        double partials[8], squares[6];
        const UpdateArgs common = run.args(state, kRows);
        LambMomentsArgs moments;
        static_cast<UpdateArgs&>(moments) = common;
        moments.partials = partials, moments.squares = squares;
        DEEPCORE_PICK(lamb_moments_prepare)(moments, 0, 3);
        for (int64_t chunk = 0; chunk < 4; chunk += step)
            DEEPCORE_PICK(lamb_moments_chunks)(moments, chunk, chunk + step);
        DEEPCORE_PICK(lamb_moments_finish)(moments);
        CHECK(state == expected.moments);
        CHECK(same_numbers(squares, expected.squares, 6));
        CHECK(run.steps[0] == 1 && run.steps[1] == 42 && run.steps[2] == 7);

        LambApplyArgs apply;
        static_cast<UpdateArgs&>(apply) = common;
        apply.squares = kSquares;
        DEEPCORE_PICK(lamb_apply_prepare)(apply, 0, 3);
        for (int64_t chunk = 0; chunk < 4; chunk += step) DEEPCORE_PICK(lamb_apply_chunks)(apply, chunk, chunk + step);
        CHECK(same(state.p, expected.applied.p) && same(state.copy, expected.applied.copy));
        CHECK(same(state.s0, expected.moments.s0) && run.steps[0] == 1);
    }
}

}  // namespace

int main() {
    trust_ratio_keeps_its_bounds();
    CHECK(for_each_variant([](const char*) {
              variant_gives_the_bits_of_the_formulas(random_state());
              variant_gives_the_bits_of_the_formulas(special_state());
          }) > 0);
    return result();
}
