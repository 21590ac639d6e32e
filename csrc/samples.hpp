// The samples of one pass over shards, in their order: read, as far as they lie in tars.
//
// A shard is a tar or a listing. A tar's samples lie in a row, and are read here; what a listing names may lie anywhere,
// and is read by those who take the samples. A shard that is elsewhere is fetched when the first of its samples is to be
// read.
//
// The order is a function of (shards, seed, epoch, rank, world size, shuffle buffer, shares).
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "captions.hpp"
#include "listing.hpp"
#include "random.hpp"
#include "tar.hpp"

namespace efficientclip {

// Behind the first `skip` samples of an order, each run of `block` samples goes to the next of `of` readers: this one
// takes those of `number`.
struct Share {
    std::int64_t skip = 0, block = 1, number = 0, of = 1;
};

// A listing, which is borrowed, or else the tar at `path`. Of its samples each epoch draws a share anew. What is
// `elsewhere` must be fetched.
struct Shard {
    std::string path;
    const Listing* listing = nullptr;
    double share = 1;
    bool elsewhere = false;
};

// The number of a sample among all.
inline std::uint64_t item_of(int shard, std::int64_t ordinal) {
    return static_cast<std::uint64_t>(shard) << 32 | static_cast<std::uint64_t>(ordinal);
}

// What was elsewhere: where the tar lies now, or columns of the same pictures instead of the shard's own.
struct Fetched {
    std::string path;
    std::optional<Listing> listing;
    std::shared_ptr<void> owner;  // what both live by
};

// A shard that cannot be had or is not whole, and how many samples it gave; more than it has where each of them is named
// as a bad one.
struct BadShard {
    int shard = 0;
    std::int64_t samples = 0;
    std::string cause;
};
constexpr std::int64_t kAllSamples = std::numeric_limits<std::int64_t>::max();

// Who knows more of the shards. Calls come from one thread.
class Keeper {
  public:
    virtual ~Keeper() = default;
    // Throws ShardError. `next` are those elsewhere that follow in the order.
    virtual Fetched fetch(int shard, const std::vector<int>& next) = 0;
    // Of a tar, if it is known.
    virtual std::optional<TarIndex> index(int shard) = 0;
    // Of a tar that was read to its end.
    virtual void keep(int shard, const TarIndex& index) = 0;
};

struct PassOptions {
    std::vector<Shard> shards;
    Keeper* keeper = nullptr;  // borrowed; needed where a shard is elsewhere
    bool shuffle = true;
    int shuffle_buffer = 1;
    std::uint64_t seed = 0;
    std::uint32_t epoch = 0;
    int rank = 0, world_size = 1;
    std::vector<Share> shares;  // of the rank's order, then of what is left of it, and so on
    // Samples at the start of all this, good or bad, that were consumed before: passed over without reading them.
    std::int64_t consumed = 0;
    int max_bad_shards = 0;  // more end the pass
    // Those of this pass that are known already: each gives its samples and no more.
    std::vector<BadShard> bad_shards;
};

// A shard on its way.
struct OpenShard {
    int number = 0;
    std::string path;  // of a tar that is at hand
    const Listing* listing = nullptr;
    Fetched fetched;
    bool at_hand = false;
    bool broken = false;
    std::int64_t samples = 0;  // that it gives, broken or not
    std::int64_t shared = 0;   // that were dealt out, where ranks share it
};

struct Sample {
    int number = 0;                    // of its shard
    std::shared_ptr<OpenShard> shard;  // as long as something is to be read from it
    TarSample where;
    std::optional<Extent> span;  // in a tar whose index tells no more of it
    bool loaded = false;         // as far as it lies in a tar
    Blob image;
    std::optional<std::string> text, json;
    const char* cause = nullptr;  // why it cannot be loaded
};

class Pass {
  public:
    using Emit = std::function<bool(Sample&&)>;
    // `emit` takes the samples, and says whether more are wanted, as `stopping` does while none are emitted. `bad` is
    // told of shards.
    Pass(const PassOptions& options, Emit emit, std::function<bool()> stopping, std::function<void(BadShard)> bad);

    // Throws ShardError, after all samples before it in the order were emitted.
    void run();

  private:
    bool read_listing(const std::shared_ptr<OpenShard>& shard);
    bool read_indexed(const std::shared_ptr<OpenShard>& shard, const TarIndex& index);
    bool read_tar(const std::shared_ptr<OpenShard>& shard, std::int64_t most);
    bool mine(OpenShard& shard, std::int64_t ordinal);
    bool all_are_read() const;
    bool is_known(const OpenShard& shard, bool whole) const;
    bool wanted();
    bool shuffled(Sample&& sample, ShardFile* tar);
    bool take(Sample&& sample, ShardFile* tar);
    bool draw();
    void drain();
    void load(Sample& sample, ShardFile* tar);
    void fetch(OpenShard& shard);
    void refuse(OpenShard& shard, const ShardError& error);

    const PassOptions& options_;
    const Emit emit_;
    const std::function<bool()> stopping_;
    const std::function<void(BadShard)> bad_;
    std::vector<int> order_;     // this rank's shards
    std::size_t at_ = 0;         // which of them is read
    std::vector<bool> dealt_;    // those that are this rank's alone
    std::int64_t shared_ = 0;    // shards before it that are shared
    std::int64_t emitted_ = 0, passed_ = 0;
    int bad_shards_;
    std::vector<std::int64_t> seen_;
    std::vector<Sample> buffer_;
    std::size_t capacity_;
    bool growing_ = false;
    Random draws_;
    std::optional<ShardFile> again_;  // the tar of samples that waited
    std::shared_ptr<OpenShard> again_of_;
};

}  // namespace efficientclip
