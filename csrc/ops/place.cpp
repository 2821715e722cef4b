#include "ops/place.h"

namespace pyllm {

void fail_device(const char* op, const char* arg, const TensorView& t) {
  const bool expects_cuda = expected_device.type == kCuda;
  if (t.device_type == kCuda && expects_cuda)
    fail(Error::value, "[", op, "] ", arg, " must be on cuda:", expected_device.id, ", but got cuda:", t.device_id);
  if (expects_cuda)
    fail(Error::value, "[", op, "] ", arg, " must be on cuda:", expected_device.id, ", but got DLPack device type ",
         t.device_type);
  if (t.device_type != kCuda)
    fail(Error::not_implemented, "[", op, "] ", arg, " must be on the cpu, but got DLPack device type ", t.device_type);
#if PYLLM_WITH_CUDA
  fail(Error::not_implemented, "[", op, "] ", arg, " must be on the cpu, but got cuda:", t.device_id,
       ": the operation has no CUDA kernel, or its other tensors are on the cpu");
#else
  fail(Error::not_implemented, "[", op, "] ", arg, " must be on the cpu, but got cuda:", t.device_id,
       ": this build of pyllm has no CUDA kernels (they are built where nvcc is found)");
#endif
}

namespace ops {

Place::Place([[maybe_unused]] const char* op, [[maybe_unused]] const char* arg, const TensorView& t) {
#if PYLLM_EMULATE_CUDA
  cuda_ = cuda::emulating && t.present() && t.device_type == kCpu;
  if (cuda_) cuda::raise_faults(0);
  reads_ids = !cuda_;
#elif PYLLM_WITH_CUDA
  if (!t.present() || t.device_type != kCuda) return;
  cuda_ = true;
  work_ = {t.device_id, t.stream};
  current_.emplace(t.device_id);
  cuda::raise_faults(t.device_id);
  expected_device = {kCuda, t.device_id};
#else
  (void)t;
#endif
}

Place::~Place() {
  expected_device = {};
  reads_ids = true;
}

}  // namespace ops
}  // namespace pyllm
