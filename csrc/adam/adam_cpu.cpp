// Owns the CPU kernels of the adam stem; compiled once per instruction set, see core/host_device.h.
// Knows nothing of threads: the caller hands out ranges of segments and chunks.
#include "adam/adam_math.h"
#include "core/simd.h"

namespace deepcore {
namespace DEEPCORE_ISA {

namespace {

template <class P, class G, bool coupled, class V>
DEEPCORE_FN void update(P* p, const G* g, float* m, float* v, void* copy, DType copy_dtype, int64_t i,
                        const AdamFactors<V>& factors) {
    V param, grad, average, square;
    load(p + i, param);
    load(g + i, grad);
    load(m + i, average);
    load(v + i, square);
    adam_element<coupled>(param, grad, average, square, factors);
    store(p + i, param);
    store(m + i, average);
    store(v + i, square);
    if (copy_dtype == DType::bf16) store(static_cast<bf16*>(copy) + i, param);
    if (copy_dtype == DType::f16) store(static_cast<f16*>(copy) + i, param);
}

template <class P, class G, bool coupled>
void update_span(const AdamTensor& tensor, DType copy_dtype, const AdamScalars& scalars, Span span) {
    P* const p = static_cast<P*>(tensor.param);
    const G* const g = static_cast<const G*>(tensor.grad);
    float *const m = tensor.exp_avg, *const v = tensor.exp_avg_sq;
    const AdamFactors<vec> many = adam_factors<vec>(scalars);
    const AdamFactors<float> one = adam_factors<float>(scalars);
    int64_t i = span.begin;
    for (; i + kWidth <= span.end; i += kWidth) update<P, G, coupled>(p, g, m, v, tensor.copy, copy_dtype, i, many);
    for (; i < span.end; ++i) update<P, G, coupled>(p, g, m, v, tensor.copy, copy_dtype, i, one);
}

template <class P, class G>
void apply(const AdamArgs& args, int64_t begin, int64_t end) {
    for_each_chunk(args.segments, args.num_segments, begin, end, [&](int64_t row, int64_t, Span span) {
        const AdamScalars& scalars = args.scalars[row];
        if (!scalars.enabled) return;
        const AdamTensor& tensor = args.tensors[args.segments[row].tensor];
        if (scalars.coupled) {
            update_span<P, G, true>(tensor, args.copy_dtype, scalars, span);
        } else {
            update_span<P, G, false>(tensor, args.copy_dtype, scalars, span);
        }
    });
}

template <class P>
void apply_to(const AdamArgs& args, int64_t begin, int64_t end) {
    if (args.grad_dtype == DType::f32) apply<P, float>(args, begin, end);
    if (args.grad_dtype == DType::bf16) apply<P, bf16>(args, begin, end);
    if (args.grad_dtype == DType::f16) apply<P, f16>(args, begin, end);
}

}  // namespace

void adam_prepare(const AdamArgs& args, int64_t begin, int64_t end) noexcept {
    for (int64_t index = begin; index < end; ++index) adam_prepare_segment(args, index);
}

void adam_apply(const AdamArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.param_dtype == DType::f32) apply_to<float>(args, begin, end);
    if (args.param_dtype == DType::bf16) apply_to<bf16>(args, begin, end);
    if (args.param_dtype == DType::f16) apply_to<f16>(args, begin, end);
}

}  // namespace DEEPCORE_ISA
}  // namespace deepcore
