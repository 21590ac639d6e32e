#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "image_loader.hpp"

namespace py = pybind11;

namespace {

using efficientclip::ImageBatch;
using efficientclip::ImageLoader;
using efficientclip::ImageOptions;

// Names in a tar are bytes; those that are no UTF-8 become what os.fsdecode makes of them.
py::str text(const std::string& bytes) {
    PyObject* decoded = PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "surrogateescape");
    if (decoded == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(decoded);
}

py::object optional_bytes(const std::optional<std::string>& bytes) {
    return bytes ? py::object(py::bytes(*bytes)) : py::none();
}

// The loader and the memory that its threads write to.
class BoundImageLoader {
  public:
    explicit BoundImageLoader(const ImageOptions& options)
        : keep_encoded_(options.keep_encoded), pid_(getpid()), loader_(std::make_unique<ImageLoader>(options)) {}

    ~BoundImageLoader() { close(); }

    void supply(std::uintptr_t address, py::object owner) {
        ImageLoader& loader = open_loader();
        lent_.push_back(std::move(owner));
        const py::gil_scoped_release release;
        loader.supply(reinterpret_cast<std::byte*>(address));
    }

    py::tuple next() {
        constexpr std::chrono::milliseconds kBetweenSignals{50};
        ImageLoader& loader = open_loader();
        ImageBatch batch;
        auto outcome = ImageLoader::Outcome::waiting;
        while (outcome == ImageLoader::Outcome::waiting) {
            {
                const py::gil_scoped_release release;
                outcome = loader.next(batch, kBetweenSignals);
            }
            if (outcome == ImageLoader::Outcome::waiting && PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        py::object images = py::none();
        if (outcome == ImageLoader::Outcome::batch) {
            images = std::move(lent_.front());
            lent_.pop_front();
        }
        py::list records, bad;
        for (const auto& record : batch.records) {
            records.append(py::make_tuple(text(record.key), record.shard, record.extent.offset, record.extent.size,
                                          optional_bytes(record.text), optional_bytes(record.json),
                                          keep_encoded_ ? py::object(py::bytes(record.encoded.data.get(), record.encoded.size)) : py::none()));
        }
        for (const auto& sample : batch.bad) bad.append(py::make_tuple(sample.shard, text(sample.key), sample.cause));
        return py::make_tuple(images, records, bad, batch.consumed);
    }

    void close() {
        std::unique_ptr<ImageLoader> closing = std::move(loader_);
        if (getpid() != pid_) {
            // The threads do not exist here, and the lock may be held by one for ever.
            static_cast<void>(closing.release());
            return;
        }
        {
            const py::gil_scoped_release release;
            closing.reset();
        }
        lent_.clear();
    }

  private:
    ImageLoader& open_loader() const {
        if (getpid() != pid_) {
            throw std::runtime_error("this ImageLoader's threads live in the process that made it: make another after the fork");
        }
        if (loader_ == nullptr) throw std::runtime_error("this ImageLoader is closed");
        return *loader_;
    }

    bool keep_encoded_;
    pid_t pid_;
    std::deque<py::object> lent_;
    std::unique_ptr<ImageLoader> loader_;  // ends before what it writes to
};

std::unique_ptr<BoundImageLoader> make_image_loader(
    std::vector<std::string> shards, int batch_size, int size, bool train, int threads, std::uint64_t seed,
    std::uint32_t epoch, int rank, int world_size, const std::vector<std::array<std::int64_t, 4>>& shares,
    const std::array<float, 3>& mean, const std::array<float, 3>& std, const std::string& dtype, bool channels_last,
    const std::array<double, 2>& scale, const std::array<double, 2>& ratio, bool flip, bool scaled_decoding,
    int shuffle_buffer, bool captions, bool keep_encoded, bool drop_last, std::int64_t consumed) {
    ImageOptions options;
    options.shards = std::move(shards);
    options.transform.size = size;
    options.transform.random_crop = train;
    options.transform.scale = scale;
    options.transform.ratio = ratio;
    options.transform.flip = flip;
    options.transform.scaled_decoding = scaled_decoding;
    options.format.type = dtype == "float32"    ? efficientclip::PixelType::float32
                          : dtype == "bfloat16" ? efficientclip::PixelType::bfloat16
                                                : efficientclip::PixelType::uint8;
    options.format.channels_last = channels_last;
    std::copy(mean.begin(), mean.end(), options.format.mean);
    std::copy(std.begin(), std.end(), options.format.std);
    options.batch_size = batch_size;
    options.threads = threads;
    options.shuffle = train;
    options.shuffle_buffer = shuffle_buffer;
    options.seed = seed;
    options.epoch = epoch;
    options.rank = rank;
    options.world_size = world_size;
    for (const auto& [skip, block, number, of] : shares) options.shares.push_back({skip, block, number, of});
    options.captions = captions;
    options.keep_encoded = keep_encoded;
    options.drop_last = drop_last;
    options.consumed = consumed;
    return std::make_unique<BoundImageLoader>(options);
}

}  // namespace

void bind_images(py::module_& module) {
    py::register_exception<efficientclip::ShardError>(module, "ShardError");
    py::class_<BoundImageLoader>(module, "ImageLoader", "One pass over image shards, made by threads ahead of the consumer.")
        .def(py::init(&make_image_loader), py::kw_only(), py::arg("shards"), py::arg("batch_size"), py::arg("size"),
             py::arg("train"), py::arg("threads"), py::arg("seed"), py::arg("epoch"), py::arg("rank"),
             py::arg("world_size"), py::arg("shares"), py::arg("mean"), py::arg("std"), py::arg("dtype"),
             py::arg("channels_last"), py::arg("scale"), py::arg("ratio"), py::arg("flip"), py::arg("scaled_decoding"),
             py::arg("shuffle_buffer"), py::arg("captions"), py::arg("keep_encoded"), py::arg("drop_last"),
             py::arg("consumed"))
        .def("supply", &BoundImageLoader::supply, py::arg("address"), py::arg("owner"),
             "Lend memory for one more batch of images.")
        .def("next", &BoundImageLoader::next,
             "(owner of the memory or None at the end, records, bad samples, samples consumed).")
        .def("close", &BoundImageLoader::close, "End the threads.");
}
