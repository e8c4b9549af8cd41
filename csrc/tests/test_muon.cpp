// Owns the check of the muon kernels: every variant gives the bits of the formulas for one element.
// Knows nothing of torch or of matrices.
#include "muon/muon_math.h"
#include "update_check.h"

using namespace deepcore;
using namespace deepcore_test;

namespace {

constexpr double kRows[] = {0.02, 0.95, 1, 0.1, 0, 0, 0, 0, 3e-3, 0.8, 0, 0, 0, 0, 0, 0};
constexpr double kRatios[] = {1.75, 0.5, 1};

// The second pass over what the first two segments hold, gradients standing for orthogonalised matrices.
State expected_weights(const State& before) {
    State after = before;
    UpdateRun run;
    for (int64_t index = 0; index < 2; ++index) {
        const Segment& segment = run.segments[index];
        const double* row = kRows + segment.hyper * MuonMomentum::kColumns;
        const float keep = static_cast<float>(1 - row[MuonMomentum::kLr] * row[MuonMomentum::kWeightDecay]);
        const float rate = static_cast<float>(row[MuonMomentum::kLr] * kRatios[index]);
        for (int64_t i = segment.begin; i < segment.begin + segment.numel; ++i) {
            const float kept = after.p[i] * keep, moved = after.g[i] * rate;
            after.p[i] = kept - moved;
            store(&after.copy[i], after.p[i]);
        }
    }
    return after;
}

void every_variant() {
    variant_gives_the_bits_of_the_formula<MuonMomentum>(kRows, DEEPCORE_PICK(muon_momentum_prepare),
                                                        DEEPCORE_PICK(muon_momentum_chunks));
    const State before = random_state(), expected = expected_weights(before);
    for (float skip : {0.0f, 1.0f}) {
        State state = before;
        UpdateRun run;
        run.skip = skip;
        MuonApplyArgs args = {};
        static_cast<UpdateArgs&>(args) = run.args(state, kRows);
        args.ratios = kRatios;
        DEEPCORE_PICK(muon_apply_prepare)(args, 0, 3);
        for (int64_t chunk = 0; chunk < 4; ++chunk) DEEPCORE_PICK(muon_apply_chunks)(args, chunk, chunk + 1);
        CHECK(state == (skip == 0 ? expected : before));
        CHECK(run.steps[0] == 0 && run.steps[1] == 41);
    }
}

}  // namespace

int main() {
    CHECK(for_each_variant([](const char*) { every_variant(); }) > 0);
    return result();
}
