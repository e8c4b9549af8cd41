// Owns how a CUDA launcher finds its block's segment, cuts its tensors into launches and reports an error.
// Knows nothing of any one kernel. Only for .cu files.
#pragma once

#include <cuda_runtime.h>

#include "core/blocks.h"

namespace deepcore {

static_assert(CUDART_VERSION >= 12010, "kernel parameters beyond 4 KB need CUDA 12.1 or newer");

// Null, or the runtime's text.
static inline const char* error_text(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Each launch passes its tensors' addresses by value, so that a captured graph needs no table in device memory.
// Calls launch(first tensor, number of tensors, first chunk, number of chunks) until an error; returns that.
template <class Launch>
static const char* for_each_batch(const int64_t* chunk_offsets, int64_t num_tensors, int64_t capacity,
                                  const Launch& launch) {
    for (int64_t first = 0; first < num_tensors; first += capacity) {
        const int64_t count = num_tensors - first < capacity ? num_tensors - first : capacity;
        const int64_t begin = chunk_offsets[first], chunks = chunk_offsets[first + count] - begin;
        if (chunks == 0) continue;
        launch(first, count, begin, static_cast<unsigned>(chunks));
        if (const char* text = error_text(cudaGetLastError())) return text;
    }
    return nullptr;
}

// The same segment for all threads of a block.
__device__ __forceinline__ int64_t block_segment(const Segment* segments, int64_t num_segments, int64_t chunk) {
    return find_segment_in_block(segments, num_segments, chunk,
                                 [](auto test) { return __syncthreads_count(test(threadIdx.x)); });
}

}  // namespace deepcore
