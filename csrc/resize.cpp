#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

// Which instructions may be used where the processor has them: 2 for AVX-512 VNNI, 1 for AVX2, 0 for neither. All give the
// same bits; tests build each to see that.
#if !defined(__x86_64__)
#undef EFFICIENTCLIP_VECTORS
#define EFFICIENTCLIP_VECTORS 0
#elif !defined(EFFICIENTCLIP_VECTORS)
#define EFFICIENTCLIP_VECTORS 2
#endif
#if EFFICIENTCLIP_VECTORS > 0
#include <immintrin.h>
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

#if EFFICIENTCLIP_VECTORS > 0
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

// Sums of rows 0 and 1 and of rows 2 and 3, of one output and of the next, to a byte each.
EFFICIENTCLIP_TARGET inline void write_four(__m256i sum_a, __m256i sum_b, __m256i sum_c, __m256i sum_d, __m128i shift,
                                            std::uint8_t* const* out, int at) {
    sum_a = _mm256_packs_epi32(_mm256_sra_epi32(sum_a, shift), _mm256_sra_epi32(sum_b, shift));
    sum_c = _mm256_packs_epi32(_mm256_sra_epi32(sum_c, shift), _mm256_sra_epi32(sum_d, shift));
    // In each half: row, row + 2 of the first output, then of the second; then by rows.
    const __m256i four = _mm256_shuffle_epi32(_mm256_packus_epi16(sum_a, sum_c), _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i low = _mm256_castsi256_si128(four), high = _mm256_extracti128_si256(four, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[0] + at), low);
    _mm_storeh_pd(reinterpret_cast<double*>(out[2] + at), _mm_castsi128_pd(low));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out[1] + at), high);
    _mm_storeh_pd(reinterpret_cast<double*>(out[3] + at), _mm_castsi128_pd(high));
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
    std::uint8_t* const to[kRows] = {out[0], out[1], out[2], out[3]};
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
        write_four(sum_a, sum_b, sum_c, sum_d, shift, to, 4 * i);
    }
}

// `bytes` is a multiple of 32.
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

#if EFFICIENTCLIP_VECTORS > 1
#define EFFICIENTCLIP_TARGET_VNNI __attribute__((target("avx2,avx512vl,avx512vnni")))

// Sums of bytes times each weight's high byte and its low one, four at once.
struct SplitSum {
    __m256i high, low;

    EFFICIENTCLIP_TARGET_VNNI void add(__m256i pixels, __m256i high_weights, __m256i low_weights) {
        high = _mm256_dpbusd_epi32(high, pixels, high_weights);
        low = _mm256_dpbusd_epi32(low, pixels, low_weights);
    }
    EFFICIENTCLIP_TARGET_VNNI __m256i whole() const { return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low); }
};

EFFICIENTCLIP_TARGET_VNNI inline __m256i four_weights(const std::int8_t* split) {
    return _mm256_set1_epi32(load<std::int32_t>(split));
}

