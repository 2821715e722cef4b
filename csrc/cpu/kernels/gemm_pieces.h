// How a product is shared out to the threads.
#pragma once
#include <algorithm>

#include "cpu/kernels/gemm.h"

namespace pyllm::ISA {
namespace {

// Equal pieces of C for the threads, of the shape that packs least: the more pieces the sooner a thread that was late
// is helped, but each copies its share of A and B anew. packed(height, width): what that costs a piece, in the time of
// as many multiply-adds for each of k; block(p, i0, i1, j0, j1) computes one.
template <class Packed, class Block>
void in_pieces(const Product& p, int64_t row_step, int64_t column_step, const Packed& packed, const Block& block) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t threads = p.m * p.n * p.k < 1 << 15 ? 1 : cpu::num_threads();
  int64_t height = p.m, width = p.n, best = INT64_MAX;
  for (int64_t count = threads; threads > 1 && count <= 3 * threads; count += threads)
    for (int64_t down = 1; down <= count; down++) {
      const int64_t across = count / down, h = round_up((p.m + down - 1) / down, row_step);
      const int64_t w = round_up((p.n + across - 1) / across, column_step);
      const int64_t pieces = ((p.m + h - 1) / h) * ((p.n + w - 1) / w), rounds = (pieces + threads - 1) / threads;
      const int64_t cost = (32 * rounds + 1) * (std::min(h, p.m) * std::min(w, p.n) + packed(h, w) + 512);
      if (cost < best) best = cost, height = h, width = w;
    }
  const int64_t across = (p.n + width - 1) / width, pieces = (p.m + height - 1) / height * across;
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t i = piece / across * height, j = piece % across * width;
      block(p, i, std::min(i + height, p.m), j, std::min(j + width, p.n));
    }
  });
}

}  // namespace
}  // namespace pyllm::ISA
