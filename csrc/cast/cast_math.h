// Owns the random bits of stochastic rounding, and the rounding, for CPU and CUDA alike.
// Knows nothing of memory. Source of Philox4x32-10: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
#pragma once

#include "cast/cast.h"
#include "core/words.h"

namespace deepcore {

// The ten rounds on a counter of four words, or on one in each lane; see core/words.h.
template <class Words>
DEEPCORE_FN void philox_rounds(uint64_t key, Words& a, Words& b, Words& c, Words& d) {
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const Words first = product(a, 0xd2511f53u), second = product(c, 0xcd9e8d57u);
        Words mixed0, mixed1;
        splat(key0, mixed0);
        splat(key1, mixed1);
        a = upper_half(second) ^ b ^ mixed0, b = second;
        c = upper_half(first) ^ d ^ mixed1, d = first;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
}

// Four words from a key and the two halves of a counter. Element i uses the 16 bits number i % 8, from the low ones of
// word 0 on, of the block with counter i / 8: the bits depend on nothing but the seed, the place, and what the upper
// half says. That is zero in a cast; in an update it is what `random_stream` gives.
DEEPCORE_FN void philox(uint64_t counter, uint64_t upper, uint64_t key, uint32_t& a, uint32_t& b, uint32_t& c,
                        uint32_t& d) {
    uint64_t words[4] = {counter, counter >> 32, upper, upper >> 32};
    philox_rounds(key, words[0], words[1], words[2], words[3]);
    a = static_cast<uint32_t>(words[0]), b = static_cast<uint32_t>(words[1]);
    c = static_cast<uint32_t>(words[2]), d = static_cast<uint32_t>(words[3]);
}

// Those of four elements from number `place` on, the first in the low 16 bits.
DEEPCORE_FN uint64_t random_bits(uint64_t place, uint64_t upper, uint64_t key) {
    uint32_t a, b, c, d;
    philox(place / 8, upper, key, a, b, c, d);
    uint64_t low = a | static_cast<uint64_t>(b) << 32, high = c | static_cast<uint64_t>(d) << 32;
    const int skip = static_cast<int>(place % 8) * 16;
    if (skip >= 64) low = high;
    if (skip > 64) {
        philox(place / 8 + 1, upper, key, a, b, c, d);
        high = a | static_cast<uint64_t>(b) << 32;
    }
    const int shift = skip % 64;
    return shift == 0 ? low : low >> shift | high << (64 - shift);
}

// Up with the probability that the dropped bits say, away from zero in that case: random is one of 2^16 equally likely
// numbers. Infinity stays; NaN is the quiet one, as when rounding to nearest.
DEEPCORE_FN uint16_t round_to_bfloat(uint32_t bits, uint32_t random) {
    const uint32_t rounded = (bits + random) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace deepcore
