#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

// The portable code gives the same bits; a test builds it alone to see that.
#if defined(__x86_64__) && !defined(EFFICIENTCLIP_PORTABLE)
#include <immintrin.h>
#define EFFICIENTCLIP_AVX2 1
#endif

namespace efficientclip {
namespace {

// Keys' bicubic with a = -0.5, Pillow's choice; it is 0 from kSupport on.
constexpr double kSupport = 2.0;

double bicubic(double x) {
    x = std::fabs(x);
    const double near = (1.5 * x - 2.5) * x * x + 1.0, far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0;
    return x < 1.0 ? near : x < kSupport ? far : 0.0;
}

// Weights are multiplied in pairs of 16 bits and summed up in 32; beyond this, a sum of large weights would overflow.
constexpr int kMaxShift = 22;
constexpr double kLargestWeight = 32'000;
// Rows that are resampled at once, so that each weight is loaded once for all of them.
constexpr int kRows = 4;

template <class T>
T load(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

std::uint8_t clipped(std::int32_t sum, int shift) {
    return static_cast<std::uint8_t>(std::clamp(sum >> shift, 0, 255));
}

// `inline` is not enough: the bodies below must become part of functions for other instruction sets.
#define EFFICIENTCLIP_INLINE inline __attribute__((always_inline))

void across_portable(const Axis& axis, const std::uint8_t* const* rows, std::uint8_t* const* out) {
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < axis.outputs; ++i) {
            const std::uint8_t* pixel = rows[r] + 4 * (axis.starts[static_cast<std::size_t>(i)] - axis.first);
            const std::int16_t* weights = axis.weights.data() + static_cast<std::size_t>(i) * axis.taps;
            std::int32_t sums[4];
            std::fill(sums, sums + 4, 1 << (axis.shift - 1));
            for (int t = 0; t < axis.counts[static_cast<std::size_t>(i)]; ++t) {
                for (int c = 0; c < 4; ++c) sums[c] += weights[t] * pixel[4 * t + c];
            }
            for (int c = 0; c < 4; ++c) out[r][4 * i + c] = clipped(sums[c], axis.shift);
        }
    }
}

void down_portable(const std::uint8_t* const* column, const std::int16_t* weights, int taps, int shift, int bytes,
                   std::uint8_t* out) {
    for (int i = 0; i < bytes; ++i) {
        std::int32_t sum = 1 << (shift - 1);
        for (int t = 0; t < taps; ++t) sum += weights[t] * column[t][i];
        out[i] = clipped(sum, shift);
    }
}

EFFICIENTCLIP_INLINE std::uint16_t rounded_bfloat16(float value) {
    const auto bits = load<std::uint32_t>(&value);
    // To the nearest, to even where two are as near; a picture has no NaN.
    return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

EFFICIENTCLIP_INLINE void put(float value, float* out) { *out = value; }
EFFICIENTCLIP_INLINE void put(float value, std::uint16_t* out) { *out = rounded_bfloat16(value); }

struct Scaling {
    float factor[3], offset[3];
};

// A row of pixels to three rows of values.
template <class Value>
EFFICIENTCLIP_INLINE void scale_row(const std::uint32_t* pixels, int count, const Scaling& scaling,
                                    Value* __restrict red, Value* __restrict green, Value* __restrict blue) {
    const auto [factor, offset] = scaling;
    for (int i = 0; i < count; ++i) {
        const auto pixel = static_cast<std::int32_t>(pixels[i]);
        put(static_cast<float>(pixel & 255) * factor[0] + offset[0], red + i);
        put(static_cast<float>(pixel >> 8 & 255) * factor[1] + offset[1], green + i);
        put(static_cast<float>(pixel >> 16 & 255) * factor[2] + offset[2], blue + i);
    }
}

void scale_row_portable(const std::uint32_t* pixels, int count, const Scaling& scaling, float* red, float* green,
                        float* blue) {
    scale_row(pixels, count, scaling, red, green, blue);
}

void scale_row_portable(const std::uint32_t* pixels, int count, const Scaling& scaling, std::uint16_t* red,
                        std::uint16_t* green, std::uint16_t* blue) {
    scale_row(pixels, count, scaling, red, green, blue);
}

#ifdef EFFICIENTCLIP_AVX2
#define EFFICIENTCLIP_TARGET __attribute__((target("avx2")))

EFFICIENTCLIP_TARGET inline __m256i pair_of_weights(const std::int16_t* weights) {
    return _mm256_set1_epi32(load<std::int32_t>(weights));
}

EFFICIENTCLIP_TARGET inline __m256i two_rows(const std::uint8_t* low, const std::uint8_t* high) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Of four neighbouring pixels of each row: the first two by their weights, and the last two by theirs.
EFFICIENTCLIP_TARGET inline __m256i four_taps(__m256i pixels, __m256i first_two, __m256i last_two, __m256i w,
                                              __m256i v) {
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(pixels, first_two), w),
                            _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, last_two), v));
}

