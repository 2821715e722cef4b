// Embedding: rows of a table, and the gradient of the table. Forward copies rows, threads take ids. Backward sorts the ids
// once (a stable radix sort, so that equal ids stay in the order of their positions); threads then own ranges of the
// vocabulary, and each row is the sum, in that order and in float, of the rows of dy that it got: the same bits for any
// number of threads, and the work is that of the ids, not of the vocabulary. What a large vocabulary costs is writing its
// zeros, so the caller may hand over memory that the system has zeroed (`zeroed`).
#include "cpu/embedding.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

struct Hit {
  int64_t id, position;
};

int64_t id_at(const char* ids, DType dtype, int64_t i) {
  return dtype == DType::i64 ? reinterpret_cast<const int64_t*>(ids)[i] : reinterpret_cast<const int32_t*>(ids)[i];
}

// The hits sorted by id, then position.
const Hit* sorted_hits(const EmbeddingBackwardArgs& a) {
  auto* from = static_cast<Hit*>(cpu::scratch(2 * a.count * sizeof(Hit), 0));
  auto* to = from + a.count;
  for (int64_t i = 0; i < a.count; i++) from[i] = {id_at(a.ids, a.ids_dtype, i), i};
  const int bits = a.vocabulary > 1 ? 64 - __builtin_clzll(a.vocabulary - 1) : 1;
  const int passes = (bits + 10) / 11, digit = (bits + passes - 1) / passes;
  int64_t starts[1 << 11];
  for (int pass = 0; pass < passes; pass++) {
    const int shift = pass * digit;
    const int64_t mask = (int64_t{1} << digit) - 1;
    std::fill(starts, starts + mask + 1, 0);
    for (int64_t i = 0; i < a.count; i++) starts[from[i].id >> shift & mask]++;
    int64_t total = 0;
    for (int64_t d = 0; d <= mask; d++) {
      const int64_t n = starts[d];
      starts[d] = total;
      total += n;
    }
    for (int64_t i = 0; i < a.count; i++) to[starts[from[i].id >> shift & mask]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

// Columns [begin, end) of one row of dweight from its hits, kept in registers `kWide` vectors at a time.
template <class T>
void sum_hits(const Hit* first, const Hit* last, const T* dy, int64_t dy_step, T* out, int64_t begin, int64_t end) {
  constexpr int kWide = 8;
  int64_t j = begin;
  for (; j + kWide * W <= end; j += kWide * W) {
    V s[kWide] = {};
    for (const Hit* h = first; h < last; h++)
      for (int k = 0; k < kWide; k++) s[k] = s[k] + load(dy + h->position * dy_step + j + k * W);
    for (int k = 0; k < kWide; k++) store(out + j + k * W, s[k]);
  }
  for (; j < end; j += W) {
    const int64_t n = std::min<int64_t>(W, end - j);
    V s{};
    for (const Hit* h = first; h < last; h++) s = s + get(dy + h->position * dy_step + j, n);
    write(out + j, s, n);
  }
}

}  // namespace

void embedding_forward(const EmbeddingArgs& a) {
  const int64_t bytes = a.width * size_of(a.dtype), step = a.weight_step * size_of(a.dtype);
  constexpr int64_t kAhead = 8;
  constexpr int64_t kNarrow = 512;  // a call for each row would take longer than its copy
  if (bytes == 0) return;           // null pointers then, which memcpy may not have
  parallel_for(a.count, 65536 / (bytes + 64) + 1, [&](int64_t begin, int64_t end) {
    if (bytes <= kNarrow && bytes % 64 == 0) {
      for (int64_t i = begin; i < end; i++) {
        if (i + kAhead < end) __builtin_prefetch(a.weight + id_at(a.ids, a.ids_dtype, i + kAhead) * step);
        const char* from = a.weight + id_at(a.ids, a.ids_dtype, i) * step;
        for (int64_t b = 0; b < bytes; b += 64) std::memcpy(a.out + i * bytes + b, from + b, 64);
      }
      return;
    }
    for (int64_t i = begin; i < end; i++) {
      if (i + kAhead < end) {
        const char* next = a.weight + id_at(a.ids, a.ids_dtype, i + kAhead) * step;
        for (int64_t b = 0; b < std::min<int64_t>(bytes, 512); b += 64) __builtin_prefetch(next + b);
      }
      std::memcpy(a.out + i * bytes, a.weight + id_at(a.ids, a.ids_dtype, i) * step, bytes);
    }
  });
}

void embedding_backward(const EmbeddingBackwardArgs& a) {
  const Hit* hits = sorted_hits(a);
  const Hit* end_of_hits = hits + a.count;
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* dy = reinterpret_cast<const T*>(a.dy);
    T* out = reinterpret_cast<T*>(a.dweight);
    // Pieces are ranges of the vocabulary; where it is small, ranges of columns too, for ids that are mostly one.
    const int64_t columns = a.vocabulary * a.width <= 1 << 20 ? std::max<int64_t>(64, 8 * W) : a.width;
    const int64_t across = (a.width + columns - 1) / columns;
    const int64_t rows = std::max<int64_t>(1, std::min(a.vocabulary / 16, (int64_t{1} << 18) / (a.width + 1)));
    const int64_t pieces = (a.vocabulary + rows - 1) / rows * across;
    const bool small = a.count * a.width + (a.zeroed ? 0 : a.vocabulary * a.width / 4) < 1 << 15;
    parallel_for(pieces, small ? pieces : 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; piece++) {
        int64_t row = piece / across * rows;
        const int64_t last = std::min(row + rows, a.vocabulary);
        const int64_t j0 = piece % across * columns, j1 = std::min(j0 + columns, a.width);
        const auto zero = [&](int64_t from, int64_t to) {
          if (a.zeroed) return;
          if (across == 1) {
            std::memset(static_cast<void*>(out + from * a.width), 0, (to - from) * a.width * sizeof(T));
          } else {
            for (int64_t r = from; r < to; r++)
              std::memset(static_cast<void*>(out + r * a.width + j0), 0, (j1 - j0) * sizeof(T));
          }
        };
        const Hit* hit = std::lower_bound(hits, end_of_hits, row, [](const Hit& h, int64_t id) { return h.id < id; });
        while (hit < end_of_hits && hit->id < last) {
          const Hit* next = hit;
          while (next < end_of_hits && next->id == hit->id) next++;
          zero(row, hit->id);
          sum_hits(hit, next, dy, a.dy_step, out + hit->id * a.width, j0, j1);
          row = hit->id + 1;
          hit = next;
        }
        zero(row, last);
      }
    });
  });
}

}  // namespace pyllm::ISA
