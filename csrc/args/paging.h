#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

constexpr int64_t kKeyTile = 64;  // keys that are walked together; a page holds whole tiles

// Numbers in an int8 page are a byte each, and each group of a head's has a bf16 scale, by which they are multiplied. They
// lie as they are read: of a tile of positions, head after head, [four elements][position][element], the last perhaps of
// fewer, and behind those the scales, [group][position].
constexpr int64_t kInt8Group = 32, kInt8Quad = 4;
constexpr int64_t int8_width(int64_t dim) { return dim + (dim + kInt8Group - 1) / kInt8Group * 2; }
constexpr int64_t int8_dim(int64_t width) { return width - (width + kInt8Group + 1) / (kInt8Group + 2) * 2; }

// Where a head's tile has the numbers from `element` on, the first of its four, of a position; and a scale.
constexpr int64_t int8_count(int64_t dim, int64_t element) {
  return dim - element < kInt8Quad ? dim - element : kInt8Quad;
}
constexpr int64_t int8_at(int64_t dim, int64_t position, int64_t element) {
  return element * kKeyTile + position * int8_count(dim, element);
}
constexpr int64_t int8_scale_at(int64_t dim, int64_t position, int64_t element) {
  return dim * kKeyTile + (element / kInt8Group * kKeyTile + position) * 2;
}

// Row (batch, time) of `rows`, of `heads` times `dim` numbers, goes to its position of pages (pages, page_size, heads,
// width): to the page that the table (batch, pages of a sequence) names at position / page_size. A position's heads lie
// next to each other in the pages, which are of the rows' dtype or int8, where those of a tile of positions do.
struct WritePagesArgs {
  int64_t batch, time, heads, dim, bytes;  // bytes: of a head in the pages
  DType dtype;                             // of rows
  bool int8;
  const char* rows;
  int64_t row_batch, row_time, row_head;  // steps in bytes, as those of the pages
  char* pages;
  int64_t page_step, position_step, page_size;
  const int32_t* page_table;
  int64_t table_step;
  const char* positions;  // (batch, time), contiguous
  DType positions_dtype;
  int64_t page_count, sequence_pages;  // pages there are, and those that a sequence may have
};

// positions (batch x count) = lengths and on, totals (batch) = lengths + count: none beyond capacity.
struct NextPositionsArgs {
  int64_t batch, count, capacity;
  const int64_t* lengths;
  int64_t *positions, *totals;
};

}  // namespace pyllm
