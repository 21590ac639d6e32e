#include "image_loader.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <utility>

namespace efficientclip {
namespace {

constexpr const char* kNoImage = "caption without image";
// Pictures that lie in files of their own are read by so many threads: each waits for its disk or network alone.
constexpr int kGatherers = 8;

}  // namespace

// A batch that is being filled, or is full and being written.
struct ImageLoader::Pending {
    ImageBatch batch;
    std::byte* images = nullptr;
    int unwritten = 0;
    bool sealed = false;
};

// One sample on its way from the reader into a batch.
struct ImageLoader::Place {
    enum class State { free, read, gathered, decoding, good, bad, placed } state = State::free;
    Sample sample;
    Captions captions;
    const char* without = nullptr;
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
        const auto listed = [](const Shard& shard) { return shard.listing != nullptr; };
        if (std::any_of(options_.shards.begin(), options_.shards.end(), listed)) {
            for (int i = 0; i < kGatherers; ++i) start(&ImageLoader::gather);
        }
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
    gather_.notify_all();
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
        Pass(
            options_, [this](Sample&& sample) { return emit(std::move(sample)); }, [this] { return must_stop(); },
            [this](BadShard shard) {
                const std::lock_guard lock(mutex_);
                bad_shards_.push_back(std::move(shard));
            })
            .run();
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

// Hands a sample to the workers once there is room; false when the pass is to stop.
bool ImageLoader::emit(Sample&& sample) {
    std::unique_lock lock(mutex_);
    const std::size_t at = static_cast<std::size_t>(read_) % places_.size();
    Place& place = places_[at];
    space_.wait(lock, [&] { return stopping_ || place.state == Place::State::free; });
    if (stopping_) return false;
    place.sample = std::move(sample);
    place.cause.clear();
    ++read_;
    if (place.sample.shard != nullptr) {
        place.state = Place::State::read;
        to_gather_.push_back(at);
        gather_.notify_one();
    } else {
        place.state = Place::State::gathered;
        work_.notify_one();
    }
    return true;
}

// Reads the pictures that lie in no tar.
void ImageLoader::gather() {
    PictureReader reader;
    std::unique_lock lock(mutex_);
    for (;;) {
        gather_.wait(lock, [&] { return stopping_ || !to_gather_.empty(); });
        if (stopping_) return;
        Place& place = places_[to_gather_.front()];
        to_gather_.pop_front();
        lock.unlock();
        gather(place, reader);
        lock.lock();
        place.state = Place::State::gathered;
        work_.notify_one();
    }
}

// Finds what is said of the picture, and its bytes.
void ImageLoader::gather(Place& place, PictureReader& reader) const {
    Sample& sample = place.sample;
    TarSample& where = sample.where;
    const Listing* listing = sample.shard != nullptr ? sample.shard->listing : nullptr;
    place.captions = {};
    try {
        if (listing != nullptr) {
            where.key = listing->keys[where.ordinal];
            place.captions.source = listing->sources[where.ordinal];
            if (listing->file[where.ordinal] >= 0) {
                where.image = Extent{listing->offset[where.ordinal], listing->length[where.ordinal]};
            }
        }
        if (sample.cause != nullptr) throw BadPicture{sample.cause};
        if (!where.image) throw BadPicture{kNoImage};
        place.without = listing != nullptr ? read_captions(listing->captions_of(where.ordinal), place.captions)
                                           : read_captions(sample.text, sample.json, place.captions);
        if (options_.captions && place.without != nullptr) throw BadPicture{place.without};
        if (where.image->size > kLargestPicture) throw BadPicture{kTooLarge};
        if (listing != nullptr) {
            sample.image = reader.read(listing->files[listing->file[where.ordinal]], *where.image, listing->base64,
                                       sample.shard->fetched.owner);
        }
    } catch (const BadPicture& bad) {
        place.cause = bad.cause;
    }
}

bool ImageLoader::can_decode() const {
    return taken_ < read_ &&
           places_[static_cast<std::size_t>(taken_) % places_.size()].state == Place::State::gathered;
}

void ImageLoader::work() {
    PictureReader reader;
    Transform transform(options_.transform, options_.other);
    const std::size_t image_bytes = options_.format.image_bytes(options_.transform.size);
    std::unique_lock lock(mutex_);
    for (;;) {
        work_.wait(lock, [&] { return stopping_ || !to_store_.empty() || can_decode(); });
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
        // The next one may have been gathered before this one was.
        if (can_decode()) work_.notify_one();
        lock.unlock();
        if (place.sample.shard == nullptr) gather(place, reader);
        if (place.cause.empty()) decode(place, transform);
        lock.lock();
        place.state = place.cause.empty() ? Place::State::good : Place::State::bad;
        give_places();
    }
}

// Makes the sample's tile, or tells why it is bad.
void ImageLoader::decode(Place& place, Transform& transform) const {
    const Sample& sample = place.sample;
    try {
        // By shard and place in it: the same picture is cut the same way whatever the number of ranks.
        const std::uint64_t item = item_of(sample.number, sample.where.ordinal);
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
            bad_.push_back({place.sample.number, std::move(place.sample.where.key), std::move(place.cause)});
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
        pending.batch.records.push_back({sample.number, sample.where.ordinal, std::move(sample.where.key),
                                         *sample.where.image, std::move(place.captions), place.without,
                                         std::move(sample.json),
                                         options_.keep_encoded ? std::move(sample.image) : Blob(),
                                         options_.consumed + placed_ + 1});
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
    pending.batch.bad_shards = std::exchange(bad_shards_, {});
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
    batch = {{}, std::exchange(bad_, {}), std::exchange(bad_shards_, {}), 0, options_.consumed + placed_};
    return Outcome::finished;
}

}  // namespace efficientclip