EFFICIENTCLIP_TARGET_VNNI void across_vnni(const Axis& axis, const std::uint8_t* const* rows, std::uint8_t* const* out) {
    const __m256i by_channel = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const int taps = axis.taps, outputs = axis.outputs;
    const __m256i half = _mm256_set1_epi32(1 << (axis.shift - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(axis.shift);
    const int* starts = axis.starts.data();
    const std::int8_t *v = axis.split.data(), *w = v + 2 * taps;
    std::uint8_t* const to[kRows] = {out[0], out[1], out[2], out[3]};
    const std::uint8_t* row_0 = rows[0] - 4 * axis.first;
    const std::ptrdiff_t to_1 = rows[1] - rows[0], to_2 = rows[2] - rows[0], to_3 = rows[3] - rows[0];
    for (int i = 0; i < outputs; i += 2, starts += 2, v += 4 * taps, w += 4 * taps) {
        const std::uint8_t *p = row_0 + 4 * starts[0], *q = row_0 + 4 * starts[1];
        SplitSum a{zero, half}, b{zero, half}, c{zero, half}, d{zero, half};
        for (int t = 0; t < taps; t += 4, p += 16, q += 16) {
            const __m256i v_high = four_weights(v + 2 * t), v_low = four_weights(v + 2 * t + 4);
            a.add(_mm256_shuffle_epi8(two_rows(p, p + to_1), by_channel), v_high, v_low);
            b.add(_mm256_shuffle_epi8(two_rows(p + to_2, p + to_3), by_channel), v_high, v_low);
            const __m256i w_high = four_weights(w + 2 * t), w_low = four_weights(w + 2 * t + 4);
            c.add(_mm256_shuffle_epi8(two_rows(q, q + to_1), by_channel), w_high, w_low);
            d.add(_mm256_shuffle_epi8(two_rows(q + to_2, q + to_3), by_channel), w_high, w_low);
        }
        write_four(a.whole(), b.whole(), c.whole(), d.whole(), shift, to, 4 * i);
    }
}

EFFICIENTCLIP_TARGET_VNNI void down_vnni(const std::uint8_t* const* column, const std::int8_t* split, int taps,
                                         int shift_by, int bytes, std::uint8_t* out) {
    const __m256i half = _mm256_set1_epi32(1 << (shift_by - 1)), zero = _mm256_setzero_si256();
    const __m128i shift = _mm_cvtsi32_si128(shift_by);
    for (int i = 0; i < bytes; i += 32) {
        SplitSum sums[4] = {{zero, half}, {zero, half}, {zero, half}, {zero, half}};
        for (int t = 0; t < taps; t += 4) {
            const auto row = [&](int r) EFFICIENTCLIP_TARGET_VNNI {
                return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column[t + r] + i));
            };
            const __m256i ab_low = _mm256_unpacklo_epi8(row(0), row(1)), ab_high = _mm256_unpackhi_epi8(row(0), row(1));
            const __m256i cd_low = _mm256_unpacklo_epi8(row(2), row(3)), cd_high = _mm256_unpackhi_epi8(row(2), row(3));
            const __m256i high = four_weights(split + 2 * t), low = four_weights(split + 2 * t + 4);
            sums[0].add(_mm256_unpacklo_epi16(ab_low, cd_low), high, low);
            sums[1].add(_mm256_unpackhi_epi16(ab_low, cd_low), high, low);
            sums[2].add(_mm256_unpacklo_epi16(ab_high, cd_high), high, low);
            sums[3].add(_mm256_unpackhi_epi16(ab_high, cd_high), high, low);
        }
        __m256i whole[4];
        for (int k = 0; k < 4; ++k) whole[k] = _mm256_sra_epi32(sums[k].whole(), shift);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm256_packus_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                                _mm256_packs_epi32(whole[2], whole[3])));
    }
}

// The low byte counts from -128 on, so the high one is of what it leaves.
EFFICIENTCLIP_TARGET_VNNI void split_weights(Axis& axis) {
    const __m128i order = _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14);
    const __m128i low = _mm_set1_epi64x(static_cast<long long>(0xFFFFFFFF00000000));
    axis.split.resize(2 * axis.weights.size());
    for (std::size_t i = 0; i < axis.weights.size(); i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(axis.weights.data() + i));
        const __m128i rounded = _mm_add_epi16(eight, _mm_set1_epi16(128));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(axis.split.data() + 2 * i),
                         _mm_blendv_epi8(_mm_shuffle_epi8(rounded, order), _mm_shuffle_epi8(eight, order), low));
    }
}

const bool kHasVnni = kHasAvx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif

// kRows rows; an even number of outputs is written.
void across(const Axis& axis, const std::uint8_t* const* rows, std::uint8_t* const* out) {
#if EFFICIENTCLIP_VECTORS > 1
    if (kHasVnni) return across_vnni(axis, rows, out);
#endif
#if EFFICIENTCLIP_VECTORS > 0
    if (kHasAvx2) return across_avx2(axis, rows, out);
#endif
    across_portable(axis, rows, out);
}

