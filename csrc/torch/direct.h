// Owns the direct way from Python to a binding's function, without torch's dispatcher, its boxes and its handles: a
// call costs about a microsecond less per list. Knows nothing of any one op. What it is not sure of it hands on to the
// dispatcher: other devices, subclasses, fake tensors, active modes, profiles.
#pragma once

#include "torch/box.h"

#if defined(DEEPCORE_DIRECT)

#define Py_LIMITED_API 0x030A0000  // of Python 3.10, which every later one keeps
#include <Python.h>

#include "torch/dlpack.h"

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {
namespace direct {

struct Host {  // what Python said at the start; references that are kept for good
    const dlpack::Exchange* exchange = nullptr;
    PyObject *tensor_type = nullptr, *parameter_type = nullptr;
    PyObject *num_modes = nullptr, *has_function_mode = nullptr, *profiles = nullptr;  // functions
    PyObject* is_neg = nullptr;                                                        // of a tensor
};

inline Host& host() {
    static Host found;
    return found;
}

inline bool yes(PyObject* answer) {  // in doubt too; takes the answer over
    const int truth = answer == nullptr ? 1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (truth < 0 || answer == nullptr) PyErr_Clear();
    return truth != 0;
}

struct KnownType {
    dlpack::DataType dlpack;
    int32_t code;  // torch's
};

inline const KnownType* known_types() {  // ends with code -1
    static const KnownType types[] = {
        {{2, 32, 1}, aoti_torch_dtype_float32()},
        {{4, 16, 1}, aoti_torch_dtype_bfloat16()},
        {{2, 16, 1}, aoti_torch_dtype_float16()},
        {{2, 64, 1}, aoti_torch_dtype_float64()},
        {{0, 64, 1}, aoti_torch_dtype_int64()},
        {{1, 8, 1}, aoti_torch_dtype_uint8()},
        {{0, 0, 0}, -1},
    };
    return types;
}

inline int32_t code_of(dlpack::DataType type) {
    const KnownType* known = known_types();
    while (known->code >= 0 && (known->dlpack.code != type.code || known->dlpack.bits != type.bits)) ++known;
    return type.lanes == 1 ? known->code : -1;
}

inline View viewed(const dlpack::Tensor& tensor) {
    View view{tensor.data, 1, tensor.sizes, tensor.strides, tensor.dim, code_of(tensor.dtype), true};
    for (int32_t i = tensor.dim - 1; i >= 0; --i) {
        view.contiguous &= tensor.sizes[i] == 1 || tensor.strides[i] == view.numel;
        view.numel *= tensor.sizes[i];
    }
    view.contiguous |= view.numel == 0;
    return view;
}

// The address of what lies in a freed storage is its offset there. Executables that are not position-independent have
// memory as low as that, and gain nothing from direct calls (see deepcore/ops/direct.py).
constexpr uintptr_t kLeastAddress = uintptr_t(1) << 38;

// Whether the bindings may look at the memory themselves.
inline bool is_plain(PyObject* given, const View& view, const dlpack::Tensor& tensor) {
    if (tensor.device.type != dlpack::kCpu || view.dtype_code < 0) return false;
    if (view.numel > 0 && reinterpret_cast<uintptr_t>(view.data) < kLeastAddress) return false;
    if (view.contiguous && view.numel > 1) return true;  // see deepcore/ops/direct.py: asking each costs too much
    return !yes(PyObject_CallFunctionObjArgs(host().is_neg, given, nullptr));  // its memory has the other sign
}

// Whether somebody wants to see every op. Then taking arguments would run their code, too.
inline bool is_watched() {
    return yes(PyObject_CallNoArgs(host().num_modes)) || yes(PyObject_CallNoArgs(host().has_function_mode)) ||
           yes(PyObject_CallNoArgs(host().profiles));
}

// Each returns false where the dispatcher has to look at the argument.
inline bool take(PyObject* given, Tensor& taken) {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(given));
    if (type != host().tensor_type && type != host().parameter_type) return false;
    dlpack::Tensor tensor;
    if (host().exchange->describe(given, &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    const View view = viewed(tensor);
    taken = Tensor(view);
    return tensor.byte_offset == 0 && is_plain(given, view, tensor);
}

inline bool take(PyObject* given, OptionalTensor& taken) { return given == Py_None || take(given, taken.emplace()); }

inline bool take(PyObject* given, TensorList& taken) {
    if (!PyList_Check(given)) return false;
    taken.resize(static_cast<size_t>(PyList_Size(given)));
    for (size_t i = 0; i < taken.size(); ++i) {
        PyObject* const item = PyList_GetItem(given, static_cast<Py_ssize_t>(i));
        if (item == nullptr) PyErr_Clear();
        if (item == nullptr || !take(item, taken[i])) return false;
    }
    return true;
}

inline bool take(PyObject* given, bool& taken) {
    taken = given == Py_True;
    return PyBool_Check(given);
}

inline bool take(PyObject* given, int64_t& taken) {
    if (!PyLong_Check(given) || PyBool_Check(given)) return false;
    taken = PyLong_AsLongLong(given);
    if (taken != -1 || PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
}

inline bool take(PyObject* given, double& taken) {
    if (!PyFloat_Check(given)) return false;
    taken = PyFloat_AsDouble(given);
    return true;
}

struct Owned {  // a result on its way to Python, 1-D
    Tensor tensor;
    int64_t size, stride;
    dlpack::ManagedTensor managed;
};

inline PyObject* object_of(Tensor result) {
    Owned* const owned = new Owned{std::move(result), 0, 1, {}};
    owned->size = owned->tensor.numel();
    const KnownType* known = known_types();
    while (known->code >= 0 && known->code != owned->tensor.dtype_code()) ++known;
    owned->managed = {{dlpack::kMajorVersion, 0},
                      owned,
                      [](dlpack::ManagedTensor* done) { delete static_cast<Owned*>(done->context); },
                      0,
                      {owned->tensor.data_ptr(), {dlpack::kCpu, 0}, 1, known->dlpack, &owned->size, &owned->stride, 0}};
    void* object = nullptr;
    if (host().exchange->object_from_managed(&owned->managed, &object) != 0) return nullptr;
    return static_cast<PyObject*>(object);
}

template <class... Results>
PyObject* object_of(std::tuple<Results...> results) {
    PyObject* const tuple = PyTuple_New(sizeof...(Results));
    Py_ssize_t index = 0;
    const auto put = [&](PyObject* item) { return item != nullptr && PyTuple_SetItem(tuple, index++, item) == 0; };
    const bool whole = tuple != nullptr &&
                       std::apply([&](auto&... each) { return (put(object_of(std::move(each))) && ...); }, results);
    if (whole) return tuple;
    Py_XDECREF(tuple);
    return nullptr;
}

class Unlocked {  // the interpreter goes on while the kernels run
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() { PyEval_RestoreThread(state_); }

  private:
    PyThreadState* state_;
};

inline PyObject* dispatched(PyObject* op, PyObject* const* given, Py_ssize_t count) {
    PyObject* const args = PyTuple_New(count);
    if (args == nullptr) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
        Py_INCREF(given[i]);
        PyTuple_SetItem(args, i, given[i]);
    }
    PyObject* const result = PyObject_Call(op, args, nullptr);
    Py_DECREF(args);
    return result;
}

template <class Result, class... Args, size_t... index>
PyObject* call(Result (*function)(Args...), PyObject* op, PyObject* const* given, Py_ssize_t count,
               std::index_sequence<index...>) {
    std::tuple<std::decay_t<Args>...> args;
    if (is_watched() || count != sizeof...(Args) || !(take(given[index], std::get<index>(args)) && ...)) {
        return dispatched(op, given, count);
    }
    const auto run = [&] {
        const Unlocked unlocked;
        return std::apply(function, args);
    };
    if constexpr (std::is_void_v<Result>) {
        run();
        Py_RETURN_NONE;
    } else {
        return object_of(run());
    }
}

template <class Result, class... Args>
PyObject* call(Result (*function)(Args...), PyObject* op, PyObject* const* given, Py_ssize_t count) {
    try {
        return call(function, op, given, count, std::index_sequence_for<Args...>());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

// A Python function; its `self` is the dispatcher's op.
template <auto function>
PyObject* called(PyObject* op, PyObject* const* given, Py_ssize_t count) {
    return call(function, op, given, count);
}

inline std::vector<PyMethodDef>& ops() {
    static std::vector<PyMethodDef> all;
    return all;
}

template <auto function>
void add(const char* name) {
    PyObject* (*const start)(PyObject*, PyObject* const*, Py_ssize_t) = &called<function>;
    ops().push_back({name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(start)), METH_FASTCALL, nullptr});
}

}  // namespace direct
}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore

extern "C" {

// Called once, with the interpreter's lock. capsule: torch.Tensor.__dlpack_c_exchange_api__; types and functions as in
// Host. Returns True, or False where this torch's table of functions is not one that we know.
__attribute__((weak, visibility("default"))) PyObject* deepcore_direct_start(PyObject* capsule, PyObject* host_values) {
    using namespace deepcore;
    auto* const exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    if (exchange == nullptr) {
        PyErr_Clear();
        Py_RETURN_FALSE;
    }
    if (exchange->version.major != dlpack::kMajorVersion || exchange->describe == nullptr) Py_RETURN_FALSE;
    binding::direct::Host& host = binding::direct::host();
    Py_INCREF(host_values);  // a tuple, whose items then stay
    if (!PyArg_ParseTuple(host_values, "OOOOOO", &host.tensor_type, &host.parameter_type, &host.num_modes,
                          &host.has_function_mode, &host.profiles, &host.is_neg)) {
        return nullptr;
    }
    host.exchange = exchange;
    Py_RETURN_TRUE;
}

// The Python function of an op, or None where it has none. op: the dispatcher's, for what is handed on.
__attribute__((weak, visibility("default"))) PyObject* deepcore_direct_op(const char* name, PyObject* op) {
    for (PyMethodDef& method : deepcore::binding::direct::ops()) {
        if (strcmp(method.ml_name, name) == 0) return PyCFunction_NewEx(&method, op, nullptr);
    }
    Py_RETURN_NONE;
}

}  // extern "C"

#endif  // DEEPCORE_DIRECT

namespace deepcore {
namespace DEEPCORE_HIDDEN binding {

// Lets a function serve an op: `m` is the dispatcher's library for CPUs.
template <auto function>
void serve(torch::stable::detail::StableLibrary& m, const char* name) {
    m.impl(name, boxed<function>);
#if defined(DEEPCORE_DIRECT)
    direct::add<function>(name);
#endif
}

}  // namespace DEEPCORE_HIDDEN binding
}  // namespace deepcore
