// What the image loader is made of, to be run under the sanitizers: tars, captions, windows of pictures, resampling.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "captions.hpp"
#include "check.hpp"
#include "picture.hpp"
#include "resize.hpp"
#include "shards.hpp"
#include "tar.hpp"
#include "transform.hpp"

using namespace efficientclip;

namespace {

std::vector<TarSample> samples_of(const std::string& path, std::string* error = nullptr) {
    std::vector<TarSample> found;
    try {
        ShardFile file(path, path, below(2) == 0);
        SampleReader reader(file);
        for (TarSample sample; reader.next(sample);) found.push_back(sample);
    } catch (const ShardError& broken) {
        check(error != nullptr, std::string("unexpected: ") + broken.what());
        *error = broken.what();
    }
    return found;
}

void test_tar() {
    const std::string long_name = std::string(130, 'd') + "/k3.JPG";
    const std::string pax_path = "pax/k4.x.jpg", record = " path=" + pax_path + "\n";
    const std::string pax = std::to_string(record.size() + 2) + record;
    std::string whole = member("folder/", "", '5') + member("k1.jpg", "one") + member("k1.txt", std::string(700, 't')) +
                        member("a/k2.json", "{}") + member("././@LongLink", long_name + '\0', 'L') +
                        member(long_name.substr(0, 100), "three") + member("x", pax, 'x') + member("short.jpg", "four") +
                        member("link.jpg", "", '2') + member("k5", "no suffix");
    const std::string path = write_file("a.tar", whole + kEnd);
    const auto found = samples_of(path);
    std::vector<std::string> keys;
    for (const TarSample& sample : found) keys.push_back(sample.key);
    check(keys == std::vector<std::string>{"k1", "a/k2", std::string(130, 'd') + "/k3", "pax/k4", "k5"}, "keys");
    ShardFile file(path, path, below(2) == 0);
    check(file.read_text(*found[0].image) == "one" && file.read_text(*found[0].text) == std::string(700, 't'), "members");
    check(file.read_text(*found[2].image) == "three" && !found[3].image && found[3].ordinal == 3, "long names");

    // Cut anywhere, a shard gives whole samples and an error.
    for (std::size_t size = 0; size <= whole.size(); size += size % 512 == 0 ? 511 : 1) {
        std::string error;
        const auto some = samples_of(write_file("cut.tar", whole.substr(0, size)), &error);
        check(!error.empty(), "a cut at " + std::to_string(size) + " is no error");
        for (std::size_t i = 0; i < some.size(); ++i) check(some[i].key == keys[i], "samples before a cut");
        for (const TarSample& sample : some) {
            const auto& last = sample.text ? sample.text : sample.image;
            check(!last || last->offset + last->size <= static_cast<std::int64_t>(size), "a sample past the cut");
        }
    }
    std::string broken = whole, error;
    broken[1536 + 3] ^= 1;
    samples_of(write_file("broken.tar", broken), &error);
    check(error.find("broken header at byte 1536") != error.npos && error.find("broken.tar") != error.npos, error);
    samples_of(folder + "/absent.tar", &error);
    check(error.find("No such file") != error.npos, error);
}

class Rows : public RowSink {
  public:
    explicit Rows(int width) : width_(width) {}
    void rows(const std::uint8_t* const* pixels, int count) override {
        for (int i = 0; i < count; ++i) {
            for (int x = 0; x < width_; ++x) found.insert(found.end(), pixels[i] + 4 * x, pixels[i] + 4 * x + 3);
        }
    }
    std::vector<std::uint8_t> found;

