// Owns the rounding at random of a run of elements on a CPU, for casts and updates; compiled once per instruction set.
// Knows nothing of where the elements come from. Its loops have a constant length and arrays of one word each: these
// the compiler turns into vectors.
#pragma once

#include "cast/cast_math.h"
#include "core/simd.h"
#include "core/update.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

// The 16 bits of each element of `numel / kCastBlock` blocks from `block` on.
template <int64_t numel>
DEEPCORE_FN void draw(uint64_t block, uint64_t upper, uint64_t key, uint16_t (&random)[numel]) {
    constexpr int64_t kBlocks = numel / kCastBlock, kLanes = sizeof(words) / sizeof(uint64_t);
    static_assert(kBlocks % kLanes == 0, "whole vectors");
    uint64_t low[kBlocks], high[kBlocks], both[2 * kBlocks];
    for (int64_t k = 0; k < kBlocks; k += kLanes) {
        words a, c;
        count_from(block + static_cast<uint64_t>(k), a);
        splat(upper, c);
        words b = upper_half(a), d = upper_half(c);
        philox_rounds(key, a, b, c, d);
        store(low + k, joined(a, b));
        store(high + k, joined(c, d));
    }
    for (int64_t k = 0; k < kBlocks; ++k) both[2 * k] = low[k], both[2 * k + 1] = high[k];
    memcpy(random, both, sizeof random);
}

// At most `most` elements; where it is that many, in a loop that the compiler turns into vectors.
template <int64_t most>
DEEPCORE_FN void round_run(const float* from, uint16_t* to, const uint16_t* random, int64_t numel) {
    if (numel == most) {
        for (int64_t k = 0; k < most; ++k) to[k] = round_to_bfloat(bits_of(from[k]), random[k]);
    } else {
        for (int64_t k = 0; k < numel; ++k) to[k] = round_to_bfloat(bits_of(from[k]), random[k]);
    }
}

// How an update stores bf16 parameters: see ToNearest.
class AtRandom {
  public:
    explicit AtRandom(const RandomPlace& place) : place_(place) {}

    int64_t lead(int64_t begin) const { return (begin + place_.shift) % kCastBlock; }

    template <int64_t most>
    void keep(const float (&from)[most], void* to, DType, int64_t begin, int64_t numel) const {
        uint16_t random[most];
        draw(static_cast<uint64_t>((begin + place_.shift) / kCastBlock), place_.stream, place_.seed, random);
        round_run<most>(from, static_cast<uint16_t*>(to) + begin, random + lead(begin), numel);
    }

  private:
    const RandomPlace place_;
};

}  // namespace

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
