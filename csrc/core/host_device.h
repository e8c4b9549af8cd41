// Owns the qualifiers that let one function serve CPU variants, CUDA kernels and plain tests.
// Knows nothing of what the functions compute.
#pragma once

#include <stdint.h>

// Each *_cpu.cpp is compiled once per instruction set into one library. Whatever these headers define must therefore
// have internal linkage or live in namespace DEEPCORE_ISA: a shared inline function would let the linker keep the
// AVX-512 copy for everybody, an illegal instruction on older machines.
#ifdef __CUDACC__
#define DEEPCORE_FN static __host__ __device__ __forceinline__
#else
#define DEEPCORE_FN static inline __attribute__((always_inline))
#endif

// Before a loop over an array that is to live in registers: GCC keeps it in memory where it does not unroll the loop.
#define DEEPCORE_UNROLL _Pragma("GCC unroll 32")

// Before a template that calls what it is given: nvcc cannot know that a device lambda never meets the host version.
#ifdef __CUDACC__
#define DEEPCORE_CALLS_BACK _Pragma("nv_exec_check_disable")
#else
#define DEEPCORE_CALLS_BACK
#endif

#ifndef DEEPCORE_ISA
#ifdef __CUDACC__
#define DEEPCORE_ISA cuda
#else
#define DEEPCORE_ISA portable
#endif
#endif
