#include "listing.hpp"

#include <array>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "picture.hpp"

namespace efficientclip {
namespace {

constexpr const char* kShort = "picture file: it ends early";
constexpr std::uint8_t kNoDigit = 0xFF;

constexpr std::array<std::uint8_t, 256> base64_digits() {
    std::array<std::uint8_t, 256> digits{};
    for (auto& digit : digits) digit = kNoDigit;
    constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (std::size_t i = 0; i < kDigits.size(); ++i) {
        digits[static_cast<unsigned char>(kDigits[i])] = static_cast<std::uint8_t>(i);
    }
    digits['-'] = 62;
    digits['_'] = 63;
    return digits;
}

constexpr auto kDigitOf = base64_digits();

}  // namespace

std::string_view Strings::operator[](std::int64_t i) const {
    if (i < 0 || i + 1 >= ends.size || ends[i] < 0 || ends[i] > ends[i + 1] || ends[i + 1] > bytes.size) {
        throw std::out_of_range("a listing's columns contradict each other at " + std::to_string(i));
    }
    return {reinterpret_cast<const char*>(bytes.data) + ends[i], static_cast<std::size_t>(ends[i + 1] - ends[i])};
}

std::vector<std::string_view> Listing::captions_of(std::int64_t picture) const {
    std::vector<std::string_view> texts;
    for (auto i = caption_ends[picture]; i < caption_ends[picture + 1]; ++i) texts.push_back(captions[i]);
    return texts;
}

Blob PictureReader::read(std::string_view path, Extent& extent, bool base64, const std::shared_ptr<void>& owner) {
    Blob stored;
    try {
        const bool is_of_owner = !owner_.owner_before(owner) && !owner.owner_before(owner_);
        if (!file_ || path_ != path || !is_of_owner) {
            path_ = path;
            owner_ = owner;
            file_.emplace(path_);
        }
        if (extent.size < 0) extent.size = file_->size() - extent.offset;
        if (extent.size > kLargestPicture) throw BadPicture{kTooLarge};
        if (extent.offset < 0 || extent.size < 0) throw BadPicture{kShort};
        stored = Blob(extent.size);
        if (file_->read(extent.offset, stored.data.get(), stored.size) < stored.size) throw BadPicture{kShort};
    } catch (const std::system_error& error) {
        file_.reset();
        throw BadPicture{"picture file: " + error.code().message()};
    }
    if (!base64) return stored;
    std::optional<Blob> decoded = from_base64({stored.data.get(), stored.size});
    if (!decoded) throw BadPicture{"picture is not base64"};
    return std::move(*decoded);
}

std::optional<Blob> from_base64(std::string_view text) {
    if (text.size() % 4 != 0) return std::nullopt;
    std::size_t padding = 0;
    while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
    Blob decoded(static_cast<std::int64_t>(text.size() / 4 * 3 - padding));
    const auto digit = [&](std::size_t at) -> std::uint32_t {
        return at < text.size() - padding ? kDigitOf[static_cast<unsigned char>(text[at])] : 0;
    };
    char* out = decoded.data.get();
    std::uint32_t seen = 0;
    for (std::size_t at = 0; at < text.size(); at += 4) {
        const std::uint32_t a = digit(at), b = digit(at + 1), c = digit(at + 2), d = digit(at + 3);
        seen |= a | b | c | d;
        const std::uint32_t three = a << 18 | b << 12 | c << 6 | d;
        const std::size_t count = at + 4 < text.size() ? 3 : 3 - padding;
        for (std::size_t i = 0; i < count; ++i) *out++ = static_cast<char>(three >> (16 - 8 * i) & 0xFF);
    }
    // Of digits alone no bit beyond the sixth is set.
    if (seen > 63) return std::nullopt;
    return decoded;
}

}  // namespace efficientclip
