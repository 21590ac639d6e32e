#include "file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace efficientclip {
namespace {

[[noreturn]] void fail(int code) { throw std::system_error(code, std::generic_category()); }

}  // namespace

// Without O_NONBLOCK a named pipe would hold the caller until someone writes to it.
File::File(const std::string& path) : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_ < 0) fail(errno);
    struct stat status {};
    int cause = fstat(descriptor_, &status) != 0 ? errno : 0;
    if (cause == 0 && !S_ISREG(status.st_mode)) cause = S_ISDIR(status.st_mode) ? EISDIR : ESPIPE;
    if (cause != 0) {
        close(descriptor_);
        fail(cause);
    }
    size_ = status.st_size;
}

File::~File() { close(descriptor_); }

std::size_t File::read(std::int64_t offset, char* out, std::size_t wanted) const {
    std::size_t done = 0;
    while (done < wanted) {
        const ssize_t count = pread(descriptor_, out + done, wanted - done, offset + static_cast<std::int64_t>(done));
        if (count == 0) break;
        if (count > 0) {
            done += static_cast<std::size_t>(count);
        } else if (errno != EINTR) {
            fail(errno);
        }
    }
    return done;
}

}  // namespace efficientclip
