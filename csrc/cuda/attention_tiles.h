// Tiles of attention's rows in shared memory, as matrix instructions take them, and the two products made of them.
//
// A row has kDim elements of 16 bits (beyond the head's size: zeros) in chunks of 16 bytes; chunk c of row r stands at
// c ^ (r % 8), so that the eight rows that an ldmatrix reads lie in different banks. A tile begins at a row that is a
// multiple of 8. A warp's result has 16 rows; a lane holds rows group and group + 8 of it, as matrix.h says of c.
#pragma once
#include "cuda/attention_rows.h"
#include "cuda/matrix.h"

namespace pyllm::cuda {

template <int kDim, class T>
__device__ __forceinline__ T* chunk_at(T* rows, int row, int chunk) {
  return rows + row * kDim + ((chunk ^ (row % 8)) * 8);
}

// Rows [0, count) at row_of(i), each `dim` elements, to shared memory, and zeros beyond, for which `valid` is not read.
template <int kDim, int kThreads, class T, class F>
__device__ __forceinline__ void copy_rows(T* to, int rows, int count, int dim, const void* valid, const F& row_of) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int left = row < count ? dim - chunk * 8 : 0, taken = left < 0 ? 0 : left < 8 ? left : 8;
    copy_async(chunk_at<kDim>(to, row, chunk), taken ? row_of(row) + chunk * 8 : valid, taken * 2);
  }
}

// A tile's queries, or what else lies like them (the gradients of their results), to the first of `rows` rows.
template <int kDim, int kThreads, class T>
__device__ __forceinline__ void copy_queries(const AttentionArgs& a, const Tile& t, const char* data,
                                             const int64_t* step, int64_t dim, T* to, int rows) {
  copy_rows<kDim, kThreads>(to, rows, static_cast<int>(t.count), static_cast<int>(dim), a.q,
                            [&](int i) { return query_at<T>(data, step, t, i); });
}

// Keys first..first + most and their values, all of one page.
template <int kDim, int kThreads, class T>
__device__ __forceinline__ void copy_keys(const AttentionArgs& a, const Tile& t, int64_t first, int most, T* keys,
                                          T* values, FaultRecord* record) {
  const int64_t left = t.length - first;
  const int count = static_cast<int>(left < 0 ? 0 : left < most ? left : most);
  const T* k = count > 0 ? key_at<T>(a, a.k, a.k_step, t, first, record) : nullptr;
  const T* v = count > 0 ? key_at<T>(a, a.v, a.v_step, t, first, record) : nullptr;
  copy_rows<kDim, kThreads>(keys, most, k ? count : 0, static_cast<int>(a.dim), a.q,
                            [&](int j) { return k + j * a.k_step[1]; });
  copy_rows<kDim, kThreads>(values, most, v ? count : 0, static_cast<int>(a.value_dim), a.q,
                            [&](int j) { return v + j * a.v_step[1]; });
}

// c += the 16 rows of a times the kTiles * 8 rows of b, each with each.
template <int kDim, int kTiles, class T>
__device__ __forceinline__ void add_products(float (&c)[kTiles][4], T* a, T* b) {
  static_assert(kTiles % 2 == 0);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int d = 0; d < kDim / 16; d++) {
    uint32_t x[4];  // 16 rows by 16 elements
    load_matrices<false>(x, chunk_at<kDim>(a, lane % 16, d * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t y[4];  // 16 rows by 16 elements: the two halves of 8 rows, then of the next 8
      load_matrices<false>(y, chunk_at<kDim>(b, n * 8 + lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
      multiply_add<T>(c[n], x, {y[0], y[1]});
      multiply_add<T>(c[n + 1], x, {y[2], y[3]});
    }
  }
}

// c += sums of the kTiles * 8 rows of b with these weights, which are rounded to T.
template <int kDim, int kTiles, class T>
__device__ __forceinline__ void add_weighted(float (&c)[kDim / 8][4], const float (&weights)[kTiles][4], T* b) {
  static_assert(kTiles % 2 == 0);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    const uint32_t w[4] = {two<T>(weights[n][0], weights[n][1]), two<T>(weights[n][2], weights[n][3]),
                           two<T>(weights[n + 1][0], weights[n + 1][1]), two<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t y[4];  // 16 rows by 16 elements
      load_matrices<true>(y, chunk_at<kDim>(b, n * 8 + lane % 16, d + lane / 16));
      multiply_add<T>(c[d], w, {y[0], y[1]});
      multiply_add<T>(c[d + 1], w, {y[2], y[3]});
    }
  }
}

// Row r (0: group, 1: group + 8) of what a lane holds, times `factor`, to the row at `to`.
template <class T, int kChunks>
__device__ __forceinline__ void store_row(T* to, const float (&c)[kChunks][4], int r, int dim, float factor) {
  const int pair = threadIdx.x % 4 * 2;
  check_aligned(to, 4);
#pragma unroll
  for (int d = 0; d < kChunks; d++)
    if (d * 8 < dim)
      *reinterpret_cast<uint32_t*>(to + d * 8 + pair) = two<T>(c[d][r * 2] * factor, c[d][r * 2 + 1] * factor);
}

// Whether chunks of 16 bytes hold whole elements of one row, in the inputs and in what is written beside them.
inline bool whole_chunks(const char* p, const int64_t* step) {
  return whole_packs(p) && step[0] % 8 == 0 && step[1] % 8 == 0 && step[2] % 8 == 0;
}
inline bool fits_matrices(const AttentionArgs& a) {
  return a.dtype != DType::f32 && a.dim % 8 == 0 && a.value_dim % 8 == 0 && whole_chunks(a.q, a.q_step) &&
         whole_chunks(a.k, a.k_step) && whole_chunks(a.v, a.v_step);
}

// f(the storage type, the head size that the tiles have), as values.
template <class F>
void with_tiles(const AttentionArgs& a, const F& f) {
  const int64_t dim = std::max(a.dim, a.value_dim);
  const auto of = [&](auto type) {
    dim <= 64    ? f(type, std::integral_constant<int, 64>())
    : dim <= 128 ? f(type, std::integral_constant<int, 128>())
                 : f(type, std::integral_constant<int, 256>());
  };
  a.dtype == DType::bf16 ? of(bf16{}) : of(f16{});
}

}  // namespace pyllm::cuda
