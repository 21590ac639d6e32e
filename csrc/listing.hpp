// Sources that are no tars: columns that tell of each picture where its bytes lie and what is said of it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "batch.hpp"
#include "file.hpp"

namespace efficientclip {

// Byte strings end to end: the i-th is bytes[ends[i]] .. bytes[ends[i + 1] - 1]; `ends` is [n + 1].
struct Strings {
    View<std::uint8_t> bytes;
    View<std::int64_t> ends;

    // Throws std::out_of_range for a string that is not there.
    std::string_view operator[](std::int64_t i) const;
};

struct Listing {
    Strings files;
    View<std::int32_t> file;            // [n]: which of `files` holds the picture; -1: there is none
    View<std::int64_t> offset, length;  // [n]: where in it; length -1 is the whole file
    bool base64 = false;                // is what lies there
    Strings keys, sources;              // [n]
    Strings captions;
    View<std::int64_t> caption_ends;    // [n + 1]: picture i has captions caption_ends[i] .. caption_ends[i + 1] - 1

    std::int64_t size() const { return file.size; }
    std::vector<std::string_view> captions_of(std::int64_t picture) const;
};

// Reads encoded pictures. The file read last stays open: neighbours often share one. Not for two threads at once.
class PictureReader {
  public:
    // What lies at `extent` of the file at `path`, or what that stands for as base64. Size -1 is the whole file, and is
    // replaced by its size. `owner`: what a temporary file lives by; another one's file may get the same path. Throws
    // BadPicture.
    Blob read(std::string_view path, Extent& extent, bool base64, const std::shared_ptr<void>& owner = nullptr);

  private:
    std::string path_;
    std::weak_ptr<void> owner_;
    std::optional<File> file_;
};

// What padded base64 of either alphabet, the plain one or that for URLs, stands for; nothing for anything else.
std::optional<Blob> from_base64(std::string_view text);

}  // namespace efficientclip
