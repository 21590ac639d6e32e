// From an encoded picture to the square that a tower sees: which part of it, at which size, turned which way.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "picture.hpp"
#include "random.hpp"
#include "resize.hpp"

namespace efficientclip {

struct TransformOptions {
    int size = 224;
    // A random part of the picture stretched to the square; else its middle, after the short side is made to fit.
    bool random_crop = true;
    std::array<double, 2> scale{0.9, 1.0};  // share of the picture's area
    std::array<double, 2> ratio{3.0 / 4.0, 4.0 / 3.0};
    // Mirror one picture in two.
    bool flip = false;
    // Let JPEG pictures be decoded at half, a quarter or an eighth of their size where that is still enough pixels.
    bool scaled_decoding = false;
    std::int64_t max_pixels = kMaxPixels;
};

struct Sides {
    Side x, y;
};

// torchvision's RandomResizedCrop of a picture of width x height.
Sides random_resized_crop(int width, int height, const TransformOptions& options, Random& random);

// Resize of the short side, then a crop of the centre, as Hugging Face's processors of CLIP do: half a pixel is cut off,
// where torchvision's CenterCrop rounds to even.
Sides resize_and_centre_crop(int width, int height, int size);

// Keeps its buffers from picture to picture. Not for two threads at once.
class Transform {
  public:
    explicit Transform(const TransformOptions& options, OtherDecoder other = {})
        : options_(options), decoder_(options.max_pixels, std::move(other)) {}

    // Fills the tile; returns how it lies in the picture. Throws BadPicture.
    Turn apply(const std::uint8_t* encoded, std::size_t size, Random random, Tile& tile);

    // Whether the picture met last went to the other decoder.
    bool by_other() const { return by_other_; }

  private:
    TransformOptions options_;
    PictureDecoder decoder_;
    Resampler resampler_;
    Axis x_, y_;
    bool by_other_ = false;
};

}  // namespace efficientclip