// Two outputs at a time, a row in each half of a register.
EFFICIENTCLIP_TARGET void across_avx2(const Axis& axis, const std::uint8_t* const* rows, std::uint8_t* const* out) {
    const __m256i first_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i last_two = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const int taps = axis.taps, outputs = axis.outputs;
    const __m256i half = _mm256_set1_epi32(1 << (axis.shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(axis.shift);
    const int* starts = axis.starts.data();
    const std::int16_t* weights = axis.weights.data();
    std::uint8_t *out_0 = out[0], *out_1 = out[1], *out_2 = out[2], *out_3 = out[3];
    const std::uint8_t* row_0 = rows[0] - 4 * axis.first;
    const std::ptrdiff_t to_1 = rows[1] - rows[0], to_2 = rows[2] - rows[0], to_3 = rows[3] - rows[0];
    for (int i = 0; i < outputs; i += 2, starts += 2, weights += 2 * taps) {
        const std::uint8_t *p = row_0 + 4 * starts[0], *q = row_0 + 4 * starts[1];
        // Of the first output and of the second, rows 0 and 1 and rows 2 and 3.
        __m256i sum_a = half, sum_b = half, sum_c = half, sum_d = half;
        for (int t = 0; t < taps; t += 4, p += 16, q += 16) {
            __m256i w = pair_of_weights(weights + t), v = pair_of_weights(weights + t + 2);
            sum_a = _mm256_add_epi32(sum_a, four_taps(two_rows(p, p + to_1), first_two, last_two, w, v));
            sum_b = _mm256_add_epi32(sum_b, four_taps(two_rows(p + to_2, p + to_3), first_two, last_two, w, v));
            w = pair_of_weights(weights + taps + t), v = pair_of_weights(weights + taps + t + 2);
            sum_c = _mm256_add_epi32(sum_c, four_taps(two_rows(q, q + to_1), first_two, last_two, w, v));
            sum_d = _mm256_add_epi32(sum_d, four_taps(two_rows(q + to_2, q + to_3), first_two, last_two, w, v));
        }
        sum_a = _mm256_packs_epi32(_mm256_sra_epi32(sum_a, shift), _mm256_sra_epi32(sum_b, shift));
        sum_c = _mm256_packs_epi32(_mm256_sra_epi32(sum_c, shift), _mm256_sra_epi32(sum_d, shift));
        // In each half: row, row + 2 of the first output, then of the second; then by rows.
        const __m256i four = _mm256_shuffle_epi32(_mm256_packus_epi16(sum_a, sum_c), _MM_SHUFFLE(3, 1, 2, 0));
        const __m128i low = _mm256_castsi256_si128(four), high = _mm256_extracti128_si256(four, 1);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out_0 + 4 * i), low);
        _mm_storeh_pd(reinterpret_cast<double*>(out_2 + 4 * i), _mm_castsi128_pd(low));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out_1 + 4 * i), high);
        _mm_storeh_pd(reinterpret_cast<double*>(out_3 + 4 * i), _mm_castsi128_pd(high));
    }
}

// `bytes` is a multiple of 32, `taps` of 2.
EFFICIENTCLIP_TARGET void down_avx2(const std::uint8_t* const* column, const std::int16_t* weights, int taps,
                                    int shift_by, int bytes, std::uint8_t* out) {
    const __m256i half = _mm256_set1_epi32(1 << (shift_by - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(shift_by);
    for (int i = 0; i < bytes; i += 32) {
        __m256i sums[4] = {half, half, half, half};
        for (int t = 0; t < taps; t += 2) {
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column[t] + i));
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column[t + 1] + i));
            const __m256i pair = pair_of_weights(weights + t);
            const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
        }
        for (__m256i& sum : sums) sum = _mm256_sra_epi32(sum, shift);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                                                _mm256_packs_epi32(sums[2], sums[3])));
    }
}

EFFICIENTCLIP_TARGET void scale_row_avx2(const std::uint32_t* pixels, int count, const Scaling& scaling, float* red,
                                         float* green, float* blue) {
    scale_row(pixels, count, scaling, red, green, blue);
}

EFFICIENTCLIP_TARGET void scale_row_avx2(const std::uint32_t* pixels, int count, const Scaling& scaling,
                                         std::uint16_t* red, std::uint16_t* green, std::uint16_t* blue) {
    scale_row(pixels, count, scaling, red, green, blue);
}

const bool kHasAvx2 = __builtin_cpu_supports("avx2") != 0;
#endif

// kRows rows; an even number of outputs is written.
void across(const Axis& axis, const std::uint8_t* const* rows, std::uint8_t* const* out) {
#ifdef EFFICIENTCLIP_AVX2
    if (kHasAvx2) return across_avx2(axis, rows, out);
#endif
    across_portable(axis, rows, out);
}

