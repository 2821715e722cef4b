#include "cuda/tensor_map.h"

#include "cuda/launch.h"
#include "tensor.h"

namespace pyllm::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver.
Encode encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  check_cuda(error, "looking for cuTensorMapEncodeTiled");
  if (!found || result != cudaDriverEntryPointSuccess)
    fail(Error::runtime, "[cuda] the driver must have cuTensorMapEncodeTiled, as from CUDA 12.0 on, but has not");
  return reinterpret_cast<Encode>(found);
}

// Along an axis of one element nothing is ever stepped.
int64_t bytes_of(int64_t size, int64_t step) { return size == 1 ? 16 : step * 2; }

}  // namespace

bool has_map(const void* data, const int64_t (&size)[4], const int64_t (&step)[3]) {
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (const int64_t n : size) fits = fits && n > 0 && n < INT64_C(1) << 31;  // coordinates have 32 bits, with a sign
  for (int i = 0; i < 3; i++) {
    const int64_t bytes = bytes_of(size[i + 1], step[i]);
    fits = fits && bytes > 0 && bytes % 16 == 0 && bytes < INT64_C(1) << 40;
  }
  return fits;
}

CUtensorMap tensor_map(const char* op, DType dtype, const void* data, const int64_t (&size)[4],
                       const int64_t (&step)[3], const int64_t (&box)[3]) {
  static const Encode encode = encoder();
  cuuint64_t sizes[4], bytes[3];
  cuuint32_t boxes[4] = {kMapRow}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; i++) sizes[i] = static_cast<cuuint64_t>(size[i]);
  for (int i = 0; i < 3; i++) bytes[i] = static_cast<cuuint64_t>(bytes_of(size[i + 1], step[i]));
  for (int i = 0; i < 3; i++) boxes[i + 1] = static_cast<cuuint32_t>(box[i]);
  CUtensorMap map;
  const CUresult result =
      encode(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(data), sizes, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    fail(Error::runtime, "[", op, "] expected cuTensorMapEncodeTiled to take a tensor of ", size[3], " x ", size[2],
         " x ", size[1], " x ", size[0], " with steps ", step[2], ", ", step[1], ", ", step[0], " and a box of ",
         box[2], " x ", box[1], " x ", box[0], " x ", kMapRow, ", but got error ", static_cast<int>(result));
  return map;
}

}  // namespace pyllm::cuda
