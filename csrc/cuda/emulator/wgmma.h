// What wgmma.h declares for sm_90a, on the CPU. In every other block a copy is done at once, as early as it could be; in the
// others, when it is waited for. A product is done when it is waited for and all other warps got as far as they could: as
// late as it could be, from what registers and shared memory hold then. Shared memory has addresses as on a GPU, from which
// swizzled places and descriptors are reckoned; what a block is given begins at no round one.
#pragma once
#include "cuda/emulator/emulator.h"
#include "cuda/emulator/tensor_map.h"
#include "cuda/numbers.h"

namespace pyllm::cuda {

uint32_t shared_address(const void* p);

void make_barrier(uint64_t* barrier, uint32_t arrivals);
inline void publish_barriers() {}
void arrive(uint64_t* barrier);
void arrive_expecting(uint64_t* barrier, uint32_t bytes);
void wait_for_phase(uint64_t* barrier, uint32_t parity);

void copy_box(void* to, const CUtensorMap& map, const int (&at)[4], uint64_t* barrier);
inline void prefetch_map(const CUtensorMap&) {}

inline void publish_writes() {}
inline void meet_warpgroup(int) { meet_group(); }

template <int kRegisters>
void give_registers_back() {
  meet_group();
}
template <int kRegisters>
void take_registers() {
  meet_group();
}

struct Product {  // of 64 rows by `tiles` times 8 columns
  float* c;
  int tiles;
  const uint32_t* a;  // or null, and then
  uint64_t a_tile, b_tile;
  bool columns, add;  // columns: b's rows are summed over
  float (*widen)(uint16_t);
};
void begin_products();
void give_product(const Product& product);
void end_of_products();
void wait_for_products(size_t pending);
template <int kPending>
void wait_for_products() {
  wait_for_products(kPending);
}
template <class X, int kTiles>
void settle(X (&)[kTiles][4]) {}

template <class T>
float widened(uint16_t bits) {
  return to_float(T{bits});
}
template <class T, int kTiles>
void multiply_rows(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  give_product({c[0], kTiles, nullptr, a, b, false, add, widened<T>});
}
template <class T, int kTiles>
void add_weighted_rows(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  give_product({c[0], kTiles, a, 0, b, true, true, widened<T>});
}

}  // namespace pyllm::cuda
