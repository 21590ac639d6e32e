#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "batch.hpp"
#include "bindings.hpp"
#include "pair_loader.hpp"

namespace py = pybind11;
using efficientclip::View;

namespace {

template <class T>
py::array_t<T> owning_array(std::vector<T>&& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    std::vector<T>* held = owner.get();
    py::capsule free_values(held, [](void* data) { delete static_cast<std::vector<T>*>(data); });
    owner.release();
    return py::array_t<T>(static_cast<py::ssize_t>(held->size()), held->data(), free_values);
}

efficientclip::Texts texts_of(const py::array& tokens, const py::array& offsets) {
    if (py::isinstance<py::array_t<std::uint16_t>>(tokens)) {
        return {view<std::uint16_t>(tokens, "tokens"), view<std::int64_t>(offsets, "offsets")};
    }
    if (py::isinstance<py::array_t<std::int32_t>>(tokens)) {
        return {view<std::int32_t>(tokens, "tokens"), view<std::int64_t>(offsets, "offsets")};
    }
    throw py::type_error("tokens must be a contiguous 1-D uint16 or int32 array, not " + described(tokens));
}

py::tuple pack_tokens(const py::array& tokens_array, const py::array& offsets_array, const py::array& ids_array,
                      std::int64_t max_length) {
    const efficientclip::Texts texts = texts_of(tokens_array, offsets_array);
    const auto ids = view<std::int64_t>(ids_array, "ids");
    py::array_t<std::int32_t> cu_seqlens(ids.size + 1);
    std::int32_t* lengths = cu_seqlens.mutable_data();
    {
        const Unlocked unlocked;
        std::visit([&](const auto& tokens) {
            efficientclip::measure_texts(texts.offsets, tokens.size, ids, max_length, lengths);
        }, texts.tokens);
    }
    py::array_t<std::int64_t> input_ids(lengths[ids.size]);
    py::array_t<std::int64_t> position_ids(lengths[ids.size]);
    std::int64_t* inputs = input_ids.mutable_data();
    std::int64_t* positions = position_ids.mutable_data();
    {
        const Unlocked unlocked;
        std::visit([&](const auto& tokens) {
            efficientclip::pack_texts(tokens, texts.offsets, ids, lengths, inputs, positions);
        }, texts.tokens);
    }
    return py::make_tuple(input_ids, position_ids, cu_seqlens);
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
        const Unlocked unlocked;
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
        const Unlocked unlocked;
        pairs = efficientclip::linked_pairs(indptr, indices, left_ids, columns, diagonal);
    }
    return py::make_tuple(owning_array(std::move(pairs.rows)), owning_array(std::move(pairs.cols)));
}

// `weights` is (groups, weight of each group).
efficientclip::Weights weights_of(const std::optional<py::tuple>& weights) {
    if (!weights) return {};
    return {view<std::uint8_t>((*weights)[0], "groups"), view<double>((*weights)[1], "weights")};
}

std::int64_t count_visits(const py::array& kept, const std::optional<py::tuple>& weights, std::int64_t pairs,
                          std::uint64_t seed, std::uint32_t epoch) {
    const auto bits = view<std::uint8_t>(kept, "kept");
    const efficientclip::Weights weighted = weights_of(weights);
    const py::gil_scoped_release release;
    return efficientclip::Order(pairs, bits, true, seed, efficientclip::Purpose::kept_pairs, epoch, weighted).size();
}

// The loader and the arrays that it reads.
class BoundPairLoader {
  public:
    BoundPairLoader(const py::array& trained_ids, const py::array& frozen_ids, const py::array& features,
                    const std::optional<py::tuple>& captions, const std::optional<py::dict>& masked,
                    const py::array& kept, const std::optional<py::tuple>& weights,
                    efficientclip::EpochSettings settings)
        : width_(features.ndim() == 2 ? features.shape(1) : 0) {
        if (features.ndim() != 2 || features.dtype().char_() != 'e' || (features.flags() & py::array::c_style) == 0) {
            throw py::type_error("features must be a C-contiguous 2-D float16 array, not " + described(features));
        }
        efficientclip::PairStore store{};
        store.trained_ids = held<std::int32_t>(trained_ids, "trained_ids");
        store.frozen_ids = held<std::int32_t>(frozen_ids, "frozen_ids");
        store.features = static_cast<const std::byte*>(features.data());
        store.n_features = features.shape(0);
        store.feature_bytes = width_ * 2;
        arrays_.push_back(features);
        if (captions) store.captions = held_texts((*captions)[0], (*captions)[1]);
        if (masked) {
            const py::dict& given = *masked;
            store.masked = efficientclip::MaskedTexts{
                held_texts(given["tokens"], given["offsets"]),
                given["texts_per_batch"].cast<std::int64_t>(),
                given["max_tokens"].cast<std::int64_t>(),
                {held<std::uint8_t>(given["token_kinds"], "token_kinds"), given["mask_token"].cast<std::int64_t>(),
                 given["mask_share"].cast<double>(), given["whole_words"].cast<bool>()}};
        }
        settings.kept = held<std::uint8_t>(kept, "kept");
        settings.weights = weights_of(weights);
        if (weights) arrays_.insert(arrays_.end(), {(*weights)[0], (*weights)[1]});
        loader_ = std::make_unique<efficientclip::PairLoader>(store, settings);
    }

