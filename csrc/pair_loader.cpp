#include "pair_loader.hpp"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace efficientclip {
namespace {

void require(bool held, const std::string& message) {
    if (!held) throw std::invalid_argument(message);
}

std::string str(std::int64_t value) { return std::to_string(value); }

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

template <class T>
View<T> view(const std::vector<T>& values) {
    return {values.data(), static_cast<std::int64_t>(values.size())};
}

struct Share {
    std::int64_t begin, end;
};

// The part of `total` things that falls to a rank; the first ranks take what does not divide.
Share share_of(std::int64_t total, std::int64_t rank, std::int64_t world_size) {
    const std::int64_t each = total / world_size, extra = total % world_size;
    const std::int64_t begin = rank * each + std::min(rank, extra);
    return {begin, begin + each + (rank < extra ? 1 : 0)};
}

// Lengths of the texts `ids` after the cut to max_tokens. measure_texts checks ids and offsets.
void measure(const Texts& texts, View<std::int64_t> ids, std::int64_t max_tokens, std::vector<std::int32_t>& lengths) {
    const std::int64_t n_tokens = std::visit([](const auto& tokens) { return tokens.size; }, texts.tokens);
    lengths.resize(index(ids.size + 1));
    measure_texts(texts.offsets, n_tokens, ids, max_tokens, lengths.data());
    for (std::int64_t i = 0; i < ids.size; ++i) lengths[index(i)] = lengths[index(i + 1)] - lengths[index(i)];
    lengths.pop_back();
}

// Shortest first, equal lengths in the order given: these share one attention call on CPUs.
void sort_by_length(const std::int32_t* lengths, std::int64_t n, std::vector<std::int64_t>& order) {
    const std::int32_t longest = n == 0 ? 0 : *std::max_element(lengths, lengths + n);
    std::vector<std::int64_t> places(index(longest) + 2);
    for (std::int64_t i = 0; i < n; ++i) ++places[index(lengths[i]) + 1];
    std::partial_sum(places.begin(), places.end(), places.begin());
    order.resize(index(n));
    for (std::int64_t i = 0; i < n; ++i) order[index(places[index(lengths[i])]++)] = i;
}

// Cuts [pieces + 1] of a rank's pairs into runs of at most `limit` tokens, but one pair at least. `masked` tokens of
// masked texts go with the first run.
std::vector<std::int64_t> cuts_within(const std::int32_t* lengths, std::int64_t n, std::int64_t masked,
                                      std::int64_t limit) {
    std::vector<std::int64_t> cuts{0};
    std::int64_t tokens = masked;
    for (std::int64_t i = 0; i < n; ++i) {
        if (i > cuts.back() && tokens + lengths[i] > limit) {
            cuts.push_back(i);
            tokens = 0;
        }
        tokens += lengths[i];
    }
    cuts.push_back(n);
    return cuts;
}

// Exactly `pieces` runs of near token counts, none beyond `limit`, which `pieces` runs are known to keep to.
std::vector<std::int64_t> even_cuts(const std::int32_t* lengths, std::int64_t n, std::int64_t masked,
                                    std::int64_t limit, std::size_t pieces) {
    std::int64_t low = 0, high = limit;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (cuts_within(lengths, n, masked, middle).size() - 1 <= pieces) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    std::vector<std::int64_t> cuts = cuts_within(lengths, n, masked, high);
    while (cuts.size() - 1 < pieces) {
        std::size_t widest = 0;
        for (std::size_t i = 1; i + 1 < cuts.size(); ++i) {
            if (cuts[i + 1] - cuts[i] > cuts[widest + 1] - cuts[widest]) widest = i;
        }
        const std::int64_t middle = (cuts[widest] + cuts[widest + 1]) / 2;
        cuts.insert(cuts.begin() + static_cast<std::ptrdiff_t>(widest) + 1, middle);
    }
    return cuts;
}

// Batches that nobody holds. A lease ends wherever its last holder dies, also after the loader.
class BatchPool : public std::enable_shared_from_this<BatchPool> {
  public:
    explicit BatchPool(std::size_t most) : most_(most) {}

