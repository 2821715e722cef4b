// Matrix product C = A B (+ bias) for kernels: fp32 arithmetic on operands of any strides and float dtype.
//
// An element of C is the sum, in order, of blocks of kBlockK products, each block one chain of fused multiply-adds from
// zero. Nothing else about the call enters: a row has the same bits alone, in a batch, and for any number of threads.
// Products of bf16 on tile registers have another order (gemm_tiles.cpp), as fixed.
#pragma once
#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kPanel = 2 * W;  // columns of a panel
constexpr int64_t kBlockK = 256;
#if ISA_AVX512
constexpr int64_t kTile = 12;  // rows of a tile: 24 of 32 registers are sums
#else
constexpr int64_t kTile = 6;  // 12 of 16
#endif

}  // namespace

struct Matrix {  // element (i, j) is data[i * row_step + j * column_step]
  const void* data;
  DType dtype;
  int64_t row_step, column_step;
};

struct Product {
  int64_t m, n, k;
  Matrix a, b;          // m x k and k x n
  const float* packed;  // b from pack(), or null
  const float* bias;    // n, or null
  void* c;              // m x n, rows c_step apart
  DType c_dtype;
  int64_t c_step;
  bool accumulate;                      // C starts from what is in c
  const void* packed_narrow = nullptr;  // b from pack_narrow()
  bool plain = false;                   // not on tile registers: the bits of a product with `packed`
};

namespace {

[[maybe_unused]] int64_t packed_size(int64_t n, int64_t k) { return round_up(n, kPanel) * k; }  // floats
[[maybe_unused]] int64_t narrow_rows(int64_t k) { return round_up(k, 32); }                     // of a narrow panel

}  // namespace

// All of b (k x n) as panels: [panel][k][kPanel], the columns beyond n zeros.
void pack(const Matrix& b, int64_t n, int64_t k, float* out);
// The same in b's own 16-bit type, by pairs of k: [panel][narrow_rows(k) / 2][kPanel][2], the rows beyond k zeros.
void pack_narrow(const Matrix& b, int64_t n, int64_t k, void* out);

// The whole product, shared out to the threads.
void product(const Product& p);

// Rows i0..i1 of C's columns j0..j1 (j0 a multiple of kPanel), on the calling thread.
void product_block(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

// The same on the tile registers, which take bf16 by bf16 where the processor has them, in an order of their own.
bool on_tiles(const Product& p);
void tiles_block(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

}  // namespace pyllm::ISA
