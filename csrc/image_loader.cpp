#include "image_loader.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <numeric>
#include <string_view>
#include <utility>

namespace efficientclip {
namespace {

constexpr const char* kNoImage = "caption without image";
// Of what is said of a picture.
constexpr std::int64_t kLargestText = 16 * 1024 * 1024;

}  // namespace

struct ImageLoader::Sample {
    int shard = 0;
    bool loaded = false;  // as far as it lies in a tar
    TarSample where;
    Blob image;
    std::optional<std::string> text, json;
    Captions captions;
    const char* without = nullptr;

    // Reads the members' bytes from the shard.
    void load(ShardFile& file) {
        loaded = true;
        if (where.image && where.image->size <= kLargestPicture) {
            image = Blob(where.image->size);
            file.read(*where.image, image.data.get());
        }
        if (where.text && where.text->size <= kLargestText) text = file.read_text(*where.text);
        if (where.json && where.json->size <= kLargestText) json = file.read_text(*where.json);
    }
};

// A batch that is being filled, or is full and being written.
struct ImageLoader::Pending {
    ImageBatch batch;
    std::byte* images = nullptr;
    int unwritten = 0;
    bool sealed = false;
};

// One sample on its way from the reader into a batch.
struct ImageLoader::Place {
    enum class State { free, read, decoding, good, bad, placed } state = State::free;
    Sample sample;
    std::string cause;
    bool by_other = false;
    Tile tile;
    Turn turn;
    std::shared_ptr<Pending> batch;
    std::size_t slot = 0;
};

ImageLoader::ImageLoader(const ImageOptions& options)
    : options_(options),
      // Enough that a large picture does not hold up the other threads.
      places_(static_cast<std::size_t>(std::max(16, 4 * options.threads))) {
    // A thread that cannot start must not leave others behind.
    try {
        start(&ImageLoader::read);
        for (int i = 0; i < options_.threads; ++i) start(&ImageLoader::work);
    } catch (...) {
        fail(nullptr);
        for (std::thread& thread : threads_) thread.join();
        throw;
    }
}

ImageLoader::~ImageLoader() {
    fail(nullptr);
    for (std::thread& thread : threads_) thread.join();
}

void ImageLoader::start(void (ImageLoader::*task)()) {
    // Signals are the main thread's: it may be waiting to be interrupted by one.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        threads_.emplace_back([this, task] {
            try {
                (this->*task)();
            } catch (...) {
                fail(std::current_exception());
            }
        });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Stops all threads; next() throws `error`.
void ImageLoader::fail(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    stopping_ = true;
    work_.notify_all();
    space_.notify_all();
    ready_.notify_all();
}

bool ImageLoader::must_stop() {
    const std::lock_guard lock(mutex_);
    return stopping_;
}

void ImageLoader::read() {
    std::exception_ptr broken;
    try {
        read_shards();
    } catch (const ShardError&) {
        broken = std::current_exception();
    }
    const std::lock_guard lock(mutex_);
    // What was read before is delivered first.
    if (!error_) error_ = std::move(broken);
    all_read_ = true;
    give_places();
    work_.notify_all();
    ready_.notify_all();
}

