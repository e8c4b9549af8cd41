// Owns the Python module over FileEngine and the transfers of checked blocks, built per interpreter.
// Knows nothing of tensors: addresses are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/block_file.h"
#include "host/crc32c.h"
#include "host/file_engine.h"

namespace py = pybind11;
using deepcore::Failure;
using deepcore::FileEngine;
using deepcore::Piece;
using deepcore::Verdict;

namespace {

using Pieces = std::vector<std::pair<uintptr_t, int64_t>>;  // address, or 0 where nobody wants the bytes; how many

std::vector<Piece> pieces_of(const Pieces& given) {
    std::vector<Piece> pieces;
    pieces.reserve(given.size());
    for (const auto& [address, nbytes] : given) pieces.push_back({reinterpret_cast<char*>(address), nbytes});
    return pieces;
}

int64_t num_blocks(const std::vector<Piece>& pieces, int64_t block) {
    int64_t total = 0;
    for (const Piece& piece : pieces) total += piece.nbytes;
    return (total + block - 1) / block;
}

py::tuple write_blocks(int file, int64_t offset, const Pieces& given, int64_t block) {
    const std::vector<Piece> pieces = pieces_of(given);
    std::vector<uint32_t> sums(num_blocks(pieces, block));
    Failure failure;
    {
        const py::gil_scoped_release unlocked;
        failure = deepcore::write_blocks(file, offset, pieces, block, sums.data());
    }
    return py::make_tuple(py::make_tuple(failure.code, failure.offset, failure.missing), sums);
}

// `expected` has a checksum per block, or none at all, and then nothing is checked.
py::tuple read_blocks(int file, int64_t offset, const Pieces& given, int64_t block,
                      const std::vector<uint32_t>& expected, int threads) {
    const std::vector<Piece> pieces = pieces_of(given);
    const bool checks = static_cast<int64_t>(expected.size()) == num_blocks(pieces, block);
    Verdict verdict;
    {
        const py::gil_scoped_release unlocked;
        verdict = deepcore::read_blocks(file, offset, pieces, block, checks ? expected.data() : nullptr, threads);
    }
    const Failure& failure = verdict.failure;
    return py::make_tuple(py::make_tuple(failure.code, failure.offset, failure.missing), verdict.bad_block,
                          verdict.found);
}

}  // namespace

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
    module.def("gather", [](const Pieces& given, uintptr_t address, int threads) {
        const std::vector<Piece> pieces = pieces_of(given);
        const py::gil_scoped_release unlocked;
        deepcore::gather(pieces, reinterpret_cast<char*>(address), threads);
    });
    module.def("reserve", &deepcore::reserve, py::call_guard<py::gil_scoped_release>());
    module.def("write_blocks", &write_blocks);
    module.def("read_blocks", &read_blocks);
    module.def("crc32c", [](uint32_t crc, uintptr_t address, int64_t nbytes) {
        const py::gil_scoped_release unlocked;
        return deepcore::crc32c(crc, reinterpret_cast<const void*>(address), nbytes);
    });
    module.def("crc32c_way", &deepcore::crc32c_way);
}
