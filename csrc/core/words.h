// Owns words of 32 bits as random bits are made from: each in the lower half of 64, what the upper half holds left
// open. Knows nothing of vectors; simd.h gives the same bits, a word in each lane of 64.
#pragma once

#include "core/host_device.h"

namespace deepcore {

DEEPCORE_FN void splat(uint64_t value, uint64_t& x) { x = value; }
DEEPCORE_FN void count_from(uint64_t first, uint64_t& x) { x = first; }
DEEPCORE_FN uint64_t product(uint64_t a, uint32_t b) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b; }
DEEPCORE_FN uint64_t upper_half(uint64_t a) { return a >> 32; }
DEEPCORE_FN uint64_t joined(uint64_t low, uint64_t high) { return static_cast<uint32_t>(low) | high << 32; }
DEEPCORE_FN void store(uint64_t* to, uint64_t x) { *to = x; }

}  // namespace deepcore
