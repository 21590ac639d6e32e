#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "batch.hpp"
#include "bindings.hpp"

namespace py = pybind11;
using efficientclip::View;

namespace {

constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;

std::string described(const py::array& array) {
    return std::to_string(array.ndim()) + "-D " + py::str(array.dtype()).cast<std::string>() +
           ((array.flags() & py::array::c_style) != 0 ? "" : ", not contiguous") +
           ((array.flags() & kAligned) != 0 ? "" : ", not aligned");
}

template <class T>
View<T> view(const py::array& array, const char* name) {
    constexpr int kPlain = py::array::c_style | kAligned;
    if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 || (array.flags() & kPlain) != kPlain) {
        const std::string dtype = py::str(py::dtype::of<T>()).cast<std::string>();
        throw py::type_error(std::string(name) + " must be a contiguous 1-D " + dtype + " array, not " +
                             described(array) + ": np.require(" + name + ", np." + dtype + ", \"CA\") makes one");
    }
    return {static_cast<const T*>(array.data()), array.size()};
}

template <class T>
py::array_t<T> owning_array(std::vector<T>&& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    std::vector<T>* held = owner.get();
    py::capsule free_values(held, [](void* data) { delete static_cast<std::vector<T>*>(data); });
    owner.release();
    return py::array_t<T>(static_cast<py::ssize_t>(held->size()), held->data(), free_values);
}

template <class Token>
py::tuple pack_tokens_of(View<Token> tokens, const py::array& offsets_array, const py::array& ids_array,
                         std::int64_t max_length) {
    const auto offsets = view<std::int64_t>(offsets_array, "offsets");
    const auto ids = view<std::int64_t>(ids_array, "ids");
    py::array_t<std::int32_t> cu_seqlens(ids.size + 1);
    std::int32_t* lengths = cu_seqlens.mutable_data();
    {
        const py::gil_scoped_release release;
        efficientclip::measure_texts(offsets, tokens.size, ids, max_length, lengths);
    }
    py::array_t<std::int64_t> input_ids(lengths[ids.size]);
    py::array_t<std::int64_t> position_ids(lengths[ids.size]);
    std::int64_t* inputs = input_ids.mutable_data();
    std::int64_t* positions = position_ids.mutable_data();
    {
        const py::gil_scoped_release release;
        efficientclip::pack_texts(tokens, offsets, ids, lengths, inputs, positions);
    }
    return py::make_tuple(input_ids, position_ids, cu_seqlens);
}

py::tuple pack_tokens(const py::array& tokens, const py::array& offsets, const py::array& ids,
                      std::int64_t max_length) {
    if (py::isinstance<py::array_t<std::uint16_t>>(tokens)) {
        return pack_tokens_of(view<std::uint16_t>(tokens, "tokens"), offsets, ids, max_length);
    }
    if (py::isinstance<py::array_t<std::int32_t>>(tokens)) {
        return pack_tokens_of(view<std::int32_t>(tokens, "tokens"), offsets, ids, max_length);
    }
    throw py::type_error("tokens must be a contiguous 1-D uint16 or int32 array, not " + described(tokens));
}

py::array gather_rows(const py::array& table, const py::array& rows_array, int threads) {
    const auto rows = view<std::int64_t>(rows_array, "rows");
    const py::ssize_t item = table.itemsize();
    if ((item != 1 && item != 2 && item != 4 && item != 8) || table.dtype().attr("hasobject").cast<bool>()) {
        throw py::type_error("table must hold plain items of 1, 2, 4 or 8 bytes, not " + described(table));
    }
    if (table.ndim() != 2 || (table.flags() & py::array::c_style) == 0) {
        throw py::type_error("table must be a C-contiguous 2-D array, not " + described(table) +
                             ": np.ascontiguousarray(table) makes one");
    }
    py::array out(table.dtype(), std::vector<py::ssize_t>{rows.size, table.shape(1)});
    const auto* source = static_cast<const std::byte*>(table.data());
    auto* target = static_cast<std::byte*>(out.mutable_data());
    {
        const py::gil_scoped_release release;
        efficientclip::gather_rows(source, table.shape(0), table.shape(1) * item, rows, threads, target);
    }
    return out;
}

py::tuple linked_pairs(const py::array& indptr_array, const py::array& indices_array, const py::array& left_ids_array,
                       const py::array& columns_array, std::int64_t diagonal) {
    const auto indptr = view<std::int64_t>(indptr_array, "indptr");
    const auto indices = view<std::int32_t>(indices_array, "indices");
    const auto left_ids = view<std::int64_t>(left_ids_array, "left_ids");
    const auto columns = view<std::int64_t>(columns_array, "columns");
    efficientclip::Pairs pairs;
    {
        const py::gil_scoped_release release;
        pairs = efficientclip::linked_pairs(indptr, indices, left_ids, columns, diagonal);
    }
    return py::make_tuple(owning_array(std::move(pairs.rows)), owning_array(std::move(pairs.cols)));
}

}  // namespace

void bind_pairs(py::module_& module) {
    module.def("pack_tokens", &pack_tokens, py::arg("tokens"), py::arg("offsets"), py::arg("ids"),
               py::arg("max_length"), "Texts `ids` in one row without padding: (input_ids, position_ids, cu_seqlens).");
    module.def("gather_rows", &gather_rows, py::arg("table"), py::arg("rows"), py::arg("threads") = 1,
               "The rows `rows` of `table` as a new array.");
    module.def("linked_pairs", &linked_pairs, py::arg("indptr"), py::arg("indices"), py::arg("left_ids"),
               py::arg("columns"), py::arg("diagonal"),
               "Places (rows, cols) of a batch's similarity matrix that are edges of the store's graph.");
}
