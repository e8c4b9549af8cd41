// Owns the checks of bucket_sum_'s arguments and their translation to BucketArgs, for CPU and CUDA alike.
// Knows nothing of how the kernels are started.
#pragma once

#include "bucket/bucket_math.h"
#include "torch/lists.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

inline void require_row_of(const char* name, const Tensor& tensor, Device device) {
    if (!(device_of(tensor) == device)) {
        fail("%s: got a tensor on %s, expected %s", name, describe(device_of(tensor)).text, describe(device).text);
    }
    if (tensor.dim() != 1 || !tensor.is_contiguous()) {
        fail("%s: got shape %s with strides %s, expected a contiguous 1-D tensor", name, shape_text(tensor).text,
             strides_text(tensor).text);
    }
    if (!fits_storage(tensor)) fail("%s: got a storage smaller than the tensor, expected its memory", name);
}

inline int64_t require_parts(int64_t numel, int64_t out_numel) {
    const bool fits = out_numel == 0 ? numel == 0 : numel > 0 && numel % out_numel == 0;
    if (!fits) {
        fail("parts: got %lld elements, expected a positive multiple of the %lld of out", (long long)numel,
             (long long)out_numel);
    }
    return out_numel == 0 ? 1 : numel / out_numel;
}

inline float require_divisor(double divisor) {
    const float rounded = static_cast<float>(divisor);
    if (rounded == 0 || rounded - rounded != 0) {
        fail("divisor: got %g, expected a number that is finite and not 0 in float32", divisor);
    }
    return rounded;
}

inline BucketArgs bucket_args(const Tensor& out, const Tensor& parts, bool accumulate, double divisor, Device device) {
    require_row_of("out", out, device);
    require_row_of("parts", parts, device);
    BucketArgs args = {};
    args.out_dtype = float_dtype("out", out.dtype_code());
    args.part_dtype = float_dtype("parts", parts.dtype_code());
    args.numel = out.numel();
    args.num_parts = require_parts(parts.numel(), args.numel);
    args.out = out.data_ptr();
    args.parts = parts.data_ptr();
    args.accumulate = accumulate;
    set_divisor(args, require_divisor(divisor));

    const bool same = args.out == args.parts && args.num_parts == 1 && args.out_dtype == args.part_dtype;
    const Range from = range_at(args.parts, args.num_parts * args.numel * bytes_of(args.part_dtype));
    if (!same && from.overlaps(range_at(args.out, args.numel * bytes_of(args.out_dtype)))) {
        fail("parts: got memory that overlaps out, expected memory of its own, or out itself as the one part");
    }
    return args;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
