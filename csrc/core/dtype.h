// Owns the element types of deepcore tensors and their exact conversions to and from fp32, one element at a time.
// Knows nothing of vectors; simd.h gives the same bits, many at a time.
#pragma once

#include <string.h>

#include "core/host_device.h"

namespace deepcore {

enum class DType : int32_t { f32, bf16, f16, none };

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

DEEPCORE_FN uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

DEEPCORE_FN float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// IEEE 754 binary16 to binary32, exact. Integers only where a subnormal is near: a flush-to-zero mode changes nothing.
DEEPCORE_FN float widen_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu, mantissa = half & 0x3ffu;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
    return float_of(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// binary32 to binary16, to nearest even; overflow gives infinity, NaN stays NaN.
DEEPCORE_FN uint16_t narrow_half(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
    if (magnitude < 0x38800000u) {  // below 2^-14: 0.5 has the spacing of half's subnormals, so the sum rounds for us
        return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

DEEPCORE_FN uint16_t narrow_bfloat(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

DEEPCORE_FN void load(const float* from, float& x) { x = *from; }
DEEPCORE_FN void load(const bf16* from, float& x) { x = float_of(static_cast<uint32_t>(from->bits) << 16); }
DEEPCORE_FN void store(float* to, float x) { *to = x; }

#ifdef __CUDA_ARCH__
DEEPCORE_FN void load(const f16* from, float& x) { asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(from->bits)); }
#if __CUDA_ARCH__ >= 800
DEEPCORE_FN void store(bf16* to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
#else
DEEPCORE_FN void store(bf16* to, float x) { to->bits = narrow_bfloat(x); }
#endif
DEEPCORE_FN void store(f16* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
#else
DEEPCORE_FN void load(const f16* from, float& x) { x = widen_half(from->bits); }
DEEPCORE_FN void store(bf16* to, float x) { to->bits = narrow_bfloat(x); }
DEEPCORE_FN void store(f16* to, float x) { to->bits = narrow_half(x); }
#endif

DEEPCORE_FN void splat(float value, float& x) { x = value; }
DEEPCORE_FN float root(float x) { return __builtin_sqrtf(x); }
DEEPCORE_FN float larger(float a, float b) { return a > b ? a : b; }  // b where either is NaN, or both are zero
DEEPCORE_FN float sign(float x) { return static_cast<float>((x > 0) - (x < 0)); }  // 0 for NaN

DEEPCORE_FN void load(const float* from, double& x) { x = *from; }
DEEPCORE_FN void load(const double* from, double& x) { x = *from; }
DEEPCORE_FN void splat(double value, double& x) { x = value; }
template <class T>
DEEPCORE_FN void load(const T* from, double& x) {
    float narrow;
    load(from, narrow);
    x = narrow;
}

}  // namespace deepcore
