// Owns the NEON vector types of 64-bit Arm. Include through simd.h.
// Knows nothing of the other instruction sets.
#pragma once

#include <arm_neon.h>

#include "core/dtype.h"

namespace deepcore {
namespace DEEPCORE_ISA {

struct vec {
    float32x4_t value;
};

struct dvec {
    float64x2_t value;
};

DEEPCORE_FN vec operator+(vec a, vec b) { return {vaddq_f32(a.value, b.value)}; }
DEEPCORE_FN vec operator-(vec a, vec b) { return {vsubq_f32(a.value, b.value)}; }
DEEPCORE_FN vec operator*(vec a, vec b) { return {vmulq_f32(a.value, b.value)}; }
DEEPCORE_FN vec operator/(vec a, vec b) { return {vdivq_f32(a.value, b.value)}; }
DEEPCORE_FN vec larger(vec a, vec b) { return {vbslq_f32(vcgtq_f32(a.value, b.value), a.value, b.value)}; }
DEEPCORE_FN vec root(vec a) { return {vsqrtq_f32(a.value)}; }
DEEPCORE_FN vec sign(vec a) {
    const float32x4_t zero = vdupq_n_f32(0), one = vdupq_n_f32(1);
    return {vbslq_f32(vcgtq_f32(a.value, zero), one, vbslq_f32(vcltq_f32(a.value, zero), vnegq_f32(one), zero))};
}
DEEPCORE_FN void splat(float value, vec& x) { x.value = vdupq_n_f32(value); }

DEEPCORE_FN uint16x4_t load_halves(const void* from) { return vld1_u16(static_cast<const uint16_t*>(from)); }

DEEPCORE_FN void load(const float* from, vec& x) { x.value = vld1q_f32(from); }
DEEPCORE_FN void load(const bf16* from, vec& x) {
    x.value = vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(load_halves(from)), 16));
}
DEEPCORE_FN void load(const f16* from, vec& x) { x.value = vcvt_f32_f16(vreinterpret_f16_u16(load_halves(from))); }

DEEPCORE_FN void store(float* to, vec x) { vst1q_f32(to, x.value); }
DEEPCORE_FN void store(bf16* to, vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(x.value, x.value);
    vst1_u16(&to->bits, vmovn_u32(vbslq_u32(number, vshrq_n_u32(rounded, 16), vdupq_n_u32(0x7fc0))));
}
DEEPCORE_FN void store(f16* to, vec x) { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(x.value))); }

template <class T>
DEEPCORE_FN void stream(T* to, vec x) {
    store(to, x);
}
DEEPCORE_FN void stream_fence() {}

DEEPCORE_FN void splat(double value, dvec& x) { x.value = vdupq_n_f64(value); }
DEEPCORE_FN void load(const float* from, dvec& x) { x.value = vcvt_f64_f32(vld1_f32(from)); }
template <class T>
DEEPCORE_FN void load(const T* from, dvec& x) {
    float pair[2];
    load(from, pair[0]);
    load(from + 1, pair[1]);
    load(pair, x);
}
DEEPCORE_FN void load(const double* from, dvec& x) { x.value = vld1q_f64(from); }
DEEPCORE_FN void store(double* to, dvec x) { vst1q_f64(to, x.value); }
// The square of a widened fp32 is exact in fp64, so fusing changes no bit.
DEEPCORE_FN void add_square(dvec& sum, dvec x) { sum.value = vfmaq_f64(sum.value, x.value, x.value); }

struct words {
    uint64x2_t value;
};

DEEPCORE_FN words operator^(words a, words b) { return {veorq_u64(a.value, b.value)}; }
DEEPCORE_FN words product(words a, uint32_t b) { return {vmull_u32(vmovn_u64(a.value), vdup_n_u32(b))}; }
DEEPCORE_FN words upper_half(words a) { return {vshrq_n_u64(a.value, 32)}; }
DEEPCORE_FN words joined(words a, words b) { return {vsliq_n_u64(a.value, b.value, 32)}; }
DEEPCORE_FN void splat(uint64_t value, words& x) { x.value = vdupq_n_u64(value); }
DEEPCORE_FN void count_from(uint64_t first, words& x) {
    x.value = vcombine_u64(vcreate_u64(first), vcreate_u64(first + 1));
}
DEEPCORE_FN void store(uint64_t* to, words x) { vst1q_u64(to, x.value); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
