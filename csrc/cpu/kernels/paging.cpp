// New keys or values to their places in pages. Threads take positions; each is a copy, of all its heads at once where they
// lie next to each other. The floor is the memory read and written.
#include "cpu/paging.h"

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {

void write_pages(const WritePagesArgs& a) {
  const int64_t size = a.heads * a.bytes;
  const bool whole = a.row_head == a.bytes || a.heads == 1;
  parallel_for(a.batch * a.time, 65536 / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t batch = i / a.time;
      const int64_t position = a.positions_dtype == DType::i64 ? reinterpret_cast<const int64_t*>(a.positions)[i]
                                                               : reinterpret_cast<const int32_t*>(a.positions)[i];
      const int64_t page = a.page_table[batch * a.table_step + position / a.page_size];
      char* to = a.pages + page * a.page_step + position % a.page_size * a.position_step;
      const char* from = a.rows + batch * a.row_batch + i % a.time * a.row_time;
      if (whole)
        std::memcpy(to, from, size);
      else
        for (int64_t h = 0; h < a.heads; h++) std::memcpy(to + h * a.bytes, from + h * a.row_head, a.bytes);
    }
  });
}

}  // namespace pyllm::ISA
