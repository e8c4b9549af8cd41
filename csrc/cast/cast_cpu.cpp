// Owns the CPU kernels of the cast stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of elements.
#include "cast/cast_math.h"
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

constexpr int64_t kBlocksTogether =
    64;  // blocks whose random bits are made side by side, for the compiler to vectorise

void round_at_random(const CastArgs& args, int64_t begin, int64_t end) {
    const uint64_t key = static_cast<uint64_t>(*args.seed);
    const float* const from = static_cast<const float*>(args.source);
    uint16_t* const to = static_cast<uint16_t*>(args.out);
    uint32_t words[4 * kBlocksTogether];
    for (int64_t i = begin; i < end; i += kCastBlock * kBlocksTogether) {
        const uint64_t block = static_cast<uint64_t>(i / kCastBlock);
        for (int64_t k = 0; k < kBlocksTogether; ++k) {
            uint32_t a, b, c, d;
            philox(block + static_cast<uint64_t>(k), key, a, b, c, d);
            words[4 * k] = a, words[4 * k + 1] = b, words[4 * k + 2] = c, words[4 * k + 3] = d;
        }
        const int64_t numel = i + kCastBlock * kBlocksTogether < end ? kCastBlock * kBlocksTogether : end - i;
        for (int64_t k = 0; k < numel; ++k) {
            const uint32_t random = (words[k / 2] >> (k % 2 * 16)) & 0xffffu;
            to[i + k] = round_to_bfloat(bits_of(from[i + k]), random);
        }
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
