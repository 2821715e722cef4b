// Numbers as kernels see them: the storage types widened and rounded, packs of 16 bytes, and sums over threads.
#pragma once
#include "cuda/launch.h"
#include "dtype.h"
#include "rows.h"

namespace pyllm::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float(static_cast<int32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) {
#if PYLLM_EMULATE_CUDA
  const int32_t sign = (x.bits & 0x8000) << 16, magnitude = (x.bits & 0x7fff) << 13;
  if (magnitude >= 0x7c00 << 13) return __int_as_float(sign | magnitude | 0x7f800000);
  return __int_as_float(sign | __float_as_int(__int_as_float(magnitude) * 0x1p112f));
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

// Round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#if PYLLM_EMULATE_CUDA
  const auto bits = static_cast<uint32_t>(__float_as_int(x));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
#if PYLLM_EMULATE_CUDA
  const auto sign = static_cast<uint16_t>(__float_as_int(x) >> 16 & 0x8000);
  float y = fabsf(x);
  if (y != y) return {0x7fff};
  if (y >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (y < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(nearbyintf(y * 0x1p24f)))};
  const auto bits = static_cast<uint32_t>(__float_as_int(y));
  return {static_cast<uint16_t>(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
#else
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float float_at(const char* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) return reinterpret_cast<const float*>(p)[i];
  if (dtype == DType::bf16) return to_float(reinterpret_cast<const bf16*>(p)[i]);
  return to_float(reinterpret_cast<const f16*>(p)[i]);
}
__device__ __forceinline__ void put_at(char* p, DType dtype, int64_t i, float x) {
  if (dtype == DType::f32)
    reinterpret_cast<float*>(p)[i] = x;
  else if (dtype == DType::bf16)
    reinterpret_cast<bf16*>(p)[i] = from_float<bf16>(x);
  else
    reinterpret_cast<f16*>(p)[i] = from_float<f16>(x);
}
__device__ __forceinline__ int64_t integer_at(const char* p, DType dtype, int64_t i) {
  return dtype == DType::i64 ? reinterpret_cast<const int64_t*>(p)[i] : reinterpret_cast<const int32_t*>(p)[i];
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// 16 bytes of elements, as floats.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  float x[kSize];
};

// Up to a pack's size of the `left` elements from p on, the rest zeros. `whole`: p is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p, int64_t left, bool whole) {
  Pack<T> pack;
  if (whole && left >= Pack<T>::kSize) {
    check_aligned(p, 16);
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; i++) {
      if constexpr (sizeof(T) == 4)
        pack.x[i] = __int_as_float(static_cast<int32_t>(words[i]));
      else
        pack.x[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    }
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; i++) pack.x[i] = i < left ? to_float(p[i]) : 0.0f;
  }
  return pack;
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack, int64_t left, bool whole) {
  if (whole && left >= Pack<T>::kSize) {
    check_aligned(p, 16);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; i++) {
      if constexpr (sizeof(T) == 4)
        words[i] = static_cast<uint32_t>(__float_as_int(pack.x[i]));
      else
        words[i / 2] |= static_cast<uint32_t>(from_float<T>(pack.x[i]).bits) << (i % 2 * 16);
    }
    *reinterpret_cast<uint4*>(p) = uint4{words[0], words[1], words[2], words[3]};
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; i++)
      if (i < left) p[i] = from_float<T>(pack.x[i]);
  }
}
// The same of a parameter, whose type is known at run time only.
template <class T>
__device__ __forceinline__ Pack<T> load_parameter(const char* p, DType dtype, int64_t i, int64_t left) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; k++) pack.x[k] = k < left ? float_at(p, dtype, i + k) : 0.0f;
  return pack;
}

inline bool whole_packs(const void* p, int64_t step_bytes = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && step_bytes % 16 == 0;
}
// Whether every row begins on 16 bytes.
inline bool whole_rows(const void* p, const Rows& rows, int64_t size) {
  bool whole = whole_packs(p);
  for (int i = 0; i < rows.levels; i++) whole = whole && rows.step[i] * size % 16 == 0;
  return whole;
}

// Sums that every thread gets, always in the same order.
template <class X>
__device__ __forceinline__ X warp_sum(X x) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_xor_sync(~0u, x, half);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, half));
  return x;
}
// Over the threads of a block along x, which are one warp or, then alone in the block, several; `room` is for 32.
template <class X>
__device__ __forceinline__ X row_sum(X x, X* room) {
  x = warp_sum(x);
  if (blockDim.x == kWarp) return x;
  __syncthreads();  // what was in `room` has been read
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
  __syncthreads();
  X total = room[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; w++) total += room[w];
  return total;
}
__device__ __forceinline__ float row_max(float x, float* room) {
  x = warp_max(x);
  if (blockDim.x == kWarp) return x;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
  __syncthreads();
  float most = room[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; w++) most = fmaxf(most, room[w]);
  return most;
}

// Calls f with a null pointer of the storage type.
template <class F>
void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(nullptr));
  if (dtype == DType::bf16) return f(static_cast<bf16*>(nullptr));
  f(static_cast<f16*>(nullptr));
}

}  // namespace pyllm::cuda
