// Owns the rounding at random of the parameters of an update on a GPU; include it in a *_cuda.cu only.
// Knows nothing of formulas.
#pragma once

#include "cast/cast_math.h"
#include "core/typed_pack.cuh"
#include "core/update.h"

namespace deepcore {

// How an update stores bf16 parameters: see ToNearest.
class AtRandom {
  public:
    static constexpr bool kBfloatAlone = true;
    __device__ __forceinline__ AtRandom(const RandomPlace& place, int64_t begin) : place_(place), begin_(begin) {}

    template <int width>
    __device__ __forceinline__ void operator()(const TypedPointer& to, int i, const float (&values)[width]) const {
        const auto place = static_cast<uint64_t>(begin_ + place_.shift + i);
        const uint64_t bits = random_bits(place, place_.stream, place_.seed);
        unsigned rounded[width];
#pragma unroll
        for (int j = 0; j < width; ++j) {
            rounded[j] = round_to_bfloat(__float_as_uint(values[j]), static_cast<uint32_t>(bits >> 16 * j) & 0xffffu);
        }
        uint16_t* const out = static_cast<uint16_t*>(to.memory) + i;
        if constexpr (width == 1) {
            *out = static_cast<uint16_t>(rounded[0]);
        } else {
            __stwb(reinterpret_cast<uint2*>(out),
                   make_uint2(rounded[0] | rounded[1] << 16, rounded[2] | rounded[3] << 16));
        }
    }

  private:
    const RandomPlace& place_;  // in memory until it is needed: its six registers would spill others
    const int64_t begin_;
};

}  // namespace deepcore
