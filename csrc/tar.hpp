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
    // `name` is for messages. `whole`: all of it will be read, so large blocks are: where each read waits, as over a
    // network, their number is what counts. Throws ShardError if `path` cannot be opened.
    ShardFile(std::string name, const std::string& path, bool whole);

    std::int64_t size() const { return file_->size(); }

    // Throws ShardError if the file ends before the extent does, or cannot be read.
    void read(Extent extent, char* out);
    std::string read_text(Extent extent);

    [[noreturn]] void fail(const std::string& cause, std::int64_t offset) const;

  private:
    // Fewer bytes than wanted mean the file's end.
    std::size_t read_at(std::int64_t offset, char* out, std::size_t wanted) const;

    std::string name_;
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
    // From the header at `begin` to the one at `end`, if there is an end other than the archive's own.
    explicit TarReader(ShardFile& file, std::int64_t begin = 0, std::optional<std::int64_t> end = {})
        : file_(file), offset_(begin), end_(end) {}

    // False at `end`, or at the mark of the archive's end.
    bool next(TarMember& member);

    // Where the next member begins, with the headers that describe it.
    std::int64_t offset() const { return offset_; }

  private:
    ShardFile& file_;
    std::int64_t offset_;
    std::optional<std::int64_t> end_;
};

// The members of one sample that the loader reads; what is loaded of them stands beside their extents.
struct TarSample {
    std::string key;
    std::int64_t ordinal = 0;  // its place among the shard's samples
    std::optional<Extent> image, text, json;

    void add(const TarMember& member, std::string& image_suffix);
};

// What a picture's file may be called.
constexpr const char* kImageSuffixes[] = {"jpg", "jpeg", "png",  "webp", "gif", "bmp",
                                            "tif", "tiff", "avif", "heic", "heif"};

// Where a tar's samples begin: how many records of 512 bytes each takes, from the first one on. With it any sample is
// read without the headers of those before it.
using TarIndex = std::vector<std::uint32_t>;
constexpr std::int64_t kTarRecord = 512;

// A tar's samples in order: the runs of members that share a name up to the first dot of the last part.
class SampleReader {
  public:
    explicit SampleReader(ShardFile& file) : tar_(file) {}

    // False after the last sample. Throws ShardError; the samples before it are whole.
    bool next(TarSample& sample);

    // Of the samples that were read; of a tar once it was read to its end.
    const TarIndex& index() const { return index_; }

  private:
    TarReader tar_;
    TarMember member_;
    bool started_ = false;
    bool has_member_ = false;
    std::int64_t begins_ = 0;  // where member_ does
    TarIndex index_;
};

// The sample in `extent` of a tar, whose place among the samples is `ordinal`. Throws ShardError where none is.
TarSample read_sample(ShardFile& file, Extent extent, std::int64_t ordinal);

}  // namespace efficientclip
