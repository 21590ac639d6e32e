#include "samples.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "picture.hpp"

namespace efficientclip {
namespace {

constexpr const char* kNoShard = "its shard cannot be read";

// One bad shard too many, which is not that of the sample at hand.
struct TooManyBadShards : ShardError {
    using ShardError::ShardError;
};

// Of what is said of a picture.
constexpr std::int64_t kLargestText = 16 * 1024 * 1024;
// The part of a shuffle buffer that is filled before anything is drawn from it.
constexpr std::size_t kFirstDraw = 4;
// As many fetches are known ahead.
constexpr std::size_t kAhead = 16;

void read_members(Sample& sample, ShardFile& file) {
    if (sample.span) sample.where = read_sample(file, *sample.span, sample.where.ordinal);
    const TarSample& where = sample.where;
    if (where.image && where.image->size <= kLargestPicture) {
        sample.image = Blob(where.image->size);
        file.read(*where.image, sample.image.data.get());
    }
    if (where.text && where.text->size <= kLargestText) sample.text = file.read_text(*where.text);
    if (where.json && where.json->size <= kLargestText) sample.json = file.read_text(*where.json);
}

}  // namespace

Pass::Pass(const PassOptions& options, Emit emit, std::function<bool()> stopping, std::function<void(BadShard)> bad)
    : options_(options),
      emit_(std::move(emit)),
      stopping_(std::move(stopping)),
      bad_(std::move(bad)),
      bad_shards_(static_cast<int>(options.bad_shards.size())),
      seen_(options.shares.size()),
      capacity_(static_cast<std::size_t>(options.shuffle ? options.shuffle_buffer : 0)),
      draws_(options.seed, Purpose::shuffle_buffer, options.epoch, static_cast<std::uint64_t>(options.rank)) {
    const auto n = static_cast<int>(options.shards.size());
    std::vector<int> all(static_cast<std::size_t>(n));
    std::iota(all.begin(), all.end(), 0);
    if (options.shuffle) {
        Random(options.seed, Purpose::shards, options.epoch, 0).shuffle(all.data(), static_cast<std::uint32_t>(n));
    }
    // Whole shards as far as those of one share can be dealt out evenly; of the rest each rank reads every world_size-th
    // sample.
    std::map<double, int> shards_of, met;
    for (const Shard& shard : options.shards) ++shards_of[shard.share];
    for (const int number : all) {
        const double share = options.shards[static_cast<std::size_t>(number)].share;
        const int place = met[share]++;
        const bool dealt = place < shards_of[share] - shards_of[share] % options.world_size;
        if (dealt && place % options.world_size != options.rank) continue;
        order_.push_back(number);
        dealt_.push_back(dealt);
    }
}

void Pass::run() {
    for (at_ = 0; at_ < order_.size(); shared_ += dealt_[at_++] ? 0 : 1) {
        const auto shard = std::make_shared<OpenShard>();
        shard->number = order_[at_];
        const Shard& given = options_.shards[static_cast<std::size_t>(shard->number)];
        shard->path = given.path;
        shard->listing = given.listing;
        shard->at_hand = !given.elsewhere;
        shard->samples = kAllSamples;
        for (const BadShard& bad : options_.bad_shards) {
            if (bad.shard == shard->number) shard->samples = std::min(shard->samples, bad.samples);
        }
        shard->broken = is_known(*shard, true);
        if (shard->samples == 0) continue;
        bool more;
        if (given.listing != nullptr) {
            more = read_listing(shard);
        } else if (auto index = options_.keeper != nullptr ? options_.keeper->index(shard->number) : std::nullopt) {
            more = read_indexed(shard, *index);
        } else {
            more = read_tar(shard, shard->samples);
        }
        if (!more) return;
    }
    drain();
}

bool Pass::read_listing(const std::shared_ptr<OpenShard>& shard) {
    const std::int64_t n = std::min(shard->listing->size(), shard->samples);
    for (std::int64_t ordinal = 0; ordinal < n; ++ordinal) {
        if (!mine(*shard, ordinal)) continue;
        Sample sample;
        sample.number = shard->number;
        sample.shard = shard;
        sample.where.ordinal = ordinal;
        if (!shuffled(std::move(sample), nullptr)) return false;
    }
    return true;
}

bool Pass::read_indexed(const std::shared_ptr<OpenShard>& shard, const TarIndex& index) {
    std::int64_t ordinal = 0, offset = 0;
    for (const std::uint32_t records : index) {
        if (ordinal == shard->samples) break;
        Sample sample;
        sample.number = shard->number;
        sample.shard = shard;
        sample.where.ordinal = ordinal;
        sample.span = Extent{offset, records * kTarRecord};
        offset += sample.span->size;
        if (mine(*shard, ordinal++) && !shuffled(std::move(sample), nullptr)) return false;
    }
    return true;
}

bool Pass::read_tar(const std::shared_ptr<OpenShard>& shard, std::int64_t most) {
    shard->samples = 0;
    // Only its headers tell how many samples there are to be named.
    shard->broken = false;
    try {
        fetch(*shard);
        ShardFile tar(options_.shards[static_cast<std::size_t>(shard->number)].path, shard->path, all_are_read());
        SampleReader reader(tar);
        Sample sample;
        while (shard->samples < most && !shard->broken) {
            if (!reader.next(sample.where)) {
                if (options_.keeper != nullptr) options_.keeper->keep(shard->number, reader.index());
                break;
            }
            ++shard->samples;
            if (!mine(*shard, sample.where.ordinal)) continue;
            sample.number = shard->number;
            sample.shard = shard;
            if (!shuffled(std::move(sample), &tar)) return false;
            sample = {};
        }
    } catch (const TooManyBadShards&) {
        throw;
    } catch (const ShardError& error) {
        // Passed over, samples are counted: without these the count would lead to another place than it stands for.
        if (emitted_ < options_.consumed || is_known(*shard, true)) throw;
        refuse(*shard, error);
    }
    return true;
}

bool Pass::mine(OpenShard& shard, std::int64_t ordinal) {
    // Ranks that share a shard draw alike.
    const double share = options_.shards[static_cast<std::size_t>(shard.number)].share;
    Random draw(options_.seed, Purpose::visits, options_.epoch, item_of(shard.number, ordinal));
    if (share < 1 && draw.uniform() >= share) return false;
    // Counted in each shard anew: one that a rank lacks shifts nothing behind it.
    return dealt_[at_] || (shared_ + shard.shared++) % options_.world_size == options_.rank;
}

// Whether samples are loaded in the order in which they lie in the shard that is read.
bool Pass::all_are_read() const {
    return at_ < order_.size() && dealt_[at_] && seen_.empty() && emitted_ >= options_.consumed;
}

// Whether the next sample of the order is to be read.
bool Pass::wanted() {
    for (std::size_t i = 0; i < seen_.size(); ++i) {
        const Share& share = options_.shares[i];
        const std::int64_t at = seen_[i]++ - share.skip;
        if (at < 0 || at / share.block % share.of != share.number) return false;
    }
    return emitted_++ >= options_.consumed;
}

bool Pass::shuffled(Sample&& sample, ShardFile* tar) {
    if (capacity_ == 0) return take(std::move(sample), tar);
    // Which samples of a shared order are this reader's is known as they leave the buffer.
    if (seen_.empty() && emitted_ >= options_.consumed) load(sample, tar);
    if (buffer_.size() < capacity_) {
        buffer_.push_back(std::move(sample));
        growing_ = !growing_;
        // Nobody waits for a whole buffer: one that grows gives every second sample.
        return growing_ || buffer_.size() < capacity_ / kFirstDraw || draw();
    }
    Sample& drawn = buffer_[draws_.below(static_cast<std::uint32_t>(capacity_))];
    std::swap(drawn, sample);
    return take(std::move(sample), nullptr);
}

// Takes any sample of the buffer on.
bool Pass::draw() {
    std::swap(buffer_[draws_.below(static_cast<std::uint32_t>(buffer_.size()))], buffer_.back());
    Sample sample = std::move(buffer_.back());
    buffer_.pop_back();
    return take(std::move(sample), nullptr);
}

// Takes one sample on in the order; false when the pass is to stop.
bool Pass::take(Sample&& sample, ShardFile* tar) {
    if (!wanted()) return !(++passed_ % 1024 == 0 && stopping_());
    load(sample, tar);
    return emit_(std::move(sample));
}

void Pass::drain() {
    while (!buffer_.empty() && draw()) {
    }
}

// Brings what lies in the sample's shard, or tells why not. `tar`: it is open, since its samples are just walked along.
void Pass::load(Sample& sample, ShardFile* tar) {
    if (sample.loaded) return;
    sample.loaded = true;
    OpenShard& shard = *sample.shard;
    try {
        if (!shard.broken) fetch(shard);
        if (!shard.broken && shard.listing == nullptr) {
            if (tar == nullptr && again_of_ != sample.shard) {
                again_of_ = nullptr;
                again_.emplace(options_.shards[static_cast<std::size_t>(shard.number)].path, shard.path, all_are_read());
                again_of_ = sample.shard;
            }
            read_members(sample, tar != nullptr ? *tar : *again_);
        }
    } catch (const ShardError& error) {
        refuse(shard, error);
    }
    if (shard.broken) {
        sample.cause = kNoShard;
        if (sample.span) sample.where.key = "sample " + std::to_string(sample.where.ordinal);
    }
    if (shard.listing == nullptr) sample.shard = nullptr;
}

void Pass::fetch(OpenShard& shard) {
    if (shard.at_hand) return;
    std::vector<int> next;
    for (std::size_t i = at_ + 1; i < order_.size() && next.size() < kAhead; ++i) {
        if (options_.shards[static_cast<std::size_t>(order_[i])].elsewhere) next.push_back(order_[i]);
    }
    shard.fetched = options_.keeper->fetch(shard.number, next);
    shard.at_hand = true;
    if (shard.fetched.listing) {
        shard.listing = &*shard.fetched.listing;
    } else {
        shard.path = shard.fetched.path;
    }
}

// Whether it was bad before; `whole`: and all of its samples were named.
bool Pass::is_known(const OpenShard& shard, bool whole) const {
    return std::any_of(options_.bad_shards.begin(), options_.bad_shards.end(), [&](const BadShard& bad) {
        return bad.shard == shard.number && (!whole || bad.samples == kAllSamples);
    });
}

// Goes on without what the shard lacks, or ends the pass.
void Pass::refuse(OpenShard& shard, const ShardError& error) {
    shard.broken = true;
    if (is_known(shard, false)) return;
    if (++bad_shards_ > options_.max_bad_shards) throw TooManyBadShards(error.what());
    bad_({shard.number, shard.samples, error.what()});
}

}  // namespace efficientclip
