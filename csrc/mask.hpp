// BERT's masked-language modelling: which tokens of a text are hidden, and what stands in their place.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.hpp"
#include "random.hpp"

namespace efficientclip {

// What a token of the vocabulary is to masking.
enum class TokenKind : std::uint8_t { ordinary = 0, special = 1, continuing = 2 };

struct MaskRule {
    View<std::uint8_t> kinds;  // TokenKind of each token of the vocabulary
    std::int64_t mask_token;
    double share;              // of a text's tokens that are no special ones
    bool whole_words;          // a word is a token and the `continuing` ones behind it
};

// std::invalid_argument if the rule can mask nothing: no ordinary token, or a setting out of range.
void check_rule(const MaskRule& rule);

// Masks a text's `tokens` [n] in place and appends the chosen positions, ascending, plus `first`, and what stood there.
// Of the chosen, 80 % become the mask token, 10 % a random token that is not special, 10 % stay. max(1, round(share x
// tokens that are not special)) are chosen; whole words fill that number as far as they fit, at least one of them.
// std::invalid_argument for a token outside the vocabulary.
void mask_text(const MaskRule& rule, Random random, std::int64_t* tokens, std::int64_t n, std::int64_t first,
               std::vector<std::int64_t>& positions, std::vector<std::int64_t>& labels);

}  // namespace efficientclip
