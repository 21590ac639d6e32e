// Order, masks and the pair loader's core, to be run under the sanitizers: against the plainest loops, then each error.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "pair_loader.hpp"

using namespace efficientclip;
using std::chrono::milliseconds;

namespace {

std::mt19937_64 rng;

std::int64_t below(std::int64_t n) { return std::uniform_int_distribution<std::int64_t>(0, n - 1)(rng); }

std::vector<std::uint8_t> bits_of(const std::vector<bool>& kept) {
    std::vector<std::uint8_t> bits((kept.size() + 7) / 8);
    for (std::size_t i = 0; i < kept.size(); ++i) bits[i / 8] |= static_cast<std::uint8_t>(kept[i] << (i % 8));
    return bits;
}

std::vector<bool> random_mask(std::int64_t n, double share) {
    std::vector<bool> kept;
    for (std::int64_t i = 0; i < n; ++i) kept.push_back(std::uniform_real_distribution<>(0, 1)(rng) < share);
    return kept;
}

void test_random() {
    // The known answers of the generator's authors.
    check(philox({0, 0, 0, 0}, {0, 0}) == Philox4{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, "philox of zeros");
    check(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Philox4{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1},
          "philox of pi");
    Random random(1, Purpose::masks, 2, 3);
    std::map<std::uint32_t, int> seen;
    double sum = 0;
    for (int i = 0; i < 60'000; ++i) {
        ++seen[random.below(6)];
        sum += random.uniform();
    }
    check(seen.size() == 6, "below stays below");
    for (const auto& [value, times] : seen) check(std::abs(times - 10'000) < 500, "below is uniform");
    check(std::abs(sum / 60'000 - 0.5) < 0.01, "uniform is uniform");
    std::set<std::uint32_t> firsts;
    for (const Purpose purpose : {Purpose::masks, Purpose::texts}) {
        for (const std::uint32_t epoch : {0u, 1u}) {
            for (const std::uint64_t item : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1} << 32}) {
                for (const std::uint64_t seed : {0ull, 1ull, 1ull << 32}) {
                    firsts.insert(Random(seed, purpose, epoch, item).bits());
                }
            }
        }
    }
    check(firsts.size() == 36, "seed, purpose, epoch and item each choose another stream");
}

std::vector<std::int64_t> all_of(Order order) {
    std::vector<std::int64_t> rows(static_cast<std::size_t>(order.size()));
    order.read(0, order.size(), rows.data());
    return rows;
}

void test_order() {
    for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, std::int64_t{255}, std::int64_t{257},
                                 1 + below(5'000), 2 * kBlockRows * kWindowBlocks + below(5'000)}) {
        const std::vector<bool> kept = random_mask(n, 0.8);
        const std::vector<std::uint8_t> bits = bits_of(kept);
        std::vector<std::int64_t> expected[2];
        for (std::int64_t row = 0; row < n; ++row) expected[kept[static_cast<std::size_t>(row)]].push_back(row);
        for (const bool chosen : {false, true}) {
            Order order(n, view(bits), chosen, 5, Purpose::kept_pairs, 1);
            std::vector<std::int64_t> rows = all_of(order);
            for (int round = 0; round < 20 && order.size() > 0; ++round) {
                const std::int64_t first = below(order.size()), count = below(order.size() - first + 1);
                std::vector<std::int64_t> part(static_cast<std::size_t>(count));
                order.read(first, count, part.data());
                check(std::equal(part.begin(), part.end(), rows.begin() + first), "any place is read alike");
                if (n > 100'000 && round == 5) break;
            }
            if (rows.size() > 200) {
                check(rows != all_of(Order(n, view(bits), chosen, 6, Purpose::kept_pairs, 1)), "seed changes order");
                check(rows != all_of(Order(n, view(bits), chosen, 5, Purpose::kept_pairs, 2)), "epoch changes order");
            }
            std::sort(rows.begin(), rows.end());
            check(rows == expected[chosen], "an order visits the chosen rows once");
            check_throws<std::out_of_range>([&] { order.read(0, order.size() + 1, nullptr); }, "read past the end");
            check_throws<std::out_of_range>([&] { order.read(-1, 0, nullptr); }, "read before the start");
        }
    }
    check_throws<std::invalid_argument>(
        [] { Order(9, View<std::uint8_t>{reinterpret_cast<const std::uint8_t*>(""), 1}, true, 0, Purpose::texts, 0); },
        "a mask of another size");
}

// Rows are visited as often as their group weighs, by a draw of each epoch's own, and dropped ones never.
void test_weights() {
    const std::int64_t n = kBlockRows * kWindowBlocks + 5'000;
    const std::vector<bool> kept = random_mask(n, 0.8);
    const std::vector<std::uint8_t> bits = bits_of(kept);
    const std::vector<double> of_group{1, 0.5, 2.5, 0, 3};
    std::vector<std::uint8_t> groups(static_cast<std::size_t>(n));
    for (auto& group : groups) group = static_cast<std::uint8_t>(below(5));
    const Weights weights{view(groups), view(of_group)};
    std::vector<std::int64_t> before;
    for (const std::uint32_t epoch : {0u, 1u}) {
        Order order(n, view(bits), true, 5, Purpose::kept_pairs, epoch, weights);
        std::vector<std::int64_t> rows = all_of(order);
        check(rows == all_of(order), "an order is read again alike");
        std::vector<std::int64_t> part(1'000);
        order.read(order.size() / 2, 1'000, part.data());
        check(std::equal(part.begin(), part.end(), rows.begin() + order.size() / 2), "any place is read alike");
        std::vector<int> times(static_cast<std::size_t>(n));
        for (const std::int64_t row : rows) ++times[static_cast<std::size_t>(row)];
        double total[5] = {}, count[5] = {};
        for (std::size_t row = 0; row < times.size(); ++row) {
            if (!kept[row]) {
                check(times[row] == 0, "a dropped row is not visited");
                continue;
            }
            const double weight = of_group[groups[row]];
            check(times[row] == std::floor(weight) || times[row] == std::ceil(weight), "whole visits, and a draw");
            total[groups[row]] += times[row];
            count[groups[row]] += 1;
        }
        // Six deviations of the mean of about 42,000 draws.
        for (std::size_t group = 0; group < 5; ++group) {
            check(std::abs(total[group] / count[group] - of_group[group]) < 0.015, "visits as the weights say");
        }
        std::sort(rows.begin(), rows.end());
        check(rows != before, "another epoch, another draw");
        before = rows;
    }
    const std::vector<double> once(5, 1.0);
    check(all_of(Order(n, view(bits), true, 5, Purpose::kept_pairs, 1, {view(groups), view(once)})) ==
              all_of(Order(n, view(bits), true, 5, Purpose::kept_pairs, 1)),
          "weight 1 is the order without weights");
    const auto made = [&](const std::vector<std::uint8_t>& of, const std::vector<double>& given) {
        Order(n, view(bits), true, 5, Purpose::kept_pairs, 1, {view(of), view(given)});
    };
    check_throws<std::out_of_range>([&] { made(groups, {1, 1, 1, 1}); }, "a group without a weight");
    check_throws<std::invalid_argument>([&] { made({0, 1}, of_group); }, "groups of other rows");
    for (const double wrong : {-1.0, 101.0, std::nan("")}) {
        check_throws<std::invalid_argument>([&] { made(groups, {1, 1, 1, 1, wrong}); }, "no weight");
    }
}

// Each row is as likely at each place, and neighbours in the store do not stay neighbours.
void test_order_is_mixed() {
    constexpr int kRounds = 4'000, kRows = 6;
    int at[kRows][kRows] = {};
    for (int epoch = 0; epoch < kRounds; ++epoch) {
        const std::vector<std::int64_t> rows =
            all_of(Order(kRows, View<std::uint8_t>{nullptr, 0}, true, 9, Purpose::texts, static_cast<std::uint32_t>(epoch)));
        for (int place = 0; place < kRows; ++place) ++at[place][rows[static_cast<std::size_t>(place)]];
    }
    for (const auto& row : at) {
        for (const int times : row) check(std::abs(times - kRounds / kRows) < 130, "small stores are uniform");
    }
    const std::int64_t n = 4 * kBlockRows * kWindowBlocks;
    const std::vector<std::int64_t> rows = all_of(Order(n, View<std::uint8_t>{nullptr, 0}, true, 9, Purpose::texts, 0));
    std::int64_t near = 0, batch_blocks = 0;
    for (std::size_t i = 1; i < rows.size(); ++i) near += std::abs(rows[i] - rows[i - 1]) < kBlockRows;
    // Two of a window's rows share a block with chance 1 / 1024, or lie in two that touch.
    check(near < n / 300, "neighbours are spread");
    for (std::size_t begin = 0; begin < 10 * 4096; begin += 4096) {
        std::set<std::int64_t> blocks;
        for (std::size_t i = begin; i < begin + 4096; ++i) blocks.insert(rows[i] / kBlockRows);
        batch_blocks += static_cast<std::int64_t>(blocks.size());
    }
    check(batch_blocks > 10 * 900, "a batch draws on nearly all blocks of its window");
    std::int64_t quarters[4] = {};
    for (std::size_t i = 0; i < 4096; ++i) ++quarters[rows[i] / (n / 4)];
    for (const std::int64_t times : quarters) check(std::abs(times - 1024) < 300, "a window draws on the whole store");
}

void test_masks() {
    std::vector<std::uint8_t> kinds(200);
    for (int i = 0; i < 5; ++i) kinds[static_cast<std::size_t>(i)] = 1;
    for (std::size_t i = 120; i < 200; ++i) kinds[i] = 2;
    std::int64_t masked = 0, random_token = 0, kept = 0;
    for (int round = 0; round < 4'000; ++round) {
        const MaskRule rule{view(kinds), 4, 0.15, round % 2 == 1};
        std::vector<std::int64_t> tokens(static_cast<std::size_t>(below(60)));
        for (std::int64_t& token : tokens) token = below(10) == 0 ? below(4) : below(200);
        std::vector<std::int64_t> before = tokens, positions, labels;
        const Random random(3, Purpose::masks, 0, static_cast<std::uint64_t>(round));
        mask_text(rule, random, tokens.data(), static_cast<std::int64_t>(tokens.size()), 1000, positions, labels);
        const std::int64_t maskable =
            std::count_if(before.begin(), before.end(), [&](std::int64_t t) { return kinds[static_cast<std::size_t>(t)] != 1; });
        const std::int64_t wanted = maskable == 0 ? 0 : std::max<std::int64_t>(1, std::llrint(0.15 * static_cast<double>(maskable)));
        const auto found = static_cast<std::int64_t>(positions.size());
        if (!rule.whole_words) check(found == wanted, "the share of tokens is masked");
        check((found > 0) == (maskable > 0), "a text with words has a mask");
        check(std::is_sorted(positions.begin(), positions.end()), "positions ascend");
        std::set<std::size_t> chosen;
        for (std::size_t k = 0; k < positions.size(); ++k) {
            const auto at = static_cast<std::size_t>(positions[k] - 1000);
            chosen.insert(at);
            check(labels[k] == before[at] && kinds[static_cast<std::size_t>(before[at])] != 1, "labels, never special");
            check(tokens[at] == 4 || kinds[static_cast<std::size_t>(tokens[at])] != 1, "no special token put in");
            ++(tokens[at] == 4 ? masked : tokens[at] == before[at] ? kept : random_token);
        }
        check(chosen.size() == positions.size(), "no position twice");
        for (std::size_t i = 0; i < tokens.size(); ++i) check(chosen.count(i) || tokens[i] == before[i], "others stay");
        for (std::size_t i = 1; rule.whole_words && i < tokens.size(); ++i) {
            const bool joined = kinds[static_cast<std::size_t>(before[i])] == 2 && kinds[static_cast<std::size_t>(before[i - 1])] != 1;
            check(!joined || chosen.count(i) == chosen.count(i - 1), "words are masked whole");
        }
    }
    const double all = static_cast<double>(masked + random_token + kept);
    check(std::abs(static_cast<double>(masked) / all - 0.8) < 0.02, "80 % masked");
    check(std::abs(static_cast<double>(random_token) / all - 0.1) < 0.02, "10 % random");

    std::vector<std::int64_t> outside{200}, nothing;
    const MaskRule rule{view(kinds), 4, 0.15, false};
    check_throws<std::invalid_argument>(
        [&] { mask_text(rule, Random(0, Purpose::masks, 0, 0), outside.data(), 1, 0, nothing, nothing); }, "token outside");
    check_throws<std::invalid_argument>([&] { check_rule({view(kinds), 200, 0.15, false}); }, "mask token outside");
    check_throws<std::invalid_argument>([&] { check_rule({view(kinds), 4, 1.0, false}); }, "share of 1");
    const std::vector<std::uint8_t> special(5, 1);
    check_throws<std::invalid_argument>([&] { check_rule({view(special), 4, 0.15, false}); }, "all special");
}

// A store of random texts and features, and the settings of an epoch over it.
struct Made {
    std::vector<std::int32_t> trained_ids, frozen_ids;
    std::vector<std::byte> features;
    std::vector<std::int64_t> offsets{0}, text_offsets{0};
    std::vector<std::uint16_t> tokens;
    std::vector<std::int32_t> text_tokens;
    std::vector<std::uint8_t> kinds = std::vector<std::uint8_t>(100), bits;
    PairStore store{};
    EpochSettings settings{};

    explicit Made(std::int64_t pairs) {
        const std::int64_t captions = 1 + pairs / 2, images = 1 + pairs / 3, width = 24;
        for (std::int64_t i = 0; i < captions; ++i) {
            for (std::int64_t k = below(20); k >= 0; --k) tokens.push_back(static_cast<std::uint16_t>(5 + below(95)));
            offsets.push_back(static_cast<std::int64_t>(tokens.size()));
        }
        for (std::int64_t i = 0; i < 60; ++i) {
            for (std::int64_t k = below(20); k >= 0; --k) text_tokens.push_back(static_cast<std::int32_t>(below(100)));
            text_offsets.push_back(static_cast<std::int64_t>(text_tokens.size()));
        }
        for (std::int64_t i = 0; i < pairs; ++i) {
            trained_ids.push_back(static_cast<std::int32_t>(below(captions)));
            frozen_ids.push_back(static_cast<std::int32_t>(below(images)));
        }
        for (std::int64_t i = 0; i < images * width; ++i) features.push_back(static_cast<std::byte>(below(256)));
        for (std::size_t i = 0; i < 5; ++i) kinds[i] = 1;
        bits = bits_of(random_mask(pairs, 0.8));
        store.trained_ids = view(trained_ids);
        store.frozen_ids = view(frozen_ids);
        store.features = features.data();
        store.n_features = images;
        store.feature_bytes = width;
        store.captions = Texts{view(tokens), view(offsets)};
        store.masked = MaskedTexts{{view(text_tokens), view(text_offsets)}, 7, 12, {view(kinds), 4, 0.15, false}};
        settings = {view(bits), 24, 2, 0, 1, 9, 24, 0, 3, 0, 0, 0, 1, 3, {}};
    }
};

using Batches = std::vector<std::shared_ptr<Batch>>;

Batches take(const Made& made, std::int64_t most = 1'000'000) {
    PairLoader loader(made.store, made.settings);
    Batches batches;
    for (std::int64_t step = made.settings.epoch_step; step < std::min(loader.steps(), most); ++step) {
        std::shared_ptr<Batch> batch;
        while (batch == nullptr) batch = loader.next(milliseconds(20));
        batches.push_back(batch);
    }
    if (most > loader.steps()) check_throws<std::out_of_range>([&] { loader.next(milliseconds(1)); }, "past the end");
    return batches;
}

bool same(const Batch& a, const Batch& b) {
    return a.rows == b.rows && a.weights == b.weights && a.frozen_ids == b.frozen_ids && a.trained_ids == b.trained_ids &&
           a.features == b.features && a.input_ids == b.input_ids && a.position_ids == b.position_ids &&
           a.cu_seqlens == b.cu_seqlens && a.segments == b.segments && a.masked_positions == b.masked_positions &&
           a.masked_labels == b.masked_labels;
}

// Every array of a batch from its rows, by plain loops.
void check_batch(const Made& made, const Batch& batch) {
    const std::int64_t n = made.settings.batch_size, m = n / made.settings.world_size, first = made.settings.rank * m;
    check(static_cast<std::int64_t>(batch.rows.size()) == n, "rows");
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t row = batch.rows[static_cast<std::size_t>(i)];
        const bool kept = made.bits[static_cast<std::size_t>(row / 8)] >> (row % 8) & 1;
        check(kept == (i < n - made.settings.auditions), "kept pairs first, then dropped ones");
        check(batch.weights[static_cast<std::size_t>(i)] == (kept ? 1.0f : 0.0f), "weights");
        check(batch.frozen_ids[static_cast<std::size_t>(i)] == made.frozen_ids[static_cast<std::size_t>(row)], "frozen ids");
    }
    std::size_t text = 0, pairs = 0;
    std::int64_t token = 0;
    for (std::size_t piece = 0; piece < batch.micro_batches.size(); ++piece) {
        const MicroBatch& micro = batch.micro_batches[piece];
        check(micro.begin == static_cast<std::int64_t>(pairs) && micro.end > micro.begin, "micro-batches follow on");
        check(micro.first_token == token && micro.first_text == static_cast<std::int64_t>(text), "tokens follow on");
        const std::int32_t* cu_seqlens = batch.cu_seqlens.data() + text + piece;
        for (std::int64_t i = micro.begin; i < micro.end; ++i) {
            const std::int64_t row = batch.rows[static_cast<std::size_t>(first + i)];
            const std::int32_t caption = made.trained_ids[static_cast<std::size_t>(row)];
            check(batch.trained_ids[static_cast<std::size_t>(i)] == caption, "trained ids");
            check(std::memcmp(batch.features.data() + i * made.store.feature_bytes,
                              made.store.features + made.frozen_ids[static_cast<std::size_t>(row)] * made.store.feature_bytes,
                              static_cast<std::size_t>(made.store.feature_bytes)) == 0,
                  "features");
            const std::int64_t segment = batch.segments[static_cast<std::size_t>(i)];
            const std::int64_t begin = made.offsets[static_cast<std::size_t>(caption)];
            const std::int64_t whole = made.offsets[static_cast<std::size_t>(caption) + 1] - begin;
            const std::int64_t length = std::min(whole, made.settings.max_tokens);
            check(cu_seqlens[segment + 1] - cu_seqlens[segment] == length, "lengths");
            for (std::int64_t k = 0; k < length; ++k) {
                const auto at = static_cast<std::size_t>(token + cu_seqlens[segment] + k);
                const std::int64_t source = begin + (k == length - 1 ? whole - 1 : k);
                check(batch.input_ids[at] == made.tokens[static_cast<std::size_t>(source)], "caption tokens");
                check(batch.position_ids[at] == k, "caption positions");
            }
        }
        for (std::int64_t k = 1; k < micro.end - micro.begin; ++k) {
            check(cu_seqlens[k] - cu_seqlens[k - 1] <= cu_seqlens[k + 1] - cu_seqlens[k], "shortest first");
        }
        const auto texts = static_cast<std::size_t>(micro.last_text - micro.first_text);
        if (piece > 0) check(texts == static_cast<std::size_t>(micro.end - micro.begin), "masked texts in the first only");
        check(micro.last_token - micro.first_token == cu_seqlens[texts], "a micro-batch's tokens");
        if (made.settings.tokens_per_micro_batch > 0) {
            check(cu_seqlens[texts] <= made.settings.tokens_per_micro_batch, "the token budget is kept");
        }
        for (std::size_t k = 0; piece == 0 && k < batch.masked_positions.size(); ++k) {
            check(batch.masked_positions[k] >= cu_seqlens[micro.end - micro.begin] && batch.masked_positions[k] < cu_seqlens[texts],
                  "masks lie in the masked texts");
            check(batch.masked_labels[k] >= 5, "no special token is a label");
        }
        text += texts;
        token = micro.last_token;
        pairs = static_cast<std::size_t>(micro.end);
    }
    check(static_cast<std::int64_t>(pairs) == m && token == static_cast<std::int64_t>(batch.input_ids.size()), "all pairs");
    check(batch.cu_seqlens.size() == text + batch.micro_batches.size(), "all boundaries");
}

void test_loader() {
    Made made(1'500);
    for (const auto& [micro, budget] : {std::pair<std::int64_t, std::int64_t>{24, 0}, {5, 0}, {1, 0}, {24, 100}, {24, 200}}) {
        made.settings.pairs_per_micro_batch = micro;
        made.settings.tokens_per_micro_batch = budget;
        made.settings.threads = 1;
        const Batches batches = take(made);
        std::set<std::int64_t> rows;
        for (const auto& batch : batches) {
            check_batch(made, *batch);
            rows.insert(batch->rows.begin(), batch->rows.end() - 2);
        }
        check(rows.size() == batches.size() * 22, "no kept pair twice");
        for (const int threads : {2, 5}) {
            made.settings.threads = threads;
            const Batches again = take(made);
            check(again.size() == batches.size(), "threads change no number of batches");
            for (std::size_t i = 0; i < again.size(); ++i) check(same(*again[i], *batches[i]), "threads change no batch");
        }
        // A start in the middle, as after a resume.
        made.settings.epoch_step = made.settings.step = 17;
        const Batches rest = take(made);
        for (std::size_t i = 0; i < rest.size(); ++i) check(same(*rest[i], *batches[i + 17]), "a resume changes no batch");
        made.settings.epoch_step = made.settings.step = 0;
    }
}

void test_ranks() {
    Made made(1'500);
    made.settings.tokens_per_micro_batch = 60;
    const Batches alone = [&] {
        Made whole = made;
        whole.settings.tokens_per_micro_batch = 0;
        whole.store = made.store;
        return take(whole, 30);
    }();
    made.settings.world_size = 3;
    Batches ranks[3];
    for (std::int64_t rank = 0; rank < 3; ++rank) {
        made.settings.rank = rank;
        ranks[rank] = take(made, 30);
    }
    for (std::size_t step = 0; step < 30; ++step) {
        std::vector<std::byte> features;
        std::multiset<std::int64_t> labels;
        for (const Batches& rank : ranks) {
            check(rank[step]->rows == alone[step]->rows, "ranks know the same rows");
            check(rank[step]->micro_batches.size() == ranks[0][step]->micro_batches.size(), "as many micro-batches");
            features.insert(features.end(), rank[step]->features.begin(), rank[step]->features.end());
            labels.insert(rank[step]->masked_labels.begin(), rank[step]->masked_labels.end());
        }
        check(features == alone[step]->features, "ranks share the batch");
        check(labels == std::multiset<std::int64_t>(alone[step]->masked_labels.begin(), alone[step]->masked_labels.end()),
              "masks do not depend on the rank");
    }
}

void test_lives() {
    Made made(1'500);
    made.settings.threads = 3;
    // Ended early, with batches on the way.
    for (int round = 0; round < 20; ++round) take(made, round % 3);
    // Batches outlive the loader and are not used again while they are held.
    const Batches held = take(made);
    std::vector<Batch> copies;
    for (const auto& batch : held) copies.push_back(*batch);
    take(made);
    for (std::size_t i = 0; i < held.size(); ++i) check(same(copies[i], *held[i]), "held batches stay as they are");
    // Batches released by another thread than the consumer's.
    PairLoader loader(made.store, made.settings);
    for (std::int64_t step = 0; step < loader.steps(); ++step) {
        std::shared_ptr<Batch> batch;
        while (batch == nullptr) batch = loader.next(milliseconds(20));
        std::thread([moved = std::move(batch)]() mutable { moved.reset(); }).join();
    }
}

void test_errors() {
    const Made good(1'500);
    const auto fails = [&](auto change, const char* what) {
        Made made = good;
        made.store = good.store;
        change(made);
        check_throws<std::invalid_argument>([&] { PairLoader(made.store, made.settings); }, what);
    };
    fails([](Made& m) { m.settings.world_size = 5; }, "a batch that ranks do not divide");
    fails([](Made& m) { m.settings.rank = 1; }, "a rank outside");
    fails([](Made& m) { m.settings.batch_size = 3'000; }, "a batch larger than the store");
    fails([](Made& m) { m.settings.auditions = 24; }, "nothing but auditions");
    fails([](Made& m) { m.settings.max_tokens = 0; }, "no token");
    fails([](Made& m) { m.settings.threads = 0; }, "no thread");
    fails([](Made& m) { m.settings.prefetch = 0; }, "no room");
    fails([](Made& m) { m.settings.epoch_step = 1'000; }, "a step behind the epoch");
    fails([](Made& m) { m.settings.tokens_per_micro_batch = 20; }, "a budget for no caption");
    fails([](Made& m) { m.store.masked->per_batch = 61; }, "more masked texts than there are");
    fails([](Made& m) { m.store.masked->rule.share = 0; }, "a share of 0");
    fails([](Made& m) { m.store.frozen_ids.size -= 1; }, "ids of two lengths");

    // A store that contradicts itself: its error reaches the consumer behind the sound batches, again and again.
    Made broken = good;
    broken.store = good.store;
    const std::int64_t row = take(good, 6)[5]->rows[0];
    broken.trained_ids[static_cast<std::size_t>(row)] = 1'000'000;
    broken.store.trained_ids = view(broken.trained_ids);
    broken.settings.threads = 2;
    PairLoader loader(broken.store, broken.settings);
    int sound = 0;
    for (int round = 0; round < 2; ++round) {
        check_throws<std::out_of_range>(
            [&] {
                for (;;) sound += loader.next(milliseconds(20)) != nullptr;
            },
            "a caption outside the store");
    }
    check(sound == 5, "batches before a broken one are sound");
}

// The child has none of the threads: it must neither wait for them nor hang in taking down.
void test_fork() {
    Made made(1'500);
    made.settings.threads = 2;
    auto loader = std::make_unique<PairLoader>(made.store, made.settings);
    std::shared_ptr<Batch> batch;
    while (batch == nullptr) batch = loader->next(milliseconds(20));
    const pid_t child = fork();
    if (child == 0) {
        bool refused = false;
        try {
            loader->next(milliseconds(1));
        } catch (const std::logic_error&) {
            refused = true;
        }
        batch.reset();
        loader.reset();
        _exit(refused ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child gets an error and ends");
}

}  // namespace

int main() {
    const auto seed = std::random_device()();
    std::fprintf(stderr, "seed %u\n", seed);
    rng.seed(seed);
    test_random();
    test_order();
    test_weights();
    test_order_is_mixed();
    test_masks();
    test_loader();
    test_ranks();
    test_lives();
    test_errors();
    test_fork();
    std::puts("all passed");
}
