// Owns how a sum of parts is divided, on CPU and CUDA alike: without a division wherever that changes no bit.
// Knows nothing of memory.
#pragma once

#include "bucket/bucket.h"

namespace deepcore {

// Division by a power of two, 1 among them, is multiplication by its reciprocal, bit for bit, as long as that is a
// normal number: both round the same real number once. Beside the memory, multiplication costs nothing; division does.
DEEPCORE_FN bool reciprocal_is_exact(float divisor) {
    const uint32_t exponent = (bits_of(divisor) >> 23) & 0xffu, mantissa = bits_of(divisor) & 0x7fffffu;
    return mantissa == 0 && exponent >= 1 && exponent <= 253;
}

DEEPCORE_FN void set_divisor(BucketArgs& args, float divisor) {
    args.divide = !reciprocal_is_exact(divisor);
    args.by = args.divide ? divisor : 1 / divisor;
}

}  // namespace deepcore
