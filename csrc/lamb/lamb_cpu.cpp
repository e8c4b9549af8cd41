// Owns the CPU kernels of the lamb stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "core/squares.h"
#include "core/update_cpu.h"
#include "lamb/lamb_math.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

template <class V, class Form>
DEEPCORE_FN void moments(const TilePointers& at, int64_t i, float* updates, const LambFactors<V>& factors, Form form) {
    V param, grad, average, square;
    load(at.param + i, param);
    load(at.grad + i, grad);
    load(at.states[0] + i, average);
    load(at.states[1] + i, square);
    const V update = LambMoments::element(param, grad, average, square, factors, form);
    store(at.states[0] + i, average);
    store(at.states[1] + i, square);
    store(updates + i, update);
}

template <class Form>
void moments_tile(const TilePointers& at, int64_t numel, float* updates, const LambScalars& scalars, Form form) {
    const auto many = LambMoments::spread<vec>(scalars);
    int64_t i = 0;
    for (; i + kWidth <= numel; i += kWidth) moments(at, i, updates, many, form);
    const auto one = LambMoments::spread<float>(scalars);
    for (; i < numel; ++i) moments(at, i, updates, one, form);
}

// sums: of the squares of weights and updates. A tile is a multiple of kLanes, so that each begins at lane 0.
void moments_chunk(const UpdateArgs& args, const UpdateTensor& tensor, Span span, const LambScalars& scalars,
                   double* sums) {
    static_assert(kTileNumel % kLanes == 0, "tiles begin at lane 0");
    float params[kTileNumel], grads[kTileNumel], updates[kTileNumel];
    double weight_lanes[kLanes] = {}, update_lanes[kLanes] = {};
    const bool wide_params = args.param_dtype == DType::f32, wide_grads = args.grad_dtype == DType::f32;
    for (int64_t begin = span.begin; begin < span.end; begin += kTileNumel) {
        const int64_t numel = begin + kTileNumel < span.end ? kTileNumel : span.end - begin;
        const TilePointers at = {wide_params ? static_cast<float*>(tensor.param) + begin : params,
                                 wide_grads ? static_cast<const float*>(tensor.grad) + begin : grads,
                                 {tensor.states[0] + begin, tensor.states[1] + begin}};
        widen(tensor.param, args.param_dtype, begin, params, numel);
        widen(tensor.grad, args.grad_dtype, begin, grads, numel);
        if (scalars.form == 1) moments_tile(at, numel, updates, scalars, std::integral_constant<int, 1>());
        if (scalars.form == 0) moments_tile(at, numel, updates, scalars, std::integral_constant<int, 0>());
        add_squares<0>(at.param, numel, weight_lanes);
        add_squares<0>(updates, numel, update_lanes);
    }
    sums[0] = fold_lanes(weight_lanes);
    sums[1] = fold_lanes(update_lanes);
}

}  // namespace

void lamb_moments_prepare(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept {
    prepare_range<LambMoments>(args, begin, end);
}

void lamb_moments_chunks(const LambMomentsArgs& args, int64_t begin, int64_t end) noexcept {
    const auto* const scalars = static_cast<const LambScalars*>(args.scalars);
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t chunk, Span span) {
        if (scalars[row].form == kLeftAlone) return;
        moments_chunk(args, args.tensors[args.segments[row].tensor], span, scalars[row], args.partials + 2 * chunk);
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