void down(const std::uint8_t* const* column, const std::int16_t* weights, int taps, int shift, int bytes,
          std::uint8_t* out) {
#ifdef EFFICIENTCLIP_AVX2
    if (kHasAvx2) return down_avx2(column, weights, taps, shift, bytes, out);
#endif
    down_portable(column, weights, taps, shift, bytes, out);
}

template <class Value>
void scale(const std::uint32_t* pixels, int count, const Scaling& scaling, Value* red, Value* green, Value* blue) {
#ifdef EFFICIENTCLIP_AVX2
    if (kHasAvx2) return scale_row_avx2(pixels, count, scaling, red, green, blue);
#endif
    scale_row_portable(pixels, count, scaling, red, green, blue);
}

int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Pixels of row y of the picture that a tile becomes; put together in `row` unless they lie so in the tile.
const std::uint32_t* turned_row(const Tile& tile, Turn turn, int y, std::vector<std::uint32_t>& row) {
    const int last = tile.size - 1;
    const int across_step = turn.transposed ? tile.stride : 1, down_step = turn.transposed ? 1 : tile.stride;
    const std::uint32_t* from = tile.pixels.data() +
                                static_cast<std::ptrdiff_t>(turn.mirrored_y ? last - y : y) * down_step +
                                static_cast<std::ptrdiff_t>(turn.mirrored_x ? last : 0) * across_step;
    const std::ptrdiff_t step = turn.mirrored_x ? -across_step : across_step;
    if (step == 1) return from;
    row.resize(static_cast<std::size_t>(tile.size));
    for (int x = 0; x < tile.size; ++x) row[static_cast<std::size_t>(x)] = from[x * step];
    return row.data();
}

template <class Value>
void store_values(const Tile& tile, Turn turn, const PixelFormat& format, Value* out) {
    Scaling scaling;
    for (int c = 0; c < 3; ++c) {
        scaling.factor[c] = 1.0f / (255.0f * format.std[c]);
        scaling.offset[c] = -format.mean[c] / format.std[c];
    }
    const auto size = static_cast<std::size_t>(tile.size);
    std::vector<std::uint32_t> scratch;
    std::vector<Value> planes(format.channels_last ? 3 * size : 0);
    for (std::size_t y = 0; y < size; ++y) {
        const std::uint32_t* row = turned_row(tile, turn, static_cast<int>(y), scratch);
        if (!format.channels_last) {
            scale(row, tile.size, scaling, out + y * size, out + (size + y) * size, out + (2 * size + y) * size);
            continue;
        }
        scale(row, tile.size, scaling, planes.data(), planes.data() + size, planes.data() + 2 * size);
        Value* pixel = out + 3 * y * size;
        for (std::size_t x = 0; x < size; ++x, pixel += 3) {
            for (std::size_t c = 0; c < 3; ++c) pixel[c] = planes[c * size + x];
        }
    }
}

void store_bytes(const Tile& tile, Turn turn, bool channels_last, std::uint8_t* out) {
    const auto size = static_cast<std::size_t>(tile.size);
    const std::size_t pixel_step = channels_last ? 3 : 1, channel_step = channels_last ? 1 : size * size;
    std::vector<std::uint32_t> scratch;
    for (std::size_t y = 0; y < size; ++y) {
        const auto* bytes =
            reinterpret_cast<const std::uint8_t*>(turned_row(tile, turn, static_cast<int>(y), scratch));
        std::uint8_t* first = out + y * size * pixel_step;
        for (std::size_t x = 0; x < size; ++x) {
            for (std::size_t c = 0; c < 3; ++c) first[x * pixel_step + c * channel_step] = bytes[4 * x + c];
        }
    }
}

}  // namespace

Side Side::mirrored(int length) const {
    return {length - end, length - begin, length - highest, length - lowest, size, size - first_output - outputs,
            outputs};
}

Side Side::scaled(double factor, int length) const {
    return {begin * factor,
            end * factor,
            static_cast<int>(std::floor(lowest * factor)),
            std::min(length, static_cast<int>(std::ceil(highest * factor))),
            size,
            first_output,
            outputs};
}

