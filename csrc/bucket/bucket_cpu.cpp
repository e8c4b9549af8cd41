// Owns the CPU kernels of the bucket stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of elements.
#include "bucket/bucket_math.h"
#include "core/simd.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int kTogether = 4;  // vectors of each part that are read in a row

template <bool streaming, class V, class To>
DEEPCORE_FN void keep(To* to, V x) {
    if constexpr (streaming) {
        stream(to, x);
    } else {
        store(to, x);
    }
}

// `count` times as many elements as V holds, from `out` and `part` on. All parts are walked side by side: passing them
// one after the other over sums in the nearest cache is slower from three parts on.
template <class V, int count, bool streaming, class To, class From>
DEEPCORE_FN void sum(To* out, const From* part, const BucketArgs& args) {
    constexpr int64_t kStep = sizeof(V) / sizeof(float);
    V totals[count], other, by;
    for (int u = 0; u < count; ++u) load(part + u * kStep, totals[u]);
    for (int64_t k = 1; k < args.num_parts; ++k) {
        part += args.numel;
        for (int u = 0; u < count; ++u) {
            load(part + u * kStep, other);
            totals[u] = totals[u] + other;
        }
    }
    splat(args.by, by);
    for (int u = 0; u < count; ++u) {
        totals[u] = args.divide ? totals[u] / by : totals[u] * by;
        if (args.accumulate) {
            load(out + u * kStep, other);
            totals[u] = other + totals[u];
        }
        keep<streaming>(out + u * kStep, totals[u]);
    }
}

template <class To, class From>
void sum_one_by_one(To* out, const From* part, const BucketArgs& args, int64_t numel) {
    for (int64_t i = 0; i < numel; ++i) sum<float, 1, false>(out + i, part + i, args);
}

template <class To, class From>
void sum_range(BucketArgs args, int64_t begin, int64_t end) {
    To* const out = static_cast<To*>(args.out);
    const From* const part = static_cast<const From*>(args.parts);
    constexpr int64_t kMany = kTogether * kWidth;
    int64_t i = begin;
    if (args.streaming) {
        while (i < end && !aligned(out + i)) ++i;
        sum_one_by_one(out + begin, part + begin, args, i - begin);
        for (; i + kMany <= end; i += kMany) sum<vec, kTogether, true>(out + i, part + i, args);
    }
    for (; i + kMany <= end; i += kMany) sum<vec, kTogether, false>(out + i, part + i, args);
    sum_one_by_one(out + i, part + i, args, end - i);
}

template <class To>
void sum_range_to(const BucketArgs& args, int64_t begin, int64_t end) {
    if (args.part_dtype == DType::f32) sum_range<To, float>(args, begin, end);
    if (args.part_dtype == DType::bf16) sum_range<To, bf16>(args, begin, end);
    if (args.part_dtype == DType::f16) sum_range<To, f16>(args, begin, end);
}

}  // namespace

void bucket_range(const BucketArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.out_dtype == DType::f32) sum_range_to<float>(args, begin, end);
    if (args.out_dtype == DType::bf16) sum_range_to<bf16>(args, begin, end);
    if (args.out_dtype == DType::f16) sum_range_to<f16>(args, begin, end);
    if (args.streaming) stream_fence();
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
