// Owns the CPU kernels of the cast stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of elements.
#include "cast/cast_random_cpu.h"
#include "core/simd.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

template <class From, class To>
void round_to_nearest(const CastArgs& args, int64_t begin, int64_t end) {
    const From* const from = static_cast<const From*>(args.source);
    To* const to = static_cast<To*>(args.out);
    int64_t i = begin;
    const auto one_by_one = [&](int64_t stop) {
        for (; i < stop; ++i) {
            float x;
            load(from + i, x);
            store(to + i, x);
        }
    };
    const int64_t unaligned = static_cast<int64_t>(-(reinterpret_cast<uintptr_t>(to + i) / sizeof(To)) % kWidth);
    if (args.streaming) one_by_one(i + unaligned < end ? i + unaligned : end);
    for (; i + kWidth <= end; i += kWidth) {
        vec x;
        load(from + i, x);
        if (args.streaming) {
            stream(to + i, x);
        } else {
            store(to + i, x);
        }
    }
    one_by_one(end);
}

template <class From>
void round_to_nearest_from(const CastArgs& args, int64_t begin, int64_t end) {
    if (args.out_dtype == DType::f32) round_to_nearest<From, float>(args, begin, end);
    if (args.out_dtype == DType::bf16) round_to_nearest<From, bf16>(args, begin, end);
    if (args.out_dtype == DType::f16) round_to_nearest<From, f16>(args, begin, end);
}

void round_at_random(const CastArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t kTile = 512;
    const float* const from = static_cast<const float*>(args.source);
    uint16_t* const to = static_cast<uint16_t*>(args.out);
    uint16_t random[kTile];
    for (int64_t i = begin; i < end; i += kTile) {
        draw(static_cast<uint64_t>(i / kCastBlock), 0, static_cast<uint64_t>(*args.seed), random);
        round_run<kTile>(from + i, to + i, random, end - i < kTile ? end - i : kTile);
    }
}

}  // namespace

void cast_range(const CastArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.seed != nullptr) return round_at_random(args, begin, end);
    if (args.source_dtype == DType::f32) round_to_nearest_from<float>(args, begin, end);
    if (args.source_dtype == DType::bf16) round_to_nearest_from<bf16>(args, begin, end);
    if (args.source_dtype == DType::f16) round_to_nearest_from<f16>(args, begin, end);
    if (args.streaming) stream_fence();
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
