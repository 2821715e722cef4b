// The matrix instructions of a warp (mma.sync m16n8k16, ldmatrix) and asynchronous copies to shared memory, as PTX has
// them from sm_80 on. What each lane holds of a matrix is said here once more for the emulator, from PTX's own tables:
// with group = lane / 4 and pair = lane % 4 * 2,
//   a (16 x 16): rows group, group + 8; columns pair, pair + 1, then the same + 8; in the order of (row, row + 8) first
//   b (16 x 8): rows pair, pair + 1, then the same + 8; column group
//   c (16 x 8): rows group (0 and 1), group + 8 (2 and 3); columns pair, pair + 1
#pragma once
#include "cuda/numbers.h"
#if PYLLM_EMULATE_CUDA
#include "cuda/emulator/copies.h"
#endif

namespace pyllm::cuda {

// Two elements in a register, the first in its low half.
template <class T>
__device__ __forceinline__ uint32_t two(float low, float high) {
#if PYLLM_EMULATE_CUDA
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t y;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
#endif
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if PYLLM_EMULATE_CUDA
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const char* all = meet_warp(mine, sizeof mine);
  const auto element = [&](int lane, int word, int half) {
    uint32_t w;
    std::memcpy(&w, all + lane * kGift + word * 4, 4);
    return to_float(T{static_cast<uint16_t>(w >> (half * 16))});
  };
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      const float x = element(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8, k % 2);
      const float y = element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
      c[i] = fmaf(x, y, c[i]);
    }
  }
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit elements: lane l says where row l % 8 of matrix l / 8 lies. Of each, a lane gets the two
// elements at row group, columns pair and pair + 1; transposed, those at rows pair and pair + 1, column group.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  check_aligned(row, 16);
#if PYLLM_EMULATE_CUDA
  const char* all = meet_warp(row, 16);
  const int lane = lane_of_thread(), group = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < 4; i++) {
    uint16_t low, high;
    const auto at = [&](int r, int c) { return all + (i * 8 + r) * kGift + c * 2; };
    std::memcpy(&low, kTransposed ? at(pair, group) : at(group, pair), 2);
    std::memcpy(&high, kTransposed ? at(pair + 1, group) : at(group, pair + 1), 2);
    x[i] = low | static_cast<uint32_t>(high) << 16;
  }
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
#endif
}

// 16 bytes to shared memory, of which those beyond `bytes` are zeros; done after wait_for_copies.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, 16);
  check_aligned(from, 16);
#if PYLLM_EMULATE_CUDA
  begin_copy(to, from, bytes, 16);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void copy_async(float* to, const float* from) {
  check_aligned(from, 4);
#if PYLLM_EMULATE_CUDA
  begin_copy(to, from, 4, 4);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void end_of_copies() {  // of one group
#if PYLLM_EMULATE_CUDA
  end_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {  // until at most the last kPending groups are under way
#if PYLLM_EMULATE_CUDA
  finish_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace pyllm::cuda
