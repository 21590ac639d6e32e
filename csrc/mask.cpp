#include "mask.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace efficientclip {
namespace {

TokenKind kind_of(const MaskRule& rule, std::int64_t token) {
    if (token < 0 || token >= rule.kinds.size) {
        throw std::invalid_argument("tokens holds " + std::to_string(token) + ", but the vocabulary has " +
                                    std::to_string(rule.kinds.size) + " tokens: prepare the text store anew");
    }
    return static_cast<TokenKind>(rule.kinds[token]);
}

struct Word {
    std::int64_t begin, end;
};

// The units that are masked or not: words, or single tokens.
std::vector<Word> units(const MaskRule& rule, const std::int64_t* tokens, std::int64_t n) {
    std::vector<Word> found;
    for (std::int64_t i = 0; i < n; ++i) {
        const TokenKind kind = kind_of(rule, tokens[i]);
        if (kind == TokenKind::special) continue;
        const bool continues = rule.whole_words && kind == TokenKind::continuing;
        if (continues && !found.empty() && found.back().end == i) {
            ++found.back().end;
        } else {
            found.push_back({i, i + 1});
        }
    }
    return found;
}

}  // namespace

void check_rule(const MaskRule& rule) {
    if (!(rule.share > 0 && rule.share < 1)) {
        throw std::invalid_argument("mask_share is " + std::to_string(rule.share) + ": it must lie between 0 and 1");
    }
    if (rule.mask_token < 0 || rule.mask_token >= rule.kinds.size) {
        throw std::invalid_argument("mask_token is " + std::to_string(rule.mask_token) + ", but the vocabulary has " +
                                    std::to_string(rule.kinds.size) + " tokens");
    }
    const std::uint8_t* end = rule.kinds.data + rule.kinds.size;
    if (std::find(rule.kinds.data, end, static_cast<std::uint8_t>(TokenKind::ordinary)) == end) {
        throw std::invalid_argument("token_kinds: every token of the vocabulary is special or continues a word");
    }
}

void mask_text(const MaskRule& rule, Random random, std::int64_t* tokens, std::int64_t n, std::int64_t first,
               std::vector<std::int64_t>& positions, std::vector<std::int64_t>& labels) {
    std::vector<Word> words = units(rule, tokens, n);
    if (words.empty()) return;
    std::int64_t maskable = 0;
    for (const Word& word : words) maskable += word.end - word.begin;
    // Halves go to the even number, as Python rounds.
    const std::int64_t wanted =
        std::max<std::int64_t>(1, std::llrint(std::nearbyint(rule.share * static_cast<double>(maskable))));

    // The words of a shuffle's front, as long as they fit.
    std::vector<Word> chosen;
    std::int64_t count = 0;
    for (std::size_t i = 0; i < words.size() && count < wanted; ++i) {
        std::swap(words[i], words[i + random.below(static_cast<std::uint32_t>(words.size() - i))]);
        const std::int64_t size = words[i].end - words[i].begin;
        if (chosen.empty() || count + size <= wanted) {
            chosen.push_back(words[i]);
            count += size;
        }
    }
    std::sort(chosen.begin(), chosen.end(), [](const Word& a, const Word& b) { return a.begin < b.begin; });
    for (const Word& word : chosen) {
        for (std::int64_t i = word.begin; i < word.end; ++i) {
            positions.push_back(first + i);
            labels.push_back(tokens[i]);
            const double action = random.uniform();
            if (action < 0.8) {
                tokens[i] = rule.mask_token;
            } else if (action < 0.9) {
                do {
                    tokens[i] = random.below(static_cast<std::uint32_t>(rule.kinds.size));
                } while (kind_of(rule, tokens[i]) == TokenKind::special);
            }
        }
    }
}

}  // namespace efficientclip