// One output from `taps` rows, of which there are a multiple of 4.
void down(const Axis& axis, std::size_t output, const std::uint8_t* const* column, int taps, int bytes,
          std::uint8_t* out) {
    const std::size_t first = output * static_cast<std::size_t>(axis.taps);
#if EFFICIENTCLIP_VECTORS > 1
    if (kHasVnni) return down_vnni(column, axis.split.data() + 2 * first, taps, axis.shift, bytes, out);
#endif
#if EFFICIENTCLIP_VECTORS > 0
    if (kHasAvx2) return down_avx2(column, axis.weights.data() + first, taps, axis.shift, bytes, out);
#endif
    down_portable(column, axis.weights.data() + first, taps, axis.shift, bytes, out);
}

template <class Value>
void scale(const std::uint32_t* pixels, int count, const Scaling& scaling, Value* red, Value* green, Value* blue) {
#if EFFICIENTCLIP_VECTORS > 0
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
#if EFFICIENTCLIP_VECTORS > 1
    if (kHasVnni) split_weights(*this);
#endif
}

void Tile::resize(int wanted) {
    size = wanted;
    stride = rounded_up(wanted, 8);
    pixels.resize(static_cast<std::size_t>(stride) * static_cast<std::size_t>(size));
}

void Resampler::begin(const Axis& x, const Axis& y, Tile& tile, bool columns_first) {
    x_ = &x;
    y_ = &y;
    tile_ = &tile;
    columns_first_ = columns_first;
    done_ = y.first;
    made_ = 0;
    capacity_ = *std::max_element(y.counts.begin(), y.counts.end()) + kRows;
    const auto vector = static_cast<int>(sizeof(Vector));
    stride_ = static_cast<std::size_t>(columns_first ? rounded_up(4 * x.readable(), vector) : 4 * tile.stride);
    ring_.resize(stride_ / sizeof(Vector) * static_cast<std::size_t>(capacity_));
    if (columns_first) waiting_.resize((kRows * stride_ + 4 * static_cast<std::size_t>(tile.stride)) / sizeof(Vector));
    column_.resize(static_cast<std::size_t>(y.taps));
}

void Resampler::rows(const std::uint8_t* const* pixels, int count) {
    if (!columns_first_) return rows_first(pixels, count);
    for (int r = 0; r < count; ++r) columns_first(pixels[r]);
}

void Resampler::rows_first(const std::uint8_t* const* pixels, int count) {
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
        while (made_ < y_->outputs && column(tile_row(made_))) ++made_;
    }
}

void Resampler::columns_first(const std::uint8_t* row) {
    std::memcpy(kept(done_), row, 4 * static_cast<std::size_t>(x_->readable()));
    ++done_;
    auto* waiting = reinterpret_cast<std::uint8_t*>(waiting_.data());
    while (made_ < y_->outputs && column(waiting + static_cast<std::size_t>(made_ % kRows) * stride_)) {
        const int first = made_ / kRows * kRows;
        if (++made_ % kRows != 0 && made_ < y_->outputs) continue;
        const std::uint8_t* from[kRows];
        std::uint8_t* to[kRows];
        for (int i = 0; i < kRows; ++i) {
            from[i] = waiting + static_cast<std::size_t>(std::min(i, made_ - 1 - first)) * stride_;
            to[i] = first + i < made_ ? tile_row(first + i) : waiting + kRows * stride_;
        }
        across(*x_, from, to);
    }
}

// Makes the next output of the columns of the rows that are kept, if they are all there.
bool Resampler::column(std::uint8_t* out) {
    const auto at = static_cast<std::size_t>(made_);
    const int start = y_->starts[at], taps = y_->counts[at];
    if (start + taps > done_) return false;
    // Weights past the last are 0: any row will do there.
    const int fours = rounded_up(taps, 4);
    for (int t = 0; t < fours; ++t) column_[static_cast<std::size_t>(t)] = kept(start + std::min(t, taps - 1));
    down(*y_, at, column_.data(), fours, static_cast<int>(stride_), out);
    return true;
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
