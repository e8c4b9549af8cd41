// Owns the CPU kernels of the lamb stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "core/squares.h"
#include "core/update_cpu.h"
#include "lamb/lamb_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

struct MomentsRun {  // of one chunk; each address is that of its first element
    Operand param, grad;
    float *exp_avg, *exp_avg_sq;
};

template <class V, class Form>
DEEPCORE_FN void moments(const MomentsRun& at, int64_t i, float* weight, float* update, const LambFactors<V>& factors,
                         Form form) {
    V param = {}, grad = {}, average, square;
    fetch(at.param, i, param);
    fetch(at.grad, i, grad);
    load(at.exp_avg + i, average);
    load(at.exp_avg_sq + i, square);
    store(weight, param);
    store(update, LambMoments::element(param, grad, average, square, factors, form));
    store(at.exp_avg + i, average);
    store(at.exp_avg_sq + i, square);
}

// sums: of the squares of weights and updates, which wait for it in a tile. Each tile begins at lane 0.
template <class Form>
void moments_run(const MomentsRun at, int64_t numel, const LambScalars& scalars, double* sums, Form form) {
    static_assert(kTileNumel % kLanes == 0, "tiles begin at lane 0");
    alignas(64) float weights[kTileNumel], updates[kTileNumel];
    double weight_lanes[kLanes] = {}, update_lanes[kLanes] = {};
    const auto many = LambMoments::spread<vec>(scalars);
    const auto one = LambMoments::spread<float>(scalars);
    for (int64_t begin = 0; begin < numel; begin += kTileNumel) {
        const int64_t left = numel - begin < kTileNumel ? numel - begin : kTileNumel;
        int64_t i = 0;
        for (; i + kWidth <= left; i += kWidth) moments(at, begin + i, weights + i, updates + i, many, form);
        for (; i < left; ++i) moments(at, begin + i, weights + i, updates + i, one, form);
        add_squares<0>(weights, left, weight_lanes);
        add_squares<0>(updates, left, update_lanes);
    }
    sums[0] = fold_lanes(weight_lanes);
    sums[1] = fold_lanes(update_lanes);
}

void moments_chunk(const UpdateArgs& args, const UpdateTensor& tensor, Span span, const LambScalars& scalars,
                   double* sums) {
    const MomentsRun at = {
        operand(tensor.param, args.param_dtype, span.begin), operand(tensor.grad, args.grad_dtype, span.begin),
        static_cast<float*>(tensor.states[0]) + span.begin, static_cast<float*>(tensor.states[1]) + span.begin};
    const int64_t numel = span.end - span.begin;
    if (scalars.form == 1) moments_run(at, numel, scalars, sums, std::integral_constant<int, 1>());
    if (scalars.form == 0) moments_run(at, numel, scalars, sums, std::integral_constant<int, 0>());
}

}  // namespace

void lamb_moments_prepare(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<LambMoments>(args, begin, end);
}

void lamb_moments_chunks(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept {
    const auto* const scalars = static_cast<const LambScalars*>(args.scalars);
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t chunk, Span span) {
        if (scalars[row].form == kLeftAlone) return;
        moments_chunk(args, tensor_of(args, row), span, scalars[row], args.partials + 2 * chunk);
    });
}

void lamb_moments_finish(const LambMomentsArgs& args) noexcept {
    const auto* const scalars = static_cast<const LambScalars*>(args.scalars);
    for (int64_t index = 0; index < args.num_segments; ++index) {
        const Segment& segment = args.segments[index];
        const double* partials = args.partials + 2 * segment.first_chunk;
        const int64_t chunks = scalars[index].form == kLeftAlone ? 0 : num_chunks(segment.numel);
        double sums[2] = {};
        for (int64_t k = 0; k < 2 * chunks; ++k) sums[k % 2] += partials[k];
        args.squares[2 * index] = sums[0];
        args.squares[2 * index + 1] = sums[1];
    }
}

void lamb_apply_prepare(const LambApplyArgs& args, int64_t begin, int64_t end) noexcept {
    for (int64_t index = begin; index < end; ++index) prepare_lamb_apply(args, index);
}

void lamb_apply_chunks(const LambApplyArgs& args, int64_t begin, int64_t end) noexcept {
    apply_range<LambApply>(args, begin, end);
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
