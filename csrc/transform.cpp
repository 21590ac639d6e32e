#include "transform.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

namespace efficientclip {
namespace {

// To the nearest, to even where two are as near: Python's round.
int rounded(double value) { return static_cast<int>(std::nearbyint(value)); }

Side part(int begin, int length, int size) { return {double(begin), double(begin + length), begin, begin + length, size, 0, size}; }

// The least eighths at which both sides still have as many pixels as they are to become.
int fewest_eighths(const Side& x, const Side& y) {
    for (const int eighths : {1, 2, 4}) {
        const double factor = eighths / 8.0;
        if ((x.end - x.begin) * factor >= x.size && (y.end - y.begin) * factor >= y.size) return eighths;
    }
    return 8;
}

}  // namespace

Sides random_resized_crop(int width, int height, const TransformOptions& options, Random& random) {
    const int size = options.size;
    const double area = static_cast<double>(width) * height;
    const auto between = [&](double low, double high) { return low + (high - low) * random.uniform(); };
    const auto within = [&](int length) { return static_cast<int>(random.below(static_cast<std::uint32_t>(length))); };
    constexpr int kTries = 10;
    for (int tries = 0; tries < kTries; ++tries) {
        const double target = area * between(options.scale[0], options.scale[1]);
        const double ratio = std::exp(between(std::log(options.ratio[0]), std::log(options.ratio[1])));
        const int w = rounded(std::sqrt(target * ratio)), h = rounded(std::sqrt(target / ratio));
        if (w < 1 || w > width || h < 1 || h > height) continue;
        const int top = within(height - h + 1), left = within(width - w + 1);
        return {part(left, w, size), part(top, h, size)};
    }
    // The largest middle part of an allowed ratio.
    const double ratio = static_cast<double>(width) / height;
    int w = width, h = height;
    if (ratio < options.ratio[0]) h = std::clamp(rounded(width / options.ratio[0]), 1, height);
    if (ratio > options.ratio[1]) w = std::clamp(rounded(height * options.ratio[1]), 1, width);
    return {part((width - w) / 2, w, size), part((height - h) / 2, h, size)};
}

Sides resize_and_centre_crop(int width, int height, int size) {
    const auto side = [&](int length) {
        const std::int64_t whole = static_cast<std::int64_t>(size) * length / std::min(width, height);
        const int resized = static_cast<int>(whole);
        return Side{0, double(length), 0, length, resized, (resized - size) / 2, size};
    };
    return {side(width), side(height)};
}

Turn Transform::apply(const std::uint8_t* encoded, std::size_t size, Random random, Tile& tile) {
    const PictureInfo info = decoder_.open(encoded, size);
    by_other_ = info.other;
    const bool transposed = info.orientation >= 5;
    const bool mirrored_x = info.orientation == 2 || info.orientation == 3 || info.orientation == 6 || info.orientation == 7;
    const bool mirrored_y = info.orientation == 3 || info.orientation == 4 || info.orientation == 7 || info.orientation == 8;
    // A line of pixels cannot be made as long as its short side would ask for.
    constexpr std::int64_t kLongest = 1 << 30;
    if (static_cast<std::int64_t>(options_.size) * std::max(info.width, info.height) / std::min(info.width, info.height) >
        kLongest) {
        throw BadPicture{kTooLarge};
    }
    const int width = transposed ? info.height : info.width, height = transposed ? info.width : info.height;

    Sides sides = options_.random_crop ? random_resized_crop(width, height, options_, random)
                                       : resize_and_centre_crop(width, height, options_.size);
    const bool flipped = options_.flip && random.below(2) == 1;

    // The picture is resampled as it is stored; the small tile is turned afterwards.
    if (mirrored_x) sides.x = sides.x.mirrored(width);
    if (mirrored_y) sides.y = sides.y.mirrored(height);
    if (transposed) std::swap(sides.x, sides.y);
    const int eighths = options_.scaled_decoding && info.scalable ? fewest_eighths(sides.x, sides.y) : 8;
    if (eighths < 8) {
        sides.x = sides.x.scaled(eighths / 8.0, scaled_length(info.width, eighths));
        sides.y = sides.y.scaled(eighths / 8.0, scaled_length(info.height, eighths));
    }
    x_.plan(sides.x);
    y_.plan(sides.y);
    tile.resize(options_.size);
    // Rounding between the passes tells their order: the rows first that are rows when it is turned.
    resampler_.begin(x_, y_, tile, transposed);
    decoder_.decode({x_.first, y_.first, x_.end, y_.end}, eighths, x_.readable(), resampler_);
    return {transposed, mirrored_x != flipped, mirrored_y};
}

}  // namespace efficientclip
