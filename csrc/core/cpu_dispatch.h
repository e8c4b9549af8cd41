// Owns which variant of a CPU kernel runs: the best that this processor has, or the one that a test asks for.
// Knows nothing of the kernels; it reads no environment.
#pragma once

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace deepcore {

enum class Isa : int { scalar, avx2, avx512, neon };
constexpr int kNumIsas = 4;

#if defined(__x86_64__)
#define DEEPCORE_FOR_EACH_ISA(declarations) \
    namespace scalar {                      \
    declarations                            \
    }                                       \
    namespace avx2 {                        \
    declarations                            \
    }                                       \
    namespace avx512 {                      \
    declarations                            \
    }
#if defined(DEEPCORE_WITHOUT_AVX512)  // a build for one machine, which has none
#define DEEPCORE_PICK(function) \
    (::deepcore::active_isa() == ::deepcore::Isa::avx2 ? &avx2::function : &scalar::function)
#else
#define DEEPCORE_PICK(function)                                              \
    (::deepcore::active_isa() == ::deepcore::Isa::avx512 ? &avx512::function \
     : ::deepcore::active_isa() == ::deepcore::Isa::avx2 ? &avx2::function   \
                                                         : &scalar::function)
#endif
#elif defined(__aarch64__)
#define DEEPCORE_FOR_EACH_ISA(declarations) \
    namespace neon {                        \
    declarations                            \
    }
#define DEEPCORE_PICK(function) (&neon::function)
#else
#define DEEPCORE_FOR_EACH_ISA(declarations) \
    namespace scalar {                      \
    declarations                            \
    }
#define DEEPCORE_PICK(function) (&scalar::function)
#endif

inline const char* isa_name(Isa isa) {
    constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "neon"};
    return kNames[static_cast<int>(isa)];
}

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    __builtin_cpu_init();
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx2) return avx2;
#if defined(DEEPCORE_WITHOUT_AVX512)
    if (isa == Isa::avx512) return false;
#endif
    if (isa == Isa::avx512) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    return isa == Isa::scalar;
#elif defined(__aarch64__)
    return isa == Isa::neon;
#else
    return isa == Isa::scalar;
#endif
}

inline Isa best_isa() {
    if (isa_supported(Isa::neon)) return Isa::neon;
    if (isa_supported(Isa::avx512)) return Isa::avx512;
    return isa_supported(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

inline Isa& isa_slot() {
    static Isa isa = best_isa();
    return isa;
}

inline Isa active_isa() { return isa_slot(); }

// Chooses the variant by name, or the best one for "best". Returns false and changes nothing where this processor
// has no such variant.
inline bool choose_isa(const char* name) {
    if (strcmp(name, "best") == 0) {
        isa_slot() = best_isa();
        return true;
    }
    for (int index = 0; index < kNumIsas; ++index) {
        const Isa isa = static_cast<Isa>(index);
        if (strcmp(name, isa_name(isa)) == 0 && isa_supported(isa)) {
            isa_slot() = isa;
            return true;
        }
    }
    return false;
}

}  // namespace deepcore
