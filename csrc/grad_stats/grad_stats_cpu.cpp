// Owns the CPU kernels of the grad_stats stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of chunks.
#include "core/squares.h"
#include "grad_stats/grad_stats_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int64_t kAhead = 8192;  // bytes: two small pages on, where the hardware's own prefetch stops

template <class T>
void sum_chunks(const GradStatsArgs& args, int64_t begin, int64_t end) {
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t chunk, Span span) {
        const T* grad = static_cast<const T*>(args.grads[args.segments[row].tensor]);
        double lanes[kLanes] = {};
        add_squares<kAhead>(grad + span.begin, span.end - span.begin, lanes);
        args.partials[chunk] = fold_lanes(lanes);
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