    std::int64_t steps() const { return open_loader().steps(); }

    py::dict next() {
        constexpr std::chrono::milliseconds kBetweenSignals{50};
        efficientclip::PairLoader& loader = open_loader();
        std::shared_ptr<efficientclip::Batch> batch;
        while (batch == nullptr) {
            {
                const Unlocked unlocked;
                batch = loader.next(kBetweenSignals);
            }
            if (batch == nullptr && PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        return arrays_of(std::move(batch));
    }

    void close() {
        std::unique_ptr<efficientclip::PairLoader> closing = std::move(loader_);
        {
            const Unlocked unlocked;
            closing.reset();
        }
        arrays_.clear();
    }

  private:
    efficientclip::PairLoader& open_loader() const {
        if (loader_ == nullptr) throw std::logic_error("the loader is closed");
        return *loader_;
    }

    template <class T>
    View<T> held(const py::array& array, const char* name) {
        arrays_.push_back(array);
        return view<T>(array, name);
    }

    efficientclip::Texts held_texts(const py::array& tokens, const py::array& offsets) {
        arrays_.push_back(tokens);
        arrays_.push_back(offsets);
        return texts_of(tokens, offsets);
    }

    // Views of the batch, which goes back to the loader's pool when the last of them dies.
    py::dict arrays_of(std::shared_ptr<efficientclip::Batch> shared) const {
        efficientclip::Batch& batch = *shared;
        auto lease = std::make_unique<std::shared_ptr<efficientclip::Batch>>(std::move(shared));
        const py::capsule owner(lease.get(),
                                [](void* held) { delete static_cast<std::shared_ptr<efficientclip::Batch>*>(held); });
        lease.release();
        const auto array = [&](auto& values) {
            using Value = typename std::decay_t<decltype(values)>::value_type;
            return py::array_t<Value>(static_cast<py::ssize_t>(values.size()), values.data(), owner);
        };
        py::dict found;
        found["rows"] = array(batch.rows);
        found["weights"] = array(batch.weights);
        found["frozen_ids"] = array(batch.frozen_ids);
        found["trained_ids"] = array(batch.trained_ids);
        found["features"] =
            py::array(py::dtype("float16"),
                      std::vector<py::ssize_t>{static_cast<py::ssize_t>(batch.trained_ids.size()), width_},
                      batch.features.data(), owner);
        py::list micro_batches;
        for (const efficientclip::MicroBatch& micro : batch.micro_batches) {
            micro_batches.append(py::make_tuple(micro.begin, micro.end, micro.first_token, micro.last_token,
                                                micro.first_text, micro.last_text));
        }
        found["micro_batches"] = micro_batches;
        found["input_ids"] = array(batch.input_ids);
        found["position_ids"] = array(batch.position_ids);
        found["cu_seqlens"] = array(batch.cu_seqlens);
        found["segments"] = array(batch.segments);
        found["masked_positions"] = array(batch.masked_positions);
        found["masked_labels"] = array(batch.masked_labels);
        return found;
    }

    std::vector<py::array> arrays_;
    py::ssize_t width_;
    std::unique_ptr<efficientclip::PairLoader> loader_;  // dies before the arrays
};

std::unique_ptr<BoundPairLoader> make_pair_loader(
    const py::array& trained_ids, const py::array& frozen_ids, const py::array& features,
    const std::optional<py::tuple>& captions, const std::optional<py::dict>& masked, const py::array& kept,
    const std::optional<py::tuple>& weights, std::int64_t batch_size, std::int64_t auditions, std::int64_t rank, std::int64_t world_size,
    std::int64_t max_tokens, std::int64_t pairs_per_micro_batch, std::int64_t tokens_per_micro_batch,
    std::uint64_t seed, std::uint32_t epoch, std::int64_t epoch_step, std::int64_t step, int threads, int prefetch) {
    return std::make_unique<BoundPairLoader>(
        trained_ids, frozen_ids, features, captions, masked, kept, weights,
        efficientclip::EpochSettings{{}, batch_size, auditions, rank, world_size, max_tokens, pairs_per_micro_batch,
                                     tokens_per_micro_batch, seed, epoch, epoch_step, step, threads, prefetch, {}});
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
    module.def("count_visits", &count_visits, py::arg("kept"), py::arg("weights"), py::arg("pairs"), py::arg("seed"),
               py::arg("epoch"), "How many visits of the kept pairs an epoch has.");
    py::class_<BoundPairLoader>(module, "PairLoader", "One epoch's batches, made by threads ahead of the consumer.")
        .def(py::init(&make_pair_loader), py::kw_only(), py::arg("trained_ids"), py::arg("frozen_ids"),
             py::arg("features"), py::arg("captions"), py::arg("masked"), py::arg("kept"), py::arg("weights"), py::arg("batch_size"),
             py::arg("auditions"), py::arg("rank"), py::arg("world_size"), py::arg("max_tokens"),
             py::arg("pairs_per_micro_batch"), py::arg("tokens_per_micro_batch"), py::arg("seed"), py::arg("epoch"),
             py::arg("epoch_step"), py::arg("step"), py::arg("threads"), py::arg("prefetch"))
        .def_property_readonly("steps", &BoundPairLoader::steps)
        .def("next", &BoundPairLoader::next, "The next batch, its arrays by name.")
        .def("close", &BoundPairLoader::close, "Ends the threads; batches that were given out stay valid.");
}
