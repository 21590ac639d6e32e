#include "tar.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <string_view>
#include <system_error>
#include <utility>

namespace efficientclip {
namespace {

constexpr std::int64_t kRecord = kTarRecord;
// Long enough for a member's neighbours, short beside a picture.
constexpr std::size_t kBlock = 16 * 1024;
// Long beside a picture.
constexpr std::size_t kBlockOfWhole = 1024 * 1024;
// A name or a set of pax records longer than this is no shard's.
constexpr std::int64_t kLongestName = 1024 * 1024;

struct Field {
    int offset, length;
};
constexpr Field kName{0, 100}, kSize{124, 12}, kChecksum{148, 8}, kMagic{257, 8}, kPrefix{345, 155};
constexpr int kType = 156;

std::string text_of(const char* record, Field field) {
    const char* begin = record + field.offset;
    return {begin, static_cast<std::size_t>(std::find(begin, begin + field.length, '\0') - begin)};
}

// Octal digits between blanks, or base-256 where the first bit is set; nothing for anything else, or for a number
// that is no file's size.
std::optional<std::int64_t> number_of(const char* record, Field field) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(record) + field.offset;
    std::int64_t value = 0;
    if (bytes[0] == 0x80) {
        for (int i = 1; i < field.length; ++i) {
            if (value > std::numeric_limits<std::int64_t>::max() >> 10) return std::nullopt;
            value = value << 8 | bytes[i];
        }
        return value;
    }
    int i = 0;
    while (i < field.length && bytes[i] == ' ') ++i;
    for (; i < field.length && bytes[i] >= '0' && bytes[i] <= '7'; ++i) value = value << 3 | (bytes[i] - '0');
    const bool ended = i == field.length || bytes[i] == ' ' || bytes[i] == '\0';
    return ended ? std::optional(value) : std::nullopt;
}

bool checksum_holds(const char* record) {
    std::int64_t as_unsigned = 0, as_signed = 0;
    for (int i = 0; i < kRecord; ++i) {
        const bool blank = i >= kChecksum.offset && i < kChecksum.offset + kChecksum.length;
        const char byte = blank ? ' ' : record[i];
        as_unsigned += static_cast<unsigned char>(byte);
        // Some old writers summed signed characters.
        as_signed += static_cast<signed char>(byte);
    }
    const std::optional<std::int64_t> written = number_of(record, kChecksum);
    return written == as_unsigned || written == as_signed;
}

std::optional<std::int64_t> decimal(std::string_view digits) {
    if (digits.empty() || digits.size() > 18) return std::nullopt;
    std::int64_t value = 0;
    for (const char digit : digits) {
        if (digit < '0' || digit > '9') return std::nullopt;
        value = value * 10 + (digit - '0');
    }
    return value;
}

struct PaxRecords {
    std::optional<std::string> path;
    std::optional<std::int64_t> size;
};

// Records "<length> <keyword>=<value>\n"; false if they are malformed or describe a sparse file.
bool read_pax(std::string_view records, PaxRecords& found) {
    while (!records.empty() && records.front() != '\0') {
        const std::size_t space = records.find(' ');
        if (space == records.npos) return false;
        const auto length = decimal(records.substr(0, space));
        if (!length || *length <= static_cast<std::int64_t>(space) + 1 ||
            *length > static_cast<std::int64_t>(records.size())) {
            return false;
        }
        std::string_view record = records.substr(space + 1, static_cast<std::size_t>(*length) - space - 1);
        records.remove_prefix(static_cast<std::size_t>(*length));
        const std::size_t equals = record.find('=');
        if (record.back() != '\n' || equals == record.npos) return false;
        record.remove_suffix(1);
        const std::string_view keyword = record.substr(0, equals), value = record.substr(equals + 1);
        if (keyword.substr(0, 11) == "GNU.sparse.") return false;
        if (keyword == "path") found.path = value;
        if (keyword == "size" && !(found.size = decimal(value))) return false;
    }
    return true;
}

struct Name {
    std::string_view key, suffix;
};

// A name up to the first dot of its last part, and what follows that dot.
Name split(std::string_view name) {
    const std::size_t slash = name.rfind('/');
    const std::size_t dot = name.find('.', slash == name.npos ? 0 : slash + 1);
    // "/a.jpg" is sample "a": a folder without a name is none.
    const std::size_t first = slash == 0 ? 1 : 0;
    if (dot == name.npos) return {name.substr(first), {}};
    return {name.substr(first, dot - first), name.substr(dot + 1)};
}

std::string lowered(std::string_view text) {
    std::string lower(text);
    for (char& letter : lower) {
        if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
    }
    return lower;
}

bool names_image(const std::string& suffix) {
    return std::find(std::begin(kImageSuffixes), std::end(kImageSuffixes), suffix) != std::end(kImageSuffixes);
}

}  // namespace

ShardFile::ShardFile(std::string name, const std::string& path, bool whole)
    : name_(std::move(name)), block_(whole ? kBlockOfWhole : kBlock) {
    try {
        file_.emplace(path);
    } catch (const std::system_error& error) {
        throw ShardError("shard " + name_ + ": " + error.code().message() + "; put it back, or take it out of the list");
    }
}

void ShardFile::fail(const std::string& cause, std::int64_t offset) const {
    throw ShardError("shard " + name_ + ": not a whole tar file (" + cause + " at byte " + std::to_string(offset) +
                     "); copy or download it again");
}

std::size_t ShardFile::read_at(std::int64_t offset, char* out, std::size_t wanted) const {
    try {
        return file_->read(offset, out, wanted);
    } catch (const std::system_error& error) {
        throw ShardError("shard " + name_ + ": " + error.code().message() + "; copy or download it again");
    }
}

