// Owns the checks of cast_'s arguments and their translation to CastArgs, for CPU and CUDA alike.
// Knows nothing of how the kernels are started.
#pragma once

#include <optional>

#include "cast/cast.h"
#include "torch/lists.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

using OptionalTensor = std::optional<Tensor>;

inline CastArgs cast_args(const Tensor& out, const Tensor& source, const OptionalTensor& seed, Device device) {
    require_list("out", {out}, device);
    require_list("source", {source}, device);
    require_companion("source", {source}, "out", {out});
    CastArgs args = {};
    args.out_dtype = float_dtype("out", out);
    args.source_dtype = float_dtype("source", source);
    args.out = out.data_ptr();
    args.source = source.data_ptr();
    args.numel = out.numel();
    if (seed.has_value()) {
        args.seed = table_of<const int64_t>("seed", *seed, ScalarType::Long, {1}, device);
        if (args.out_dtype != DType::bf16) {
            fail("out: got %s, expected bfloat16, the one that is rounded at random", dtype_name(out.scalar_type()));
        }
        if (args.source_dtype != DType::f32) {
            fail("source: got %s, expected float32 where a seed is given", dtype_name(source.scalar_type()));
        }
    }
    const Range from = range_at(args.source, args.numel * bytes_of(args.source_dtype));
    if (from.overlaps(range_at(args.out, args.numel * bytes_of(args.out_dtype)))) {
        fail("source: got memory that overlaps out, expected memory of its own");
    }
    return args;
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
