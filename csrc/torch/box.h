// Owns the way from torch's stack of arguments to a binding's function, and of its results back.
// Knows nothing of any one op. As TORCH_BOX, but for a list's tensors, of which it makes no shared pointers.
#pragma once

#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>

#include "torch/check.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

using OptionalTensor = std::optional<Tensor>;

template <class Value>
struct Unboxed {
    static Value of(StableIValue value) { return torch::stable::detail::to<Value>(value); }
};

template <>
struct Unboxed<Tensor> {
    static Tensor of(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};

template <>
struct Unboxed<OptionalTensor> {
    static OptionalTensor of(StableIValue value) {
        const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
        return handle.has_value() ? OptionalTensor(*handle) : OptionalTensor();
    }
};

template <>
struct Unboxed<TensorList> {
    static TensorList of(StableIValue value) {
        const std::unique_ptr<StableListOpaque, AOTITorchError (*)(StableListHandle)> list(
            torch::stable::detail::to<StableListHandle>(value), torch_delete_list);
        size_t size = 0;
        TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
        TensorList tensors(size);
        for (Tensor& tensor : tensors) {
            StableIValue item;
            TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), &tensor - tensors.data(), &item));
            tensor = Unboxed<Tensor>::of(item);
        }
        return tensors;
    }
};

inline StableIValue boxed_result(Tensor result) { return torch::stable::detail::from(result.release()); }

template <class... Results>
void put_results(StableIValue* stack, std::tuple<Results...> results) {
    std::apply([&](auto&... each) { ((*stack++ = boxed_result(std::move(each))), ...); }, results);
}

template <class Result, class... Args, size_t... index>
void call_boxed(Result (*function)(Args...), StableIValue* stack, std::index_sequence<index...>) {
    std::tuple<std::decay_t<Args>...> args{Unboxed<std::decay_t<Args>>::of(stack[index])...};
    if constexpr (std::is_void_v<Result>) {
        std::apply(function, args);
    } else if constexpr (std::is_same_v<Result, Tensor>) {
        stack[0] = boxed_result(std::apply(function, args));
    } else {
        put_results(stack, std::apply(function, args));
    }
}

template <class Result, class... Args>
void call_boxed(Result (*function)(Args...), StableIValue* stack, uint64_t num_args) {
    if (num_args != sizeof...(Args)) {
        fail("the op's schema: got %llu arguments, expected %zu", (unsigned long long)num_args, sizeof...(Args));
    }
    call_boxed(function, stack, std::index_sequence_for<Args...>());
}

// The kernel to register for `function`: it takes tensors, lists and optional tensors by const reference, and numbers;
// it returns nothing, a tensor or a tuple of them.
template <auto function>
void boxed(StableIValue* stack, uint64_t num_args, uint64_t /* num_results */) {
    call_boxed(function, stack, num_args);
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