void ShardFile::read(Extent extent, char* out) {
    auto [offset, size] = extent;
    while (size > 0) {
        const std::int64_t inside = offset - block_offset_;
        if (inside >= 0 && inside < static_cast<std::int64_t>(block_size_)) {
            const auto count = std::min<std::int64_t>(size, static_cast<std::int64_t>(block_size_) - inside);
            std::memcpy(out, block_.data() + inside, static_cast<std::size_t>(count));
            offset += count;
            out += count;
            size -= count;
            continue;
        }
        // Behind the block's start lies the picture whose neighbours the block was read for.
        if (inside < 0 || size >= static_cast<std::int64_t>(block_.size())) {
            const auto wanted = static_cast<std::size_t>(inside < 0 ? std::min(size, -inside) : size);
            if (read_at(offset, out, wanted) < wanted) fail("it ends early", this->size());
            offset += static_cast<std::int64_t>(wanted);
            out += wanted;
            size -= static_cast<std::int64_t>(wanted);
            continue;
        }
        block_size_ = 0;
        block_offset_ = offset;
        block_size_ = read_at(offset, block_.data(), block_.size());
        if (block_size_ == 0) fail("it ends early", this->size());
    }
}

std::string ShardFile::read_text(Extent extent) {
    std::string bytes(static_cast<std::size_t>(extent.size), '\0');
    read(extent, bytes.data());
    return bytes;
}

bool TarReader::next(TarMember& member) {
    std::optional<std::string> long_name;
    PaxRecords pax;
    for (;;) {
        const std::int64_t at = offset_;
        if (end_ && at >= *end_) return false;
        // Without the mark of its end, a shard may have lost samples.
        if (at > file_.size() - kRecord) file_.fail("it ends early", file_.size());
        char record[kRecord];
        file_.read({at, kRecord}, record);
        if (std::all_of(record, record + kRecord, [](char byte) { return byte == 0; })) return false;
        if (!checksum_holds(record)) file_.fail(at == 0 ? "no tar header" : "a broken header", at);

        const std::optional<std::int64_t> size = number_of(record, kSize);
        if (!size) file_.fail("a broken size", at);
        const char type = record[kType];
        // Such a member only describes the next.
        const bool described = type == 'L' || type == 'K' || type == 'x' || type == 'X' || type == 'g';
        if (described && *size > kLongestName) file_.fail("a name that is too long", at);
        // Links, folders and devices have no bytes, whatever their size field says.
        const bool empty = type >= '1' && type <= '6';
        const Extent extent{at + kRecord, described ? *size : pax.size ? *pax.size : empty ? 0 : *size};
        // Past the file's end, the next call says so: the members before this one are whole.
        offset_ = extent.offset + (extent.size + kRecord - 1) / kRecord * kRecord;

        if (type == 'L') {
            long_name = file_.read_text(extent);
            long_name->resize(std::strlen(long_name->c_str()));
        } else if (type == 'x' || type == 'X') {
            if (!read_pax(file_.read_text(extent), pax)) file_.fail("pax records that are broken or of a sparse file", at);
        } else if (type == 'S') {
            file_.fail("a sparse member, which GNU tar writes when told --sparse", at);
        } else if (!described) {
            if (pax.path) {
                member.name = std::move(*pax.path);
            } else if (long_name) {
                member.name = std::move(*long_name);
            } else {
                member.name = text_of(record, kName);
                // GNU tar keeps times where POSIX has the prefix.
                const bool posix = std::memcmp(record + kMagic.offset, "ustar\0", 6) == 0;
                const std::string prefix = posix ? text_of(record, kPrefix) : std::string();
                if (!prefix.empty()) member.name = prefix + "/" + member.name;
            }
            const bool regular = type == '0' || type == '\0' || type == '7';
            const bool folder = type == '\0' && !member.name.empty() && member.name.back() == '/';
            if (regular && !folder) {
                member.extent = extent;
                return true;
            }
            long_name.reset();
            pax = {};
        }
    }
}

// The first kind of image counts; a member that is written twice holds the last.
void TarSample::add(const TarMember& member, std::string& image_suffix) {
    const std::string suffix = lowered(split(member.name).suffix);
    if (names_image(suffix) && (!image || suffix == image_suffix)) {
        image = member.extent;
        image_suffix = suffix;
    }
    if (suffix == "txt") text = member.extent;
    if (suffix == "json") json = member.extent;
}

bool SampleReader::next(TarSample& sample) {
    const auto go_on = [&] {
        begins_ = tar_.offset();
        has_member_ = tar_.next(member_);
    };
    if (!started_) {
        started_ = true;
        go_on();
    }
    if (!has_member_) return false;
    sample = {};
    sample.key = split(member_.name).key;
    sample.ordinal = static_cast<std::int64_t>(index_.size());
    const std::int64_t begin = index_.empty() ? 0 : begins_;
    std::string image_suffix;
    do {
        sample.add(member_, image_suffix);
        go_on();
    } while (has_member_ && split(member_.name).key == sample.key);
    index_.push_back(static_cast<std::uint32_t>((begins_ - begin) / kRecord));
    return true;
}

TarSample read_sample(ShardFile& file, Extent extent, std::int64_t ordinal) {
    TarReader tar(file, extent.offset, extent.offset + extent.size);
    TarSample sample;
    sample.ordinal = ordinal;
    TarMember member;
    std::string image_suffix;
    bool found = false;
    while (tar.next(member)) {
        const std::string_view key = split(member.name).key;
        if (found && key != sample.key) file.fail("no end of a sample", tar.offset());
        sample.key = key;
        sample.add(member, image_suffix);
        found = true;
    }
    if (!found || tar.offset() != extent.offset + extent.size) file.fail("no whole sample", extent.offset);
    return sample;
}

}  // namespace efficientclip
