// Owns the AVX-512 vector types. Include through simd.h.
// Knows nothing of the other instruction sets.
#pragma once

// GCC 11 and 12 take the undefined pass-through operand inside their own intrinsics for a mistake of ours.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace deepcore {
namespace DEEPCORE_ISA {

struct vec {
    __m512 value;
};

struct dvec {
    __m512d value;
};

DEEPCORE_FN vec operator+(vec a, vec b) { return {_mm512_add_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator-(vec a, vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator*(vec a, vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator/(vec a, vec b) { return {_mm512_div_ps(a.value, b.value)}; }
DEEPCORE_FN vec larger(vec a, vec b) { return {_mm512_max_ps(a.value, b.value)}; }
DEEPCORE_FN vec root(vec a) { return {_mm512_sqrt_ps(a.value)}; }
DEEPCORE_FN vec sign(vec a) {
    const __m512 one = _mm512_or_ps(_mm512_and_ps(a.value, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1.0f));
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, _mm512_setzero_ps(), _CMP_NEQ_OQ), one)};
}
DEEPCORE_FN void splat(float value, vec& x) { x.value = _mm512_set1_ps(value); }

DEEPCORE_FN __m256i load_halves(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

DEEPCORE_FN void load(const float* from, vec& x) { x.value = _mm512_loadu_ps(from); }
DEEPCORE_FN void load(const bf16* from, vec& x) {
    x.value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(from)), 16));
}
DEEPCORE_FN void load(const f16* from, vec& x) { x.value = _mm512_cvtph_ps(load_halves(from)); }

// Sixteen bf16 in one register. The AVX512-BF16 instruction is no substitute: it flushes subnormals.
DEEPCORE_FN __m256i to_bf16(vec x) {
    const __m512i bits = _mm512_castps_si512(x.value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x.value, x.value, _CMP_UNORD_Q);
    const __m512i upper = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(upper);
}
DEEPCORE_FN __m256i to_f16(vec x) { return _mm512_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

DEEPCORE_FN void store(float* to, vec x) { _mm512_storeu_ps(to, x.value); }
DEEPCORE_FN void store(bf16* to, vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }
DEEPCORE_FN void store(f16* to, vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_f16(x)); }

// Around the caches; `to` must be aligned to the bytes written. Fence before another thread may read.
DEEPCORE_FN void stream(float* to, vec x) { _mm512_stream_ps(to, x.value); }
DEEPCORE_FN void stream(bf16* to, vec x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }
DEEPCORE_FN void stream(f16* to, vec x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), to_f16(x)); }
DEEPCORE_FN void stream_fence() { _mm_sfence(); }

DEEPCORE_FN __m128i load_eight(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

DEEPCORE_FN void splat(double value, dvec& x) { x.value = _mm512_set1_pd(value); }
DEEPCORE_FN void load(const float* from, dvec& x) { x.value = _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
DEEPCORE_FN void load(const bf16* from, dvec& x) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight(from)), 16);
    x.value = _mm512_cvtps_pd(_mm256_castsi256_ps(bits));
}
DEEPCORE_FN void load(const f16* from, dvec& x) { x.value = _mm512_cvtps_pd(_mm256_cvtph_ps(load_eight(from))); }
DEEPCORE_FN void load(const double* from, dvec& x) { x.value = _mm512_loadu_pd(from); }
DEEPCORE_FN void store(double* to, dvec x) { _mm512_storeu_pd(to, x.value); }
// The square of a widened fp32 is exact in fp64, so fusing changes no bit.
DEEPCORE_FN void add_square(dvec& sum, dvec x) { sum.value = _mm512_fmadd_pd(x.value, x.value, sum.value); }

struct words {
    __m512i value;
};

DEEPCORE_FN words operator^(words a, words b) { return {_mm512_xor_si512(a.value, b.value)}; }
DEEPCORE_FN words product(words a, uint32_t b) { return {_mm512_mul_epu32(a.value, _mm512_set1_epi64(b))}; }
DEEPCORE_FN words upper_half(words a) { return {_mm512_srli_epi64(a.value, 32)}; }
DEEPCORE_FN words joined(words a, words b) {
    return {_mm512_mask_blend_epi32(0xaaaa, a.value, _mm512_slli_epi64(b.value, 32))};
}
DEEPCORE_FN void splat(uint64_t value, words& x) { x.value = _mm512_set1_epi64(static_cast<long long>(value)); }
DEEPCORE_FN void count_from(uint64_t first, words& x) {
    splat(first, x);
    x.value = _mm512_add_epi64(x.value, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
DEEPCORE_FN void store(uint64_t* to, words x) { _mm512_storeu_si512(to, x.value); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
