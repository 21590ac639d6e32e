#include "captions.hpp"

#include <cstdint>
#include <string_view>

namespace efficientclip {
namespace {

constexpr const char* kNotUtf8 = "caption is not UTF-8";
constexpr const char* kMalformed = "json is malformed";
constexpr const char* kMissing = "image without caption";
constexpr const char* kEmpty = "empty caption";

// Python's parser gives up about here too.
constexpr int kDeepest = 900;

struct NotUtf8 {};
struct Malformed {};

// Takes one code point off the front. Surrogates are let through if asked for, as Python's json does.
std::uint32_t take_code_point(std::string_view& text, bool surrogates) {
    const auto byte = [&](std::size_t i) -> std::uint32_t { return static_cast<unsigned char>(text[i]); };
    const std::uint32_t lead = byte(0);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xC2 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : lead < 0xF5 ? 4 : 0;
    if (length == 0 || length > text.size()) throw NotUtf8{};
    constexpr std::uint32_t kBits[] = {0, 0x7F, 0x1F, 0x0F, 0x07}, kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    std::uint32_t point = lead & kBits[length];
    for (std::size_t i = 1; i < length; ++i) {
        if ((byte(i) & 0xC0) != 0x80) throw NotUtf8{};
        point = point << 6 | (byte(i) & 0x3F);
    }
    const bool surrogate = point >= 0xD800 && point <= 0xDFFF;
    if (point < kLeast[length] || point > 0x10FFFF || (surrogate && !surrogates)) throw NotUtf8{};
    text.remove_prefix(length);
    return point;
}

// What Python's str.strip() strips.
bool is_space(std::uint32_t point) {
    return (point >= 0x09 && point <= 0x0D) || (point >= 0x1C && point <= 0x20) || point == 0x85 || point == 0xA0 ||
           point == 0x1680 || (point >= 0x2000 && point <= 0x200A) || point == 0x2028 || point == 0x2029 ||
           point == 0x202F || point == 0x205F || point == 0x3000;
}

bool blank(std::string_view text) {
    bool found = true;
    while (!text.empty()) found = is_space(take_code_point(text, false)) && found;
    return found;
}

// What a JSON value means as a caption.
struct Value {
    enum class Kind { null, text, list, object, other } kind = Kind::other;
    // A text of spaces, an object whose "text" is one, or a list that holds either.
    bool blank = false;
    bool empty_list = false;
};

struct Fields {
    std::optional<Value> text, caption, captions;
};

// Reads JSON as Python's json.loads does. Throws Malformed.
class Json {
  public:
    explicit Json(std::string_view json) : left_(json) {
        constexpr std::string_view kMark = "\xEF\xBB\xBF";
        if (left_.substr(0, kMark.size()) == kMark) left_.remove_prefix(kMark.size());
        for (std::string_view rest = left_; !rest.empty();) take_code_point(rest, true);
    }

    Fields record() {
        skip_spaces();
        if (!accept("{")) throw Malformed{};
        const Fields fields = object(0);
        skip_spaces();
        if (!left_.empty()) throw Malformed{};
        return fields;
    }

  private:
    void skip_spaces() {
        while (!left_.empty() && std::string_view(" \t\n\r").find(left_.front()) != std::string_view::npos) {
            left_.remove_prefix(1);
        }
    }

    bool accept(std::string_view token) {
        if (left_.substr(0, token.size()) != token) return false;
        left_.remove_prefix(token.size());
        return true;
    }

    Value value(int depth) {
        if (depth > kDeepest) throw Malformed{};
        skip_spaces();
        Value found;
        if (accept("{")) {
            const Fields fields = object(depth);
            found.kind = Value::Kind::object;
            found.blank = fields.text && fields.text->kind == Value::Kind::text && fields.text->blank;
        } else if (accept("[")) {
            found = list(depth);
        } else if (accept("\"")) {
            found.kind = Value::Kind::text;
            string(nullptr, &found.blank);
        } else if (accept("null")) {
            found.kind = Value::Kind::null;
        } else if (!accept("true") && !accept("false") && !accept("NaN") && !accept("Infinity") &&
                   !accept("-Infinity")) {
            number();
        }
        return found;
    }

