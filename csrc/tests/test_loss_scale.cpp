// Owns the check of the loss scaler's state machine: growth, hysteresis, minimum.
// Knows nothing of torch.
#include <math.h>

#include "check.h"
#include "loss_scale/loss_scale_math.h"
#include "variants.h"

using namespace deepcore;

namespace {

struct Machine {
    float state[3] = {8, 0, 2};
    float skip = 0;
    LossScaleArgs args = {state, &skip, 2, 2, false, 1};

    bool after(bool skipped, float scale, float good, float left) {
        skip = skipped ? NAN : 0;  // anything but 0 is a skip
        DEEPCORE_PICK(loss_scale_update)(args);
        return state[0] == scale && state[1] == good && state[2] == left;
    }
};

void a_history() {
    Machine machine;
    CHECK(machine.after(true, 8, 0, 1));   // hysteresis absorbs the first
    CHECK(machine.after(true, 4, 0, 1));   // the second halves
    CHECK(machine.after(false, 4, 1, 1));  // nothing refills before growth
    CHECK(machine.after(false, 8, 2, 2));  // which comes after two in a row
    machine.args.consecutive = true;
    CHECK(machine.after(true, 8, 0, 1));
    CHECK(machine.after(false, 8, 1, 2));  // now every step taken refills
    machine.state[0] = 1.5f, machine.state[2] = 1;
    CHECK(machine.after(true, 1, 0, 1));  // not below the minimum
    machine.state[0] = 3e38f, machine.state[1] = 1;
    CHECK(machine.after(false, 3e38f, 2, 2));  // not to infinity
}

}  // namespace

int main() {
    CHECK(deepcore_test::for_each_variant([](const char*) { a_history(); }) > 0);
    return deepcore_test::result();
}
