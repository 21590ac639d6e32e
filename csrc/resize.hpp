// Bicubic resampling with antialiasing, as Pillow does it: rows in, one small RGBX tile out, all in integers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "picture.hpp"

namespace efficientclip {

// How one side of a picture is resampled: the span begin .. end of the source becomes `size` outputs, of which
// `outputs` from `first_output` on are made. Only source pixels lowest .. highest - 1 may be read.
struct Side {
    double begin, end;
    int lowest, highest;
    int size, first_output, outputs;

    // The same seen from the other end of a source of `length` pixels.
    Side mirrored(int length) const;
    // The same in a source that is `factor` times as long, and holds `length` pixels.
    Side scaled(double factor, int length) const;
};

// Which source pixels make each output, and with which weights.
struct Axis {
    int outputs = 0;
    int first = 0, end = 0;             // source pixels that are read
    int taps = 0;                       // weights kept for each output, a multiple of 4; unused ones are 0
    int shift = 0;                      // weights are in units of 2^-shift
    std::vector<int> starts, counts;    // [outputs] or one more, source pixels
    std::vector<std::int16_t> weights;  // [as many * taps], of each output they sum up to 2^shift
    std::vector<std::int8_t> split;     // of every four weights their high bytes, then their low ones, where that is faster

    // Pixels that a row from `first` on must let be read, whatever stands in those past `end`.
    int readable() const { return end - first + taps; }
    void plan(const Side& side);

  private:
    std::vector<double> row_;
};

// A square of RGBX pixels; a row may be longer than the square, so that whole vectors are written.
struct Tile {
    int size = 0;
    int stride = 0;
    std::vector<std::uint32_t> pixels;

    void resize(int wanted);
};

// A vector register's worth of memory.
struct alignas(32) Vector {
    std::uint8_t bytes[32];
};

// Resamples rows as they come: first each row, then as many columns as its rows allow, or first the columns. Keeps few
// rows.
class Resampler : public RowSink {
  public:
    // Rows y.first .. y.end - 1 follow, each from pixel x.first on. The axes and the tile are borrowed.
    void begin(const Axis& x, const Axis& y, Tile& tile, bool columns_first);
    void rows(const std::uint8_t* const* pixels, int count) override;

  private:
    void rows_first(const std::uint8_t* const* pixels, int count);
    void columns_first(const std::uint8_t* row);
    bool column(std::uint8_t* out);
    std::uint8_t* tile_row(int output) {
        return reinterpret_cast<std::uint8_t*>(tile_->pixels.data() + static_cast<std::ptrdiff_t>(output) * tile_->stride);
    }
    std::uint8_t* kept(int row) {
        return reinterpret_cast<std::uint8_t*>(ring_.data()) + static_cast<std::size_t>(row % capacity_) * stride_;
    }

    const Axis* x_ = nullptr;
    const Axis* y_ = nullptr;
    Tile* tile_ = nullptr;
    bool columns_first_ = false;
    std::vector<Vector> ring_;
    std::vector<Vector> waiting_;  // kRows rows whose columns are done, and one to write to in vain
    std::vector<const std::uint8_t*> column_;
    int capacity_ = 0;
    std::size_t stride_ = 0;
    int done_ = 0;  // rows
    int made_ = 0;  // outputs
};

enum class PixelType { float32, bfloat16, uint8 };

struct PixelFormat {
    PixelType type = PixelType::float32;
    bool channels_last = false;
    // Applied to values in 0 .. 1, unless the type is uint8.
    float mean[3] = {0, 0, 0};
    float std[3] = {1, 1, 1};

    std::size_t image_bytes(int size) const;
};

// How a tile lies in the picture it becomes.
struct Turn {
    bool transposed = false;          // before the mirrors
    bool mirrored_x = false, mirrored_y = false;
};

// Writes a tile as one image [3, size, size], or [size, size, 3] with channels last.
void store_tile(const Tile& tile, Turn turn, const PixelFormat& format, std::byte* out);

}  // namespace efficientclip
