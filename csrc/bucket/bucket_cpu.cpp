// Owns the CPU kernels of the bucket stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of elements.
#include "bucket/bucket_math.h"
#include "core/convert.h"
#include "core/squares.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int kTogether = 4;      // vectors of each part that are read in a row
constexpr int64_t kPiece = 1024;  // elements that are squared before they leave the nearest cache

template <bool streaming, class V, class To>
DEEPCORE_FN void keep(To* to, V x) {
    if constexpr (streaming) {
        stream(to, x);
    } else {
        store(to, x);
    }
}

// `count` times as many elements as V holds, from `out` and `part` on. All parts are walked side by side: passing them
// one after the other over sums in the nearest cache is slower from three parts on. Unrolled, or the totals would live
// in memory.
template <bool divides, bool accumulates, class V, int count, bool streaming, class To, class From>
DEEPCORE_FN void sum(To* out, const From* part, int64_t num_parts, int64_t stride, V by) {
    constexpr int64_t kStep = sizeof(V) / sizeof(float);
    V totals[count], other;
    DEEPCORE_UNROLL
    for (int u = 0; u < count; ++u) load(part + u * kStep, totals[u]);
    for (int64_t k = 1; k < num_parts; ++k) {
        part += stride;
        DEEPCORE_UNROLL
        for (int u = 0; u < count; ++u) {
            load(part + u * kStep, other);
            totals[u] = totals[u] + other;
        }
    }
    DEEPCORE_UNROLL
    for (int u = 0; u < count; ++u) {
        totals[u] = divides ? totals[u] / by : totals[u] * by;
        if constexpr (accumulates) {
            load(out + u * kStep, other);
            totals[u] = other + totals[u];
        }
        keep<streaming>(out + u * kStep, totals[u]);
    }
}

template <bool divides, bool accumulates, class To, class From>
void sum_range(const BucketArgs& args, int64_t begin, int64_t end) {
    To* const out = static_cast<To*>(args.out);
    const From* const part = static_cast<const From*>(args.parts);
    constexpr int64_t kMany = kTogether * kWidth;
    const int64_t num_parts = args.num_parts, stride = args.numel;
    const float one_by = args.by;
    vec by;
    splat(one_by, by);
    const auto one_by_one = [&](int64_t first, int64_t last) {
        for (; first < last; ++first)
            sum<divides, accumulates, float, 1, false>(out + first, part + first, num_parts, stride, one_by);
    };
    int64_t i = begin;
    if (args.streaming) {
        while (i < end && !aligned(out + i)) ++i;
        one_by_one(begin, i);
        for (; i + kMany <= end; i += kMany) {
            sum<divides, accumulates, vec, kTogether, true>(out + i, part + i, num_parts, stride, by);
        }
    }
    for (; i + kMany <= end; i += kMany)
        sum<divides, accumulates, vec, kTogether, false>(out + i, part + i, num_parts, stride, by);
    one_by_one(i, end);
}

template <class To, class From>
void sum_range_as(const BucketArgs& args, int64_t begin, int64_t end) {
    if (args.divide) {
        args.accumulate ? sum_range<true, true, To, From>(args, begin, end)
                        : sum_range<true, false, To, From>(args, begin, end);
    } else {
        args.accumulate ? sum_range<false, true, To, From>(args, begin, end)
                        : sum_range<false, false, To, From>(args, begin, end);
    }
}

template <class To>
void sum_range_to(const BucketArgs& args, int64_t begin, int64_t end) {
    if (args.part_dtype == DType::f32) sum_range_as<To, float>(args, begin, end);
    if (args.part_dtype == DType::bf16) sum_range_as<To, bf16>(args, begin, end);
    if (args.part_dtype == DType::f16) sum_range_as<To, f16>(args, begin, end);
}

void any_range(const BucketArgs& args, int64_t begin, int64_t end) {
    if (args.out_dtype == DType::f32) sum_range_to<float>(args, begin, end);
    if (args.out_dtype == DType::bf16) sum_range_to<bf16>(args, begin, end);
    if (args.out_dtype == DType::f16) sum_range_to<f16>(args, begin, end);
}

template <class T>
void stream_copy(const T* from, T* to, int64_t numel) {
    int64_t i = 0;
    for (; i < numel && !aligned(to + i); ++i) to[i] = from[i];
    for (vec x; i + kWidth <= numel; i += kWidth) {
        load(from + i, x);
        stream(to + i, x);
    }
    for (; i < numel; ++i) to[i] = from[i];
}

// Elements [begin, end), a piece at a time. What goes around the caches is made in one of them first.
template <class To>
void sum_and_square(const BucketArgs& args, int64_t begin, int64_t end, double (&lanes)[kLanes]) {
    alignas(64) To made[kPiece];
    To* const out = static_cast<To*>(args.out);
    for (; begin < end; begin += kPiece) {
        const int64_t numel = begin + kPiece < end ? kPiece : end - begin;
        if (args.streaming) {
            BucketArgs piece = args;
            piece.out = made;
            piece.parts = static_cast<const char*>(args.parts) + begin * size_of(args.part_dtype);
            piece.streaming = false;
            any_range(piece, 0, numel);
            add_squares<0>(made, numel, lanes);
            stream_copy(made, out + begin, numel);
        } else {
            any_range(args, begin, begin + numel);
            add_squares<0>(out + begin, numel, lanes);
        }
    }
}

}  // namespace

void bucket_range(const BucketArgs& args, int64_t begin, int64_t end) noexcept {
    any_range(args, begin, end);
    if (args.streaming) stream_fence();
}

void bucket_chunks(const BucketArgs& args, const GradStatsArgs& stats, int64_t begin, int64_t end) noexcept {
    for_each_chunk(stats.segments, stats.num_segments, begin, end, [&](int64_t, int64_t chunk, Span span) {
        double lanes[kLanes] = {};
        if (args.out_dtype == DType::f32) sum_and_square<float>(args, span.begin, span.end, lanes);
        if (args.out_dtype == DType::bf16) sum_and_square<bf16>(args, span.begin, span.end, lanes);
        if (args.out_dtype == DType::f16) sum_and_square<f16>(args, span.begin, span.end, lanes);
        stats.partials[chunk] = fold_lanes(lanes);
    });
    if (args.streaming) stream_fence();
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