    std::shared_ptr<Batch> lease() {
        std::unique_ptr<Batch> batch;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!free_.empty()) {
                batch = std::move(free_.back());
                free_.pop_back();
            }
        }
        if (batch == nullptr) batch = std::make_unique<Batch>();
        return {batch.release(), [pool = shared_from_this()](Batch* released) {
                    pool->take_back(std::unique_ptr<Batch>(released));
                }};
    }

  private:
    void take_back(std::unique_ptr<Batch> batch) {
        // In a forked child the lock may be held for ever.
        if (getpid() != pid_) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (free_.size() < most_) free_.push_back(std::move(batch));
    }

    const std::size_t most_;
    const pid_t pid_ = getpid();
    std::mutex mutex_;
    std::vector<std::unique_ptr<Batch>> free_;
};

}  // namespace

struct PairLoader::Engine {
    // A batch's pairs and texts are chosen in order, its arrays filled by any thread.
    struct Chosen {
        std::int64_t epoch_step;
        std::shared_ptr<Batch> batch;
        std::vector<std::int64_t> text_ids;  // masked ones, over all ranks
        std::uint32_t pass;                  // over the unpaired texts
    };

    struct Slot {
        std::shared_ptr<Batch> batch;
        std::exception_ptr error;
    };

    const PairStore store;
    const EpochSettings settings;
    const std::int64_t m, trained;  // pairs of a rank, pairs that train
    Order kept, dropped;
    std::int64_t steps = 0;
    std::optional<Order> texts;  // of this pass
    std::int64_t pass = -1;
    const std::shared_ptr<BatchPool> pool;
    const pid_t pid = getpid();

    std::mutex choosing;  // guards the orders
    std::mutex mutex;     // guards all below
    std::condition_variable filled, room;
    std::vector<Slot> ring;
    std::int64_t next_to_fill, next_to_take;
    bool stopped = false;
    std::vector<std::thread> threads;

    Engine(const PairStore& given, const EpochSettings& epoch)
        : store(given),
          settings(epoch),
          m(epoch.batch_size / std::max<std::int64_t>(epoch.world_size, 1)),
          trained(epoch.batch_size - epoch.auditions),
          kept(given.trained_ids.size, epoch.kept, true, epoch.seed, Purpose::kept_pairs, epoch.epoch,
               epoch.weights),
          dropped(epoch.kept.size == 0 ? 0 : given.trained_ids.size, epoch.kept, false, epoch.seed,
                  Purpose::dropped_pairs, epoch.epoch),
          pool(std::make_shared<BatchPool>(index(std::max(epoch.prefetch, 1)) + 2)),
          ring(index(std::max(epoch.prefetch, 1))),
          next_to_fill(epoch.epoch_step),
          next_to_take(epoch.epoch_step) {
        check();
        steps = kept.size() / trained;
        require(steps > 0, "batch_size: " + str(settings.batch_size) + " pairs, but only " + str(kept.size()) +
                               " are left to train on");
        require(settings.epoch_step >= 0 && settings.epoch_step <= steps,
                "epoch_step is " + str(settings.epoch_step) + " of " + str(steps));
        try {
            while (threads.size() < index(settings.threads)) threads.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            // The machine is out of threads: those that started make all batches.
            if (threads.empty()) throw;
        }
    }

