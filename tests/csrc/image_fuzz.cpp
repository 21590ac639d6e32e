// Hostile shards and pictures: whatever the bytes, an error is an exception and memory stays in bounds.
// clang's libFuzzer calls LLVMFuzzerTestOneInput; built with -DMUTATIONS, a main() makes a fixed series of mutations.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "captions.hpp"
#include "resize.hpp"
#include "tar.hpp"
#include "transform.hpp"

using namespace efficientclip;

namespace {

int decoded = 0, refused = 0;

void look_at(const std::string& picture) {
    for (const bool train : {true, false}) {
        TransformOptions options;
        options.size = 24;
        options.random_crop = options.flip = train;
        options.scale = {0.3, 1.0};
        options.scaled_decoding = picture.size() % 2 == 0;
        // Large pictures are only slow.
        options.max_pixels = 1 << 20;
        Transform transform(options);
        Tile tile;
        PixelFormat format;
        std::vector<std::byte> image(format.image_bytes(options.size));
        try {
            const Turn turn = transform.apply(reinterpret_cast<const std::uint8_t*>(picture.data()), picture.size(),
                                              Random(1, Purpose::crops, 0, picture.size()), tile);
            store_tile(tile, turn, format, image.data());
            ++decoded;
        } catch (const BadPicture&) {
            ++refused;
        }
    }
}

// Writes true checksums over the headers, which else refuse nearly all that is changed in them.
void repair_checksums(std::string& tar) {
    constexpr std::size_t kRecord = 512, kChecksum = 148, kMagic = 257;
    for (std::size_t at = 0; at + kRecord <= tar.size(); at += kRecord) {
        if (tar.compare(at + kMagic, 5, "ustar") != 0) continue;
        std::fill_n(tar.begin() + static_cast<std::ptrdiff_t>(at + kChecksum), 8, ' ');
        unsigned sum = 0;
        for (std::size_t i = at; i < at + kRecord; ++i) sum += static_cast<unsigned char>(tar[i]);
        char digits[8];
        std::snprintf(digits, sizeof digits, "%06o", sum);
        tar.replace(at + kChecksum, 7, digits, 7);
    }
}

std::vector<std::int64_t> places(const TarSample& sample) {
    std::vector<std::int64_t> found{sample.ordinal};
    for (const auto& member : {sample.image, sample.text, sample.json}) {
        found.push_back(member ? member->offset : -1);
        found.push_back(member ? member->size : -1);
    }
    return found;
}

void read_shard(std::string tar) {
    repair_checksums(tar);
    const int file = memfd_create("shard", 0);
    if (file < 0 || write(file, tar.data(), tar.size()) != static_cast<ssize_t>(tar.size())) std::abort();
    try {
        ShardFile shard("tar", "/proc/self/fd/" + std::to_string(file), tar.size() % 2 == 0);
        SampleReader samples(shard);
        TarSample sample;
        std::int64_t begin = 0;
        while (samples.next(sample)) {
            const Extent span{begin, samples.index().back() * kTarRecord};
            begin += span.size;
            const TarSample again = read_sample(shard, span, sample.ordinal);
            if (again.key != sample.key || places(again) != places(sample)) std::abort();
            std::optional<std::string> text, json;
            if (sample.text && sample.text->size < shard.size()) text = shard.read_text(*sample.text);
            if (sample.json && sample.json->size < shard.size()) json = shard.read_text(*sample.json);
            Captions captions;
            read_captions(text, json, captions);
            if (sample.image && sample.image->size < shard.size()) look_at(shard.read_text(*sample.image));
        }
    } catch (const ShardError&) {
        ++refused;
    }
    close(file);
}

bool is_picture(const std::uint8_t* data, std::size_t size) {
    return size >= 4 && (data[0] == 0xFF || data[0] == 0x89 || std::string(data, data + 4) == "RIFF");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (is_picture(data, size)) {
        look_at(std::string(data, data + size));
    } else {
        read_shard(std::string(data, data + size));
    }
    return 0;
}

#ifdef MUTATIONS
// image_fuzz SEED COUNT FILE...: COUNT mutations of each file.
int main(int argc, char** argv) {
    if (argc < 4) return 2;
    std::mt19937 rng(static_cast<unsigned>(std::atoi(argv[1])));
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(rng() % n); };
    for (int file = 3; file < argc; ++file) {
        std::ifstream stream(argv[file], std::ios::binary);
        const std::string whole{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
        for (int i = std::atoi(argv[2]); i > 0; --i) {
            std::string bytes = whole;
            // Headers decide most: half of the changes fall there.
            const auto place = [&] { return below(below(2) == 0 ? std::min<std::size_t>(bytes.size(), 700) : bytes.size()); };
            for (std::size_t changes = 1 + below(6); changes > 0 && bytes.size() > 4; --changes) {
                const std::size_t at = place();
                switch (below(6)) {
                    case 0: bytes[at] = static_cast<char>(rng()); break;
                    case 1: bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8)); break;
                    case 2: bytes[at] = static_cast<char>(below(2) == 0 ? 0xFF : 0); break;
                    case 3: bytes.erase(at, 1 + below(20)); break;
                    case 4: bytes.insert(at, bytes.substr(place(), below(40))); break;
                    case 5: bytes.resize(std::max<std::size_t>(4, at)); break;
                }
            }
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
        }
    }
    std::printf("decoded %d, refused %d\n", decoded, refused);
    return 0;
}
#endif
