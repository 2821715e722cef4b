// CUDA's kernels on the CPU, to test them where there is no GPU: what of CUDA's language and run-time library they use.
// The same .cu files are compiled as C++. A thread of a block is a fiber; blocks come one after another, those of a launch
// that needs them together at once. A fiber runs until it meets a barrier, a shuffle or a matrix instruction, and goes on
// when the others whom that takes have met it too: all threads of the block, or of the warp; those who need not wait run
// ahead. Where they cannot (a barrier that only some reach, a count of blocks that is never reached), that is an error.
// Copies and products of sm_90 are in wgmma.h here. Shared memory holds NaN when a block begins; what is declared
// __shared__ is one for all blocks, so those that run at once use shared_memory() alone.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};

namespace pyllm::cuda {

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void emulate(dim3 grid, dim3 block, size_t shared, bool together, const std::function<void()>& thread);
char* shared_memory();
size_t shared_size();
void meet_block();
void meet_group();      // of the four warps that this thread's is one of
void let_others_run();  // from a loop that waits for what another block, or warp, does
void let_all_run();     // until all other warps of the block got as far as they could

// Gives the others of the warp `bytes` of mine and waits for all; what lane l gave is at result + l * kGift, until this
// lane's next meeting.
constexpr size_t kGift = 64;
const char* meet_warp(const void* mine, size_t bytes);
int lane_of_thread();
int fiber_in_block();                             // a thread's number in its block,
int fiber_of_thread();                            // and in all blocks that run at once,
int fibers_at_once();                             // which have room for this many
void check_aligned(const void* p, size_t bytes);  // what is not, a GPU cannot read: an error after the launch
void complain(const char* what);                  // likewise, of anything else; the first complaint is the error
void forget_unfinished();                         // copies and products (emulator/wgmma.h), when blocks begin

inline void __syncthreads() { meet_block(); }
inline void __syncwarp(unsigned = ~0u) { meet_warp(nullptr, 0); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  T other;
  std::memcpy(&other, meet_warp(&value, sizeof value) + (lane & 31) * kGift, sizeof other);
  return other;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, lane_of_thread() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const int lane = lane_of_thread();
  return __shfl_sync(mask, value, lane >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane);
}

template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
using cudaStream_t = void*;
using cudaMemPool_t = void*;
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice, cudaMemPoolAttrReleaseThreshold, cudaHostAllocMapped };
enum { cudaMemcpyHostToDevice };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
struct cudaMemPoolProps {
  int allocType;
  struct {
    int type, id;
  } location;
};
inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 0, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// A small GPU, so that small tests reach its limits.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 6
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 99 * 1024
                                                                  : 1;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = 0;
  return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** found, int, cudaDriverEntryPointQueryResult* result);
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return *pool = nullptr, cudaSuccess;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t);  // holds NaN
inline cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, int) { return *p = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

}  // namespace pyllm::cuda
