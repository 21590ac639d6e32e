#include "order.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace efficientclip {

Order::Order(std::int64_t n_rows, View<std::uint8_t> mask, bool chosen, std::uint64_t seed, Purpose purpose,
             std::uint32_t epoch, Weights weights)
    : n_rows_(n_rows), mask_(mask), chosen_(chosen), seed_(seed), purpose_(purpose), epoch_(epoch), weights_(weights) {
    if (n_rows < 0 || (mask.size != 0 && mask.size != (n_rows + 7) / 8)) {
        throw std::invalid_argument("kept has " + std::to_string(mask.size) + " bytes, but " +
                                    std::to_string(n_rows) + " rows need " + std::to_string((n_rows + 7) / 8));
    }
    if (weights.groups.size != 0 && weights.groups.size != n_rows) {
        throw std::invalid_argument("groups has " + std::to_string(weights.groups.size) + " rows, but there are " +
                                    std::to_string(n_rows));
    }
    for (std::int64_t group = 0; group < weights.of_group.size; ++group) {
        if (!(weights.of_group[group] >= 0 && weights.of_group[group] <= kMostVisits)) {
            throw std::invalid_argument("weight " + std::to_string(weights.of_group[group]) + " is none from 0 to " +
                                        std::to_string(kMostVisits));
        }
    }
    const std::int64_t n_blocks = (n_rows + kBlockRows - 1) / kBlockRows;
    if (n_blocks > std::numeric_limits<std::uint32_t>::max()) {
        throw std::invalid_argument("the store has " + std::to_string(n_rows) + " rows, too many for one epoch");
    }
    blocks_.resize(static_cast<std::size_t>(n_blocks));
    std::iota(blocks_.begin(), blocks_.end(), std::uint32_t{0});
    Random(seed, purpose, epoch, 0).shuffle(blocks_.data(), static_cast<std::uint32_t>(n_blocks));
    begins_.push_back(0);
    for (std::int64_t first = 0; first < n_blocks; first += kWindowBlocks) {
        std::int64_t count = 0;
        for (std::int64_t i = first; i < std::min(first + kWindowBlocks, n_blocks); ++i) {
            count += count_in_block(blocks_[static_cast<std::size_t>(i)]);
        }
        begins_.push_back(begins_.back() + count);
    }
}

// How often a row is visited.
std::int64_t Order::visits(std::int64_t row) const {
    if (mask_.size != 0 && ((mask_[row / 8] >> (row % 8) & 1) != 0) != chosen_) return 0;
    if (weights_.groups.size == 0) return 1;
    const std::int64_t group = weights_.groups[row];
    if (group >= weights_.of_group.size) {
        throw std::out_of_range("row " + std::to_string(row) + " is of group " + std::to_string(group) + " of " +
                                std::to_string(weights_.of_group.size));
    }
    const double weight = weights_.of_group[group], whole = std::floor(weight);
    const auto times = static_cast<std::int64_t>(whole);
    if (weight == whole) return times;
    Random random(seed_, Purpose::visits, epoch_, static_cast<std::uint64_t>(row));
    return times + (random.uniform() < weight - whole ? 1 : 0);
}

std::int64_t Order::count_in_block(std::int64_t block) const {
    const std::int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, n_rows_);
    std::int64_t ones = 0, row = begin;
    if (weights_.groups.size != 0) {
        for (; row < end; ++row) ones += visits(row);
        return ones;
    }
    if (mask_.size == 0) return end - begin;
    for (std::uint64_t word; row + 64 <= end; row += 64) {
        std::memcpy(&word, mask_.data + row / 8, sizeof word);
        ones += __builtin_popcountll(word);
    }
    for (; row < end; ++row) ones += mask_[row / 8] >> (row % 8) & 1;
    return chosen_ ? ones : end - begin - ones;
}

void Order::open(std::int64_t window) {
    rows_.clear();
    const std::int64_t first = window * kWindowBlocks;
    const std::int64_t last = std::min(first + kWindowBlocks, static_cast<std::int64_t>(blocks_.size()));
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = std::int64_t{blocks_[static_cast<std::size_t>(i)]} * kBlockRows;
        for (std::int64_t row = begin; row < std::min(begin + kBlockRows, n_rows_); ++row) {
            rows_.insert(rows_.end(), static_cast<std::size_t>(visits(row)), row);
        }
    }
    // Item 0 permuted the blocks.
    Random random(seed_, purpose_, epoch_, static_cast<std::uint64_t>(window) + 1);
    random.shuffle(rows_.data(), static_cast<std::uint32_t>(rows_.size()));
    window_ = window;
}

void Order::read(std::int64_t first, std::int64_t count, std::int64_t* rows) {
    if (first < 0 || count < 0 || first > size() - count) {
        throw std::out_of_range("places " + std::to_string(first) + " to " + std::to_string(first + count) +
                                " of an order of " + std::to_string(size()) + " visits");
    }
    while (count > 0) {
        const auto after = std::upper_bound(begins_.begin(), begins_.end(), first);
        const std::int64_t window = after - begins_.begin() - 1;
        if (window != window_) open(window);
        const std::int64_t inside = first - begins_[static_cast<std::size_t>(window)];
        const std::int64_t taken = std::min(count, static_cast<std::int64_t>(rows_.size()) - inside);
        rows = std::copy_n(rows_.begin() + inside, taken, rows);
        first += taken;
        count -= taken;
    }
}

}  // namespace efficientclip
