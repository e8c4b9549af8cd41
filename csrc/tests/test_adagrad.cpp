// Owns the check of the adagrad kernels: every variant gives the bits of the formula for one element.
// Knows nothing of torch.
#include "adagrad/adagrad_math.h"
#include "update_check.h"

using namespace deepcore;

namespace {

constexpr double kRows[] = {1e-2, 0.1, 1e-10, 0.1, 3e-3, 0, 1e-6, 0};

void every_variant() {
    deepcore_test::variant_gives_the_bits_of_the_formula<Adagrad>(kRows, DEEPCORE_PICK(adagrad_prepare),
                                                                  DEEPCORE_PICK(adagrad_apply));
}

// Gradients of 3 and 4 make a sum of 9 and 25: the second step is 4 / 5 of its rate, which has halved.
void steps_shrink_with_the_sum() {
    const double row[] = {0.5, 1, 0, 0};
    float p = 2, states[kMaxStates] = {};
    for (int t = 1; t <= 2; ++t) {
        const AdagradScalars s = Adagrad::scalars(row, t, 1, kMaxStates);
        Adagrad::element(p, t == 1 ? 3.0f : 4.0f, states, Adagrad::spread<float>(s), s.form);
    }
    CHECK(states[0] == 25 && p == 1.5f - 0.8f * 0.25f);
}

}  // namespace

int main() {
    steps_shrink_with_the_sum();
    CHECK(deepcore_test::for_each_variant([](const char*) { every_variant(); }) > 0);
    return deepcore_test::result();
}
