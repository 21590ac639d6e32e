// What is said of a picture: the one rule for captions, whichever file or column they stand in.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace efficientclip {

struct Caption {
    std::string text;           // UTF-8 with something to see in it, and no white space around
    std::optional<bool> noise;  // whether it is wrong, where that is known
};

struct Captions {
    std::vector<Caption> texts;
    std::string source;
    std::vector<std::string> english;
};

// Those of a tar's sample with this .txt and .json member: the .json's "captions", or else the .txt, or else the .json's
// "caption". Each is a text, an object with "text" and perhaps "noise", or a list of these.
// Returns why there are none that can be used; null if there are.
const char* read_captions(const std::optional<std::string>& text, const std::optional<std::string>& json,
                          Captions& found);

// The same for captions that stand in a column.
const char* read_captions(const std::vector<std::string_view>& texts, Captions& found);

// What is left of a UTF-8 text without white space and marks around it: nothing where there is nothing to see. Halves
// of surrogate pairs stay.
std::string_view stripped(std::string_view text);

}  // namespace efficientclip
