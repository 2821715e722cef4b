// What Hopper (sm_90a) has for tiles in shared memory: barriers that also count bytes, the copy engine (TMA), and products
// of a warpgroup, which are four warps, the first of them a multiple of four.
//
// A barrier's phases are 0, 1, 0, ...; one ends when as many arrivals as it was made for have come, and all bytes that were
// expected. A product multiplies 64 rows of A, 16 of each warp, by 16 x (8 times kTiles) of B. A lane holds of its warp's A
// and of the result what matrix.h says; A from shared memory, and B, are named by descriptors. Products and copies run
// beside the threads: what a product reads or writes, registers too, is left alone until it was waited for.
//
// On the CPU, the emulator has the same functions.
#pragma once
#include "cuda/numbers.h"
#include "cuda/tensor_map.h"

namespace pyllm::cuda {

constexpr int kWarpgroup = 4 * kWarp;

// Of rows of 128 bytes in shared memory, as tensor_map.h lays them out; `address` (shared_address) is that of a multiple of 8
// rows, plus 32 bytes for every 16 elements that the product begins at within rows. By `rows`: eight rows to the next
// eight; by `columns`, where the rows are the 16 that are summed over: 64 elements of a row to the next 64 (elsewhere it
// is not read, and PTX takes it to be 16).
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t rows, uint32_t columns = 16) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  constexpr uint64_t kSwizzle128 = 1;
  return field(address) | field(columns) << 16 | field(rows) << 32 | kSwizzle128 << 62;
}

}  // namespace pyllm::cuda

#if PYLLM_EMULATE_CUDA
#include "cuda/emulator/wgmma.h"
#else

namespace pyllm::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void make_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// By the thread that made barriers, before __syncthreads: from then on, copies see them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, which brings bytes.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until a phase of this parity has ended; that before the first counts as phase 1.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

// The box at these coordinates, the innermost first; its bytes come to the barrier. By one thread.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, const int (&at)[4], uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(to)),
      "l"(&map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(shared_address(barrier))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What this thread wrote to shared memory before, products and copies see after.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// All threads of a warpgroup meet; `id`, from 1 on, is this warpgroup's own.
__device__ __forceinline__ void meet_warpgroup(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kWarpgroup) : "memory");
}

// From here on each thread of the warpgroup has at most this many registers, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before products that read or write registers which others than products have written or read.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_of_products() {  // of one group
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_products() {  // until at most the last kPending groups are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// What products wrote or read may be used from here on: the compiler moves nothing across.
template <int kTiles>
__device__ __forceinline__ void settle(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
template <int kTiles>
__device__ __forceinline__ void settle(uint32_t (&a)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
    asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}

#define PYLLM_TILE(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define PYLLM_4_TILES(c, n) PYLLM_TILE(c, n), PYLLM_TILE(c, n + 1), PYLLM_TILE(c, n + 2), PYLLM_TILE(c, n + 3)
#define PYLLM_8_TILES(c) PYLLM_4_TILES(c, 0), PYLLM_4_TILES(c, 4)
#define PYLLM_16_TILES(c) PYLLM_8_TILES(c), PYLLM_4_TILES(c, 8), PYLLM_4_TILES(c, 12)
#define PYLLM_32_REGISTERS                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define PYLLM_64_REGISTERS                                                                                           \
  PYLLM_32_REGISTERS                                                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c = a b', or c += a b' where `add`; both tiles' rows hold what is summed over.
#define PYLLM_MULTIPLY(shape, type, registers, tiles, a_at, b_at, add_at)                                          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_at ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
               "." type " {" registers "}, " a_at ", " b_at ", p, 1, 1, 0, 0;\n}"                                  \
               : tiles(c)                                                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
template <class T, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8 && std::is_same_v<T, bf16>)
    PYLLM_MULTIPLY("m64n64k16", "bf16", PYLLM_32_REGISTERS, PYLLM_8_TILES, "%32", "%33", "%34");
  else if constexpr (kTiles == 8)
    PYLLM_MULTIPLY("m64n64k16", "f16", PYLLM_32_REGISTERS, PYLLM_8_TILES, "%32", "%33", "%34");
  else if constexpr (std::is_same_v<T, bf16>)
    PYLLM_MULTIPLY("m64n128k16", "bf16", PYLLM_64_REGISTERS, PYLLM_16_TILES, "%64", "%65", "%66");
  else
    PYLLM_MULTIPLY("m64n128k16", "f16", PYLLM_64_REGISTERS, PYLLM_16_TILES, "%64", "%65", "%66");
}
#undef PYLLM_MULTIPLY

// c += a b, with a in registers and the rows of b's tile summed over.
#define PYLLM_ADD(shape, type, registers, tiles, a_at, b_at, one_at)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " one_at ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
               "." type " {" registers "}, {" a_at "}, " b_at ", p, 1, 1, 1;\n}"                                   \
               : tiles(c)                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
template <class T, int kTiles>
__device__ __forceinline__ void add_weighted_rows(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 8 && std::is_same_v<T, bf16>)
    PYLLM_ADD("m64n64k16", "bf16", PYLLM_32_REGISTERS, PYLLM_8_TILES, "%32, %33, %34, %35", "%36", "%37");
  else if constexpr (kTiles == 8)
    PYLLM_ADD("m64n64k16", "f16", PYLLM_32_REGISTERS, PYLLM_8_TILES, "%32, %33, %34, %35", "%36", "%37");
  else if constexpr (std::is_same_v<T, bf16>)
    PYLLM_ADD("m64n128k16", "bf16", PYLLM_64_REGISTERS, PYLLM_16_TILES, "%64, %65, %66, %67", "%68", "%69");
  else
    PYLLM_ADD("m64n128k16", "f16", PYLLM_64_REGISTERS, PYLLM_16_TILES, "%64, %65, %66, %67", "%68", "%69");
}
#undef PYLLM_ADD
#undef PYLLM_TILE
#undef PYLLM_4_TILES
#undef PYLLM_8_TILES
#undef PYLLM_16_TILES
#undef PYLLM_32_REGISTERS
#undef PYLLM_64_REGISTERS

}  // namespace pyllm::cuda
#endif
