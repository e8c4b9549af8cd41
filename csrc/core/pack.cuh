// Owns the memory accesses of CUDA kernels: several elements in one instruction, 128 bits of them in fp32.
// Knows nothing of which elements.
#pragma once

#include "core/dtype.h"

namespace deepcore {

// Elements from or to an address aligned to all their bytes, widened to or rounded from fp32. Stores go through __stwb,
// which is the plain one: an assignment of a whole word the compiler sometimes splits into its elements.
__device__ __forceinline__ void load_floats(const float* from, float (&values)[4]) {
    const float4 word = *reinterpret_cast<const float4*>(from);
    values[0] = word.x, values[1] = word.y, values[2] = word.z, values[3] = word.w;
}

__device__ __forceinline__ void store_floats(float* to, const float (&values)[4]) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
}

// T: bf16 or f16, two of them in 32 bits, the first in the low half.
template <class T>
__device__ __forceinline__ void widen_pair(unsigned pair, float& first, float& second) {
    const T low = {static_cast<uint16_t>(pair)}, high = {static_cast<uint16_t>(pair >> 16)};
    load(&low, first);
    load(&high, second);
}

template <class T>
__device__ __forceinline__ unsigned narrow_pair(float first, float second) {
    T low, high;
    store(&low, first);
    store(&high, second);
    return low.bits | static_cast<unsigned>(high.bits) << 16;
}

template <class T>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[4]) {
    const uint2 word = *reinterpret_cast<const uint2*>(from);
    widen_pair<T>(word.x, values[0], values[1]);
    widen_pair<T>(word.y, values[2], values[3]);
}

template <class T>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[8]) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    widen_pair<T>(word.x, values[0], values[1]);
    widen_pair<T>(word.y, values[2], values[3]);
    widen_pair<T>(word.z, values[4], values[5]);
    widen_pair<T>(word.w, values[6], values[7]);
}

template <class T>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[4]) {
    const unsigned first = narrow_pair<T>(values[0], values[1]), second = narrow_pair<T>(values[2], values[3]);
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(first, second));
}

}  // namespace deepcore
