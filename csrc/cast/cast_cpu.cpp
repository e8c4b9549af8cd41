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

// Blocks whose random bits are made side by side. Loops of constant length over arrays of one word each: these the
// compiler turns into vectors.
constexpr int64_t kBlocksTogether = 64;
constexpr int64_t kRandomTile = kCastBlock * kBlocksTogether;

// The 16 bits of each element of a tile.
void draw(uint64_t block, uint64_t key, uint16_t (&random)[kRandomTile]) {
    uint32_t a[kBlocksTogether], b[kBlocksTogether], c[kBlocksTogether], d[kBlocksTogether], words[4 * kBlocksTogether];
    for (int64_t k = 0; k < kBlocksTogether; ++k) philox(block + static_cast<uint64_t>(k), key, a[k], b[k], c[k], d[k]);
    for (int64_t k = 0; k < kBlocksTogether; ++k)
        words[4 * k] = a[k], words[4 * k + 1] = b[k], words[4 * k + 2] = c[k], words[4 * k + 3] = d[k];
    memcpy(random, words, sizeof random);  // their low halves come first
}

void round_tile(const float* from, uint16_t* to, const uint16_t (&random)[kRandomTile]) {
    for (int64_t k = 0; k < kRandomTile; ++k) to[k] = round_to_bfloat(bits_of(from[k]), random[k]);
}

void round_at_random(const CastArgs& args, int64_t begin, int64_t end) {
    const float* const from = static_cast<const float*>(args.source);
    uint16_t* const to = static_cast<uint16_t*>(args.out);
    uint16_t random[kRandomTile];
    for (int64_t i = begin; i < end; i += kRandomTile) {
        draw(static_cast<uint64_t>(i / kCastBlock), static_cast<uint64_t>(*args.seed), random);
        if (i + kRandomTile <= end) {
            round_tile(from + i, to + i, random);
        } else {
            for (int64_t k = 0; k < end - i; ++k) to[i + k] = round_to_bfloat(bits_of(from[i + k]), random[k]);
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
