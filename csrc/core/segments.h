// Owns the row format of a segment table and the arithmetic from a chunk to its elements.
// Knows nothing of who built the table; deepcore/ops/reference/segments.py says the same in Python.
#pragma once

#include "core/host_device.h"

namespace deepcore {

constexpr int64_t kChunkNumel = 16384;  // elements of one segment that one CPU task or CUDA block works on

struct Segment {
    int64_t tensor;       // index into the lists
    int64_t begin;        // first element in that tensor's memory
    int64_t numel;        // may be 0
    int64_t hyper;        // row of the hyperparameter table
    int64_t first_chunk;  // chunks of all rows before this one
};

struct Span {  // elements [begin, end) of a tensor's memory
    int64_t begin, end;
};

// The last row with first_chunk <= chunk. Empty rows before it share its first_chunk, so "last" skips them.
DEEPCORE_FN int64_t find_segment(const Segment* segments, int64_t num_segments, int64_t chunk) {
    int64_t low = 0, high = num_segments;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (segments[middle].first_chunk <= chunk) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

DEEPCORE_FN int64_t num_chunks(int64_t numel) { return (numel + kChunkNumel - 1) / kChunkNumel; }

DEEPCORE_FN Span chunk_span(const Segment& segment, int64_t chunk) {
    const int64_t begin = (chunk - segment.first_chunk) * kChunkNumel;
    const int64_t left = segment.numel - begin;
    return {segment.begin + begin, segment.begin + begin + (left < kChunkNumel ? left : kChunkNumel)};
}

// Calls visit(segment index, chunk, span) for every chunk of [begin, end), in order.
DEEPCORE_CALLS_BACK
template <class Visit>
DEEPCORE_FN void for_each_chunk(const Segment* segments, int64_t num_segments, int64_t begin, int64_t end,
                                const Visit& visit) {
    if (begin >= end) return;
    int64_t row = find_segment(segments, num_segments, begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= segments[row].first_chunk + num_chunks(segments[row].numel)) ++row;
        visit(row, chunk, chunk_span(segments[row], chunk));
    }
}

}  // namespace deepcore
