#include "image_loader.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "captions.hpp"

namespace efficientclip {
namespace {

constexpr const char* kNoImage = "caption without image";
// A picture of kMaxPixels that needs more bytes than this is none.
constexpr std::int64_t kLargestMember = 512 * 1024 * 1024;

}  // namespace

struct ImageLoader::Sample {
    TarSample where;
    int shard = 0;
    bool loaded = false;
    Blob image;
    std::optional<std::string> text, json;

    // Reads the members' bytes from the shard.
    void load(ShardFile& file) {
        loaded = true;
        if (where.image && where.image->size <= kLargestMember) {
            image = Blob(where.image->size);
            file.read(*where.image, image.data.get());
        }
        if (where.text && where.text->size <= kLargestMember) text = file.read_text(*where.text);
        if (where.json && where.json->size <= kLargestMember) json = file.read_text(*where.json);
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
    const char* cause = nullptr;
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
    const auto take = [&](Sample&& sample, ShardFile* file) {
        if (!wanted()) return !(++passed % 1024 == 0 && must_stop());
        if (!sample.loaded && file != nullptr) sample.load(*file);
        if (!sample.loaded) {
            // It waited in the buffer without its bytes: its shard may be closed by now.
            const std::string& path = options_.shards[static_cast<std::size_t>(sample.shard)];
            if (!again || again->path() != path) again.emplace(path);
            sample.load(*again);
        }
        return emit(std::move(sample));
    };
    const auto shuffled = [&](Sample&& sample, ShardFile& file) {
        if (capacity == 0) return take(std::move(sample), &file);
        // Which samples of a shared order are this reader's is known as they leave the buffer.
        if (seen.empty() && emitted >= options_.consumed) sample.load(file);
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
            ShardFile file(options_.shards[static_cast<std::size_t>(shard)]);
            SampleReader samples(file);
            Sample sample;
            sample.shard = shard;
            while (samples.next(sample.where)) {
                if (i >= dealt && shared++ % options_.world_size != options_.rank) continue;
                if (!shuffled(std::move(sample), file)) return;
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
    Transform transform(options_.transform);
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
        const Sample& sample = place.sample;
        const char* cause = sample.where.image ? nullptr : kNoImage;
        if (cause == nullptr && options_.captions) cause = captions_missing(sample.text, sample.json);
        if (cause == nullptr) {
            // By shard and place in it: the same picture is cut the same way whatever the number of ranks.
            const auto item = static_cast<std::uint64_t>(sample.shard) << 32 |
                              static_cast<std::uint64_t>(sample.where.ordinal);
            try {
                place.turn = transform.apply(reinterpret_cast<const std::uint8_t*>(sample.image.data.get()),
                                             sample.image.size,
                                             Random(options_.seed, Purpose::crops, options_.epoch, item), place.tile);
            } catch (const BadPicture& bad) {
                cause = bad.cause;
            }
        }
        lock.lock();
        place.cause = cause;
        place.state = cause == nullptr ? Place::State::good : Place::State::bad;
        give_places();
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
            bad_.push_back({place.sample.shard, std::move(place.sample.where.key), place.cause});
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
        pending.batch.records.push_back({sample.shard, std::move(sample.where.key), *sample.where.image,
                                         std::move(sample.text), std::move(sample.json),
                                         options_.keep_encoded ? std::move(sample.image) : Blob()});
        sample = {};
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
    batch = {{}, std::exchange(bad_, {}), options_.consumed + placed_};
    return Outcome::finished;
}

}  // namespace efficientclip
