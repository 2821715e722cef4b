// Where an op runs: on the device of its first tensor, to which the checks of tensor.h then hold the others.
#pragma once
#include <optional>

#include "cpu/pages.h"
#include "cuda/device.h"
#include "tensor.h"

namespace pyllm::ops {

// For an op that has CUDA kernels: made before its other checks, and kept until it is done.
class Place {
 public:
  Place(const char* op, const char* arg, const TensorView& t);
  ~Place();
  Place(const Place&) = delete;

  bool cuda() const { return cuda_; }
  const cuda::Work& work() const { return work_; }
  void prefer_large_pages(const TensorView& t) const {  // which is about to be written
    if (!cuda_ && t.present()) cpu::prefer_large_pages(t.data, t.numel() * size_of(t.dtype));
  }

 private:
  bool cuda_ = false;
  cuda::Work work_;
#if PYLLM_WITH_CUDA
  std::optional<cuda::OnDevice> current_;
#endif
};

// While it lives, the checks hold tensors to the CPU again: for arguments that an op reads itself.
class OnHost {
 public:
  OnHost() { expected_device = {}; }
  ~OnHost() { expected_device = before_; }
  OnHost(const OnHost&) = delete;

 private:
  DeviceKey before_ = expected_device;
};

}  // namespace pyllm::ops
