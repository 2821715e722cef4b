// Whole numbers of 8 bits, four to a register, exact: what quantised products are made of.
#pragma once
#include "cuda/numbers.h"

namespace pyllm::cuda {

// sum + the four products of bytes, u unsigned and s signed.
__device__ __forceinline__ int32_t dot_bytes(int32_t sum, uint32_t u, uint32_t s) {
#if PYLLM_EMULATE_CUDA
  for (int b = 0; b < 32; b += 8) sum += static_cast<int32_t>(u >> b & 255) * static_cast<int8_t>(s >> b);
  return sum;
#else
  int32_t y;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(y) : "r"(u), "r"(s), "r"(sum));
  return y;
#endif
}

// c += a b for a (16 x 16 or 32, signed) and b (as many x 8, unsigned). With group = lane / 4 and four = lane % 4 * 4, a
// lane holds, of a, rows group and group + 8 at columns four to four + 3, then the same 16 columns on; of b, rows four to
// four + 3, then 16 on, of column group; of c, what matrix.h says.
template <int kRegisters>
__device__ __forceinline__ void multiply_add_bytes(int32_t (&c)[4], const uint32_t (&a)[2 * kRegisters],
                                                   const uint32_t (&b)[kRegisters]) {
#if PYLLM_EMULATE_CUDA
  uint32_t mine[3 * kRegisters];
  for (int i = 0; i < kRegisters; i++) mine[2 * i] = a[2 * i], mine[2 * i + 1] = a[2 * i + 1];
  for (int i = 0; i < kRegisters; i++) mine[2 * kRegisters + i] = b[i];
  const char* all = meet_warp(mine, sizeof mine);
  const auto word = [&](int lane, int at) {
    uint32_t w;
    std::memcpy(&w, all + lane * kGift + at * 4, 4);
    return w;
  };
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int r = 0; r < kRegisters; r++)
      for (int four = 0; four < 4; four++)
        c[i] = dot_bytes(c[i], word(column * 4 + four, 2 * kRegisters + r), word(row % 8 * 4 + four, 2 * r + row / 8));
  }
#else
  if constexpr (kRegisters == 2)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#endif
}

}  // namespace pyllm::cuda
