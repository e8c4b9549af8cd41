// Owns the conversion of a run of elements to and from fp32 on a CPU; compiled once per instruction set.
// Knows nothing of why. Rounds to nearest even.
#pragma once

#include "core/simd.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

template <class From, class To>
void convert(const From* from, To* to, int64_t numel) {
    int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) {
        vec x;
        load(from + i, x);
        store(to + i, x);
    }
    for (; i < numel; ++i) {
        float x;
        load(from + i, x);
        store(to + i, x);
    }
}

DEEPCORE_FN int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// dtype: bf16 or f16; begin: the first element.
DEEPCORE_FN void widen(const void* from, DType dtype, int64_t begin, float* to, int64_t numel) {
    if (dtype == DType::bf16) convert(static_cast<const bf16*>(from) + begin, to, numel);
    if (dtype == DType::f16) convert(static_cast<const f16*>(from) + begin, to, numel);
}

DEEPCORE_FN void narrow(const float* from, void* to, DType dtype, int64_t begin, int64_t numel) {
    if (dtype == DType::bf16) convert(from, static_cast<bf16*>(to) + begin, numel);
    if (dtype == DType::f16) convert(from, static_cast<f16*>(to) + begin, numel);
}

}  // namespace

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
