// Whole passes of the image loader over tars and listings, to be run under the sanitizers.
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "image_loader.hpp"
#include "listing.hpp"
#include "shards.hpp"

using namespace efficientclip;
using std::chrono::milliseconds;

namespace {

// Columns that own their memory.
struct Columns {
    std::vector<std::uint8_t> file_bytes, key_bytes, source_bytes, caption_bytes;
    std::vector<std::int64_t> file_ends{0}, key_ends{0}, source_ends{0}, text_ends{0}, caption_ends{0}, offset, length;
    std::vector<std::int32_t> file;
    bool base64 = false;

    static void add(std::vector<std::uint8_t>& bytes, std::vector<std::int64_t>& ends, const std::string& text) {
        bytes.insert(bytes.end(), text.begin(), text.end());
        ends.push_back(static_cast<std::int64_t>(bytes.size()));
    }
    std::int32_t add_file(const std::string& path) {
        add(file_bytes, file_ends, path);
        return static_cast<std::int32_t>(file_ends.size()) - 2;
    }
    void add_picture(std::int32_t in, std::int64_t at, std::int64_t size, const std::string& key,
                     const std::vector<std::string>& captions) {
        file.push_back(in);
        offset.push_back(at);
        length.push_back(size);
        add(key_bytes, key_ends, key);
        add(source_bytes, source_ends, "");
        for (const std::string& caption : captions) add(caption_bytes, text_ends, caption);
        caption_ends.push_back(static_cast<std::int64_t>(text_ends.size()) - 1);
    }
    Listing listing() const {
        return {{view(file_bytes), view(file_ends)}, view(file), view(offset), view(length), base64,
                {view(key_bytes), view(key_ends)}, {view(source_bytes), view(source_ends)},
                {view(caption_bytes), view(text_ends)}, view(caption_ends)};
    }
};

std::string base64_of(const std::string& bytes, bool for_urls) {
    std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", text;
    digits += for_urls ? "-_" : "+/";
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        std::uint32_t three = 0;
        for (std::size_t j = 0; j < 3; ++j) {
            three = three << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0);
        }
        for (std::size_t j = 0; j < 4; ++j) text += i + j <= bytes.size() ? digits[three >> (18 - 6 * j) & 63] : '=';
    }
    return text;
}

