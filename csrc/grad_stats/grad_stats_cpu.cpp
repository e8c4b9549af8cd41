// Owns the CPU kernels of the grad_stats stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of chunks.
#include "core/squares.h"
#include "grad_stats/grad_stats_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

constexpr int kStreams = 4;
constexpr int64_t kPieceBytes = 512, kAhead = 256;

// Sums chunks side by side, a piece of each in turn: memory gives one core more in several streams than in one. Each
// chunk has its own lanes, so that its sum has the bits that it has alone.
template <class T>
class Streams {
  public:
    explicit Streams(double* partials) : partials_(partials) {}

    void add(const T* first, int64_t numel, int64_t chunk) {
        runs_[count_++] = {first, numel, chunk, {}};
        if (count_ == kStreams) finish();
    }

    void finish() {
        constexpr int64_t kPiece = kPieceBytes / sizeof(T);
        for (bool more = true; more;) {
            more = false;
            for (int k = 0; k < count_; ++k) {
                Run& run = runs_[k];
                if (run.left == 0) continue;
                const int64_t numel = run.left < kPiece ? run.left : kPiece;
                add_squares<kAhead>(run.next, numel, run.lanes);
                run.next += numel;
                run.left -= numel;
                more = more || run.left > 0;
            }
        }
        for (int k = 0; k < count_; ++k) partials_[runs_[k].chunk] = fold_lanes(runs_[k].lanes);
        count_ = 0;
    }

  private:
    struct Run {
        const T* next;
        int64_t left, chunk;
        double lanes[kLanes];
    };

    double* const partials_;
    Run runs_[kStreams];
    int count_ = 0;
};

template <class T>
void sum_chunks(const GradStatsArgs& args, int64_t begin, int64_t end) {
    Streams<T> streams(args.partials);
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t chunk, Span span) {
        const T* grad = static_cast<const T*>(args.grads[args.segments[row].tensor]);
        streams.add(grad + span.begin, span.end - span.begin, chunk);
    });
    streams.finish();
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
