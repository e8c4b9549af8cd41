// Owns accesses of CUDA kernels to elements whose type is known at run time: one kernel serves all dtypes.
// Knows nothing of which elements. All threads of a launch see the same types, so that no branch here diverges;
// fetching and widening are apart, so that all loads of a thread are on their way before it waits for the first.
#pragma once

#include "core/blocks.h"
#include "core/pack.cuh"

namespace deepcore {

constexpr int kTypedPack = 4;  // elements per access: 128 bits of fp32

struct TypedPointer {  // dtype none: nothing is there
    void* memory;
    DType dtype;

    __device__ __forceinline__ int to_boundary() const {
        if (dtype == DType::f32) return elements_to_boundary<kTypedPack>(static_cast<const float*>(memory));
        return elements_to_boundary<kTypedPack>(static_cast<const bf16*>(memory));  // fp16 has the same size
    }
};

// The pointer to element `begin` of what starts at `memory`.
__device__ __forceinline__ TypedPointer typed(const void* memory, DType dtype, int64_t begin) {
    void* const base = const_cast<void*>(memory);
    if (dtype == DType::none) return {nullptr, dtype};
    if (dtype == DType::f32) return {static_cast<float*>(base) + begin, dtype};
    return {static_cast<bf16*>(base) + begin, dtype};
}

template <int width>
struct RawElements {
    unsigned words[width];  // fp32 in all of them; else two elements a word, or the single one
};

template <int width>
__device__ __forceinline__ RawElements<width> fetch(const TypedPointer& from, int i) {
    RawElements<width> raw = {};
    if constexpr (width == 1) {
        if (from.dtype == DType::f32) {
            raw.words[0] = static_cast<const unsigned*>(from.memory)[i];
        } else {
            raw.words[0] = static_cast<const uint16_t*>(from.memory)[i];
        }
    } else if (from.dtype == DType::f32) {
        const uint4 word = *reinterpret_cast<const uint4*>(static_cast<const float*>(from.memory) + i);
        raw.words[0] = word.x, raw.words[1] = word.y, raw.words[2] = word.z, raw.words[3] = word.w;
    } else {
        const uint2 word = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(from.memory) + i);
        raw.words[0] = word.x, raw.words[1] = word.y;
    }
    return raw;
}

template <class T>
__device__ __forceinline__ void widen_words(const unsigned (&words)[4], float (&values)[4]) {
    widen_pair<T>(words[0], values[0], values[1]);
    widen_pair<T>(words[1], values[2], values[3]);
}

template <class T>
__device__ __forceinline__ void widen_words(const unsigned (&words)[1], float (&values)[1]) {
    const T element = {static_cast<uint16_t>(words[0])};
    load(&element, values[0]);
}

template <int width>
__device__ __forceinline__ void widen(const RawElements<width>& raw, DType dtype, float (&values)[width]) {
    if (dtype == DType::bf16) {
        widen_words<bf16>(raw.words, values);
    } else if (dtype == DType::f16) {
        widen_words<f16>(raw.words, values);
    } else {
#pragma unroll
        for (int j = 0; j < width; ++j) values[j] = __uint_as_float(raw.words[j]);
    }
}

__device__ __forceinline__ void fetch(const float* from, float (&values)[4]) { load_floats(from, values); }
__device__ __forceinline__ void fetch(const float* from, float (&values)[1]) { values[0] = *from; }

template <class T>
__device__ __forceinline__ void keep(T* to, const float (&values)[4]) {
    store_floats(to, values);
}

template <class T>
__device__ __forceinline__ void keep(T* to, const float (&values)[1]) {
    store(to, values[0]);
}

template <int width>
__device__ __forceinline__ void keep(const TypedPointer& to, int i, const float (&values)[width]) {
    if (to.dtype == DType::f32) keep(static_cast<float*>(to.memory) + i, values);
    if (to.dtype == DType::bf16) keep(static_cast<bf16*>(to.memory) + i, values);
    if (to.dtype == DType::f16) keep(static_cast<f16*>(to.memory) + i, values);
}

}  // namespace deepcore
