// Owns running a test on every CPU variant that this processor has, and saying which.
// Knows nothing of the kernels.
#pragma once

#include <stdio.h>

#include "core/cpu_dispatch.h"

namespace deepcore_test {

template <class Test>
int for_each_variant(const Test& test) {
    int variants = 0;
    for (int index = 0; index < deepcore::kNumIsas; ++index) {
        const char* name = deepcore::isa_name(static_cast<deepcore::Isa>(index));
        if (!deepcore::choose_isa(name)) continue;
        printf("variant: %s\n", name);
        test(name);
        ++variants;
    }
    deepcore::choose_isa("best");
    return variants;
}

}  // namespace deepcore_test
