// For kernels alone: CUDA's own header, or the emulator's, and how a kernel is launched.
#pragma once
#if PYLLM_EMULATE_CUDA
#include "cuda/emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>

#include "cuda/device.h"

namespace pyllm::cuda {

constexpr size_t kMaxShared = 99 * 1024;           // bytes of a block on any GPU from sm_80 on (sm_86 has the least)
constexpr size_t kMaxSharedOfHopper = 227 * 1024;  // on sm_90
constexpr int kWarp = 32;

void check_cuda(cudaError_t error, const char* what);   // throws Error::runtime
void refuse_capture(const char* op, const Work& work);  // throws where the stream is captured in a CUDA graph
[[noreturn]] void fail_launch(const dim3& grid, const dim3& block, size_t shared, size_t most_shared);

// Memory of the device that lives until the work given to the stream so far is done.
class Scratch {
 public:
  Scratch(const Work& work, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

constexpr int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Grid {
  int64_t x, y = 1, z = 1;
};

// What a device has for blocks that run together.
struct Capacity {
  int64_t processors;  // each runs at least one block of any size up to the limits
  size_t shared;       // bytes of a block
  bool together;       // whether all blocks of a launch can be promised to run at once
  bool warpgroups;     // whether it has what wgmma.h is made of: sm_90, and no later one
};
Capacity capacity_of(int device);

template <class... Parameters, class... Args>
void launch_blocks(bool together, size_t most_shared, void (*kernel)(Parameters...), const Grid& grid,
                   const dim3& block, size_t shared, const Work& work, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto fits = [](int64_t n, int64_t most) { return n > 0 && n <= most; };
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  const int64_t threads = static_cast<int64_t>(block.x) * block.y * block.z;
  if (!fits(grid.x, 2147483647) || !fits(grid.y, 65535) || !fits(grid.z, 65535) || !fits(threads, 1024) ||
      shared > most_shared)
    fail_launch(blocks, block, shared, most_shared);
#if PYLLM_EMULATE_CUDA
  (void)work;
  emulate(blocks, block, shared, together, [&] { kernel(args...); });
#else
  // As much as there is, so that threads of the host do not lower it for each other. What a kernel declares __shared__ is
  // a part of that: one that asks for more than 48 KB here declares none.
  if (shared > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(capacity_of(work.device).shared)),
               "a kernel's shared memory");
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(work.stream);
  config.attrs = &cooperative;
  config.numAttrs = together ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), "a kernel's launch");
#endif
}

// kernel(args...) on `grid` blocks of `block` threads with `shared` bytes; nothing for an empty grid.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const Grid& grid, const dim3& block, size_t shared, const Work& work,
            const Args&... args) {
  launch_blocks(false, kMaxShared, kernel, grid, block, shared, work, args...);
}

// The same on sm_90, whose blocks may have more.
template <class... Parameters, class... Args>
void launch_large(void (*kernel)(Parameters...), const Grid& grid, const dim3& block, size_t shared, const Work& work,
                  const Args&... args) {
  launch_blocks(false, kMaxSharedOfHopper, kernel, grid, block, shared, work, args...);
}

// The same with all blocks running at once, so that they may wait for each other (meet_blocks). There must be no more of
// them than the device has processors; where they do not all fit, the launch fails.
template <class... Parameters, class... Args>
void launch_together(void (*kernel)(Parameters...), const Grid& grid, const dim3& block, size_t shared,
                     const Work& work, const Args&... args) {
  launch_blocks(true, capacity_of(work.device).shared, kernel, grid, block, shared, work, args...);
}

inline void set_zero(void* p, size_t bytes, const Work& work) {
  if (bytes) check_cuda(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(work.stream)), "filling with zeros");
}

// Blocks for n pieces of work that each block takes in steps of the grid: enough to fill any GPU some times over.
inline int64_t blocks_for(int64_t n) { return std::min<int64_t>(n, 132 * 32); }

#if !PYLLM_EMULATE_CUDA
__device__ __forceinline__ void check_aligned(const void*, size_t) {}
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char pyllm_shared[];
  return pyllm_shared;
}
#endif

// All threads of the blocks (of one dimension) that count in `arrived` meet, and what any of them wrote before, all see
// after. It counts from zero, and is `expected` when all have come.
__device__ __forceinline__ void meet_blocks(unsigned long long* arrived, unsigned long long expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1ull);
#if PYLLM_EMULATE_CUDA
    while (*arrived < expected) let_others_run();
#else
    unsigned long long now;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(arrived) : "memory");
    } while (now < expected);
#endif
    __threadfence();
  }
  __syncthreads();
}

// Asks for what will be read soon.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#if !PYLLM_EMULATE_CUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// The first thread of any call to find something wrong says so.
__device__ __forceinline__ void report(FaultRecord* record, Fault fault, int64_t at, int64_t value, int64_t bound) {
  if (atomicCAS(&record->claimed, 0, 1) != 0) return;
  record->fault = fault;
  record->at = at;
  record->value = value;
  record->bound = bound;
  __threadfence_system();
  *static_cast<volatile int32_t*>(&record->ready) = 1;
}

}  // namespace pyllm::cuda
