// Owns the checks of what muon_momentum_ and muon_apply_ are given, and their translation to the kernels' arguments.
// Knows nothing of how the kernels are started.
#pragma once

#include "muon/muon_math.h"
#include "torch/update_args.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

struct MuonApplyCall {  // the kernels' arguments, and what they point into
    UpdateCall call;
    MuonApplyArgs args;
};

inline UpdateCall muon_momentum_call(const UpdateLists& lists, const UpdateTables& tables, Device device) {
    return update_call(lists, tables, MuonMomentum::kColumns, sizeof(MuonScalars), device);
}

inline MuonApplyCall muon_apply_call(const UpdateLists& lists, const UpdateTables& tables, const Tensor& ratios,
                                     Device device) {
    UpdateCall call = update_call(lists, tables, MuonMomentum::kColumns, sizeof(MuonScalars), device);
    MuonApplyArgs args = {};
    static_cast<UpdateArgs&>(args) = call.args;
    args.ratios = table_of<const double>("ratios", ratios, ScalarType::Double, {call.args.num_segments}, device);
    return {std::move(call), args};
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
