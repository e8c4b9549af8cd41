// Owns the check of the adam kernels: every variant gives the bits of the formula for one element.
// Knows nothing of torch.
#include "adam/adam_math.h"
#include "cast/cast_math.h"

#include "update_check.h"

using namespace deepcore;
using namespace deepcore_test;

namespace {

// Decoupled decay, and coupled decay without correction of the bias; then the same as AMSGrad.
constexpr double kRows[] = {1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1, 0, 3e-4, 0.8, 0.95, 1e-6, 0.01, 0, 0, 0};
constexpr double kLargest[] = {1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 1, 1, 3e-4, 0.8, 0.95, 1e-6, 0.01, 0, 0, 1};

void every_variant(const double* rows) {
    variant_gives_the_bits_of_the_formula<Adam>(rows, DEEPCORE_PICK(adam_prepare), DEEPCORE_PICK(adam_apply));
}

// Moments in bf16 are those of fp32, rounded; the parameters do not notice within one step.
void narrow_states_are_rounded() {
    State state = random_state(), expected;
    std::vector<bf16> narrow[3];
    std::vector<float>* const states[] = {&state.s0, &state.s1, &state.s2};
    for (int k = 0; k < 3; ++k) {
        narrow[k].resize(kNumel);
        for (int64_t i = 0; i < kNumel; ++i) {
            store(&narrow[k][i], (*states[k])[i]);
            load(&narrow[k][i], (*states[k])[i]);
        }
    }
    expected = expected_state<Adam>(state, kLargest);
    UpdateRun run;
    UpdateArgs args = run.args(state, kLargest);
    args.state_dtype = DType::bf16;
    for (int k = 0; k < 3; ++k) run.tensors[0].states[k] = narrow[k].data();
    DEEPCORE_PICK(adam_prepare)(args, 0, 3);
    DEEPCORE_PICK(adam_apply)(args, 0, 4);
    CHECK(same(state.p, expected.p) && same(state.copy, expected.copy));
    const std::vector<float>* const wanted[] = {&expected.s0, &expected.s1, &expected.s2};
    for (int k = 0; k < 3; ++k) {
        std::vector<bf16> rounded(kNumel);
        for (int64_t i = 0; i < kNumel; ++i) store(&rounded[i], (*wanted[k])[i]);
        CHECK(same(narrow[k], rounded));
    }
}

// Element i of a parameter adds the bits that its seed, number and step give to place i.
uint16_t rounded_at_place(float value, int64_t param, float t, int64_t i, int64_t seed) {
    uint32_t words[4];
    philox(static_cast<uint64_t>(i / 8), random_stream(param, t), static_cast<uint64_t>(seed), words[0], words[1],
           words[2], words[3]);
    return round_to_bfloat(bits_of(value), words[i % 8 / 2] >> (i % 2 * 16) & 0xffff);
}

void parameters_are_rounded_at_random() {
    State state = random_state();
    std::vector<bf16> params(kNumel);
    for (int64_t i = 0; i < kNumel; ++i) {
        store(&params[i], state.p[i]);
        load(&params[i], state.p[i]);
    }
    const State expected = expected_state<Adam>(state, kRows);
    std::vector<bf16> wanted = params;
    UpdateRun run;
    const int64_t seed = -5, origins[6] = {0xffffffff, 3, 7, (int64_t{1} << 40) + 5, 7, 0};
    for (int64_t row = 0; row < 2; ++row) {
        const Segment& segment = run.segments[row];
        for (int64_t k = 0; k < segment.numel; ++k) {
            wanted[segment.begin + k].bits = rounded_at_place(expected.p[segment.begin + k], origins[2 * row],
                                                              run.steps[row] + 1, origins[2 * row + 1] + k, seed);
        }
    }
    UpdateArgs args = run.args(state, kRows);
    args.param_dtype = DType::bf16;
    args.copy_dtype = DType::none;
    args.origins = origins;
    args.seed = &seed;
    run.tensors[0].param = params.data();
    DEEPCORE_PICK(adam_stochastic_prepare)(args, 0, 3);
    DEEPCORE_PICK(adam_stochastic_apply)(args, 0, 4);
    CHECK(same(params, wanted) && same(state.s0, expected.s0) && same(state.s1, expected.s1));
}

// At the first step with bias correction m / unbias1 is g and sqrt(v) * unbias2 is |g|: the update is lr * sign(g).
void first_step_moves_by_the_learning_rate() {
    const double row[] = {0.25, 0.9, 0.999, 0, 0, 0, 1, 0};
    const AdamScalars s = Adam::scalars(row, 1, 1, 2);
    for (float g : {1.0f, -3.0f, 1e-3f}) {
        float p = 2, states[kMaxStates] = {};
        Adam::element(p, g, states, Adam::spread<float>(s), s.form);
        CHECK(fabsf(p - (2 - copysignf(0.25f, g))) < 1e-6f);
    }
}

void without_its_state_amsgrad_gives_no_number() {
    CHECK(isnan(Adam::scalars(kLargest, 1, 1, 2).step_size) && !isnan(Adam::scalars(kLargest, 1, 1, 3).step_size));
}

}  // namespace

int main() {
    first_step_moves_by_the_learning_rate();
    without_its_state_amsgrad_gives_no_number();
    CHECK(for_each_variant([](const char*) {
              every_variant(kRows);
              every_variant(kLargest);
              narrow_states_are_rounded();
              parameters_are_rounded_at_random();
          }) > 0);
    return result();
}
