// Owns the checks of cast_'s arguments and their translation to CastArgs, for CPU and CUDA alike.
// Knows nothing of how the kernels are started.
#pragma once

#include "cast/cast.h"
#include "torch/box.h"
#include "torch/lists.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

inline CastArgs cast_args(const Tensor& out, const Tensor& source, const OptionalTensor& seed, Device device) {
    const CheckedList to = checked_list("out", out, device), from = checked_list("source", source, device);
    require_companion(from, to);
    CastArgs args = {};
    args.out_dtype = float_dtype(to);
    args.source_dtype = float_dtype(from);
    args.out = to[0].data;
    args.source = from[0].data;
    args.numel = to[0].numel;
    if (seed.has_value()) {
        args.seed = table_of<const int64_t>("seed", *seed, ScalarType::Long, {1}, device);
        if (args.out_dtype != DType::bf16) {
            fail("out: got %s, expected bfloat16, the one that is rounded at random", dtype_name(out));
        }
        if (args.source_dtype != DType::f32) {
            fail("source: got %s, expected float32 where a seed is given", dtype_name(source));
        }
    }
    const Range read = range_at(args.source, args.numel * bytes_of(args.source_dtype));
    if (read.overlaps(range_at(args.out, args.numel * bytes_of(args.out_dtype)))) {
        fail("source: got memory that overlaps out, expected memory of its own");
    }
    return args;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