void test_base64() {
    for (int size = 0; size < 300; ++size) {
        std::string bytes;
        for (int i = 0; i < size; ++i) bytes += static_cast<char>(rng());
        for (const bool for_urls : {false, true}) {
            const std::string text = base64_of(bytes, for_urls);
            const auto found = from_base64(text);
            check(found && std::string(found->data.get(), found->size) == bytes, "base64 of " + std::to_string(size));
            if (text.empty()) continue;
            std::string broken = text;
            broken[static_cast<std::size_t>(below(static_cast<int>(text.size())))] = " \n!\x80"[below(4)];
            check(!from_base64(broken), "a stranger in base64");
            check(!from_base64(text.substr(1)), "base64 that lacks a digit");
        }
    }
    for (const char* text : {"=", "====", "A===", "A=AA", "AA=A", "AAA=AAAA"}) check(!from_base64(text), text);
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
        options.shards.push_back({write_file("pass" + std::to_string(shard) + ".tar", tar + kEnd), nullptr});
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
    std::ifstream stream(options.shards[1].path, std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
    bytes.resize(bytes.size() * 2 / 3);
    cut.shards[1].path = write_file("cut.tar", bytes);
    const Found before = run(cut, 2);
    check(before.error.find("cut.tar") != before.error.npos && before.keys.size() > 9 + 3, "a shard that is cut");
}

// The pictures of tars as files of their own and as base64 give the same batches, whichever the order.
void test_listings() {
    ImageOptions tars, files, texts;
    std::deque<Columns> columns;
    std::deque<Listing> listings;
    for (int shard = 0; shard < 4; ++shard) {
        std::string tar, base64;
        Columns in_files, in_text;
        in_text.base64 = true;
        const std::string text_path = folder + "/listing" + std::to_string(shard) + ".tsv";
        in_text.add_file(text_path);
        for (int i = 0; i < 11 + shard; ++i) {
            const std::string key = std::to_string(shard) + "-" + std::to_string(i), caption = "caption " + key;
            std::string picture = jpeg(20 + below(60), 20 + below(60), below(3), false);
            if (i == 4) picture.resize(picture.size() / 2);
            tar += member(key + ".jpg", picture);
            if (i != 6) tar += member(key + ".txt", caption);
            const std::vector<std::string> captions(i != 6 ? 1 : 0, " " + caption + "\n");
            in_files.add_picture(in_files.add_file(write_file(key + ".jpg", picture)), 0, -1, key, captions);
            const std::string encoded = base64_of(picture, shard % 2 == 0);
            base64 += key + "\t";
            in_text.add_picture(0, static_cast<std::int64_t>(base64.size()), static_cast<std::int64_t>(encoded.size()), key, captions);
            base64 += encoded + "\n";
        }
        write_file("listing" + std::to_string(shard) + ".tsv", base64);
        tars.shards.push_back({write_file("listing" + std::to_string(shard) + ".tar", tar + kEnd), nullptr});
        for (auto* made : {&in_files, &in_text}) {
            columns.push_back(std::move(*made));
            listings.push_back(columns.back().listing());
            (made == &in_files ? files : texts).shards.push_back({"table", &listings.back()});
        }
    }
    for (const bool shuffle : {false, true}) {
        for (ImageOptions* options : {&tars, &files, &texts}) {
            options->transform.size = 16;
            options->batch_size = 7;
            options->shuffle_buffer = 10;
            options->seed = 3;
            options->shuffle = shuffle;
            options->threads = 1 + below(4);
        }
        const Found whole = run(tars, 2);
        check(whole.bad.size() == 8 && whole.keys.size() == 42, "a tar's samples");
        for (ImageOptions options : {files, texts}) {
            check(run(options, 1 + below(3)) == whole, "a listing's batches");
            Found first = run(options, 3, 3);
            options.consumed = first.consumed.back();
            const Found rest = run(options, 2);
            first.keys.insert(first.keys.end(), rest.keys.begin(), rest.keys.end());
            first.images.insert(first.images.end(), rest.images.begin(), rest.images.end());
            first.bad.insert(rest.bad.begin(), rest.bad.end());
            check(first == whole, "a listing's batches, restored");
            options.consumed = 0;
            options.world_size = 3;
            std::multiset<std::string> seen;
            for (options.rank = 0; options.rank < 3; ++options.rank) {
                const Found found = run(options, 2);
                ImageOptions same = tars;
                same.rank = options.rank;
                same.world_size = 3;
                check(run(same, 2) == found, "a rank's part of a listing");
                seen.insert(found.keys.begin(), found.keys.end());
            }
            check(seen == std::multiset<std::string>(whole.keys.begin(), whole.keys.end()), "ranks share a listing out");
        }
    }

    Columns broken;
    const std::string good = jpeg(20, 20, 0, false), good_path = write_file("good.jpg", good);
    const auto size = static_cast<std::int64_t>(good.size());
    broken.add_picture(broken.add_file(good_path), 0, -1, "good", {"a"});
    broken.add_picture(broken.add_file(folder + "/absent.jpg"), 0, -1, "absent", {"a"});
    broken.add_picture(broken.add_file(folder), 0, -1, "folder", {"a"});
    check(mkfifo((folder + "/pipe").c_str(), 0600) == 0, "mkfifo");
    broken.add_picture(broken.add_file(folder + "/pipe"), 0, -1, "pipe", {"a"});
    broken.add_picture(0, 0, size + 1, "beyond", {"a"});
    broken.add_picture(0, size + 5, -1, "behind", {"a"});
    broken.add_picture(0, 0, std::int64_t(1) << 50, "large", {"a"});
    broken.add_picture(-1, 0, -1, "none", {"a"});
    broken.add_picture(0, 0, -1, "half an emoji", {"\xED\xA0\xBD"});
    broken.add_picture(0, 0, -1, "invisible", {"a", "\xE2\x80\x8B"});
    broken.add_picture(0, 0, size, "last", {"a", "b"});
    const Listing listing = broken.listing();
    ImageOptions options;
    options.shards = {{"table", &listing}};
    options.transform.size = 16;
    options.shuffle = false;
    const Found found = run(options, 2);
    check(found.keys == std::vector<std::string>{"good", "last"} && found.error.empty(), "what is good in a listing");
    const std::map<std::string, std::string> expected{
        {"absent", "picture file: No such file or directory"}, {"folder", "picture file: Is a directory"},
        {"pipe", "picture file: Illegal seek"}, {"beyond", "picture file: it ends early"},
        {"behind", "picture file: it ends early"}, {"large", "image too large"}, {"none", "caption without image"},
        {"half an emoji", "caption is not UTF-8"}, {"invisible", "empty caption"}};
    check(found.bad == expected, "what is bad in a listing");
}

}  // namespace

// pass_test FOLDER: files are written there.
int main(int argc, char** argv) {
    if (argc < 2) return 2;
    folder = argv[1];
    const auto seed = std::random_device()();
    std::fprintf(stderr, "seed %u\n", seed);
    rng.seed(seed);
    test_base64();
    test_passes();
    test_listings();
    std::puts("all passed");
    return 0;
}
