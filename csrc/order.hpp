// The order in which an epoch visits rows: a function of (seed, purpose, epoch) and the kept rows, not a stored list.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.hpp"
#include "random.hpp"

namespace efficientclip {

// Rows that lie together on disk are visited at near times: few pages are live at once.
constexpr std::int64_t kBlockRows = 256;
// Blocks from all over the store that are mixed: 262,144 rows. A store no larger is a uniform permutation.
constexpr std::int64_t kWindowBlocks = 1024;
// Of a row in an epoch.
constexpr int kMostVisits = 100;

// How often an epoch visits a row: of_group[groups[row]] times, by the whole part for certain, and once more with the
// chance of the fraction, drawn anew each epoch. Borrowed; without groups it is once.
struct Weights {
    View<std::uint8_t> groups{nullptr, 0};
    View<double> of_group{nullptr, 0};
};

// Chosen rows in a shuffled order. Blocks of rows are permuted; the rows of each run of kWindowBlocks blocks are
// shuffled as one, all visits of a row among them. Memory: 4 bytes a block, 8 a window and the visits of one window.
class Order {
  public:
    // `mask` has one bit a row, lowest first in each byte; rows whose bit equals `chosen` are visited. It is borrowed.
    // An empty mask chooses all rows.
    Order(std::int64_t n_rows, View<std::uint8_t> mask, bool chosen, std::uint64_t seed, Purpose purpose,
          std::uint32_t epoch, Weights weights = {});

    // How many visits there are.
    std::int64_t size() const { return begins_.back(); }

    // The rows at places first .. first + count - 1 into `rows`. Cheap when called in order: one window is kept.
    void read(std::int64_t first, std::int64_t count, std::int64_t* rows);

  private:
    std::int64_t visits(std::int64_t row) const;
    std::int64_t count_in_block(std::int64_t block) const;
    void open(std::int64_t window);

    std::int64_t n_rows_;
    View<std::uint8_t> mask_;
    bool chosen_;
    std::uint64_t seed_;
    Purpose purpose_;
    std::uint32_t epoch_;
    Weights weights_;
    std::vector<std::uint32_t> blocks_;  // in the order of visit
    std::vector<std::int64_t> begins_;   // place of each window's first visit, and the number of all
    std::int64_t window_ = -1;
    std::vector<std::int64_t> rows_;     // of that window, shuffled
};

}  // namespace efficientclip
