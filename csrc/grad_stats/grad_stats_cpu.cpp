// Owns the CPU kernels of the grad_stats stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of chunks.
#include "core/simd.h"
#include "grad_stats/grad_stats_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

// Bytes: two small pages on, where the hardware's own prefetch stops. Never read, so beyond the end is harmless.
constexpr int64_t kAhead = 8192;

template <class T>
double sum_squares(const T* x, int64_t numel) {
    constexpr int kStep = sizeof(dvec) / sizeof(double), kSums = kLanes / kStep;
    dvec sums[kSums];
    for (dvec& sum : sums) splat(0.0, sum);
    int64_t i = 0;
    for (; i + kLanes <= numel; i += kLanes) {
        for (int64_t line = 0; line < kLanes * static_cast<int64_t>(sizeof(T)); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kAhead + line);
        for (int k = 0; k < kSums; ++k) {
            dvec value;
            load(x + i + k * kStep, value);
            add_square(sums[k], value);
        }
    }
    double lanes[kLanes];
    for (int k = 0; k < kSums; ++k) store(lanes + k * kStep, sums[k]);
    for (int k = 0; i < numel; ++i, ++k) {
        double value;
        load(x + i, value);
        lanes[k] += value * value;
    }
    return fold_lanes(lanes);
}

template <class T>
void sum_chunks(const GradStatsArgs& args, int64_t begin, int64_t end) {
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t chunk, Span span) {
        const T* grad = static_cast<const T*>(args.grads[args.segments[row].tensor]);
        args.partials[chunk] = sum_squares(grad + span.begin, span.end - span.begin);
    });
}

}  // namespace

void grad_stats_chunks(const GradStatsArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.dtype == DType::f32) sum_chunks<float>(args, begin, end);
    if (args.dtype == DType::bf16) sum_chunks<bf16>(args, begin, end);
    if (args.dtype == DType::f16) sum_chunks<f16>(args, begin, end);
}

void grad_stats_finish(const GradStatsArgs& args) noexcept {
    Summary summary = empty_summary();
    for (int64_t index = 0; index < args.num_segments; ++index) {
        const Segment& segment = args.segments[index];
        const double* partials = args.partials + segment.first_chunk;
        double square = 0;
        for (int64_t k = 0; k < num_chunks(segment.numel); ++k) square += partials[k];
        args.squares[index] = square;
        add_segment(summary, square, index);
    }
    args.summary[0] = summary.sum;
    args.summary[1] = summary.any_bad;
    args.summary[2] = summary.first_bad;
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