void ImageLoader::read_shards() {
    const auto n = static_cast<int>(options_.shards.size());
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    if (options_.shuffle) {
        Random(options_.seed, Purpose::shards, options_.epoch, 0)
            .shuffle(order.data(), static_cast<std::uint32_t>(n));
    }
    Random draws(options_.seed, Purpose::shuffle_buffer, options_.epoch, static_cast<std::uint64_t>(options_.rank));
    std::vector<Sample> buffer;
    const auto capacity = static_cast<std::size_t>(options_.shuffle ? options_.shuffle_buffer : 0);
    std::int64_t emitted = 0, passed = 0;
    std::vector<std::int64_t> seen(options_.shares.size());
    std::optional<ShardFile> again;

    // Whether the next sample of the order is to be read.
    const auto wanted = [&] {
        for (std::size_t i = 0; i < seen.size(); ++i) {
            const Share& share = options_.shares[i];
            const std::int64_t at = seen[i]++ - share.skip;
            if (at < 0 || at / share.block % share.of != share.number) return false;
        }
        return emitted++ >= options_.consumed;
    };
    // Takes one sample on in the order; false when the pass is to stop.
    const auto take = [&](Sample&& sample, ShardFile* tar) {
        if (!wanted()) return !(++passed % 1024 == 0 && must_stop());
        if (!sample.loaded && tar != nullptr) sample.load(*tar);
        if (!sample.loaded) {
            // It waited in the buffer without its bytes: its shard may be closed by now.
            const std::string& path = options_.shards[static_cast<std::size_t>(sample.shard)].path;
            if (!again || again->path() != path) again.emplace(path);
            sample.load(*again);
        }
        return emit(std::move(sample));
    };
    const auto shuffled = [&](Sample&& sample, ShardFile* tar) {
        if (capacity == 0) return take(std::move(sample), tar);
        // Which samples of a shared order are this reader's is known as they leave the buffer.
        if (tar != nullptr && seen.empty() && emitted >= options_.consumed) sample.load(*tar);
        if (buffer.size() < capacity) {
            buffer.push_back(std::move(sample));
            return true;
        }
        Sample& drawn = buffer[draws.below(static_cast<std::uint32_t>(capacity))];
        std::swap(drawn, sample);
        return take(std::move(sample), nullptr);
    };
    const auto drain = [&] {
        while (!buffer.empty()) {
            std::swap(buffer[draws.below(static_cast<std::uint32_t>(buffer.size()))], buffer.back());
            Sample sample = std::move(buffer.back());
            buffer.pop_back();
            if (!take(std::move(sample), nullptr)) return;
        }
    };

    // Whole shards as far as they can be dealt out evenly; of the rest each rank reads every world_size-th sample.
    const int dealt = n - n % options_.world_size;
    std::int64_t shared = 0;
    try {
        for (int i = 0; i < n; ++i) {
            if (i < dealt && i % options_.world_size != options_.rank) continue;
            const int shard = order[static_cast<std::size_t>(i)];
            const auto mine = [&] { return i < dealt || shared++ % options_.world_size == options_.rank; };
            const auto& [path, listing] = options_.shards[static_cast<std::size_t>(shard)];
            if (listing != nullptr) {
                for (std::int64_t ordinal = 0; ordinal < listing->size(); ++ordinal) {
                    if (!mine()) continue;
                    Sample sample;
                    sample.shard = shard;
                    sample.loaded = true;
                    sample.where.ordinal = ordinal;
                    if (!shuffled(std::move(sample), nullptr)) return;
                }
                continue;
            }
            ShardFile tar(path);
            SampleReader samples(tar);
            Sample sample;
            sample.shard = shard;
            while (samples.next(sample.where)) {
                if (!mine()) continue;
                if (!shuffled(std::move(sample), &tar)) return;
                sample = {};
                sample.shard = shard;
            }
        }
    } catch (const ShardError&) {
        drain();
        throw;
    }
    drain();
}

// Hands a sample to the workers once there is room; false when the pass is to stop.
bool ImageLoader::emit(Sample&& sample) {
    std::unique_lock lock(mutex_);
    Place& place = places_[static_cast<std::size_t>(read_) % places_.size()];
    space_.wait(lock, [&] { return stopping_ || place.state == Place::State::free; });
    if (stopping_) return false;
    place.sample = std::move(sample);
    place.state = Place::State::read;
    ++read_;
    work_.notify_one();
    return true;
}

void ImageLoader::work() {
    PictureReader reader;
    Transform transform(options_.transform, options_.other);
    const std::size_t image_bytes = options_.format.image_bytes(options_.transform.size);
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [&] { return stopping_ || !to_store_.empty() || taken_ < read_; });
        if (stopping_) return;
        if (!to_store_.empty()) {
            Place& place = places_[to_store_.front()];
            to_store_.pop_front();
            lock.unlock();
            store_tile(place.tile, place.turn, options_.format, place.batch->images + place.slot * image_bytes);
            lock.lock();
            if (--place.batch->unwritten == 0 && place.batch->sealed) ready_.notify_all();
            place.batch = nullptr;
            place.state = Place::State::free;
            space_.notify_one();
            continue;
        }
        Place& place = places_[static_cast<std::size_t>(taken_++) % places_.size()];
        place.state = Place::State::decoding;
        lock.unlock();
        make(place, reader, transform);
        lock.lock();
        place.state = place.cause.empty() ? Place::State::good : Place::State::bad;
        give_places();
    }
}

