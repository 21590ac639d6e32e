// The core alone, to be run under the sanitizers: random inputs against the plainest loops, then each error.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "batch.hpp"
#include "check.hpp"

using namespace efficientclip;

namespace {

std::mt19937 rng(7);

std::int64_t below(std::int64_t n) { return std::uniform_int_distribution<std::int64_t>(0, n - 1)(rng); }

template <class Token>
void test_pack_texts() {
    for (int round = 0; round < 50; ++round) {
        const std::int64_t n = 1 + below(30), max_length = 1 + below(10);
        std::vector<std::int64_t> offsets{0};
        for (std::int64_t i = 0; i < n; ++i) offsets.push_back(offsets.back() + below(15));
        std::vector<Token> tokens;
        for (std::int64_t i = 0; i < offsets.back(); ++i) tokens.push_back(static_cast<Token>(below(60'000)));
        std::vector<std::int64_t> ids, expected, expected_positions;
        for (std::int64_t i = below(100); i > 0; --i) ids.push_back(below(n));
        for (const std::int64_t id : ids) {
            const std::int64_t begin = offsets[id], length = offsets[id + 1] - begin;
            for (std::int64_t p = 0; p < std::min(length, max_length); ++p) {
                const bool cut_end = length > max_length && p == max_length - 1;
                expected.push_back(tokens[cut_end ? begin + length - 1 : begin + p]);
                expected_positions.push_back(p);
            }
        }
        std::vector<std::int32_t> cu_seqlens(ids.size() + 1);
        measure_texts(view(offsets), offsets.back(), view(ids), max_length, cu_seqlens.data());
        std::vector<std::int64_t> input_ids(cu_seqlens.back()), position_ids(cu_seqlens.back());
        pack_texts(view(tokens), view(offsets), view(ids), cu_seqlens.data(), input_ids.data(), position_ids.data());
        check(input_ids == expected && position_ids == expected_positions, "pack_texts");
    }
}

void test_gather_rows() {
    for (int round = 0; round < 30; ++round) {
        const std::int64_t n = 1 + below(50), row_bytes = below(3'000), m = below(3'000);
        std::vector<std::byte> table(n * row_bytes), out(m * row_bytes), expected(m * row_bytes);
        for (std::byte& value : table) value = static_cast<std::byte>(rng());
        std::vector<std::int64_t> rows;
        for (std::int64_t i = 0; i < m; ++i) rows.push_back(below(n));
        for (std::int64_t i = 0; row_bytes > 0 && i < m; ++i) {
            std::memcpy(&expected[i * row_bytes], &table[rows[i] * row_bytes], row_bytes);
        }
        gather_rows(table.data(), n, row_bytes, view(rows), 1 + static_cast<int>(below(6)), out.data());
        check(out == expected, "gather_rows");
    }
}

void test_linked_pairs() {
    for (int round = 0; round < 60; ++round) {
        const std::int64_t n_left = 1 + below(12), n_right = 1 + below(round % 2 == 0 ? 20 : 2'000);
        std::vector<std::int64_t> indptr{0}, left_ids, columns;
        std::vector<std::int32_t> indices;
        for (std::int64_t i = 0; i < n_left; ++i) {
            std::set<std::int32_t> edges;
            for (std::int64_t k = below(2 * n_right); k > 0; --k) {
                edges.insert(static_cast<std::int32_t>(below(n_right)));
            }
            indices.insert(indices.end(), edges.begin(), edges.end());
            indptr.push_back(static_cast<std::int64_t>(indices.size()));
        }
        for (std::int64_t i = below(40); i > 0; --i) left_ids.push_back(below(n_left));
        for (std::int64_t j = below(40); j > 0; --j) columns.push_back(below(n_right + 1) - 1);
        const std::int64_t diagonal = below(9) - 4;

        Pairs expected;
        for (std::size_t i = 0; i < left_ids.size(); ++i) {
            const std::int64_t left = left_ids[i];
            const std::set<std::int64_t> edges(indices.begin() + indptr[left], indices.begin() + indptr[left + 1]);
            for (std::size_t j = 0; j < columns.size(); ++j) {
                if (edges.count(columns[j]) == 0 || static_cast<std::int64_t>(j - i) == diagonal) continue;
                expected.rows.push_back(static_cast<std::int64_t>(i));
                expected.cols.push_back(static_cast<std::int64_t>(j));
            }
        }
        const Pairs got = linked_pairs(view(indptr), view(indices), view(left_ids), view(columns), diagonal);
        check(got.rows == expected.rows && got.cols == expected.cols, "linked_pairs");
    }
}

void test_errors() {
    using Absent = std::out_of_range;
    using Broken = std::invalid_argument;
    const std::vector<std::int64_t> none, offsets{0, 2}, past_end{0, 9}, falling{2, 1}, ids{0}, absent{1};
    const std::vector<std::int64_t> columns{0, 1, 2};
    const std::vector<std::int32_t> edges{1, 2}, unsorted{2, 1};
    std::int32_t lengths[2];
    std::byte row[8];
    const auto measure = [&](const auto& bounds, const auto& which, std::int64_t max_length) {
        measure_texts(view(bounds), 2, view(which), max_length, lengths);
    };
    const auto link = [&](const auto& indptr, const auto& indices, const auto& left_ids) {
        linked_pairs(view(indptr), view(indices), view(left_ids), view(columns), 0);
    };
    check_throws<Absent>([&] { measure(offsets, absent, 5); }, "absent text");
    check_throws<Broken>([&] { measure(offsets, ids, 0); }, "max_length");
    check_throws<Absent>([&] { link(offsets, edges, absent); }, "absent left id");
    check_throws<Broken>([&] { link(offsets, unsorted, ids); }, "unsorted row");
    for (const auto* bounds : {&past_end, &falling, &none}) {
        check_throws<Broken>([&] { measure(*bounds, ids, 5); }, "offsets");
        check_throws<Broken>([&] { link(*bounds, edges, ids); }, "indptr");
    }
    check_throws<Absent>([&] { gather_rows(row, 1, 8, view(absent), 1, row); }, "absent row");
    check_throws<Broken>([&] { gather_rows(row, 1, 8, view(none), 0, row); }, "threads");
}

}  // namespace

int main() {
    test_pack_texts<std::uint16_t>();
    test_pack_texts<std::int32_t>();
    test_gather_rows();
    test_linked_pairs();
    test_errors();
    std::puts("all passed");
    return 0;
}
