// Owns the one assertion of the host tests: it counts what fails and says where.
// Knows nothing of what is tested.
#pragma once

#include <stdio.h>

namespace deepcore_test {

inline int& failures() {
    static int count = 0;
    return count;
}

inline bool check(bool holds, const char* text, const char* file, int line) {
    if (!holds && ++failures() <= 20) fprintf(stderr, "%s:%d: %s\n", file, line, text);
    return holds;
}

inline int result() { return failures() == 0 ? 0 : 1; }

// A small reproducible generator (Marsaglia's xorshift32) and numbers from it.
struct Random {
    unsigned state = 2463534242u;
    unsigned bits() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    }
    int below(int limit) { return static_cast<int>(bits() % static_cast<unsigned>(limit)); }
    float uniform() { return static_cast<float>(bits() >> 8) * 0x1p-24f * 2 - 1; }  // [-1, 1)
};

}  // namespace deepcore_test

#define CHECK(condition) deepcore_test::check(condition, #condition, __FILE__, __LINE__)
