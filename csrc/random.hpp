// Random numbers that are a function of what they are for: threads, prefetching and resuming cannot change them.
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <array>
#include <cstdint>
#include <utility>

namespace efficientclip {

using Philox4 = std::array<std::uint32_t, 4>;

inline Philox4 philox(Philox4 counter, std::array<std::uint32_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
                   static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return counter;
}

// What numbers are drawn for: streams of one seed that never meet.
enum class Purpose : std::uint32_t { kept_pairs = 1, dropped_pairs, texts, masks, shards, shuffle_buffer, crops, visits };

// The stream of one item (a window, a text, a picture) in one epoch.
class Random {
  public:
    Random(std::uint64_t seed, Purpose purpose, std::uint32_t epoch, std::uint64_t item)
        : counter_{0, epoch, static_cast<std::uint32_t>(item), static_cast<std::uint32_t>(item >> 32)} {
        // The finaliser of SplitMix64: a bijection, so two seeds never share a key.
        std::uint64_t key = seed + 0x9E3779B97F4A7C15ull * static_cast<std::uint32_t>(purpose);
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
        key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
        key ^= key >> 31;
        key_ = {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)};
    }

    std::uint32_t bits() {
        if (left_ == 0) {
            drawn_ = philox(counter_, key_);
            ++counter_[0];
            left_ = 4;
        }
        return drawn_[4 - left_--];
    }

    // Uniform in 0 .. n - 1 without bias, n >= 1 (Lemire, "Fast random integer generation in an interval", 2019).
    std::uint32_t below(std::uint32_t n) {
        std::uint64_t scaled = std::uint64_t{bits()} * n;
        if (static_cast<std::uint32_t>(scaled) < n) {
            const std::uint32_t unfair = (0u - n) % n;
            while (static_cast<std::uint32_t>(scaled) < unfair) scaled = std::uint64_t{bits()} * n;
        }
        return static_cast<std::uint32_t>(scaled >> 32);
    }

    // Uniform in [0, 1), 53 bits.
    double uniform() {
        const std::uint64_t high = bits() >> 5, low = bits() >> 6;
        return static_cast<double>((high << 26) | low) * 0x1p-53;
    }

    // Fisher-Yates; at most 2^32 - 1 values.
    template <class T>
    void shuffle(T* values, std::uint32_t n) {
        for (std::uint32_t i = n; i > 1; --i) std::swap(values[i - 1], values[below(i)]);
    }

  private:
    Philox4 counter_;
    std::array<std::uint32_t, 2> key_{};
    Philox4 drawn_{};
    int left_ = 0;
};

}  // namespace efficientclip
