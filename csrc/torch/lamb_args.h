// Owns the checks of what lamb_moments_ and lamb_apply_ are given, and their translation to the kernels' arguments.
// Knows nothing of how the kernels are started.
#pragma once

#include "lamb/lamb_math.h"
#include "torch/update_args.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct LambMomentsCall {  // the kernels' arguments, and what they point into
    UpdateCall call;
    Scratch partials;
    LambMomentsArgs args;
};

struct LambApplyCall {
    UpdateCall call;
    LambApplyArgs args;
};

inline LambMomentsCall lamb_moments_call(const UpdateLists& lists, const UpdateTables& tables, const Tensor& squares,
                                         Device device) {
    UpdateCall call = update_call(lists, tables, LambMoments::kColumns, sizeof(LambScalars), device);
    const int64_t rows = call.args.num_segments;
    Scratch partials(2 * call.num_chunks * sizeof(double), device);
    LambMomentsArgs args = {};
    static_cast<UpdateArgs&>(args) = call.args;
    args.partials = static_cast<double*>(partials.memory());
    args.squares = table_of<double>("squares", squares, ScalarType::Double, {rows, 2}, device);
    return {std::move(call), std::move(partials), args};
}

inline LambApplyCall lamb_apply_call(const UpdateLists& lists, const UpdateTables& tables, const Tensor& squares,
                                     Device device) {
    UpdateCall call = update_call(lists, tables, LambMoments::kColumns, sizeof(LambScalars), device);
    LambApplyArgs args = {};
    static_cast<UpdateArgs&>(args) = call.args;
    const int64_t rows = call.args.num_segments;
    args.squares = table_of<const double>("squares", squares, ScalarType::Double, {rows, 2}, device);
    return {std::move(call), args};
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
