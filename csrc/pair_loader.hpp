// Training batches from the store, made by threads ahead of the consumer: a ring of finished batches, in order.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "batch.hpp"
#include "mask.hpp"
#include "order.hpp"

namespace efficientclip {

// Text i is tokens[offsets[i]] .. tokens[offsets[i + 1]].
struct Texts {
    std::variant<View<std::uint16_t>, View<std::int32_t>> tokens;
    View<std::int64_t> offsets;

    std::int64_t size() const { return offsets.size - 1; }
};

// Texts that are masked and packed behind the captions of a rank's first micro-batch.
struct MaskedTexts {
    Texts texts;
    std::int64_t per_batch;  // over all ranks
    std::int64_t max_tokens;
    MaskRule rule;
};

// The store's arrays, borrowed; they must outlive the loader.
struct PairStore {
    View<std::int32_t> trained_ids;  // [n] what each pair's trained side is: a caption, or a picture
    View<std::int32_t> frozen_ids;   // [n] row of its feature
    const std::byte* features;
    std::int64_t n_features;
    std::int64_t feature_bytes;
    std::optional<Texts> captions;   // none where the trained side is no text
    std::optional<MaskedTexts> masked;
};

struct EpochSettings {
    View<std::uint8_t> kept;         // one bit a pair; empty keeps all
    std::int64_t batch_size;         // pairs over all ranks
    std::int64_t auditions;          // of these, dropped pairs at weight 0
    std::int64_t rank, world_size;
    std::int64_t max_tokens;         // captions are cut to it
    std::int64_t pairs_per_micro_batch;
    std::int64_t tokens_per_micro_batch;  // 0: pairs_per_micro_batch counts
    std::uint64_t seed;
    std::uint32_t epoch;
    std::int64_t epoch_step;         // the first batch that is wanted
    std::int64_t step;               // that batch's number over all epochs, which chooses the masked texts
    int threads;
    int prefetch;                    // finished batches that wait at most
    Weights weights;                 // of the kept pairs
};

// Pairs begin .. end of a rank's share, and where their packed texts lie in a batch.
struct MicroBatch {
    std::int64_t begin, end;
    std::int64_t first_token, last_token;
    std::int64_t first_text, last_text;  // of segments, masked texts among them; cu_seqlens has one entry more
};

// N pairs over all ranks, M = N / world_size of this rank.
struct Batch {
    std::vector<std::int64_t> rows;        // [N]
    std::vector<float> weights;            // [N]
    std::vector<std::int64_t> frozen_ids;  // [N]
    std::vector<std::int64_t> trained_ids; // [M]
    std::vector<std::byte> features;       // [M, feature_bytes]
    std::vector<MicroBatch> micro_batches;
    std::vector<std::int64_t> input_ids;   // [T]
    std::vector<std::int64_t> position_ids;
    std::vector<std::int32_t> cu_seqlens;  // of each micro-batch from 0: [texts + micro-batches]
    std::vector<std::int64_t> segments;    // [M] segment of each caption within its micro-batch
    std::vector<std::int64_t> masked_positions;  // [K] within the first micro-batch
    std::vector<std::int64_t> masked_labels;
};

// One epoch's batches from epoch_step on. Batches are the same for any number of threads.
class PairLoader {
  public:
    // std::invalid_argument for settings that contradict each other or the store.
    PairLoader(const PairStore& store, const EpochSettings& settings);
    ~PairLoader();
    PairLoader(const PairLoader&) = delete;
    PairLoader& operator=(const PairLoader&) = delete;

    // Batches in the whole epoch; its last incomplete batch is left out.
    std::int64_t steps() const;

    // The next batch, or nothing if none came within `patience`. Its buffers are used again once it is released.
    // Errors met while the batch was made are thrown here. std::out_of_range after the last batch,
    // std::logic_error in a forked child, where the threads do not exist.
    std::shared_ptr<Batch> next(std::chrono::milliseconds patience);

  private:
    struct Engine;
    Engine* engine_;  // leaked in a forked child: its locks may be held by threads that are gone
};

}  // namespace efficientclip
