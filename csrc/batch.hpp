// The loader's core: everything a batch needs from the store's flat arrays. Plain C++17, no Python.
// Errors: std::out_of_range for an id or row outside the store, std::invalid_argument for a broken array or setting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace efficientclip {

// A borrowed, read-only 1-D array.
template <class T>
struct View {
    const T* data;
    std::int64_t size;

    const T& operator[](std::int64_t i) const { return data[i]; }
};

// Lengths of the texts `ids` [m] after the cut to `max_length`, summed up into cu_seqlens [m + 1].
// Text i of the store is tokens[offsets[i]] .. tokens[offsets[i + 1]]; `offsets` is [n_texts + 1].
void measure_texts(View<std::int64_t> offsets, std::int64_t n_tokens, View<std::int64_t> ids, std::int64_t max_length,
                   std::int32_t* cu_seqlens);

// Concatenates the texts `ids` into input_ids [T] with positions from 0 in position_ids [T], T = cu_seqlens[m].
// A text that was cut keeps its last token. Call measure_texts first: it checks what is read here.
template <class Token>
void pack_texts(View<Token> tokens, View<std::int64_t> offsets, View<std::int64_t> ids, const std::int32_t* cu_seqlens,
                std::int64_t* input_ids, std::int64_t* position_ids);

// Copies the rows `rows` [m] of a table of n_rows rows of row_bytes each to out [m * row_bytes].
void gather_rows(const std::byte* table, std::int64_t n_rows, std::int64_t row_bytes, View<std::int64_t> rows,
                 int threads, std::byte* out);

struct Pairs {
    std::vector<std::int64_t> rows;
    std::vector<std::int64_t> cols;
};

// All (i, j) with an edge left_ids[i] -> columns[j] in the CSR graph, save j == i + diagonal, sorted by (i, j).
// Each CSR row must be ascending. A column id below 0 has no edge, so it may stand for an empty place.
Pairs linked_pairs(View<std::int64_t> indptr, View<std::int32_t> indices, View<std::int64_t> left_ids,
                   View<std::int64_t> columns, std::int64_t diagonal);

}  // namespace efficientclip
