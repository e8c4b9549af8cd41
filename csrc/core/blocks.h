// Owns the index arithmetic of CUDA blocks: which segment, which elements, how many at once.
// Knows nothing of CUDA, so that host tests can run every block and thread of it.
#pragma once

#include "core/segments.h"

namespace deepcore {

constexpr int kBlockThreads = 256;

// find_segment with all the threads of a block: each step divides the candidates by their number, so that 256 rows take
// one round trip to memory and 65,536 take two. count(test) gives the number of threads for which test(thread) holds.
DEEPCORE_CALLS_BACK
template <class Count>
DEEPCORE_FN int64_t find_segment_in_block(const Segment* segments, int64_t num_segments, int64_t chunk,
                                          const Count& count) {
    int64_t low = 0, size = num_segments;
    while (size > 1) {
        const int64_t step = (size + kBlockThreads - 1) / kBlockThreads;
        const int64_t below = count([=](int thread) {
            const int64_t offset = thread * step;
            return offset < size && segments[low + offset].first_chunk <= chunk;
        });
        const int64_t skipped = (below - 1) * step;  // row `low` always holds
        low += skipped;
        size = step < size - skipped ? step : size - skipped;
    }
    return low;
}

// Elements from `address` to the next boundary of `pack` elements; pack is a power of two.
template <int pack, class T>
DEEPCORE_FN int elements_to_boundary(const T* address) {
    return static_cast<int>(-(reinterpret_cast<uintptr_t>(address) / sizeof(T)) % pack);
}

// Cuts [0, numel) into single elements up to a boundary, whole packs, and the single elements left over.
// lead: elements to the boundary, the same for all pointers that are walked together, or -1 where they disagree:
// then everything is single. 32 bits: a block has at most kChunkNumel elements, and registers are dear.
struct Cut {
    int lead, packs;
};

DEEPCORE_FN Cut cut(int numel, int lead, int pack) {
    if (lead < 0 || lead >= numel) return {numel, 0};
    return {lead, (numel - lead) / pack};
}

// The part of one thread. packed(first element) and single(element) are called for what is this thread's.
DEEPCORE_CALLS_BACK
template <int pack, class Packed, class Single>
DEEPCORE_FN void for_each_pack(int numel, int lead, int thread, const Packed& packed, const Single& single) {
    const Cut parts = cut(numel, lead, pack);
    for (int i = thread; i < parts.packs; i += kBlockThreads) packed(parts.lead + i * pack);
    const int jump = parts.packs * pack;  // the single elements lie before and after the packs
    for (int i = thread; i < numel - jump; i += kBlockThreads) single(i < parts.lead ? i : i + jump);
}

}  // namespace deepcore
