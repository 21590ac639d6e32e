// Sequential reading of tar files: ustar, GNU long names and sizes, pax paths and sizes; and the samples in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "file.hpp"

namespace efficientclip {

// What is wrong with a shard, where in it, and the remedy.
struct ShardError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A tar opened for reading at any place. The first bytes of a span are served from a block that is kept, because headers
// and small members lie together.
class ShardFile {
  public:
    // Throws ShardError if it cannot be opened.
    explicit ShardFile(std::string path);

    const std::string& path() const { return path_; }
    std::int64_t size() const { return file_->size(); }

    // Throws ShardError if the file ends before the extent does, or cannot be read.
    void read(Extent extent, char* out);
    std::string read_text(Extent extent);

    [[noreturn]] void fail(const std::string& cause, std::int64_t offset) const;

  private:
    // Fewer bytes than wanted mean the file's end.
    std::size_t read_at(std::int64_t offset, char* out, std::size_t wanted) const;

    std::string path_;
    std::optional<File> file_;
    std::vector<char> block_;
    std::int64_t block_offset_ = 0;
    std::size_t block_size_ = 0;
};

struct TarMember {
    std::string name;
    Extent extent;
};

// The regular files of a tar in order. Throws ShardError where the file is no whole tar.
class TarReader {
  public:
    explicit TarReader(ShardFile& file) : file_(file) {}

    // False at the mark of the archive's end.
    bool next(TarMember& member);

  private:
    ShardFile& file_;
    std::int64_t offset_ = 0;
};

// The members of one sample that the loader reads; what is loaded of them stands beside their extents.
struct TarSample {
    std::string key;
    std::int64_t ordinal = 0;  // its place among the shard's samples
    std::optional<Extent> image, text, json;
};

// What a picture's file may be called.
constexpr const char* kImageSuffixes[] = {"jpg", "jpeg", "png",  "webp", "gif", "bmp",
                                            "tif", "tiff", "avif", "heic", "heif"};

// A tar's samples in order: the runs of members that share a name up to the first dot of the last part.
class SampleReader {
  public:
    explicit SampleReader(ShardFile& file) : tar_(file) {}

    // False after the last sample. Throws ShardError; the samples before it are whole.
    bool next(TarSample& sample);

  private:
    TarReader tar_;
    TarMember member_;
    bool started_ = false;
    bool has_member_ = false;
    std::int64_t ordinal_ = 0;
};

}  // namespace efficientclip
