// Owns the CPU kernels of the flatten stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of elements.
#include "core/simd.h"
#include "flatten/flatten_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

template <class To, class From>
DEEPCORE_FN void convert_one(To* to, const From* from) {
    float x;
    load(from, x);
    store(to, x);
}

template <class To, class From>
void convert(To* to, const From* from, int64_t numel, bool streaming) {
    int64_t i = 0;
    if (streaming) {
        for (; i < numel && !aligned(to + i); ++i) convert_one(to + i, from + i);
        for (; i + kWidth <= numel; i += kWidth) {
            vec x;
            load(from + i, x);
            stream(to + i, x);
        }
    }
    for (; i + kWidth <= numel; i += kWidth) {
        vec x;
        load(from + i, x);
        store(to + i, x);
    }
    for (; i < numel; ++i) convert_one(to + i, from + i);
}

template <class To>
void convert_from(const FlattenArgs& args, const Copy& copy, int64_t begin, int64_t numel) {
    To* const to = static_cast<To*>(copy.to) + begin;
    if (args.from_dtype == DType::f32) convert(to, static_cast<const float*>(copy.from) + begin, numel, args.streaming);
    if (args.from_dtype == DType::bf16) convert(to, static_cast<const bf16*>(copy.from) + begin, numel, args.streaming);
    if (args.from_dtype == DType::f16) convert(to, static_cast<const f16*>(copy.from) + begin, numel, args.streaming);
}

// Vectors in a row: memcpy, which first looks for a way, takes up to a twentieth longer over a thousand small tensors.
void copy_bytes(char* to, const char* from, int64_t numel, bool streaming) {
    constexpr int64_t kStep = sizeof(vec), kMany = 4 * kStep;
    if (streaming && kWidth > 1) {
        const int64_t lead = -reinterpret_cast<uintptr_t>(to) % kStep, head = lead < numel ? lead : numel;
        memcpy(to, from, head);
        to += head, from += head, numel -= head;
        for (; numel >= kStep; to += kStep, from += kStep, numel -= kStep) {
            vec x;
            load(reinterpret_cast<const float*>(from), x);
            stream(reinterpret_cast<float*>(to), x);
        }
    }
    for (; numel >= kMany && kWidth > 1; to += kMany, from += kMany, numel -= kMany) {
        const float* const source = reinterpret_cast<const float*>(from);
        float* const target = reinterpret_cast<float*>(to);
        vec a, b, c, d;
        load(source, a), load(source + kWidth, b), load(source + 2 * kWidth, c), load(source + 3 * kWidth, d);
        store(target, a), store(target + kWidth, b), store(target + 2 * kWidth, c), store(target + 3 * kWidth, d);
    }
    memcpy(to, from, numel);
}

void copy_part(const FlattenArgs& args, const Copy& copy, int64_t begin, int64_t numel) {
    const int64_t size = args.raw_size;
    if (size != 0) {
        copy_bytes(static_cast<char*>(copy.to) + begin * size, static_cast<const char*>(copy.from) + begin * size,
                   numel * size, args.streaming);
    } else {
        if (args.to_dtype == DType::f32) convert_from<float>(args, copy, begin, numel);
        if (args.to_dtype == DType::bf16) convert_from<bf16>(args, copy, begin, numel);
        if (args.to_dtype == DType::f16) convert_from<f16>(args, copy, begin, numel);
    }
}

}  // namespace

void flatten_range(const FlattenArgs& args, int64_t begin, int64_t end) noexcept {
    if (begin >= end) return;
    for (int64_t index = find_copy(args.copies, args.num_copies, begin); begin < end; ++index) {
        const Copy& copy = args.copies[index];
        const int64_t stop = copy.first + copy.numel < end ? copy.first + copy.numel : end;
        if (stop > begin) copy_part(args, copy, begin - copy.first, stop - begin);
        begin = stop > begin ? stop : begin;
    }
    if (args.streaming) stream_fence();
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