    ~Engine() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            stopped = true;
        }
        room.notify_all();
        for (std::thread& thread : threads) thread.join();
    }

    void check() const {
        const EpochSettings& s = settings;
        require(store.trained_ids.size == store.frozen_ids.size, "trained_ids and frozen_ids differ in length");
        require(s.world_size >= 1 && s.rank >= 0 && s.rank < s.world_size,
                "rank " + str(s.rank) + " of world_size " + str(s.world_size));
        require(s.batch_size >= 1 && s.batch_size % s.world_size == 0,
                "batch_size " + str(s.batch_size) + " is no multiple of world_size " + str(s.world_size));
        require(s.auditions >= 0 && s.auditions < s.batch_size && s.auditions <= dropped.size(),
                "auditions: " + str(s.auditions) + " of a batch of " + str(s.batch_size) + ", with " +
                    str(dropped.size()) + " pairs dropped");
        require(s.max_tokens >= 1, "max_tokens is " + str(s.max_tokens) + ": it must be at least 1");
        require(s.pairs_per_micro_batch >= 1, "pairs_per_micro_batch must be at least 1");
        require(s.threads >= 1 && s.prefetch >= 1, "threads and prefetch must be at least 1");
        std::int64_t most_masked = 0;
        if (store.masked) {
            const MaskedTexts& masked = *store.masked;
            require(store.captions.has_value(), "masked texts are packed behind captions, but there are none");
            require(masked.per_batch >= 1 && masked.per_batch <= masked.texts.size(),
                    "texts_per_batch is " + str(masked.per_batch) + " of " + str(masked.texts.size()) + " texts");
            check_rule(masked.rule);
            most_masked = (masked.per_batch + s.world_size - 1) / s.world_size * masked.max_tokens;
        }
        require(s.tokens_per_micro_batch == 0 || s.tokens_per_micro_batch >= s.max_tokens + most_masked,
                "tokens_per_micro_batch is " + str(s.tokens_per_micro_batch) + ": one caption and a rank's masked texts" +
                    " may take " + str(s.max_tokens + most_masked));
    }

    void work() {
        for (;;) {
            Chosen chosen;
            {
                // Held while waiting for room, so that batches are chosen in order: the orders keep one window open.
                const std::lock_guard<std::mutex> order_lock(choosing);
                {
                    std::unique_lock<std::mutex> lock(mutex);
                    room.wait(lock, [&] {
                        return stopped || next_to_fill == steps ||
                               next_to_fill < next_to_take + static_cast<std::int64_t>(ring.size());
                    });
                    if (stopped || next_to_fill == steps) return;
                    chosen.epoch_step = next_to_fill++;
                }
                publish_error(chosen, [&] { choose(chosen); });
            }
            if (chosen.batch != nullptr && publish_error(chosen, [&] { fill(chosen); })) {
                publish(chosen.epoch_step, {chosen.batch, nullptr});
            }
        }
    }

    // False, and the error lies in the batch's slot, if `make` throws.
    template <class Make>
    bool publish_error(Chosen& chosen, Make make) {
        try {
            make();
            return true;
        } catch (...) {
            chosen.batch.reset();
            publish(chosen.epoch_step, {nullptr, std::current_exception()});
            return false;
        }
    }

    void publish(std::int64_t epoch_step, Slot slot) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            ring[index(epoch_step) % ring.size()] = std::move(slot);
        }
        filled.notify_all();
    }

    void choose(Chosen& chosen) {
        chosen.batch = pool->lease();
        Batch& batch = *chosen.batch;
        batch.rows.resize(index(settings.batch_size));
        kept.read(chosen.epoch_step * trained, trained, batch.rows.data());
        for (std::int64_t at = trained; at < settings.batch_size;) {
            const std::int64_t place = (chosen.epoch_step * settings.auditions + at - trained) % dropped.size();
            const std::int64_t count = std::min(settings.batch_size - at, dropped.size() - place);
            dropped.read(place, count, batch.rows.data() + at);
            at += count;
        }
        if (store.masked) {
            const std::int64_t per_batch = store.masked->per_batch, per_pass = store.masked->texts.size() / per_batch;
            const std::int64_t step = settings.step + chosen.epoch_step - settings.epoch_step;
            if (step / per_pass != pass) {
                pass = step / per_pass;
                texts.emplace(store.masked->texts.size(), View<std::uint8_t>{nullptr, 0}, true, settings.seed,
                              Purpose::texts, static_cast<std::uint32_t>(pass));
            }
            chosen.text_ids.resize(index(per_batch));
            texts->read(step % per_pass * per_batch, per_batch, chosen.text_ids.data());
            chosen.pass = static_cast<std::uint32_t>(pass);
        }
    }

    void fill(const Chosen& chosen) const {
        Batch& batch = *chosen.batch;
        const std::int64_t first = settings.rank * m;
        batch.weights.assign(index(settings.batch_size), 0.0f);
        std::fill_n(batch.weights.begin(), trained, 1.0f);
        batch.frozen_ids.resize(batch.rows.size());
        for (std::size_t i = 0; i < batch.rows.size(); ++i) batch.frozen_ids[i] = store.frozen_ids[batch.rows[i]];
        batch.trained_ids.resize(index(m));
        for (std::int64_t i = 0; i < m; ++i) batch.trained_ids[index(i)] = store.trained_ids[batch.rows[index(first + i)]];
        batch.features.resize(index(m * store.feature_bytes));
        gather_rows(store.features, store.n_features, store.feature_bytes, {batch.frozen_ids.data() + first, m}, 1,
                    batch.features.data());
        if (store.captions) pack(chosen);
    }

    void pack(const Chosen& chosen) const {
        Batch& batch = *chosen.batch;
        std::vector<std::int32_t> lengths, masked_lengths;
        measure(*store.captions, view(batch.trained_ids), settings.max_tokens, lengths);
        const Share texts_here = share_of(static_cast<std::int64_t>(chosen.text_ids.size()), settings.rank,
                                          settings.world_size);
        const View<std::int64_t> masked_ids{chosen.text_ids.data() + texts_here.begin, texts_here.end - texts_here.begin};
        if (store.masked) measure(store.masked->texts, masked_ids, store.masked->max_tokens, masked_lengths);
        const std::int64_t masked_tokens = std::accumulate(masked_lengths.begin(), masked_lengths.end(), std::int64_t{0});
        const std::int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), masked_tokens);
        require(tokens <= std::numeric_limits<std::int32_t>::max(), "a batch has more than 2^31 - 1 tokens, too many for"
                                                                    " int32 cu_seqlens: lower batch_size or max_tokens");
        const std::vector<std::int64_t> cuts = cut(chosen, lengths, masked_tokens);

        batch.input_ids.resize(index(tokens));
        batch.position_ids.resize(index(tokens));
        batch.cu_seqlens.resize(lengths.size() + masked_lengths.size() + cuts.size() - 1);
        batch.segments.resize(index(m));
        batch.micro_batches.clear();
        batch.masked_positions.clear();
        batch.masked_labels.clear();

        std::vector<std::int64_t> order, ids;
        std::int64_t token = 0, text = 0;
        for (std::size_t piece = 0; piece + 1 < cuts.size(); ++piece) {
            MicroBatch micro{cuts[piece], cuts[piece + 1], token, 0, text, 0};
            std::int32_t* cu_seqlens = batch.cu_seqlens.data() + text + static_cast<std::int64_t>(piece);
            const std::int64_t n = micro.end - micro.begin;
            sort_by_length(lengths.data() + micro.begin, n, order);
            ids.resize(index(n));
            cu_seqlens[0] = 0;
            for (std::int64_t k = 0; k < n; ++k) {
                const std::int64_t pair = micro.begin + order[index(k)];
                ids[index(k)] = batch.trained_ids[index(pair)];
                batch.segments[index(pair)] = k;
                cu_seqlens[k + 1] = cu_seqlens[k] + lengths[index(pair)];
            }
            pack_at(*store.captions, ids, cu_seqlens, token, batch);
            token += cu_seqlens[n];
            text += n;
            if (piece == 0 && store.masked) {
                mask(chosen, masked_ids, masked_lengths, cu_seqlens + n, token, batch);
                token += masked_tokens;
                text += masked_ids.size;
            }
            micro.last_token = token;
            micro.last_text = text;
            batch.micro_batches.push_back(micro);
        }
    }

    // Packs masked texts from `token` on, behind cu_seqlens[0] tokens of captions.
    void mask(const Chosen& chosen, View<std::int64_t> masked_ids, const std::vector<std::int32_t>& lengths,
              std::int32_t* cu_seqlens, std::int64_t token, Batch& batch) const {
        std::vector<std::int64_t> order, ids(lengths.size());
        sort_by_length(lengths.data(), masked_ids.size, order);
        for (std::int64_t k = 0; k < masked_ids.size; ++k) {
            ids[index(k)] = masked_ids[order[index(k)]];
            cu_seqlens[k + 1] = cu_seqlens[k] + lengths[index(order[index(k)])];
        }
        pack_at(store.masked->texts, ids, cu_seqlens, token, batch);
        for (std::int64_t k = 0; k < masked_ids.size; ++k) {
            const Random random(settings.seed, Purpose::masks, chosen.pass, static_cast<std::uint64_t>(ids[index(k)]));
            mask_text(store.masked->rule, random, batch.input_ids.data() + token + cu_seqlens[k] - cu_seqlens[0],
                      cu_seqlens[k + 1] - cu_seqlens[k], cu_seqlens[k], batch.masked_positions, batch.masked_labels);
        }
    }

    static void pack_at(const Texts& texts, const std::vector<std::int64_t>& ids, const std::int32_t* cu_seqlens,
                        std::int64_t token, Batch& batch) {
        std::visit(
            [&](const auto& tokens) {
                pack_texts(tokens, texts.offsets, view(ids), cu_seqlens, batch.input_ids.data() + token,
                           batch.position_ids.data() + token);
            },
            texts.tokens);
    }

    // Where this rank's pairs are cut into micro-batches, as many on every rank: collectives must meet.
    std::vector<std::int64_t> cut(const Chosen& chosen, const std::vector<std::int32_t>& lengths,
                                  std::int64_t masked_tokens) const {
        std::vector<std::int64_t> cuts;
        const std::int64_t limit = settings.tokens_per_micro_batch;
        if (limit == 0) {
            for (std::int64_t begin = 0; begin < m; begin += settings.pairs_per_micro_batch) cuts.push_back(begin);
            cuts.push_back(m);
            return cuts;
        }
        std::size_t pieces = 1;
        std::vector<std::int64_t> ids(index(m));
        std::vector<std::int32_t> theirs;
        for (std::int64_t rank = 0; rank < settings.world_size; ++rank) {
            std::int64_t masked_theirs = 0;
            if (store.masked) {
                const Share part = share_of(static_cast<std::int64_t>(chosen.text_ids.size()), rank, settings.world_size);
                measure(store.masked->texts, {chosen.text_ids.data() + part.begin, part.end - part.begin},
                        store.masked->max_tokens, theirs);
                masked_theirs = std::accumulate(theirs.begin(), theirs.end(), std::int64_t{0});
            }
            for (std::int64_t i = 0; i < m; ++i) {
                ids[index(i)] = store.trained_ids[chosen.batch->rows[index(rank * m + i)]];
            }
            measure(*store.captions, view(ids), settings.max_tokens, theirs);
            pieces = std::max(pieces, cuts_within(theirs.data(), m, masked_theirs, limit).size() - 1);
        }
        return even_cuts(lengths.data(), m, masked_tokens, limit, pieces);
    }
};

PairLoader::PairLoader(const PairStore& store, const EpochSettings& settings) : engine_(new Engine(store, settings)) {}

PairLoader::~PairLoader() {
    if (getpid() == engine_->pid) delete engine_;
}

std::int64_t PairLoader::steps() const { return engine_->steps; }

std::shared_ptr<Batch> PairLoader::next(std::chrono::milliseconds patience) {
    if (getpid() != engine_->pid) {
        throw std::logic_error("this loader's threads live in the process that made it: make another after the fork");
    }
    std::unique_lock<std::mutex> lock(engine_->mutex);
    if (engine_->next_to_take == engine_->steps) throw std::out_of_range("the epoch has no further batch");
    Engine::Slot& slot = engine_->ring[index(engine_->next_to_take) % engine_->ring.size()];
    if (!engine_->filled.wait_for(lock, patience, [&] { return slot.batch != nullptr || slot.error != nullptr; })) {
        return nullptr;
    }
    if (slot.error != nullptr) std::rethrow_exception(slot.error);
    std::shared_ptr<Batch> batch = std::exchange(slot.batch, nullptr);
    ++engine_->next_to_take;
    lock.unlock();
    engine_->room.notify_all();
    return batch;
}

}  // namespace efficientclip
