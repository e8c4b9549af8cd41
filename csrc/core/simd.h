// Owns the vector types of the CPU variants: `vec` of fp32, `dvec` of fp64 and `words`, as wide as DEEPCORE_ISA has
// them. Knows nothing of formulas. Every operation gives the bits that its scalar twin in dtype.h or words.h gives.
#pragma once

#include "core/dtype.h"
#include "core/words.h"

namespace deepcore {
namespace DEEPCORE_ISA {

using ::deepcore::count_from;
using ::deepcore::joined;
using ::deepcore::larger;
using ::deepcore::load;  // the scalar forms, which the overloads below would otherwise hide
using ::deepcore::product;
using ::deepcore::root;
using ::deepcore::sign;
using ::deepcore::splat;
using ::deepcore::store;
using ::deepcore::upper_half;

}  // namespace DEEPCORE_ISA
}  // namespace deepcore

#if defined(__AVX512F__)
#include "core/simd_avx512.h"
#elif defined(__AVX2__)
#include "core/simd_avx2.h"
#elif defined(__aarch64__)
#include "core/simd_neon.h"
#else

namespace deepcore {
namespace DEEPCORE_ISA {

using vec = float;
using dvec = double;
using words = uint64_t;

DEEPCORE_FN void add_square(double& sum, double x) { sum += x * x; }
DEEPCORE_FN void store(double* to, double x) { *to = x; }

template <class T>
DEEPCORE_FN void stream(T* to, vec x) {
    store(to, x);
}
DEEPCORE_FN void stream_fence() {}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore

#endif

namespace deepcore {
namespace DEEPCORE_ISA {

constexpr int64_t kWidth = sizeof(vec) / sizeof(float);

// Adds the squares of as many elements as `sums` have numbers, in order.
template <class T, int count>
DEEPCORE_FN void add_squares_of(const T* from, dvec (&sums)[count]) {
    DEEPCORE_UNROLL
    for (int k = 0; k < count; ++k) {
        dvec value;
        load(from + k * (sizeof(dvec) / sizeof(double)), value);
        add_square(sums[k], value);
    }
}

// Whether `stream` may write a whole vector there.
template <class To>
DEEPCORE_FN bool aligned(const To* to) {
    return reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(To)) == 0;
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
