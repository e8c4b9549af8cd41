// Owns the C functions that name and choose the CPU variant: for status reports and for tests that try them all.
// Knows nothing of the kernels. Include in every CPU binding: the definitions are weak, so that one is kept.
#pragma once

#include "core/cpu_dispatch.h"

extern "C" {

// "scalar", "avx2", "avx512" or "neon".
__attribute__((weak, visibility("default"))) const char* deepcore_cpu_isa() {
    return deepcore::isa_name(deepcore::active_isa());
}

// 1, or 0 where this processor has no such variant. "best" undoes an earlier choice. Not for use while ops run.
__attribute__((weak, visibility("default"))) int deepcore_set_cpu_isa(const char* name) {
    return deepcore::choose_isa(name);
}

}  // extern "C"
