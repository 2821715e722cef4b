// How the copy engine (TMA) of sm_90 sees a tensor: a map, made by the driver on the host, that a kernel takes as a
// __grid_constant__ parameter.
#pragma once
#if PYLLM_EMULATE_CUDA
#include "cuda/emulator/tensor_map.h"
#else
#include <cuda.h>
#endif

#include "dtype.h"

namespace pyllm::cuda {

#if !PYLLM_EMULATE_CUDA
using ::CUtensorMap;
#endif

constexpr int kMapRow = 64;  // elements of 16 bits, 128 bytes: as many as a box has along the innermost axis

// Four axes, the innermost first, whose elements have 16 bits and lie `step` apart on the other three; `box` says how many
// of each of these are copied at once. In shared memory chunk c (of 16 bytes) of a row of 128 bytes stands at c ^ (r % 8),
// with r the row counted from a multiple of 1024 bytes. What lies beyond the tensor is zeros.
CUtensorMap tensor_map(const char* op, DType dtype, const void* data, const int64_t (&size)[4],
                       const int64_t (&step)[3], const int64_t (&box)[3]);

// Whether there is such a map, but for its box.
bool has_map(const void* data, const int64_t (&size)[4], const int64_t (&step)[3]);

}  // namespace pyllm::cuda
