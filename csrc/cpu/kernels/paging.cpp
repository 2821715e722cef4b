// New keys or values to their places in pages. Threads take positions. Numbers of the pages' own dtype are copied, all heads
// at once where they lie next to each other; for int8 pages a group's largest number becomes 127 times its scale, which is
// rounded up. The floor is the memory read and written. A position's bytes lie in a cache line for each four elements of a
// head: a few positions are worth a thread.
#include "cpu/paging.h"

#include <algorithm>

#include "cpu/kernels/bytes.h"

namespace pyllm::ISA {
namespace {

// To its position of a head's tile. What is not finite has no nearest byte: its group is not a number.
template <class T>
void quantize(const T* x, int64_t dim, int64_t position, char* tile) {
  for (int64_t first = 0; first < dim; first += kInt8Group) {
    const int64_t count = std::min(kInt8Group, dim - first);
    alignas(64) float block[kInt8Group];
    alignas(64) int8_t bytes[kInt8Group];
    V largest{}, bad{};
    for (int64_t j = 0; j < kInt8Group; j += W) {
      const V v = j < count ? get(x + first + j, std::min<int64_t>(W, count - j)) : V{};
      store(block + j, v);
      largest = max(abs(v), largest);
      bad = bad + v * 0.0f;
    }
    const bool finite = sum(bad) == 0.0f;
    const float exact = max(largest) / 127.0f;
    uint32_t bits;
    std::memcpy(&bits, &exact, 4);
    const bf16 scale{finite ? static_cast<uint16_t>((bits + 0xffff) >> 16) : uint16_t{0x7fc0}};
    const V by = set(to_float(scale));
    for (int64_t j = 0; j < kInt8Group; j += W)
      store_bytes(bytes + j, nearest(finite && scale.bits ? load(block + j) / by : V{}));
    for (int64_t d = first; d < first + count; d += kInt8Quad)
      std::memcpy(tile + int8_at(dim, position, d), bytes + d - first, int8_count(dim, d));
    std::memcpy(tile + int8_scale_at(dim, position, first), &scale, 2);
  }
}

}  // namespace

void write_pages(const WritePagesArgs& a) {
  const int64_t size = a.heads * a.bytes;
  const bool whole = a.row_head == a.bytes || a.heads == 1;
  parallel_for(a.batch * a.time, (a.int8 ? 2048 : 65536) / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t batch = i / a.time;
      const int64_t position = a.positions_dtype == DType::i64 ? reinterpret_cast<const int64_t*>(a.positions)[i]
                                                               : reinterpret_cast<const int32_t*>(a.positions)[i];
      const int64_t page = a.page_table[batch * a.table_step + position / a.page_size];
      const int64_t place = position % a.page_size, in_tile = a.int8 ? place % kKeyTile : 0;
      char* to = a.pages + page * a.page_step + (place - in_tile) * a.position_step;
      const char* from = a.rows + batch * a.row_batch + i % a.time * a.row_time;
      if (a.int8)
        with_dtype(a.dtype, [&](auto* tag) {
          for (int64_t h = 0; h < a.heads; h++)
            quantize(reinterpret_cast<const std::remove_pointer_t<decltype(tag)>*>(from + h * a.row_head), a.dim,
                     in_tile, to + h * a.bytes * kKeyTile);
        });
      else if (whole)
        std::memcpy(to, from, size);
      else
        for (int64_t h = 0; h < a.heads; h++) std::memcpy(to + h * a.bytes, from + h * a.row_head, a.bytes);
    }
  });
}

}  // namespace pyllm::ISA
