// Owns the Python class over FileEngine, built per interpreter.
// Knows nothing of tensors: addresses are integers.
#include <pybind11/pybind11.h>

#include "host/file_engine.h"

namespace py = pybind11;
using deepcore::Failure;
using deepcore::FileEngine;

PYBIND11_MODULE(deepcore_files, module) {
    py::class_<FileEngine>(module, "FileEngine")
        .def(py::init<int, int64_t>(), py::arg("threads"), py::arg("block_size"))
        .def("read",
             [](FileEngine& engine, int direct, int plain, uintptr_t address, int64_t nbytes, int64_t offset) {
                 return engine.read(direct, plain, reinterpret_cast<void*>(address), nbytes, offset);
             })
        .def("write",
             [](FileEngine& engine, int direct, int plain, uintptr_t address, int64_t nbytes, int64_t offset) {
                 return engine.write(direct, plain, reinterpret_cast<const void*>(address), nbytes, offset);
             })
        .def("wait", [](FileEngine& engine, int64_t ticket) {
            Failure failure;
            {
                const py::gil_scoped_release unlocked;
                failure = engine.wait(ticket);
            }
            return py::make_tuple(failure.code, failure.offset, failure.missing);
        });
}
