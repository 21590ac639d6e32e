// One pass over image shards: a reader, decoding threads and batches in a fixed order. Plain C++17, no Python.
//
// Each sample has a place in the pass's order (samples.hpp). Places in batches are given in that order, once all earlier
// samples are known to be good or bad. So neither the number of threads nor their timing shows in the batches.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "resize.hpp"
#include "samples.hpp"
#include "transform.hpp"

namespace efficientclip {

struct ImageOptions : PassOptions {
    TransformOptions transform;
    OtherDecoder other;
    PixelFormat format;
    int batch_size = 1;
    int threads = 1;
    bool captions = true;  // a sample without is a bad one
    bool keep_encoded = false;
    bool drop_last = false;
};

struct ImageRecord {
    int shard = 0;
    std::int64_t ordinal = 0;  // its place among the shard's samples
    std::string key;
    Extent extent;  // of the encoded image in its file
    Captions captions;
    const char* without = nullptr;    // why it has no captions
    std::optional<std::string> json;  // a tar's member
    Blob encoded;                     // empty unless kept
    std::int64_t consumed = 0;        // samples of the order up to here and with it, good and bad
};

struct BadImage {
    int shard;
    std::string key;
    std::string cause;
};

struct ImageBatch {
    std::vector<ImageRecord> records;
    std::vector<BadImage> bad;    // met since the batch before
    std::vector<BadShard> bad_shards;  // from then on known
    int by_other = 0;             // records of pictures that the other decoder decoded
    std::int64_t consumed = 0;    // samples of the order up to here, good and bad
};

class ImageLoader {
  public:
    explicit ImageLoader(const ImageOptions& options);
    ~ImageLoader();
    ImageLoader(const ImageLoader&) = delete;
    ImageLoader& operator=(const ImageLoader&) = delete;

    // Lends memory for one more batch of images; the k-th batch lies in the k-th memory lent. Batches are made ahead as
    // far as memory is lent.
    void supply(std::byte* images);

    enum class Outcome { batch, waiting, finished };
    // Waits for the next batch; `finished` also fills in `bad` and `consumed`. Throws what stopped the pass, ShardError
    // for one, after all batches of whole samples before it.
    Outcome next(ImageBatch& batch, std::chrono::milliseconds patience);

  private:
    struct Place;
    struct Pending;

    void read();
    bool emit(Sample&& sample);
    void gather();
    void gather(Place& place, PictureReader& reader) const;
    void work();
    void decode(Place& place, Transform& transform) const;
    bool can_decode() const;
    void give_places();
    void seal();
    void start(void (ImageLoader::*task)());
    void fail(std::exception_ptr error);
    bool must_stop();

    const ImageOptions options_;
    std::mutex mutex_;
    std::condition_variable gather_, work_, space_, ready_;
    std::vector<Place> places_;       // a ring over the order: from the sample read last back to the oldest not stored
    std::int64_t read_ = 0;           // samples read; all numbers count from options_.consumed
    std::int64_t taken_ = 0;          // samples whose decoding began
    std::int64_t placed_ = 0;         // samples that have a place in a batch, or are bad
    std::deque<std::size_t> to_gather_;  // places whose pictures lie in no tar
    std::deque<std::size_t> to_store_;   // places whose tiles can be written
    std::deque<std::byte*> memory_;
    std::deque<std::shared_ptr<Pending>> batches_;  // the last one may be growing
    std::vector<BadImage> bad_;
    std::vector<BadShard> bad_shards_;
    bool all_read_ = false;
    bool stopping_ = false;
    std::exception_ptr error_;
    std::vector<std::thread> threads_;
};

}  // namespace efficientclip
