// Owns the arithmetic that cuts a list of copies into equal pieces of work.
// Knows nothing of element types.
#pragma once

#include "flatten/flatten.h"

namespace deepcore {

// The copy that holds element `index` of the copies laid end to end. Empty copies hold none.
DEEPCORE_FN int64_t find_copy(const Copy* copies, int64_t num_copies, int64_t index) {
    int64_t low = 0, high = num_copies;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (copies[middle].first <= index) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace deepcore