void Axis::plan(const Side& side) {
    outputs = side.outputs;
    const double scale = (side.end - side.begin) / side.size;
    const double stretch = std::max(scale, 1.0), unstretch = 1.0 / stretch;
    const double support = kSupport * stretch;
    // The last output may be made with one more beside it, of no weight.
    const auto n = static_cast<std::size_t>(outputs), even = static_cast<std::size_t>(rounded_up(outputs, 2));
    const auto centre = [&](std::size_t i) {
        return side.begin + (side.first_output + static_cast<double>(i) + 0.5) * scale;
    };
    starts.resize(even);
    counts.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        // Rounded as Pillow rounds.
        starts[i] = std::max(static_cast<int>(centre(i) - support + 0.5), side.lowest);
        counts[i] = std::min(static_cast<int>(centre(i) + support + 0.5), side.highest) - starts[i];
    }
    first = starts[0];
    end = starts[n - 1] + counts[n - 1];
    starts[even - 1] = starts[n - 1];
    taps = rounded_up(*std::max_element(counts.begin(), counts.end()), 4);

    row_.resize(n * static_cast<std::size_t>(taps));
    double largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        double* row = row_.data() + i * static_cast<std::size_t>(taps);
        const double offset = starts[i] - centre(i) + 0.5;
        for (int t = 0; t < counts[i]; ++t) row[t] = bicubic((t + offset) * unstretch);
        const double share = 1.0 / std::accumulate(row, row + counts[i], 0.0);
        for (int t = 0; t < counts[i]; ++t) {
            row[t] *= share;
            largest = std::max(largest, std::fabs(row[t]));
        }
    }
    shift = std::min(kMaxShift, static_cast<int>(std::floor(std::log2(kLargestWeight / largest))));
    const double units = std::ldexp(1.0, shift);
    weights.assign(even * static_cast<std::size_t>(taps), 0);
    for (std::size_t i = 0; i < n; ++i) {
        const double* row = row_.data() + i * static_cast<std::size_t>(taps);
        std::int16_t* whole = weights.data() + i * static_cast<std::size_t>(taps);
        int rest = 1 << shift;
        for (int t = 0; t < counts[i]; ++t) {
            const double exact = row[t] * units;
            whole[t] = static_cast<std::int16_t>(exact < 0 ? exact - 0.5 : exact + 0.5);
            rest -= whole[t];
        }
        // A plain surface stays as it is.
        std::int16_t& strongest = *std::max_element(whole, whole + counts[i]);
        strongest = static_cast<std::int16_t>(strongest + rest);
    }
}

void Tile::resize(int wanted) {
    size = wanted;
    stride = rounded_up(wanted, 8);
    pixels.resize(static_cast<std::size_t>(stride) * static_cast<std::size_t>(size));
}

void Resampler::begin(const Axis& x, const Axis& y, Tile& tile) {
    x_ = &x;
    y_ = &y;
    tile_ = &tile;
    done_ = y.first;
    made_ = 0;
    capacity_ = *std::max_element(y.counts.begin(), y.counts.end()) + kRows;
    stride_ = 4 * static_cast<std::size_t>(tile.stride);
    ring_.resize(stride_ / sizeof(Vector) * static_cast<std::size_t>(capacity_));
    column_.resize(static_cast<std::size_t>(y.taps));
}

void Resampler::rows(const std::uint8_t* const* pixels, int count) {
    for (int r = 0; r < count; r += kRows) {
        // Too few are filled up by the last, into the places of rows to come.
        const std::uint8_t* from[kRows];
        std::uint8_t* to[kRows];
        for (int i = 0; i < kRows; ++i) {
            from[i] = pixels[std::min(r + i, count - 1)];
            to[i] = kept(done_ + i);
        }
        across(*x_, from, to);
        done_ += std::min(kRows, count - r);
        for (; made_ < y_->outputs; ++made_) {
            const auto at = static_cast<std::size_t>(made_);
            const int start = y_->starts[at], taps = y_->counts[at];
            if (start + taps > done_) break;
            // Weights past the last are 0: any row will do there.
            const int even = rounded_up(taps, 2);
            for (int t = 0; t < even; ++t) column_[static_cast<std::size_t>(t)] = kept(start + std::min(t, taps - 1));
            down(column_.data(), y_->weights.data() + at * static_cast<std::size_t>(y_->taps), even, y_->shift,
                 static_cast<int>(stride_),
                 reinterpret_cast<std::uint8_t*>(tile_->pixels.data() + at * static_cast<std::size_t>(tile_->stride)));
        }
    }
}

std::size_t PixelFormat::image_bytes(int size) const {
    const std::size_t item = type == PixelType::float32 ? 4 : type == PixelType::bfloat16 ? 2 : 1;
    return item * 3 * static_cast<std::size_t>(size) * static_cast<std::size_t>(size);
}

void store_tile(const Tile& tile, Turn turn, const PixelFormat& format, std::byte* out) {
    switch (format.type) {
        case PixelType::float32: return store_values(tile, turn, format, reinterpret_cast<float*>(out));
        case PixelType::bfloat16: return store_values(tile, turn, format, reinterpret_cast<std::uint16_t*>(out));
        case PixelType::uint8:
            return store_bytes(tile, turn, format.channels_last, reinterpret_cast<std::uint8_t*>(out));
    }
}

}  // namespace efficientclip
