#include "cuda/device.h"

namespace pyllm::cuda {

int device_count() {
  int n = 0;
  return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

}  // namespace pyllm::cuda
