// Encoded pictures to rows of pixels: JPEG, PNG and WebP by their reference libraries, others by a decoder that is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace efficientclip {

// Why a picture cannot be used; the causes are few, so that they can be counted.
struct BadPicture {
    std::string cause;
};

constexpr const char* kTooLarge = "image too large";

// Larger pictures are refused: a few kilobytes can claim gigabytes of pixels.
constexpr std::int64_t kMaxPixels = 100'000'000;
// A picture of kMaxPixels that needs more bytes than this is none.
constexpr std::int64_t kLargestPicture = 512 * 1024 * 1024;

// A picture as it is to be seen: rows of RGBA pixels.
struct Pixels {
    int width = 0, height = 0;
    std::string rgba;
};

// Decodes what is no JPEG, PNG or WebP; called by several threads at once. Throws BadPicture.
using OtherDecoder = std::function<Pixels(const std::uint8_t* encoded, std::size_t size)>;

struct PictureInfo {
    int width, height;   // as stored, before `orientation` is applied
    int orientation;     // EXIF: 1 .. 8
    bool scalable;       // can be decoded at a fraction of its size
    bool other = false;  // by the OtherDecoder
};

// Pixels left .. right - 1 of rows top .. bottom - 1.
struct Window {
    int left, top, right, bottom;
};

class RowSink {
  public:
    virtual ~RowSink() = default;
    // The next `count` rows of the window, as RGBX pixels; transparency lies over white.
    virtual void rows(const std::uint8_t* const* pixels, int count) = 0;
};

// Decodes one picture after another, keeping its buffers. Not for two threads at once.
class PictureDecoder {
  public:
    explicit PictureDecoder(std::int64_t max_pixels, OtherDecoder other = {});
    ~PictureDecoder();

    // Reads the header; `data` is borrowed until the next picture. Throws BadPicture.
    PictureInfo open(const std::uint8_t* data, std::size_t size);

    // Decodes a window of the opened picture at `eighths`/8 of its size (1, 2, 4 or 8; less than 8 only if scalable).
    // The window is one of the scaled picture; each row may be read for `readable` pixels from its left on.
    // Throws BadPicture, also when what lies outside the window is missing.
    void decode(const Window& window, int eighths, int readable, RowSink& sink);

  private:
    struct State;
    std::int64_t max_pixels_;
    OtherDecoder other_;
    std::unique_ptr<State> state_;
};

// The length of a side of `length` pixels in a picture that is decoded at `eighths`/8 of its size.
inline int scaled_length(int length, int eighths) {
    return static_cast<int>((static_cast<std::int64_t>(length) * eighths + 7) / 8);
}

}  // namespace efficientclip
