// Owns the AVX2 vector types (with FMA and F16C). Include through simd.h.
// Knows nothing of the other instruction sets.
#pragma once

#include <immintrin.h>

#include "core/dtype.h"

namespace deepcore {
namespace DEEPCORE_ISA {

struct vec {
    __m256 value;
};

struct dvec {
    __m256d value;
};

DEEPCORE_FN vec operator+(vec a, vec b) { return {_mm256_add_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator-(vec a, vec b) { return {_mm256_sub_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator*(vec a, vec b) { return {_mm256_mul_ps(a.value, b.value)}; }
DEEPCORE_FN vec operator/(vec a, vec b) { return {_mm256_div_ps(a.value, b.value)}; }
DEEPCORE_FN vec larger(vec a, vec b) { return {_mm256_max_ps(a.value, b.value)}; }
DEEPCORE_FN vec root(vec a) { return {_mm256_sqrt_ps(a.value)}; }
DEEPCORE_FN vec sign(vec a) {
    const __m256 one = _mm256_or_ps(_mm256_and_ps(a.value, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return {_mm256_and_ps(one, _mm256_cmp_ps(a.value, _mm256_setzero_ps(), _CMP_NEQ_OQ))};
}
DEEPCORE_FN void splat(float value, vec& x) { x.value = _mm256_set1_ps(value); }

DEEPCORE_FN __m128i load_halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

DEEPCORE_FN void load(const float* from, vec& x) { x.value = _mm256_loadu_ps(from); }
DEEPCORE_FN void load(const bf16* from, vec& x) {
    x.value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(from)), 16));
}
DEEPCORE_FN void load(const f16* from, vec& x) { x.value = _mm256_cvtph_ps(load_halves(from)); }

DEEPCORE_FN __m128i to_bf16(vec x) {
    const __m256i bits = _mm256_castps_si256(x.value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.value, x.value, _CMP_UNORD_Q));
    const __m256i upper = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
DEEPCORE_FN __m128i to_f16(vec x) { return _mm256_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

DEEPCORE_FN void store(float* to, vec x) { _mm256_storeu_ps(to, x.value); }
DEEPCORE_FN void store(bf16* to, vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_bf16(x)); }
DEEPCORE_FN void store(f16* to, vec x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), to_f16(x)); }

// Around the caches; `to` must be aligned to the bytes written. Fence before another thread may read.
DEEPCORE_FN void stream(float* to, vec x) { _mm256_stream_ps(to, x.value); }
DEEPCORE_FN void stream(bf16* to, vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_bf16(x)); }
DEEPCORE_FN void stream(f16* to, vec x) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), to_f16(x)); }
DEEPCORE_FN void stream_fence() { _mm_sfence(); }

DEEPCORE_FN __m128i load_four(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

DEEPCORE_FN void splat(double value, dvec& x) { x.value = _mm256_set1_pd(value); }
DEEPCORE_FN void load(const float* from, dvec& x) { x.value = _mm256_cvtps_pd(_mm_loadu_ps(from)); }
DEEPCORE_FN void load(const f16* from, dvec& x) { x.value = _mm256_cvtps_pd(_mm_cvtph_ps(load_four(from))); }
DEEPCORE_FN void load(const double* from, dvec& x) { x.value = _mm256_loadu_pd(from); }
DEEPCORE_FN void store(double* to, dvec x) { _mm256_storeu_pd(to, x.value); }
// The square of a widened fp32 is exact in fp64, so fusing changes no bit.
DEEPCORE_FN void add_square(dvec& sum, dvec x) { sum.value = _mm256_fmadd_pd(x.value, x.value, sum.value); }

// As in simd.h, of 32 elements. A zero below a bf16 makes it an fp32. Widening that to fp64 takes a shuffle from a
// register and none from memory: half of it each way is a quarter faster than all of it one way.
DEEPCORE_FN void add_squares_of(const bf16* from, dvec (&sums)[8]) {
    alignas(32) float wide[16];  // of elements 0 to 3, 8 to 11, 4 to 7, 12 to 15
    const __m256i zeros = _mm256_setzero_si256(), bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_store_ps(wide, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zeros, bits)));
    _mm256_store_ps(wide + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zeros, bits)));
    asm("" : "+m"(wide));  // or the compiler would take it from the registers after all
    DEEPCORE_UNROLL
    for (int k = 4; k < 8; k += 2) {
        const __m128i half = load_halves(from + 4 * k), zero = _mm_setzero_si128();
        add_square(sums[k], {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(zero, half)))});
        add_square(sums[k + 1], {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpackhi_epi16(zero, half)))});
    }
    DEEPCORE_UNROLL
    for (int k = 0; k < 4; ++k) add_square(sums[k], {_mm256_cvtps_pd(_mm_load_ps(wide + k % 2 * 8 + k / 2 * 4))});
}

struct words {
    __m256i value;
};

DEEPCORE_FN words operator^(words a, words b) { return {_mm256_xor_si256(a.value, b.value)}; }
DEEPCORE_FN words product(words a, uint32_t b) { return {_mm256_mul_epu32(a.value, _mm256_set1_epi64x(b))}; }
DEEPCORE_FN words upper_half(words a) { return {_mm256_srli_epi64(a.value, 32)}; }
DEEPCORE_FN words joined(words a, words b) {
    return {_mm256_blend_epi32(a.value, _mm256_slli_epi64(b.value, 32), 0xaa)};
}
DEEPCORE_FN void splat(uint64_t value, words& x) { x.value = _mm256_set1_epi64x(static_cast<long long>(value)); }
DEEPCORE_FN void count_from(uint64_t first, words& x) {
    splat(first, x);
    x.value = _mm256_add_epi64(x.value, _mm256_set_epi64x(3, 2, 1, 0));
}
DEEPCORE_FN void store(uint64_t* to, words x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x.value); }

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
