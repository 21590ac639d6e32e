// The image loader's core alone, to be run under the sanitizers: shards, windows of pictures, resampling, whole passes.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <jpeglib.h>

#include "captions.hpp"
#include "check.hpp"
#include "image_loader.hpp"
#include "picture.hpp"
#include "resize.hpp"
#include "tar.hpp"
#include "transform.hpp"

using namespace efficientclip;
using std::chrono::milliseconds;

namespace {

std::mt19937 rng;

int below(int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }

std::string folder;

std::string write_file(const std::string& name, const std::string& bytes) {
    const std::string path = folder + "/" + name;
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
}

// A smooth picture with some noise, so that neighbouring pixels differ and JPEG still works as on photographs.
std::string jpeg(int width, int height, int sampling, bool progressive) {
    jpeg_compress_struct info;
    jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_compress(&info);
    unsigned char* out = nullptr;
    unsigned long size = 0;
    jpeg_mem_dest(&info, &out, &size);
    info.image_width = static_cast<JDIMENSION>(width);
    info.image_height = static_cast<JDIMENSION>(height);
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, 90, TRUE);
    info.comp_info[0].h_samp_factor = sampling == 0 ? 1 : 2;
    info.comp_info[0].v_samp_factor = sampling == 2 ? 2 : 1;
    if (progressive) jpeg_simple_progression(&info);
    jpeg_start_compress(&info, TRUE);
    std::vector<JSAMPLE> row(static_cast<std::size_t>(3 * width));
    const int phase = below(100);
    for (int y = 0; y < height; ++y) {
        for (int i = 0; i < 3 * width; ++i) {
            const double wave = 110 * std::sin((i / 3 + phase) * 0.05 * (i % 3 + 1)) * std::cos(y * 0.07 + i % 3);
            row[static_cast<std::size_t>(i)] = static_cast<JSAMPLE>(std::clamp(128 + wave + below(60) - 30, 0.0, 255.0));
        }
        JSAMPROW rows = row.data();
        jpeg_write_scanlines(&info, &rows, 1);
    }
    jpeg_finish_compress(&info);
    std::string encoded(reinterpret_cast<char*>(out), size);
    jpeg_destroy_compress(&info);
    std::free(out);
    return encoded;
}

// One member with its header, as POSIX has it.
std::string member(const std::string& name, const std::string& bytes, char type = '0') {
    std::string record(512, '\0');
    record.replace(0, std::min<std::size_t>(name.size(), 100), name, 0, 100);
    char size[13];
    std::snprintf(size, sizeof size, "%011zo", bytes.size());
    record.replace(124, 11, size);
    record[156] = type;
    record.replace(257, 8, std::string("ustar\00000", 8));
    record.replace(148, 8, 8, ' ');
    unsigned sum = 0;
    for (const char byte : record) sum += static_cast<unsigned char>(byte);
    char digits[8];
    std::snprintf(digits, sizeof digits, "%06o", sum);
    record.replace(148, 7, digits, 7);
    return record + bytes + std::string((512 - bytes.size() % 512) % 512, '\0');
}

const std::string kEnd(1024, '\0');

