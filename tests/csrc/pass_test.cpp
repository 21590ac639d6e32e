// Whole passes of the image loader over tars and listings, to be run under the sanitizers.
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <utility>
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

// Keeps indexes, and gives shards that are elsewhere; those of `absent` cannot be had.
struct Shelf : Keeper {
    std::map<int, TarIndex> indexes;
    std::map<int, std::string> elsewhere;
    std::set<int> absent;
    std::vector<int> asked;
    std::map<int, std::vector<int>> told;
    std::shared_ptr<int> alive = std::make_shared<int>();

    Fetched fetch(int shard, const std::vector<int>& next) override {
        asked.push_back(shard);
        told[shard] = next;
        if (absent.count(shard) != 0) throw ShardError("shard " + std::to_string(shard) + " cannot be had");
        return {elsewhere.at(shard), {}, alive};
    }
    std::optional<TarIndex> index(int shard) override {
        const auto found = indexes.find(shard);
        return found == indexes.end() ? std::nullopt : std::optional(found->second);
    }
    void keep(int shard, const TarIndex& index) override { indexes[shard] = index; }
};

struct Found {
    std::vector<std::string> keys;
    std::vector<std::byte> images;
    std::vector<std::int64_t> consumed;
    std::map<std::string, std::string> bad;
    std::vector<BadShard> bad_shards;
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
                for (const BadShard& bad : batch.bad_shards) found.bad_shards.push_back(bad);
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

Found joined(Found first, const Found& rest) {
    first.keys.insert(first.keys.end(), rest.keys.begin(), rest.keys.end());
    first.images.insert(first.images.end(), rest.images.begin(), rest.images.end());
    first.bad.insert(rest.bad.begin(), rest.bad.end());
    first.bad_shards.insert(first.bad_shards.end(), rest.bad_shards.begin(), rest.bad_shards.end());
    return first;
}

// The shuffle buffer gives samples long before it is full, each once, and mixes as far as it reaches.
void test_buffer() {
    std::string tar;
    for (int i = 0; i < 400; ++i) tar += member(std::to_string(i) + ".txt", "caption");
    ImageOptions options;
    options.shards.push_back({write_file("buffer.tar", tar + kEnd), nullptr});
    options.shuffle_buffer = 100;
    std::vector<std::int64_t> order;
    const auto emit = [&](Sample&& sample) {
        order.push_back(sample.where.ordinal);
        return true;
    };
    Pass(options, emit, [] { return false; }, [](BadShard) {}).run();
    std::int64_t moved = 0;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(order.size()); ++i) {
        check(order[i] <= std::min<std::int64_t>(25 + 2 * i, 100 + i), "drawn from what the buffer holds by then");
        moved += std::abs(order[i] - i);
    }
    check(moved > 400 * 20, "samples move far");
    check(std::set<std::int64_t>(order.begin(), order.end()).size() == 400 && order.size() == 400, "each sample once");
}

