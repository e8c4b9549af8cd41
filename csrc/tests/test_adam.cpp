// Owns the check of the adam kernels: every variant gives the bits of the formula for one element.
// Knows nothing of torch.
#include <math.h>
#include <string.h>

#include <vector>

#include "adam/adam_math.h"
#include "check.h"
#include "variants.h"

using namespace deepcore;

namespace {

constexpr int64_t kNumel = kChunkNumel + 77;
constexpr double kRows[] = {1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1, 0, 3e-4, 0.8, 0.95, 1e-6, 0.01, 0, 0, 0};

struct State {
    std::vector<float> p = std::vector<float>(kNumel), g = p, m = p, v = p;
    std::vector<bf16> copy = std::vector<bf16>(kNumel);
};

State random_state() {
    deepcore_test::Random random;
    State state;
    for (int64_t i = 0; i < kNumel; ++i) {
        state.p[i] = random.uniform();
        state.g[i] = random.uniform() * 8;
        state.m[i] = random.uniform();
        state.v[i] = fabsf(random.uniform());
    }
    return state;
}

struct Run {  // three segments with a gap: decoupled decay, coupled decay, and one that is not active
    Segment segments[3] = {
        {0, 1, kChunkNumel + 5, 0, 0}, {0, kChunkNumel + 7, 50, 1, 2}, {0, kChunkNumel + 60, 9, 0, 3}};
    int64_t chunk_offsets[2] = {0, 4};
    float steps[3] = {0, 41, 7};
    uint8_t active[3] = {1, 1, 0};
    float grad_scale = 0.7f, skip = 0;
    AdamScalars scalars[3] = {};
    AdamTensor tensor = {};
    AdamArgs args = {};

    explicit Run(State& state) {
        tensor = {state.p.data(), state.g.data(), state.m.data(), state.v.data(), state.copy.data()};
        args = {DType::f32, DType::f32, DType::bf16, &tensor, 1,           chunk_offsets, segments,
                3,          kRows,      steps,       active,  &grad_scale, &skip,         scalars};
    }
};

State expected_state(const State& before) {
    State after = before;
    Run run(after);
    for (int64_t index = 0; index < 3; ++index) {
        if (!run.active[index]) continue;
        const Segment& segment = run.segments[index];
        const AdamScalars s = adam_scalars(kRows + segment.hyper * kHyperColumns, run.steps[index] + 1, run.grad_scale);
        const AdamFactors<float> factors = adam_factors<float>(s);
        for (int64_t i = segment.begin; i < segment.begin + segment.numel; ++i) {
            if (s.coupled) adam_element<true>(after.p[i], after.g[i], after.m[i], after.v[i], factors);
            if (!s.coupled) adam_element<false>(after.p[i], after.g[i], after.m[i], after.v[i], factors);
            store(&after.copy[i], after.p[i]);
        }
    }
    return after;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void variant_gives_the_bits_of_the_formula() {
    const State before = random_state(), expected = expected_state(before);
    for (int64_t step : {1, 4}) {
        State state = before;
        Run run(state);
        DEEPCORE_PICK(adam_prepare)(run.args, 0, 3);
        for (int64_t chunk = 0; chunk < 4; chunk += step) DEEPCORE_PICK(adam_apply)(run.args, chunk, chunk + step);
        CHECK(same(state.p, expected.p));
        CHECK(same(state.m, expected.m));
        CHECK(same(state.v, expected.v));
        CHECK(same(state.copy, expected.copy));
        CHECK(run.steps[0] == 1 && run.steps[1] == 42 && run.steps[2] == 7);
    }
    State state = before;
    Run run(state);
    run.skip = NAN;
    DEEPCORE_PICK(adam_prepare)(run.args, 0, 3);
    DEEPCORE_PICK(adam_apply)(run.args, 0, 4);
    CHECK(same(state.p, before.p) && run.steps[0] == 0);
}

// At the first step with bias correction m / unbias1 is g and sqrt(v) * unbias2 is |g|: the update is lr * sign(g).
void first_step_moves_by_the_learning_rate() {
    const double row[] = {0.25, 0.9, 0.999, 0, 0, 0, 1, 0};
    const AdamFactors<float> factors = adam_factors<float>(adam_scalars(row, 1, 1));
    for (float g : {1.0f, -3.0f, 1e-3f}) {
        float p = 2, m = 0, v = 0;
        adam_element<false>(p, g, m, v, factors);
        CHECK(fabsf(p - (2 - copysignf(0.25f, g))) < 1e-6f);
    }
}

}  // namespace

int main() {
    first_step_moves_by_the_learning_rate();
    CHECK(deepcore_test::for_each_variant([](const char*) { variant_gives_the_bits_of_the_formula(); }) > 0);
    return deepcore_test::result();
}
