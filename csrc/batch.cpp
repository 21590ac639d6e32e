#include "batch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace efficientclip {
namespace {

std::string str(std::int64_t value) { return std::to_string(value); }

// The bounds of one item in an offsets array, checked against the `size` of the array they point into.
struct Range {
    std::int64_t begin, end;
};

Range checked_range(View<std::int64_t> offsets, std::int64_t id, std::int64_t size, const char* ids_name,
                    const char* offsets_name, const char* data_name) {
    const std::int64_t n = offsets.size - 1;
    if (id < 0 || id >= n) {
        throw std::out_of_range(std::string(ids_name) + " holds " + str(id) + ", but " + offsets_name + " describes " +
                                str(n) + " items");
    }
    const Range range{offsets[id], offsets[id + 1]};
    if (range.begin < 0 || range.end < range.begin || range.end > size) {
        throw std::invalid_argument(std::string(offsets_name) + "[" + str(id) + ":" + str(id + 2) + "] = (" +
                                    str(range.begin) + ", " + str(range.end) + ") is no ascending range inside the " +
                                    str(size) + " entries of " + data_name + ": rebuild the store, its files disagree");
    }
    return range;
}

void require_offsets(View<std::int64_t> offsets, const char* name) {
    if (offsets.size < 1) {
        throw std::invalid_argument(std::string(name) + " is empty: it needs one entry more than there are items");
    }
}

constexpr std::int64_t kCacheLine = 64;
// A row's first touch misses the cache and the page table; eight rows ahead hides both.
constexpr std::int64_t kPrefetchRows = 8;
// A text is shorter than a row: less time to hide a miss in.
constexpr std::int64_t kPrefetchTexts = 16;
// Past this the hardware prefetcher has caught on to the row.
constexpr std::int64_t kPrefetchBytes = 1024;
// Smaller shares cost more in thread starts than they save in copying.
constexpr std::int64_t kBytesPerBlock = 256 * 1024;

void copy_rows(const std::byte* table, std::int64_t row_bytes, View<std::int64_t> rows, std::int64_t begin,
               std::int64_t end, std::byte* out) {
    const std::int64_t ahead = std::min(row_bytes, kPrefetchBytes);
    const auto prefetch = [&](std::int64_t i) {
        const std::byte* row = table + rows[i] * row_bytes;
        for (std::int64_t at = 0; at < ahead; at += kCacheLine) __builtin_prefetch(row + at, 0, 0);
    };
    for (std::int64_t i = begin; i < std::min(begin + kPrefetchRows, end); ++i) prefetch(i);
    for (std::int64_t i = begin; i < end; ++i) {
        if (i + kPrefetchRows < end) prefetch(i + kPrefetchRows);
        std::memcpy(out + i * row_bytes, table + rows[i] * row_bytes, static_cast<std::size_t>(row_bytes));
    }
}

// Column id -> its positions, ascending: open addressing for the first position, a chain for repeats.
class ColumnIndex {
  public:
    explicit ColumnIndex(View<std::int64_t> columns)
        : columns_(columns), next_(static_cast<std::size_t>(columns.size), kNone) {
        std::size_t capacity = 16;
        while (capacity < 2 * next_.size()) capacity *= 2;
        heads_.assign(capacity, kNone);
        for (std::int64_t j = columns.size - 1; j >= 0; --j) {
            if (columns[j] < 0) continue;
            std::int32_t& head = heads_[slot(columns[j])];
            next_[static_cast<std::size_t>(j)] = head;
            head = static_cast<std::int32_t>(j);
        }
    }

    void append_positions(std::int64_t id, std::vector<std::int32_t>& positions) const {
        for (std::int32_t j = heads_[slot(id)]; j != kNone; j = next_[static_cast<std::size_t>(j)]) {
            positions.push_back(j);
        }
    }

  private:
    static constexpr std::int32_t kNone = -1;