    // After the opening brace.
    Fields object(int depth) {
        Fields fields;
        skip_spaces();
        if (accept("}")) return fields;
        std::string name;
        do {
            skip_spaces();
            if (!accept("\"")) throw Malformed{};
            name.clear();
            string(&name, nullptr);
            skip_spaces();
            if (!accept(":")) throw Malformed{};
            const Value found = value(depth + 1);
            if (name == "text") fields.text = found;
            if (name == "caption") fields.caption = found;
            if (name == "captions") fields.captions = found;
            skip_spaces();
        } while (accept(","));
        if (!accept("}")) throw Malformed{};
        return fields;
    }

    // After the opening bracket.
    Value list(int depth) {
        Value found;
        found.kind = Value::Kind::list;
        skip_spaces();
        found.empty_list = accept("]");
        if (found.empty_list) return found;
        do {
            const Value entry = value(depth + 1);
            const bool caption = entry.kind == Value::Kind::text || entry.kind == Value::Kind::object;
            found.blank = found.blank || (caption && entry.blank);
            skip_spaces();
        } while (accept(","));
        if (!accept("]")) throw Malformed{};
        return found;
    }

    // After the opening quote. `name` receives plain ASCII alone: no other name is asked for.
    void string(std::string* name, bool* is_blank) {
        if (is_blank != nullptr) *is_blank = true;
        while (!accept("\"")) {
            if (left_.empty()) throw Malformed{};
            std::uint32_t point = take_code_point(left_, true);
            if (point < 0x20) throw Malformed{};
            if (point == '\\') point = escaped();
            if (name != nullptr) name->push_back(point < 0x80 ? static_cast<char>(point) : '?');
            if (is_blank != nullptr && !is_space(point)) *is_blank = false;
        }
    }

    std::uint32_t escaped() {
        if (left_.empty()) throw Malformed{};
        const char letter = left_.front();
        left_.remove_prefix(1);
        constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
        const std::size_t at = kLetters.find(letter);
        if (at != kLetters.npos) return static_cast<unsigned char>(kMeanings[at]);
        if (letter != 'u' || left_.size() < 4) throw Malformed{};
        std::uint32_t point = 0;
        for (int i = 0; i < 4; ++i) {
            const char digit = left_[static_cast<std::size_t>(i)];
            const int worth = digit >= '0' && digit <= '9'   ? digit - '0'
                              : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10
                              : digit >= 'A' && digit <= 'F' ? digit - 'A' + 10
                                                             : -1;
            if (worth < 0) throw Malformed{};
            point = point << 4 | static_cast<std::uint32_t>(worth);
        }
        left_.remove_prefix(4);
        // Halves of a pair stay halves: neither is a space or part of a name.
        return point;
    }

    void number() {
        accept("-");
        if (!accept("0")) digits();
        if (accept(".")) digits();
        if (accept("e") || accept("E")) {
            if (!accept("+")) accept("-");
            digits();
        }
    }

    void digits() {
        std::size_t count = 0;
        while (count < left_.size() && left_[count] >= '0' && left_[count] <= '9') ++count;
        if (count == 0) throw Malformed{};
        left_.remove_prefix(count);
    }

    std::string_view left_;
};

}  // namespace

const char* captions_missing(const std::optional<std::string>& text, const std::optional<std::string>& json) {
    try {
        const Fields fields = json ? Json(*json).record() : Fields{};
        const bool text_is_blank = text && blank(*text);
        if (fields.captions && fields.captions->kind == Value::Kind::list) {
            return fields.captions->empty_list ? kMissing : fields.captions->blank ? kEmpty : nullptr;
        }
        if (text) return text_is_blank ? kEmpty : nullptr;
        if (!fields.caption || fields.caption->kind == Value::Kind::null) return kMissing;
        return fields.caption->kind == Value::Kind::text && fields.caption->blank ? kEmpty : nullptr;
    } catch (const NotUtf8&) {
        return kNotUtf8;
    } catch (const Malformed&) {
        return kMalformed;
    }
}

}  // namespace efficientclip