std::vector<TarSample> samples_of(const std::string& path, std::string* error = nullptr) {
    std::vector<TarSample> found;
    try {
        ShardFile file(path);
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
    ShardFile file(path);
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
        resampler.begin(x, y, tile);
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
            // A row's sum that is as near to two bytes may have become either.
            double least = 0, most = 0;
            for (int s = top; s < height; ++s) {
                double sum = 0;
                for (int t = left; t < width; ++t) sum += by_x[i][t] * picture[4 * (std::size_t(s) * width + t) + c];
                const double low = by_y[j][s] * rounded(sum - slack(x)), high = by_y[j][s] * rounded(sum + slack(x));
                least += std::min(low, high);
                most += std::max(low, high);
            }
            const int found = tile.pixels[std::size_t(j) * tile.stride + i] >> 8 * c & 255;
            check(rounded(least - slack(y)) <= found && found <= rounded(most + slack(y)), "resampling");
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
    const auto is = [](const Member& text, const Member& json, const char* expected) {
        const char* found = captions_missing(text, json);
        check((found == nullptr) == (expected == nullptr) && (!found || std::string(found) == expected),
              "captions of " + text.value_or("-") + " " + json.value_or("-"));
    };
    is("a", {}, nullptr);
    is({}, {}, "image without caption");
    is("\xE3\x80\x80\n", {}, "empty caption");
    is("\xC0\x80", {}, "caption is not UTF-8");
    is({}, R"({"caption": "x"})", nullptr);
    is({}, R"({"caption": "\u3000"})", "empty caption");
    is({}, R"({"caption": null})", "image without caption");
    is("a", R"({"captions": []})", "image without caption");
    is("a", R"({"captions": ["a", {"text": " "}]})", "empty caption");
    is("a", R"({"captions": [null, {"text": "b", "noise": true}]})", nullptr);
    is("a", R"({"x": 01})", "json is malformed");
    is("a", R"([])", "json is malformed");
    is("a", std::string(100'000, '['), "json is malformed");
}

struct Found {
    std::vector<std::string> keys;
    std::vector<std::byte> images;
    std::vector<std::int64_t> consumed;
    std::map<std::string, std::string> bad;
    std::string error;

    bool operator==(const Found& other) const {
        return std::tie(keys, images, bad) == std::tie(other.keys, other.images, other.bad);
    }
};

// A whole pass, with memory for `ahead` batches; given up after `most` batches.
Found run(const ImageOptions& options, int ahead, std::size_t most = 1'000'000) {
    Found found;
    const std::size_t image = options.format.image_bytes(options.transform.size);
    const std::size_t size = image * static_cast<std::size_t>(options.batch_size);
    std::deque<std::unique_ptr<std::byte[]>> lent;
    {
        ImageLoader loader(options);
        const auto lend = [&] {
            lent.push_back(std::make_unique<std::byte[]>(size));
            loader.supply(lent.back().get());
        };
        for (int i = 0; i < ahead; ++i) lend();
        ImageBatch batch;
        try {
            while (found.consumed.size() < most) {
                const auto outcome = loader.next(batch, milliseconds(below(3)));
                if (outcome == ImageLoader::Outcome::waiting) continue;
                for (const BadImage& bad : batch.bad) found.bad[bad.key] = bad.cause;
                if (outcome == ImageLoader::Outcome::finished) break;
                for (const ImageRecord& record : batch.records) found.keys.push_back(record.key);
                const std::byte* first = lent.front().get();
                found.images.insert(found.images.end(), first, first + image * batch.records.size());
                found.consumed.push_back(batch.consumed);
                lend();
                lent.pop_front();
            }
        } catch (const ShardError& error) {
            found.error = error.what();
        }
    }
    return found;
}

void test_passes() {
    ImageOptions options;
    std::set<std::string> good;
    std::map<std::string, std::string> bad;
    for (int shard = 0; shard < 5; ++shard) {
        std::string tar;
        for (int i = 0; i < 13 + shard; ++i) {
            const std::string key = std::to_string(shard) + "-" + std::to_string(i);
            std::string picture = jpeg(20 + below(60), 20 + below(60), below(3), false);
            if (i % 7 == 3) {
                picture.resize(picture.size() / 2);
                bad[key] = "truncated image";
            } else if (i % 7 == 5) {
                bad[key] = "image without caption";
            } else {
                good.insert(key);
            }
            tar += member(key + ".jpg", picture);
            if (i % 7 != 5) tar += member(key + ".txt", "caption");
        }
        options.shards.push_back(write_file("pass" + std::to_string(shard) + ".tar", tar + kEnd));
    }
    options.transform.size = 16;
    options.batch_size = 7;
    options.shuffle_buffer = 10;
    options.seed = 3;
    options.transform.flip = true;
    const Found whole = run(options, 2);
    check(std::set<std::string>(whole.keys.begin(), whole.keys.end()) == good && whole.keys.size() == good.size(),
          "each good sample once");
    check(whole.bad == bad, "bad samples by cause");
    check(!std::is_sorted(whole.keys.begin(), whole.keys.end()), "shuffled");
    for (const int threads : {2, 4}) {
        options.threads = threads;
        check(run(options, 1 + below(4)) == whole, "the same batches by any number of threads");
    }

    // Given up anywhere and started again behind the batch received last: no sample twice, none lost.
    for (std::size_t most = 0; most <= whole.consumed.size(); ++most) {
        ImageOptions again = options;
        Found first = run(again, 3, most);
        again.consumed = most == 0 ? 0 : first.consumed.back();
        const Found rest = run(again, 2);
        first.keys.insert(first.keys.end(), rest.keys.begin(), rest.keys.end());
        first.images.insert(first.images.end(), rest.images.begin(), rest.images.end());
        first.bad.insert(rest.bad.begin(), rest.bad.end());
        check(first == whole, "restored after batch " + std::to_string(most));
    }

    for (const int world_size : {2, 3, 7}) {
        std::multiset<std::string> seen;
        for (int rank = 0; rank < world_size; ++rank) {
            ImageOptions part = options;
            part.rank = rank;
            part.world_size = world_size;
            const Found found = run(part, 2);
            check(!found.keys.empty(), "every rank has samples");
            seen.insert(found.keys.begin(), found.keys.end());
        }
        check(seen == std::multiset<std::string>(good.begin(), good.end()), "ranks share all samples out");
    }

    // Behind a batch the rest is shared, and behind the first batch of a share its rest again: none twice, none lost.
    for (const std::size_t most : {0, 1, 4}) {
        const Found first = run(options, 2, most);
        std::multiset<std::string> seen(first.keys.begin(), first.keys.end());
        for (int number = 0; number < 3; ++number) {
            ImageOptions part = options;
            part.batch_size = 2;
            part.shares = {{most == 0 ? 0 : first.consumed.back(), 2, number, 3}};
            const Found some = run(part, 2, 1);
            seen.insert(some.keys.begin(), some.keys.end());
            for (int half = 0; half < 2; ++half) {
                ImageOptions rest = part;
                rest.shares.push_back({some.consumed.back(), 1, half, 2});
                const Found found = run(rest, 2);
                seen.insert(found.keys.begin(), found.keys.end());
            }
        }
        check(seen == std::multiset<std::string>(good.begin(), good.end()), "readers of one order share it out");
    }

    ImageOptions other = options;
    other.epoch = 1;
    check(run(other, 2).keys != whole.keys, "another epoch, another order");
    other = options;
    other.drop_last = true;
    check(run(other, 2).keys.size() == good.size() / 7 * 7, "the last incomplete batch left out");

    // A shard that is cut ends the pass, after what is whole.
    ImageOptions cut = options;
    cut.shuffle = false;
    std::ifstream stream(options.shards[1], std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
    bytes.resize(bytes.size() * 2 / 3);
    cut.shards[1] = write_file("cut.tar", bytes);
    const Found before = run(cut, 2);
    check(before.error.find("cut.tar") != before.error.npos && before.keys.size() > 9 + 3, "a shard that is cut");
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
    test_passes();
    std::puts("all passed");
    return 0;
}