// Indexes and fetches change no batch; `whole` is the pass over `options` without them.
void test_keepers(ImageOptions options, const Found& whole) {
    Shelf shelf;
    options.keeper = &shelf;
    check(run(options, 2) == whole && shelf.indexes.size() == options.shards.size(), "indexes are made");
    const std::map<int, TarIndex> indexes = shelf.indexes;
    check(run(options, 2) == whole, "the same batches by indexes");
    const Found some = run(options, 2, 2);
    options.consumed = some.consumed.back();
    check(joined(some, run(options, 2)) == whole, "restored by indexes");
    options.consumed = 0;
    options.shares = {{3, 2, 1, 2}};
    const Found share = run(options, 2);
    shelf.indexes.clear();
    check(run(options, 2) == share, "the same share by indexes");
    options.shares.clear();

    ImageOptions far = options;
    for (int shard = 0; shard < static_cast<int>(far.shards.size()); ++shard) {
        if (shard == 1) continue;
        Shard& one = far.shards[static_cast<std::size_t>(shard)];
        shelf.elsewhere[shard] = std::exchange(one.path, "elsewhere " + std::to_string(shard));
        one.elsewhere = true;
    }
    for (const bool by_index : {false, true}) {
        shelf.indexes = by_index ? indexes : std::map<int, TarIndex>();
        shelf.asked.clear();
        check(run(far, 2) == whole && shelf.asked.size() == far.shards.size() - 1, "each shard fetched once");
        for (std::size_t i = 0; i < shelf.asked.size(); ++i) {
            const std::vector<int> rest(shelf.asked.begin() + static_cast<std::ptrdiff_t>(i) + 1, shelf.asked.end());
            check(shelf.told.at(shelf.asked[i]) == rest, "what follows is told");
        }
        check(shelf.alive.use_count() == 1, "nothing is held behind the pass");
    }
    // Behind the last sample but two nothing is fetched that holds none of them.
    far.shuffle = false;
    const Found in_order = run(far, 2);
    far.consumed = in_order.consumed.back() - 2;
    shelf.asked.clear();
    check(run(far, 2).keys.size() <= 2 && shelf.asked == std::vector<int>{4}, "passed over without a fetch");
    far.consumed = 0;
    far.shuffle = true;

    for (const bool by_index : {false, true}) {
        shelf.indexes = by_index ? indexes : std::map<int, TarIndex>();
        shelf.absent = {0, 3};
        far.max_bad_shards = 1;
        check(run(far, 2).error.find("cannot be had") != std::string::npos, "one bad shard too many");
        far.max_bad_shards = 2;
        const Found found = run(far, 2);
        check(found.error.empty() && found.bad_shards.size() == 2, "two bad shards are allowed");
        for (const std::string& key : found.keys) check(key[0] != '0' && key[0] != '3', "of a bad shard nothing comes");
        std::multiset<std::string> expected, got(found.keys.begin(), found.keys.end());
        for (const std::string& key : whole.keys) {
            if (key[0] != '0' && key[0] != '3') expected.insert(key);
        }
        check(got == expected, "all of the others come");
        // Both can be had again: the epoch goes on as it was.
        const Found begun = run(far, 2, 3);
        ImageOptions again = far;
        again.bad_shards = found.bad_shards;
        again.consumed = begun.consumed.back();
        shelf.absent.clear();
        const Found both = joined(begun, run(again, 2));
        got = {both.keys.begin(), both.keys.end()};
        check(got == expected, "restored beside bad shards");
        again = far;
        again.consumed = begun.consumed.back();
        again.bad_shards = {};
        shelf.absent = {0, 3};
        if (!by_index) check(!run(again, 2).error.empty(), "passing over, a bad shard that is not known ends the pass");
        again = far;
        again.max_bad_shards = 1;
        again.bad_shards = {{0, 0, "known"}};
        shelf.absent = {3};
        check(run(again, 2).error.find("cannot be had") != std::string::npos, "the known ones count");
    }
    shelf.absent.clear();

    // What one rank lacks of the shards that ranks share shifts nothing.
    far.world_size = 3;
    far.max_bad_shards = 1;
    shelf.indexes.clear();
    for (const int lacking : {0, 2, 3, 4}) {
        std::multiset<std::string> seen;
        for (far.rank = 0; far.rank < 3; ++far.rank) {
            shelf.absent = far.rank == 0 ? std::set<int>{lacking} : std::set<int>{};
            const Found found = run(far, 2);
            check(found.error.empty(), "a rank that lacks a shard goes on");
            seen.insert(found.keys.begin(), found.keys.end());
        }
        check(std::set<std::string>(seen.begin(), seen.end()).size() == seen.size(), "no sample on two ranks");
        for (const std::string& key : whole.keys) {
            if (key[0] != '0' + lacking) check(seen.count(key) == 1, "of other shards none is lost");
        }
    }
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
        const Found first = run(again, 3, most);
        again.consumed = most == 0 ? 0 : first.consumed.back();
        check(joined(first, run(again, 2)) == whole, "restored after batch " + std::to_string(most));
    }

    test_keepers(options, whole);
    test_buffer();

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

    // Of a share the ranks draw alike, and each epoch anew; what stands twice is visited twice.
    ImageOptions half = options;
    for (Shard& shard : half.shards) shard.share = 0.5;
    const auto seen_of = [&](ImageOptions given, int world_size) {
        std::multiset<std::string> seen;
        given.world_size = world_size;
        for (given.rank = 0; given.rank < world_size; ++given.rank) {
            const Found found = run(given, 2);
            seen.insert(found.keys.begin(), found.keys.end());
        }
        return seen;
    };
    const std::multiset<std::string> drawn = seen_of(half, 1);
    check(drawn.size() > good.size() / 4 && drawn.size() < good.size() * 3 / 4, "half of the samples");
    for (const int world_size : {2, 3, 7}) check(seen_of(half, world_size) == drawn, "ranks draw alike");
    half.epoch = 1;
    check(seen_of(half, 1) != drawn, "another epoch, another draw");
    half.epoch = 0;
    half.shards.insert(half.shards.end(), options.shards.begin(), options.shards.end());
    const std::multiset<std::string> more = seen_of(half, 2);
    check(more == seen_of(half, 1) && more.size() == good.size() + drawn.size(), "a visit and a share of one");
    const Found begun = run(half, 2, 3);
    half.consumed = begun.consumed.back();
    std::multiset<std::string> both(begun.keys.begin(), begun.keys.end());
    both.merge(seen_of(half, 1));
    check(both == more, "a share, restored");

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
    for (const bool shuffle : {false, true}) {
        cut.shuffle = shuffle;
        cut.max_bad_shards = 1;
        const Found past = run(cut, 2);
        check(past.error.empty() && past.bad_shards.size() == 1 && past.bad_shards[0].shard == 1, "behind a cut shard");
        check(past.bad_shards[0].samples > 3 && past.bad_shards[0].samples < 14, "how many samples it gave");
        check(past.keys.size() > good.size() - 14 && past.keys.size() < good.size(), "all but its end");
        const Found begun = run(cut, 2, 3);
        ImageOptions again = cut;
        again.consumed = begun.consumed.back();
        again.bad_shards = begun.bad_shards;
        check(joined(begun, run(again, 2)).keys == past.keys, "restored around a cut shard");

        // Mended where it ended a pass, the pass goes on as if nothing had been.
        cut.max_bad_shards = 0;
        const Found ended = run(cut, 2);
        again = options;
        again.shuffle = shuffle;
        const Found undisturbed = run(again, 2);
        again.consumed = ended.consumed.empty() ? 0 : ended.consumed.back();
        check(!ended.error.empty() && joined(ended, run(again, 2)).keys == undisturbed.keys, "a mended shard");
    }
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
            const Found first = run(options, 3, 3);
            options.consumed = first.consumed.back();
            check(joined(first, run(options, 2)) == whole, "a listing's batches, restored");
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

    // More of a tar than lie on their way at once, then a listing.
    ImageOptions mixed = tars;
    mixed.shards = {tars.shards[0], tars.shards[1], files.shards[2], texts.shards[3]};
    mixed.shuffle = tars.shuffle = false;
    const Found expected_of_all = run(tars, 2);
    for (int round = 0; round < 20; ++round) {
        mixed.threads = 1 + below(4);
        check(run(mixed, 1 + below(3)) == expected_of_all, "tars and listings");
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
