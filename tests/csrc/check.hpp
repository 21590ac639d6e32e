// What the core's own tests share.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "batch.hpp"

inline void check(bool held, const char* what) {
    if (held) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

inline void check(bool held, const std::string& what) { check(held, what.c_str()); }

template <class Error, class Call>
void check_throws(Call call, const char* what) {
    try {
        call();
    } catch (const Error&) {
        return;
    }
    check(false, what);
}

template <class T>
efficientclip::View<T> view(const std::vector<T>& values) {
    return {values.data(), static_cast<std::int64_t>(values.size())};
}