// Makes of a sample its captions and its tile, or tells why it is bad.
void ImageLoader::make(Place& place, PictureReader& reader, Transform& transform) const {
    Sample& sample = place.sample;
    TarSample& where = sample.where;
    const Listing* listing = options_.shards[static_cast<std::size_t>(sample.shard)].listing;
    place.cause.clear();
    try {
        if (listing != nullptr) {
            where.key = listing->keys[where.ordinal];
            sample.captions.source = listing->sources[where.ordinal];
            if (listing->file[where.ordinal] >= 0) {
                where.image = Extent{listing->offset[where.ordinal], listing->length[where.ordinal]};
            }
        }
        if (!where.image) throw BadPicture{kNoImage};
        sample.without = listing != nullptr ? read_captions(listing->captions_of(where.ordinal), sample.captions)
                                            : read_captions(sample.text, sample.json, sample.captions);
        if (options_.captions && sample.without != nullptr) throw BadPicture{sample.without};
        if (where.image->size > kLargestPicture) throw BadPicture{kTooLarge};
        if (listing != nullptr) {
            sample.image = reader.read(listing->files[listing->file[where.ordinal]], *where.image, listing->base64);
        }
        // By shard and place in it: the same picture is cut the same way whatever the number of ranks.
        const auto item = static_cast<std::uint64_t>(sample.shard) << 32 | static_cast<std::uint64_t>(where.ordinal);
        place.turn = transform.apply(reinterpret_cast<const std::uint8_t*>(sample.image.data.get()), sample.image.size,
                                     Random(options_.seed, Purpose::crops, options_.epoch, item), place.tile);
        place.by_other = transform.by_other();
    } catch (const BadPicture& bad) {
        place.cause = bad.cause;
    }
}

void ImageLoader::supply(std::byte* images) {
    const std::lock_guard lock(mutex_);
    memory_.push_back(images);
    give_places();
}

// Gives places in batches to samples in order, as far as they are decoded and there is memory. Needs the lock.
void ImageLoader::give_places() {
    using State = Place::State;
    while (placed_ < read_) {
        const std::size_t at = static_cast<std::size_t>(placed_) % places_.size();
        Place& place = places_[at];
        if (place.state == State::bad) {
            bad_.push_back({place.sample.shard, std::move(place.sample.where.key), std::move(place.cause)});
            place.sample = {};
            place.state = State::free;
            space_.notify_one();
            ++placed_;
            continue;
        }
        if (place.state != State::good) break;
        if (batches_.empty() || batches_.back()->sealed) {
            if (memory_.empty()) break;
            batches_.push_back(std::make_shared<Pending>());
            batches_.back()->images = memory_.front();
            memory_.pop_front();
        }
        Pending& pending = *batches_.back();
        place.batch = batches_.back();
        place.slot = pending.batch.records.size();
        Sample& sample = place.sample;
        pending.batch.records.push_back({sample.shard, sample.where.ordinal, std::move(sample.where.key),
                                         *sample.where.image, std::move(sample.captions), sample.without,
                                         std::move(sample.json),
                                         options_.keep_encoded ? std::move(sample.image) : Blob()});
        sample = {};
        pending.batch.by_other += place.by_other ? 1 : 0;
        ++pending.unwritten;
        place.state = State::placed;
        to_store_.push_back(at);
        work_.notify_one();
        ++placed_;
        if (static_cast<int>(pending.batch.records.size()) == options_.batch_size) seal();
    }
    if (!all_read_ || placed_ < read_) return;
    if (!batches_.empty() && !batches_.back()->sealed) {
        if (options_.drop_last) {
            // Its places may still be written to: they hold it.
            batches_.pop_back();
        } else {
            seal();
        }
    }
    ready_.notify_all();
}

// Closes the growing batch at the sample that was placed last.
void ImageLoader::seal() {
    Pending& pending = *batches_.back();
    pending.sealed = true;
    pending.batch.bad = std::exchange(bad_, {});
    pending.batch.consumed = options_.consumed + placed_;
    if (pending.unwritten == 0) ready_.notify_all();
}

ImageLoader::Outcome ImageLoader::next(ImageBatch& batch, std::chrono::milliseconds patience) {
    std::unique_lock lock(mutex_);
    const auto delivered = [&] {
        return !batches_.empty() && batches_.front()->sealed && batches_.front()->unwritten == 0;
    };
    const auto exhausted = [&] { return all_read_ && placed_ == read_ && batches_.empty(); };
    ready_.wait_for(lock, patience, [&] { return stopping_ || delivered() || exhausted(); });
    if (stopping_ && error_) std::rethrow_exception(error_);
    if (delivered()) {
        batch = std::move(batches_.front()->batch);
        batches_.pop_front();
        return Outcome::batch;
    }
    if (!exhausted()) return Outcome::waiting;
    if (error_) std::rethrow_exception(error_);
    batch = {{}, std::exchange(bad_, {}), 0, options_.consumed + placed_};
    return Outcome::finished;
}

}  // namespace efficientclip