    // The slot that holds `id`, or the free one where it belongs.
    std::size_t slot(std::int64_t id) const {
        const std::size_t mask = heads_.size() - 1;
        // Fibonacci hashing: neighbouring ids, common within a shard, land far apart.
        std::size_t at = static_cast<std::size_t>((static_cast<std::uint64_t>(id) * 0x9E3779B97F4A7C15ull) >> 32) & mask;
        while (heads_[at] != kNone && columns_[heads_[at]] != id) at = (at + 1) & mask;
        return at;
    }

    View<std::int64_t> columns_;
    std::vector<std::int32_t> heads_;
    std::vector<std::int32_t> next_;
};

struct Column {
    std::int64_t id;
    std::int32_t position;
};

std::vector<Column> sorted_by_id(View<std::int64_t> columns) {
    std::vector<Column> sorted;
    sorted.reserve(static_cast<std::size_t>(columns.size));
    for (std::int64_t j = 0; j < columns.size; ++j) {
        if (columns[j] >= 0) sorted.push_back({columns[j], static_cast<std::int32_t>(j)});
    }
    std::sort(sorted.begin(), sorted.end(), [](const Column& a, const Column& b) { return a.id < b.id; });
    return sorted;
}

// std::lower_bound by steps that double, so that a walk over near ids costs little more than a merge.
const std::int32_t* gallop(const std::int32_t* first, const std::int32_t* last, std::int64_t id) {
    std::int64_t step = 1;
    while (step < last - first && first[step] < id) {
        first += step;
        step *= 2;
    }
    return std::lower_bound(first, step < last - first ? first + step : last, id);
}

}  // namespace

void measure_texts(View<std::int64_t> offsets, std::int64_t n_tokens, View<std::int64_t> ids, std::int64_t max_length,
                   std::int32_t* cu_seqlens) {
    require_offsets(offsets, "offsets");
    if (max_length < 1) {
        throw std::invalid_argument("max_length is " + str(max_length) + ": it must be at least 1");
    }
    std::int64_t total = 0;
    cu_seqlens[0] = 0;
    for (std::int64_t i = 0; i < ids.size; ++i) {
        const Range text = checked_range(offsets, ids[i], n_tokens, "ids", "offsets", "tokens");
        total += std::min(text.end - text.begin, max_length);
        if (total > std::numeric_limits<std::int32_t>::max()) {
            throw std::invalid_argument("ids names more than 2^31 - 1 tokens, too many for int32 cu_seqlens: "
                                        "pack fewer texts at a time or lower max_length");
        }
        cu_seqlens[i + 1] = static_cast<std::int32_t>(total);
    }
}

template <class Token>
void pack_texts(View<Token> tokens, View<std::int64_t> offsets, View<std::int64_t> ids, const std::int32_t* cu_seqlens,
                std::int64_t* input_ids, std::int64_t* position_ids) {
    for (std::int64_t i = 0; i < ids.size; ++i) {
        if (i + kPrefetchTexts < ids.size) __builtin_prefetch(tokens.data + offsets[ids[i + kPrefetchTexts]], 0, 0);
        const std::int64_t length = cu_seqlens[i + 1] - cu_seqlens[i];
        if (length == 0) continue;
        const Token* text = tokens.data + offsets[ids[i]];
        std::copy(text, text + length - 1, input_ids);
        input_ids[length - 1] = tokens[offsets[ids[i] + 1] - 1];
        std::iota(position_ids, position_ids + length, std::int64_t{0});
        input_ids += length;
        position_ids += length;
    }
}

template void pack_texts(View<std::uint16_t>, View<std::int64_t>, View<std::int64_t>, const std::int32_t*,
                         std::int64_t*, std::int64_t*);
template void pack_texts(View<std::int32_t>, View<std::int64_t>, View<std::int64_t>, const std::int32_t*,
                         std::int64_t*, std::int64_t*);

