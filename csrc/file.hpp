// A file's bytes, and where they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace efficientclip {

// Where bytes lie in a file.
struct Extent {
    std::int64_t offset = 0;
    std::int64_t size = 0;
};

// Bytes that are not zeroed first, as a string's are.
struct Blob {
    std::unique_ptr<char[]> data;
    std::size_t size = 0;

    Blob() = default;
    explicit Blob(std::int64_t bytes)
        : data(new char[static_cast<std::size_t>(bytes)]), size(static_cast<std::size_t>(bytes)) {}
};

// A file opened for reading at any place. Throws std::system_error if it cannot be opened, is no plain file, or cannot
// be read.
class File {
  public:
    explicit File(const std::string& path);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    std::int64_t size() const { return size_; }

    // How many bytes were read: fewer than wanted mean the file's end.
    std::size_t read(std::int64_t offset, char* out, std::size_t wanted) const;

  private:
    int descriptor_;
    std::int64_t size_ = 0;
};

}  // namespace efficientclip
