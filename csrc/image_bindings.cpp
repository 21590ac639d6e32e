#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "captions.hpp"
#include "image_loader.hpp"
#include "listing.hpp"
#include "transform.hpp"

namespace py = pybind11;

namespace {

using efficientclip::ImageBatch;
using efficientclip::ImageLoader;
using efficientclip::ImageOptions;

// Names in a tar are bytes; what is no UTF-8 in them becomes \xNN, which every file format can hold.
py::str text(const std::string& bytes) {
    PyObject* decoded = PyUnicode_DecodeUTF8(bytes.data(), static_cast<py::ssize_t>(bytes.size()), "backslashreplace");
    if (decoded == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(decoded);
}

py::bytes bytes_of(const efficientclip::Blob& blob) { return {blob.data.get(), blob.size}; }

// (texts, what is known of each being wrong, source, English texts)
py::tuple captions_of(const efficientclip::Captions& captions) {
    py::list texts, noise, english;
    for (const efficientclip::Caption& caption : captions.texts) {
        texts.append(text(caption.text));
        noise.append(caption.noise);
    }
    for (const std::string& caption : captions.english) english.append(text(caption));
    return py::make_tuple(texts, noise, text(captions.source), english);
}

py::tuple read_captions(const std::optional<std::string>& txt, const std::optional<std::string>& json) {
    efficientclip::Captions captions;
    if (const char* cause = efficientclip::read_captions(txt, json, captions)) throw py::value_error(cause);
    return captions_of(captions);
}

py::str stripped(const py::str& text) {
    const auto encoded =
        py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
    if (!encoded) throw py::error_already_set();
    const std::string_view whole = encoded, left = efficientclip::stripped(whole);
    if (left.size() == whole.size()) return text;
    PyObject* decoded = PyUnicode_DecodeUTF8(left.data(), static_cast<py::ssize_t>(left.size()), "surrogatepass");
    if (decoded == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::str>(decoded);
}

py::bytes read_picture(const std::string& path, std::int64_t offset, std::int64_t size, bool base64) {
    efficientclip::Extent extent{offset, size};
    try {
        return bytes_of(efficientclip::PictureReader().read(path, extent, base64));
    } catch (const efficientclip::BadPicture& bad) {
        throw py::value_error(bad.cause);
    }
}

// `decode` is borrowed: the threads that hold the result have no right to let go of an object.
efficientclip::OtherDecoder other_decoder(py::handle decode) {
    return [decode](const std::uint8_t* encoded, std::size_t size) -> efficientclip::Pixels {
        const Asking asked;
        if (asked.too_late()) throw efficientclip::BadPicture{"undecodable image"};
        const py::gil_scoped_acquire acquire;
        try {
            const py::object found = decode(py::bytes(reinterpret_cast<const char*>(encoded), size));
            if (py::isinstance<py::str>(found)) throw efficientclip::BadPicture{found.cast<std::string>()};
            auto [width, height, rgba] = found.cast<std::tuple<int, int, std::string>>();
            return {width, height, std::move(rgba)};
        } catch (const py::error_already_set& error) {
            throw std::runtime_error(error.what());
        }
    };
}

py::array_t<std::uint8_t> decode_square(const std::string_view& encoded, int size, const py::function& other) {
    efficientclip::TransformOptions options;
    options.size = size;
    options.random_crop = false;
    efficientclip::PixelFormat format;
    format.type = efficientclip::PixelType::uint8;
    format.channels_last = true;
    py::array_t<std::uint8_t> square(std::vector<py::ssize_t>{size, size, 3});
    auto* out = reinterpret_cast<std::byte*>(square.mutable_data());
    std::string cause;
    {
        const Unlocked unlocked;
        try {
            efficientclip::Transform transform(options, other_decoder(other));
            efficientclip::Tile tile;
            const auto* data = reinterpret_cast<const std::uint8_t*>(encoded.data());
            const efficientclip::Turn turn =
                transform.apply(data, encoded.size(), {0, efficientclip::Purpose::crops, 0, 0}, tile);
            efficientclip::store_tile(tile, turn, format, out);
        } catch (const efficientclip::BadPicture& bad) {
            cause = bad.cause;
        }
    }
    if (!cause.empty()) throw py::value_error(cause);
    return square;
}

efficientclip::Strings strings(const py::handle& pair, const char* name) {
    const auto [bytes, ends] = pair.cast<std::pair<py::array, py::array>>();
    return {view<std::uint8_t>(bytes, name), view<std::int64_t>(ends, name)};
}

efficientclip::Listing listing_of(const py::dict& columns) {
    efficientclip::Listing listing;
    listing.files = strings(columns["files"], "files");
    listing.file = view<std::int32_t>(columns["file"], "file");
    listing.offset = view<std::int64_t>(columns["offset"], "offset");
    listing.length = view<std::int64_t>(columns["length"], "length");
    listing.base64 = columns["base64"].cast<bool>();
    listing.keys = strings(columns["keys"], "keys");
    listing.sources = strings(columns["sources"], "sources");
    listing.captions = strings(columns["captions"], "captions");
    listing.caption_ends = view<std::int64_t>(columns["caption_ends"], "caption_ends");
    const std::int64_t n = listing.size();
    if (listing.offset.size != n || listing.length.size != n || listing.keys.ends.size != n + 1 ||
        listing.sources.ends.size != n + 1 || listing.caption_ends.size != n + 1) {
        throw py::value_error("a listing's columns are of different lengths");
    }
    return listing;
}

// What `ask`, which calls Python, gives in a thread of C++.
template <class Ask>
auto asked(const Ask& ask) {
    const Asking asked;
    if (asked.too_late()) throw efficientclip::ShardError("the program ends");
    const py::gil_scoped_acquire acquire;
    try {
        return ask();
    } catch (const py::error_already_set& error) {
        throw std::runtime_error(error.what());
    }
}

// A Keeper in Python, which is borrowed: see _loader.pyi.
class PythonKeeper : public efficientclip::Keeper {
  public:
    explicit PythonKeeper(py::handle keeper) : keeper_(keeper) {}

    efficientclip::Fetched fetch(int shard, const std::vector<int>& next) override {
        return asked([&] {
            py::object found = keeper_.attr("fetch")(shard, next);
            efficientclip::Fetched fetched;
            if (py::isinstance<py::str>(found)) throw efficientclip::ShardError(found.cast<std::string>());
            const auto [path, columns, owner] =
                found.cast<std::tuple<std::string, std::optional<py::dict>, py::object>>();
            fetched.path = path;
            if (columns) fetched.listing = listing_of(*columns);
            // Whichever thread lets go of it last may do so without the interpreter.
            fetched.owner = std::shared_ptr<void>(found.release().ptr(), [](void* object) {
                const Asking asked;
                if (asked.too_late()) return;
                const py::gil_scoped_acquire acquire;
                Py_DECREF(static_cast<PyObject*>(object));
            });
            return fetched;
        });
    }

    std::optional<efficientclip::TarIndex> index(int shard) override {
        return asked([&]() -> std::optional<efficientclip::TarIndex> {
            const py::object found = keeper_.attr("index")(shard);
            if (found.is_none()) return std::nullopt;
            const auto records = view<std::uint32_t>(found.cast<py::array>(), "index");
            return efficientclip::TarIndex(records.data, records.data + records.size);
        });
    }

    void keep(int shard, const efficientclip::TarIndex& index) override {
        asked([&] {
            keeper_.attr("keep")(shard, py::array_t<std::uint32_t>(static_cast<py::ssize_t>(index.size()), index.data()));
            return 0;
        });
    }

  private:
    py::handle keeper_;
};

// The loader, the columns that its threads read and the memory that they write to.
class BoundImageLoader {
  public:
    // A shard is the tar of that path, unless it has columns; of its samples that share is read.
    BoundImageLoader(ImageOptions options, const std::vector<std::string>& shards, const std::vector<double>& shard_shares,
                     std::vector<std::optional<py::dict>> listings, const std::vector<bool>& elsewhere,
                     py::object keeper, py::function other)
        : keep_encoded_(options.keep_encoded),
          pid_(getpid()),
          columns_(std::move(listings)),
          keeper_object_(std::move(keeper)),
          keeper_(keeper_object_),
          other_(std::move(other)) {
        options.other = other_decoder(other_);
        options.keeper = &keeper_;
        listings_.reserve(columns_.size());
        for (std::size_t i = 0; i < shards.size(); ++i) {
            options.shards.push_back({shards[i], nullptr, shard_shares.at(i), elsewhere.at(i)});
            if (!columns_.at(i)) continue;
            listings_.push_back(listing_of(*columns_[i]));
            options.shards.back().listing = &listings_.back();
        }
        loader_ = std::make_unique<ImageLoader>(options);
    }

    ~BoundImageLoader() { close(); }

    void supply(std::uintptr_t address, py::object owner) {
        ImageLoader& loader = open_loader();
        lent_.push_back(std::move(owner));
        const Unlocked unlocked;
        loader.supply(reinterpret_cast<std::byte*>(address));
    }

    py::tuple next() {
        constexpr std::chrono::milliseconds kBetweenSignals{50};
        ImageLoader& loader = open_loader();
        ImageBatch batch;
        auto outcome = ImageLoader::Outcome::waiting;
        while (outcome == ImageLoader::Outcome::waiting) {
            {
                const Unlocked unlocked;
                outcome = loader.next(batch, kBetweenSignals);
            }
            if (outcome == ImageLoader::Outcome::waiting && PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        py::object images = py::none();
        if (outcome == ImageLoader::Outcome::batch) {
            images = std::move(lent_.front());
            lent_.pop_front();
        }
        py::list records, bad, bad_shards;
        for (const auto& record : batch.records) {
            const py::tuple captions = captions_of(record.captions);
            records.append(py::make_tuple(
                text(record.key), record.shard, record.ordinal, record.extent.offset, record.extent.size, captions[0],
                captions[1], captions[2], captions[3], record.without,
                record.json ? py::object(py::bytes(*record.json)) : py::none(),
                keep_encoded_ ? py::object(bytes_of(record.encoded)) : py::none(), record.consumed));
        }
        for (const auto& sample : batch.bad) {
            bad.append(py::make_tuple(sample.shard, text(sample.key), text(sample.cause)));
        }
        for (const auto& shard : batch.bad_shards) {
            bad_shards.append(py::make_tuple(shard.shard, shard.samples, text(shard.cause)));
        }
        return py::make_tuple(images, records, bad, bad_shards, batch.consumed, batch.by_other);
    }

    void close() {
        std::unique_ptr<ImageLoader> closing = std::move(loader_);
        if (getpid() != pid_) {
            // The threads do not exist here, and the lock may be held by one for ever.
            static_cast<void>(closing.release());
            return;
        }
        {
            const Unlocked unlocked;
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
    std::vector<std::optional<py::dict>> columns_;
    std::vector<efficientclip::Listing> listings_;
    py::object keeper_object_;
    PythonKeeper keeper_;
    py::function other_;
    std::deque<py::object> lent_;
    std::unique_ptr<ImageLoader> loader_;  // ends before what it writes to
};

std::unique_ptr<BoundImageLoader> make_image_loader(
    const std::vector<std::string>& shards, const std::vector<double>& shard_shares,
    std::vector<std::optional<py::dict>> listings, const std::vector<bool>& elsewhere, py::object keeper,
    int max_bad_shards, const std::vector<std::tuple<int, std::int64_t, std::string>>& bad_shards, py::function other,
    int batch_size, int size, bool train, int threads, std::uint64_t seed, std::uint32_t epoch, int rank,
    int world_size, const std::vector<std::array<std::int64_t, 4>>& shares,
    const std::array<float, 3>& mean, const std::array<float, 3>& std, const std::string& dtype, bool channels_last,
    const std::array<double, 2>& scale, const std::array<double, 2>& ratio, bool flip, bool scaled_decoding,
    int shuffle_buffer, bool captions, bool keep_encoded, bool drop_last, std::int64_t consumed) {
    ImageOptions options;
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
    options.max_bad_shards = max_bad_shards;
    for (const auto& [shard, samples, cause] : bad_shards) options.bad_shards.push_back({shard, samples, cause});
    for (const auto& [skip, block, number, of] : shares) options.shares.push_back({skip, block, number, of});
    options.captions = captions;
    options.keep_encoded = keep_encoded;
    options.drop_last = drop_last;
    options.consumed = consumed;
    return std::make_unique<BoundImageLoader>(std::move(options), shards, shard_shares, std::move(listings), elsewhere, std::move(keeper),
                                              std::move(other));
}

}  // namespace

void bind_images(py::module_& module) {
    py::register_exception<efficientclip::ShardError>(module, "ShardError");
    module.attr("IMAGE_SUFFIXES") = py::cast(std::vector<std::string>(std::begin(efficientclip::kImageSuffixes),
                                                                      std::end(efficientclip::kImageSuffixes)));
    module.def("read_captions", &read_captions, py::arg("txt"), py::arg("json"));
    module.def("stripped", &stripped, py::arg("text"));
    module.def("read_picture", &read_picture, py::arg("path"), py::arg("offset"), py::arg("size"), py::arg("base64"));
    module.def("decode_square", &decode_square, py::arg("encoded"), py::arg("size"),
               py::arg("other"));
    py::class_<BoundImageLoader>(module, "ImageLoader", "One pass over image shards, made by threads ahead of the consumer.")
        .def(py::init(&make_image_loader), py::kw_only(), py::arg("shards"), py::arg("shard_shares"),
             py::arg("listings"), py::arg("elsewhere"), py::arg("keeper"), py::arg("max_bad_shards"),
             py::arg("bad_shards"), py::arg("other"), py::arg("batch_size"), py::arg("size"), py::arg("train"),
             py::arg("threads"), py::arg("seed"), py::arg("epoch"), py::arg("rank"), py::arg("world_size"), py::arg("shares"), py::arg("mean"), py::arg("std"), py::arg("dtype"),
             py::arg("channels_last"), py::arg("scale"), py::arg("ratio"), py::arg("flip"), py::arg("scaled_decoding"),
             py::arg("shuffle_buffer"), py::arg("captions"), py::arg("keep_encoded"), py::arg("drop_last"),
             py::arg("consumed"))
        .def("supply", &BoundImageLoader::supply, py::arg("address"), py::arg("owner"),
             "Lend memory for one more batch of images.")
        .def("next", &BoundImageLoader::next,
             "(owner of the memory or None at the end, records, bad samples, bad shards, samples consumed, by `other`).")
        .def("close", &BoundImageLoader::close, "End the threads.");
}
