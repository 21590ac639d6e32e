// Whether a sample has captions. The same rule as engine/data/shards.py, which reads them: there the values are wanted,
// here only whether there are any, before a place in a batch is given away.
#pragma once

#include <optional>
#include <string>

namespace efficientclip {

// Why a sample with this .txt and .json member has no captions; null if it has.
const char* captions_missing(const std::optional<std::string>& text, const std::optional<std::string>& json);

}  // namespace efficientclip
