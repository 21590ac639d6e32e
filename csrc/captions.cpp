#include "captions.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>

namespace efficientclip {
namespace {

constexpr const char* kNotUtf8 = "caption is not UTF-8";
constexpr const char* kMalformed = "json is malformed";
constexpr const char* kMissing = "image without caption";
constexpr const char* kEmpty = "empty caption";
constexpr const char* kNoText = "caption is no text";

// Python's parser gives up about here too.
constexpr int kDeepest = 900;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

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

// What Python's str.strip() strips, and the marks that editors and web pages leave at the ends of a text.
bool is_space(std::uint32_t point) {
    return (point >= 0x09 && point <= 0x0D) || (point >= 0x1C && point <= 0x20) || point == 0x85 || point == 0xA0 ||
           point == 0x1680 || (point >= 0x2000 && point <= 0x200B) || point == 0x2028 || point == 0x2029 ||
           point == 0x202F || point == 0x205F || point == 0x2060 || point == 0x3000 || point == 0xFEFF;
}

// Control characters, Unicode's default ignorable code points, and the letters that are blank.
bool is_invisible(std::uint32_t point) {
    constexpr std::pair<std::uint32_t, std::uint32_t> kRanges[] = {
        {0x00, 0x1F},     {0x7F, 0x9F},     {0xAD, 0xAD},     {0x34F, 0x34F},   {0x61C, 0x61C},   {0x115F, 0x1160},
        {0x17B4, 0x17B5}, {0x180B, 0x180F}, {0x200B, 0x200F}, {0x202A, 0x202E}, {0x2060, 0x206F}, {0x2800, 0x2800},
        {0x3164, 0x3164}, {0xFE00, 0xFE0F}, {0xFFA0, 0xFFA0}, {0xFFF0, 0xFFFB}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
        {0xE0000, 0xE0FFF}};
    return std::any_of(std::begin(kRanges), std::end(kRanges),
                       [&](const auto& range) { return point >= range.first && point <= range.second; });
}

// The text without white space around it; empty where there is nothing to see. Throws NotUtf8.
std::string_view trimmed(std::string_view text, bool surrogates = false) {
    std::size_t begin = text.size(), end = 0;
    bool visible = false;
    for (std::string_view rest = text; !rest.empty();) {
        const std::size_t at = text.size() - rest.size();
        const std::uint32_t point = take_code_point(rest, surrogates);
        if (is_space(point)) continue;
        begin = std::min(begin, at);
        end = text.size() - rest.size();
        visible = visible || !is_invisible(point);
    }
    return visible ? text.substr(begin, end - begin) : std::string_view();
}

void append(std::string& text, std::uint32_t point) {
    if (point < 0x80) {
        text.push_back(static_cast<char>(point));
        return;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    constexpr std::uint32_t kLeads[] = {0, 0xC0, 0xE0, 0xF0};
    text.push_back(static_cast<char>(kLeads[more] | point >> 6 * more));
    for (int i = more - 1; i >= 0; --i) text.push_back(static_cast<char>(0x80 | (point >> 6 * i & 0x3F)));
}

// A JSON value, as far as captions ask for it.
struct Value {
    enum class Kind { null, text, truth, number, list, object, other } kind = Kind::other;
    bool truth = false;
    std::string text;               // or a number's digits
    std::vector<Caption> captions;  // of a list or an object
    bool strange = false;           // a list that holds anything but captions, an object without a text
};

struct Fields {
    std::optional<Value> text, noise, caption, captions, source, captions_en;

    std::optional<Value>* named(std::string_view name) {
        if (name == "text") return &text;
        if (name == "noise") return &noise;
        if (name == "caption") return &caption;
        if (name == "captions") return &captions;
        if (name == "source") return &source;
        if (name == "captions_en") return &captions_en;
        return nullptr;
    }
};

// Adds the captions that a value means; false if it means none.
bool add_captions(Value&& value, std::vector<Caption>& captions) {
    switch (value.kind) {
        case Value::Kind::text: captions.push_back({std::move(value.text), {}}); return true;
        case Value::Kind::list:
        case Value::Kind::object:
            captions.insert(captions.end(), std::make_move_iterator(value.captions.begin()),
                            std::make_move_iterator(value.captions.end()));
            return !value.strange;
        default: return false;
    }
}

// Reads JSON as Python's json.loads does. Throws Malformed.
class Json {
  public:
    explicit Json(std::string_view json) : left_(json) {
        if (left_.substr(0, kByteOrderMark.size()) == kByteOrderMark) left_.remove_prefix(kByteOrderMark.size());
        for (std::string_view rest = left_; !rest.empty();) take_code_point(rest, true);
    }

    Fields record() {
        skip_spaces();
        if (!accept("{")) throw Malformed{};
        Fields fields = object(0);
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
            found.kind = Value::Kind::object;
            Fields fields = object(depth);
            found.strange = !fields.text || fields.text->kind != Value::Kind::text;
            if (!found.strange) {
                found.captions.push_back({std::move(fields.text->text), {}});
                if (fields.noise && fields.noise->kind == Value::Kind::truth) {
                    found.captions.back().noise = fields.noise->truth;
                }
            }
        } else if (accept("[")) {
            found = list(depth);
        } else if (accept("\"")) {
            found.kind = Value::Kind::text;
            string(found.text);
        } else if (accept("null")) {
            found.kind = Value::Kind::null;
        } else if (left_.substr(0, 4) == "true" || left_.substr(0, 5) == "false") {
            found.kind = Value::Kind::truth;
            found.truth = accept("true");
            if (!found.truth) accept("false");
        } else if (!accept("NaN") && !accept("Infinity") && !accept("-Infinity")) {
            found.kind = Value::Kind::number;
            const std::string_view before = left_;
            number();
            found.text = before.substr(0, before.size() - left_.size());
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
            string(name);
            skip_spaces();
            if (!accept(":")) throw Malformed{};
            Value found = value(depth + 1);
            if (std::optional<Value>* field = fields.named(name)) *field = std::move(found);
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
        if (accept("]")) return found;
        do {
            Value entry = value(depth + 1);
            const bool nested = entry.kind == Value::Kind::list;
            found.strange = nested || !add_captions(std::move(entry), found.captions) || found.strange;
            skip_spaces();
        } while (accept(","));
        if (!accept("]")) throw Malformed{};
        return found;
    }

    // After the opening quote.
    void string(std::string& text) {
        while (!accept("\"")) {
            if (left_.empty()) throw Malformed{};
            std::uint32_t point = take_code_point(left_, true);
            if (point < 0x20) throw Malformed{};
            if (point == '\\') point = escaped();
            append(text, point);
        }
    }

    std::uint32_t escaped() {
        if (left_.empty()) throw Malformed{};
        const char letter = left_.front();
        left_.remove_prefix(1);
        constexpr std::string_view kLetters = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
        const std::size_t at = kLetters.find(letter);
        if (at != kLetters.npos) return static_cast<unsigned char>(kMeanings[at]);
        if (letter != 'u') throw Malformed{};
        const std::uint32_t high = four_digits();
        if (high < 0xD800 || high > 0xDBFF || left_.substr(0, 2) != "\\u") return high;
        const std::string_view before = left_;
        left_.remove_prefix(2);
        const std::uint32_t low = four_digits();
        if (low >= 0xDC00 && low <= 0xDFFF) return 0x10000 + ((high - 0xD800) << 10 | (low - 0xDC00));
        // Half of a pair stays half: a text that holds one is not UTF-8.
        left_ = before;
        return high;
    }

    std::uint32_t four_digits() {
        if (left_.size() < 4) throw Malformed{};
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

// Trims all of `found.texts`; returns why they cannot be used.
const char* finish(Captions& found) {
    const char* cause = found.texts.empty() ? kMissing : nullptr;
    try {
        for (Caption& caption : found.texts) {
            caption.text = std::string(trimmed(caption.text));
            if (caption.text.empty()) cause = kEmpty;
        }
    } catch (const NotUtf8&) {
        cause = kNotUtf8;
    }
    if (cause != nullptr) found.texts.clear();
    return cause;
}

void add_english(Value& list, std::vector<std::string>& english) {
    for (Caption& caption : list.captions) {
        try {
            if (const std::string_view text = trimmed(caption.text); !text.empty()) english.emplace_back(text);
        } catch (const NotUtf8&) {
        }
    }
}

}  // namespace

const char* read_captions(const std::optional<std::string>& text, const std::optional<std::string>& json,
                          Captions& found) {
    try {
        Fields fields = json ? Json(*json).record() : Fields{};
        if (fields.source) found.source = std::move(fields.source->text);
        if (fields.captions_en) add_english(*fields.captions_en, found.english);
        const auto given = [](const std::optional<Value>& value) { return value && value->kind != Value::Kind::null; };
        const bool several = given(fields.captions);
        if (!several && text) {
            found.texts.push_back({*text, {}});
        } else if (several || given(fields.caption)) {
            if (!add_captions(std::move(several ? *fields.captions : *fields.caption), found.texts)) {
                found.texts.clear();
                return kNoText;
            }
        }
        return finish(found);
    } catch (const NotUtf8&) {
        return kNotUtf8;
    } catch (const Malformed&) {
        return kMalformed;
    }
}

const char* read_captions(const std::vector<std::string_view>& texts, Captions& found) {
    for (const std::string_view text : texts) found.texts.push_back({std::string(text), {}});
    return finish(found);
}

std::string_view stripped(std::string_view text) { return trimmed(text, true); }

}  // namespace efficientclip