void gather_rows(const std::byte* table, std::int64_t n_rows, std::int64_t row_bytes, View<std::int64_t> rows,
                 int threads, std::byte* out) {
    if (threads < 1) {
        throw std::invalid_argument("threads is " + str(threads) + ": it must be at least 1");
    }
    for (std::int64_t i = 0; i < rows.size; ++i) {
        if (rows[i] < 0 || rows[i] >= n_rows) {
            throw std::out_of_range("rows[" + str(i) + "] is " + str(rows[i]) + ", but table has " + str(n_rows) +
                                    " rows");
        }
    }
    if (row_bytes == 0 || rows.size == 0) return;

    const std::int64_t block = std::max<std::int64_t>(1, kBytesPerBlock / row_bytes);
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t begin; (begin = next.fetch_add(block)) < rows.size;) {
            copy_rows(table, row_bytes, rows, begin, std::min(begin + block, rows.size), out);
        }
    };
    const std::int64_t blocks = (rows.size + block - 1) / block;
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(std::min<std::int64_t>(threads, blocks)));
    try {
        while (static_cast<std::int64_t>(helpers.size()) + 1 < std::min<std::int64_t>(threads, blocks)) {
            helpers.emplace_back(work);
        }
    } catch (const std::system_error&) {
        // The machine is out of threads: those that started, and this one, take all blocks.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

Pairs linked_pairs(View<std::int64_t> indptr, View<std::int32_t> indices, View<std::int64_t> left_ids,
                   View<std::int64_t> columns, std::int64_t diagonal) {
    require_offsets(indptr, "indptr");
    if (columns.size > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("columns has " + str(columns.size) + " entries: at most 2^31 - 1 are supported");
    }
    const ColumnIndex index(columns);

    // A keyword stands many times in a batch: its edges are looked up once.
    std::vector<std::int64_t> by_id(static_cast<std::size_t>(left_ids.size));
    std::iota(by_id.begin(), by_id.end(), std::int64_t{0});
    std::sort(by_id.begin(), by_id.end(), [&](std::int64_t a, std::int64_t b) { return left_ids[a] < left_ids[b]; });

    std::vector<Column> sorted_columns;
    std::vector<std::int32_t> positions;
    std::vector<Range> matches(by_id.size());
    for (std::size_t k = 0; k < by_id.size(); ++k) {
        const std::int64_t id = left_ids[by_id[k]];
        Range& match = matches[static_cast<std::size_t>(by_id[k])];
        if (k > 0 && left_ids[by_id[k - 1]] == id) {
            match = matches[static_cast<std::size_t>(by_id[k - 1])];
            continue;
        }
        match.begin = static_cast<std::int64_t>(positions.size());
        const Range edges = checked_range(indptr, id, indices.size, "left_ids", "indptr", "indices");
        const std::int32_t* first = indices.data + edges.begin;
        const std::int32_t* last = indices.data + edges.end;
        if (last - first > columns.size) {
            // More edges than columns: walk the columns through the edges.
            if (sorted_columns.empty()) sorted_columns = sorted_by_id(columns);
            for (const Column& column : sorted_columns) {
                first = gallop(first, last, column.id);
                if (first == last) break;
                if (*first == column.id) positions.push_back(column.position);
            }
        } else {
            for (const std::int32_t* edge = first; edge != last; ++edge) {
                if (edge != first && *edge <= edge[-1]) {
                    if (*edge == edge[-1]) continue;
                    throw std::invalid_argument("indices of row " + str(id) + " are not ascending: sort each row");
                }
                index.append_positions(*edge, positions);
            }
        }
        std::sort(positions.begin() + match.begin, positions.end());
        match.end = static_cast<std::int64_t>(positions.size());
    }

    std::int64_t total = 0;
    for (const Range& match : matches) total += match.end - match.begin;
    Pairs pairs;
    pairs.rows.reserve(static_cast<std::size_t>(total));
    pairs.cols.reserve(static_cast<std::size_t>(total));
    for (std::int64_t i = 0; i < left_ids.size; ++i) {
        const Range match = matches[static_cast<std::size_t>(i)];
        for (std::int64_t at = match.begin; at < match.end; ++at) {
            const std::int64_t j = positions[static_cast<std::size_t>(at)];
            if (j - i == diagonal) continue;
            pairs.rows.push_back(i);
            pairs.cols.push_back(j);
        }
    }
    return pairs;
}

}  // namespace efficientclip
