#pragma once
#include <cstdint>

#include "dtype.h"

namespace pyllm {

// Row (batch, time) of `rows` goes to its position of pages (pages, page_size, heads, width): to the page that the table
// (batch, pages of a sequence) names at position / page_size. A position's heads lie next to each other in the pages.
struct WritePagesArgs {
  int64_t batch, time, heads, bytes;  // bytes: of a head
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
