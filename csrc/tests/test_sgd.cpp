// Owns the check of the sgd kernels: every variant gives the bits of the formula for one element.
// Knows nothing of torch.
#include "sgd/sgd_math.h"
#include "update_check.h"

using namespace deepcore;

namespace {

constexpr double kRows[] = {1e-2, 0.9, 0.25, 1, 0.1, 3e-3, 0.8, 0.1, 0, 0};

void every_variant() {
    deepcore_test::variant_gives_the_bits_of_the_formula<Sgd>(kRows, DEEPCORE_PICK(sgd_prepare),
                                                              DEEPCORE_PICK(sgd_apply));
}

// With momentum 0.5 and gradients of 1 the buffer is 1, 1.5, 1.75: exact in fp32.
void momentum_adds_up() {
    const double row[] = {0.5, 0.5, 0, 0, 0};
    float p = 4, states[kMaxStates] = {};
    for (int t = 1; t <= 3; ++t) {
        const SgdScalars s = Sgd::scalars(row, t, 1, kMaxStates);
        Sgd::element(p, 1.0f, states, Sgd::spread<float>(s), s.form);
    }
    CHECK(states[0] == 1.75f && p == 4 - 0.5f * (1 + 1.5f + 1.75f));
    CHECK(isnan(Sgd::scalars(row, 1, 1, false).lr));
}

}  // namespace

int main() {
    momentum_adds_up();
    CHECK(deepcore_test::for_each_variant([](const char*) { every_variant(); }) > 0);
    return deepcore_test::result();
}
