// Owns the check of the lion kernels: every variant gives the bits of the formula for one element.
// Knows nothing of torch.
#include "lion/lion_math.h"
#include "update_check.h"

using namespace deepcore;

namespace {

constexpr double kRows[] = {1e-3, 0.9, 0.99, 0.1, 3e-4, 0.8, 0.95, 0};

void every_variant() {
    deepcore_test::variant_gives_the_bits_of_the_formula<Lion>(kRows, DEEPCORE_PICK(lion_prepare),
                                                               DEEPCORE_PICK(lion_apply));
}

// Whatever the gradient's size, a step is lr long, and none where everything is zero.
void every_step_is_as_long_as_the_learning_rate() {
    const double row[] = {0.25, 0.9, 0.99, 0};
    const LionScalars s = Lion::scalars(row, 1, 1, kMaxStates);
    const float grads[] = {1e-30f, -7.0f, 0.0f}, expected[] = {1.75f, 2.25f, 2.0f};
    for (int k = 0; k < 3; ++k) {
        float p = 2, states[kMaxStates] = {};
        Lion::element(p, grads[k], states, Lion::spread<float>(s), s.form);
        CHECK(p == expected[k]);
    }
}

}  // namespace

int main() {
    every_step_is_as_long_as_the_learning_rate();
    CHECK(deepcore_test::for_each_variant([](const char*) { every_variant(); }) > 0);
    return deepcore_test::result();
}