  private:
    int width_;
};

std::vector<std::uint8_t> window_of(PictureDecoder& decoder, const std::string& encoded, Window window, int eighths) {
    decoder.open(reinterpret_cast<const std::uint8_t*>(encoded.data()), encoded.size());
    Rows rows(window.right - window.left);
    decoder.decode(window, eighths, window.right - window.left + 8, rows);
    check(rows.found.size() == std::size_t(3) * (window.right - window.left) * (window.bottom - window.top), "rows");
    return rows.found;
}

// What is decoded of a window is, bit for bit, what the whole picture has there.
void test_windows() {
    PictureDecoder decoder(kMaxPixels);
    for (int round = 0; round < 60; ++round) {
        const int width = 1 + below(200), height = 1 + below(200), eighths = std::vector{8, 8, 4, 2, 1}[round % 5];
        const std::string encoded = jpeg(width, height, round % 3, below(3) == 0);
        const int w = scaled_length(width, eighths), h = scaled_length(height, eighths);
        const auto whole = window_of(decoder, encoded, {0, 0, w, h}, eighths);
        for (int i = 0; i < 6; ++i) {
            const int left = below(w), top = below(h);
            const Window window{left, top, left + 1 + below(w - left), top + 1 + below(h - top)};
            const auto part = window_of(decoder, encoded, window, eighths);
            auto at = part.begin();
            for (int y = window.top; y < window.bottom; ++y) {
                const auto row = whole.begin() + 3 * (std::ptrdiff_t(y) * w + left);
                check(std::equal(row, row + 3 * (window.right - left), at), "a window differs from the picture");
                at += 3 * (window.right - left);
            }
        }
        // Cut short, it is bad whichever window is asked for.
        const std::string cut = encoded.substr(0, encoded.size() - 2 - static_cast<std::size_t>(below(20)));
        try {
            window_of(decoder, cut, {0, 0, w, std::min(h, 1)}, eighths);
            check(false, "a truncated picture passes");
        } catch (const BadPicture&) {
        }
    }
}

// Resampling against the plain double sum over Pillow's filter.
void test_resampler() {
    const auto filter = [](double x) {
        x = std::fabs(x);
        return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0.0;
    };
    for (int round = 0; round < 40; ++round) {
        const int width = 1 + below(150), height = 1 + below(150), size = 1 + below(70);
        std::vector<std::uint8_t> picture(std::size_t(4) * width * height + 4096);
        for (auto& byte : picture) byte = static_cast<std::uint8_t>(rng());
        const int left = below(width), top = below(height);
        const Side across{double(left), double(width), left, width, size, 0, size};
        const Side down{double(top), double(height), top, height, size, 0, size};
        Axis x, y;
        x.plan(across);
        y.plan(down);
        Tile tile;
        tile.resize(size);
        Resampler resampler;
        const bool columns_first = round % 2 == 1;
        resampler.begin(x, y, tile, columns_first);
        for (int row = y.first; row < y.end;) {
            const int count = std::min(1 + below(8), y.end - row);
            std::vector<const std::uint8_t*> rows;
            for (int i = 0; i < count; ++i) rows.push_back(picture.data() + 4 * (std::size_t(row + i) * width + x.first));
            resampler.rows(rows.data(), count);
            row += count;
        }
        const auto weights = [&](const Side& side, int i) {
            const double scale = (side.end - side.begin) / side.size, wide = std::max(scale, 1.0);
            std::vector<double> found(static_cast<std::size_t>(side.highest), 0);
            double sum = 0;
            for (int s = side.lowest; s < side.highest; ++s) {
                sum += found[s] = filter((s + 0.5 - side.begin - (i + 0.5) * scale) / wide);
            }
            for (double& weight : found) weight /= sum;
            return found;
        };
        std::vector<std::vector<double>> by_x, by_y;
        for (int i = 0; i < size; ++i) {
            by_x.push_back(weights(across, i));
            by_y.push_back(weights(down, i));
        }
        // What the rounding of weights may change in a sum: half a unit for each, and the strongest takes the rest.
        const auto slack = [](const Axis& axis) { return 255.0 * axis.taps / (1 << axis.shift) + 1e-9; };
        const auto rounded = [](double sum) { return std::clamp(std::floor(sum + 0.5), 0.0, 255.0); };
        for (int n = 0; n < 200; ++n) {
            const int i = below(size), j = below(size), c = below(3);
            const auto value = [&](int s, int t) { return picture[4 * (std::size_t(s) * width + t) + c]; };
            const auto& first_by = columns_first ? by_y[j] : by_x[i];
            const auto& then_by = columns_first ? by_x[i] : by_y[j];
            const double first_slack = slack(columns_first ? y : x), then_slack = slack(columns_first ? x : y);
            // A sum of the first pass that is as near to two bytes may have become either.
            double least = 0, most = 0;
            for (std::size_t s = 0; s < then_by.size(); ++s) {
                double sum = 0;
                for (std::size_t t = 0; t < first_by.size(); ++t) {
                    sum += first_by[t] * (columns_first ? value(int(t), int(s)) : value(int(s), int(t)));
                }
                const double low = then_by[s] * rounded(sum - first_slack), high = then_by[s] * rounded(sum + first_slack);
                least += std::min(low, high);
                most += std::max(low, high);
            }
            const int found = tile.pixels[std::size_t(j) * tile.stride + i] >> 8 * c & 255;
            check(rounded(least - then_slack) <= found && found <= rounded(most + then_slack), "resampling");
        }
    }
    // A plain surface stays plain.
    Axis axis;
    axis.plan({0.3, 99.7, 0, 100, 37, 0, 37});
    for (std::size_t i = 0; i < 37; ++i) {
        const auto row = axis.weights.begin() + static_cast<std::ptrdiff_t>(i) * axis.taps;
        check(std::accumulate(row, row + axis.taps, 0) == 1 << axis.shift, "weights sum up to 1");
    }
}

void test_captions() {
    using Member = std::optional<std::string>;
    const auto said = [](const Captions& captions) {
        std::string all;
        for (const Caption& caption : captions.texts) {
            all += caption.text + (caption.noise ? *caption.noise ? "!" : "." : "") + "|";
        }
        return all;
    };
    const auto is = [&](const Member& text, const Member& json, const std::string& expected) {
        Captions captions;
        const char* cause = read_captions(text, json, captions);
        check((cause == nullptr ? said(captions) : cause) == expected && (cause == nullptr || captions.texts.empty()),
              "captions of " + text.value_or("-") + " " + json.value_or("-"));
    };
    is(" a\n", {}, "a|");
    is({}, {}, "image without caption");
    is("\xE3\x80\x80\n", {}, "empty caption");
    is("\xEF\xBB\xBF\xE7\x8C\xAB\n", {}, "\xE7\x8C\xAB|");
    for (const char* invisible : {"\xE2\x80\x8B", "\xEF\xBB\xBF", " \xE2\x81\xA0\xEF\xB8\x8F\x01 ", "\xE3\x85\xA4"}) {
        is(invisible, {}, "empty caption");
    }
    is("\xE2\x80\x8B \xE7\x8C\xAB\xE2\x81\xA0", {}, "\xE7\x8C\xAB|");
    is({}, R"({"captions": ["a", "\u200b"]})", "empty caption");
    is("\xE2\x9D\xA4\xEF\xB8\x8F", {}, "\xE2\x9D\xA4\xEF\xB8\x8F|");
    is("\xC0\x80", {}, "caption is not UTF-8");
    is("\xED\xA0\xBD", {}, "caption is not UTF-8");
    is({}, R"({"caption": "x"})", "x|");
    is({}, R"({"caption": "\u3000"})", "empty caption");
    is({}, R"({"caption": "\ud83d\ude00\u00e9\n"})", "\xF0\x9F\x98\x80\xC3\xA9|");
    is({}, R"({"caption": "\ud83d"})", "caption is not UTF-8");
    is({}, R"({"caption": "\ud83d\u0061"})", "caption is not UTF-8");
    is({}, R"({"caption": "a", "x": "\ud83d"})", "a|");
    is({}, R"({"caption": null})", "image without caption");
    is({}, R"({"caption": NaN})", "caption is no text");
    is({}, R"({"caption": ["a", "b"]})", "a|b|");
    is({}, R"({"caption": ["a", ["b"]]})", "caption is no text");
    is("a", R"({"captions": null, "caption": "b"})", "a|");
    is("a", R"({"captions": "b"})", "b|");
    is("a", R"({"captions": []})", "image without caption");
    is("a", R"({"captions": ["a", {"text": " "}]})", "empty caption");
    is("a", R"({"captions": [null, {"text": "b", "noise": true}]})", "caption is no text");
    is("a", R"({"captions": [{"noise": true}]})", "caption is no text");
    is("a", R"({"captions": [{"text": "b", "noise": true}, {"text": "c", "noise": false}, {"text": "d", "noise": 1}, "e"]})",
       "b!|c.|d|e|");
    is("a", R"({"x": 01})", "json is malformed");
    is("a", R"([])", "json is malformed");
    is("a", std::string(100'000, '['), "json is malformed");

    Captions found;
    read_captions({}, R"({"captions": [], "source": "web", "captions_en": [" cat ", null, "", "dog"]})", found);
    check(found.source == "web" && found.english == std::vector<std::string>{"cat", "dog"}, "what else a record says");
    found = {};
    check(read_captions({" a ", "b"}, found) == nullptr && said(found) == "a|b|", "captions of a column");
    check(std::string(read_captions(std::vector<std::string_view>{}, found = {})) == "image without caption", "none in a column");
}

void test_stores() {
    Tile tile;
    tile.resize(11);
    for (auto& pixel : tile.pixels) pixel = rng();
    for (int turn = 0; turn < 8; ++turn) {
        const Turn turned{(turn & 4) != 0, (turn & 1) != 0, (turn & 2) != 0};
        for (const bool channels_last : {false, true}) {
            PixelFormat format;
            format.channels_last = channels_last;
            for (int c = 0; c < 3; ++c) {
                format.mean[c] = 0.4f + 0.1f * c;
                format.std[c] = 0.2f + 0.1f * c;
            }
            std::vector<float> floats(3 * 121);
            std::vector<std::uint16_t> halves(3 * 121);
            std::vector<std::uint8_t> bytes(3 * 121);
            store_tile(tile, turned, format, reinterpret_cast<std::byte*>(floats.data()));
            format.type = PixelType::bfloat16;
            store_tile(tile, turned, format, reinterpret_cast<std::byte*>(halves.data()));
            format.type = PixelType::uint8;
            store_tile(tile, turned, format, reinterpret_cast<std::byte*>(bytes.data()));
            for (int y = 0; y < 11; ++y) {
                for (int x = 0; x < 11; ++x) {
                    const int u = turned.mirrored_x ? 10 - x : x, v = turned.mirrored_y ? 10 - y : y;
                    const auto pixel = turned.transposed ? tile.pixels[u * tile.stride + v] : tile.pixels[v * tile.stride + u];
                    for (int c = 0; c < 3; ++c) {
                        const int at = channels_last ? (y * 11 + x) * 3 + c : (c * 11 + y) * 11 + x;
                        const int value = pixel >> 8 * c & 255;
                        const float expected = (value / 255.0f - format.mean[c]) / format.std[c];
                        std::uint32_t widened = static_cast<std::uint32_t>(halves[at]) << 16;
                        float half;
                        std::memcpy(&half, &widened, 4);
                        check(bytes[at] == value && std::fabs(floats[at] - expected) < 2e-6f &&
                                  std::fabs(half - floats[at]) <= std::fabs(floats[at]) / 256,
                              "stored values");
                    }
                }
            }
        }
    }
}

// The same pictures in every build: compared between the vectorised code and the portable.
void print_digest() {
    rng.seed(5);
    std::uint64_t digest = 14695981039346656037ull;
    for (int i = 0; i < 30; ++i) {
        TransformOptions options;
        options.size = 1 + below(100);
        options.random_crop = i % 2 == 0;
        options.scale = {0.1, 1.0};
        Transform transform(options);
        const std::string encoded = jpeg(1 + below(300), 1 + below(300), i % 3, false);
        Tile tile;
        const Turn turn = transform.apply(reinterpret_cast<const std::uint8_t*>(encoded.data()), encoded.size(),
                                          Random(1, Purpose::crops, 0, static_cast<std::uint64_t>(i)), tile);
        PixelFormat format;
        format.type = i % 3 == 0 ? PixelType::bfloat16 : PixelType::float32;
        format.std[1] = 0.3f;
        std::vector<std::byte> image(format.image_bytes(options.size));
        store_tile(tile, turn, format, image.data());
        for (const std::byte byte : image) digest = (digest ^ static_cast<std::uint64_t>(byte)) * 1099511628211ull;
    }
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
}

}  // namespace

// image_test FOLDER: files are written there. image_test: only the digest.
int main(int argc, char** argv) {
    if (argc < 2) {
        print_digest();
        return 0;
    }
    folder = argv[1];
    const auto seed = std::random_device()();
    std::fprintf(stderr, "seed %u\n", seed);
    rng.seed(seed);
    test_tar();
    test_windows();
    test_resampler();
    test_stores();
    test_captions();
    std::puts("all passed");
    return 0;
}
