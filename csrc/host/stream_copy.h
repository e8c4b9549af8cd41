// Owns the copy of bytes that nobody reads soon. Knows nothing of what they are.
//
// An ordinary store first fetches the line that it overwrites. One past the caches does not: a third less traffic, and
// what the caches hold stays there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace deepcore {

inline void stream_copy(char* to, const char* from, int64_t nbytes) {
#if defined(__x86_64__)
    constexpr int64_t kLine = 64, kLeast = 16 << 10;  // bytes; less is copied as usual
    if (nbytes >= kLeast) {
        const int64_t first = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
        memcpy(to, from, static_cast<size_t>(first));
        to += first;
        from += first;
        nbytes -= first;
        for (; nbytes >= kLine; to += kLine, from += kLine, nbytes -= kLine) {
            const __m128i* source = reinterpret_cast<const __m128i*>(from);
            __m128i* target = reinterpret_cast<__m128i*>(to);
            const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
            const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
            _mm_stream_si128(target, a);
            _mm_stream_si128(target + 1, b);
            _mm_stream_si128(target + 2, c);
            _mm_stream_si128(target + 3, d);
        }
        _mm_sfence();  // what follows in this thread, and whoever waits for it, sees the bytes
    }
#endif
    memcpy(to, from, static_cast<size_t>(nbytes));
}

}  // namespace deepcore
