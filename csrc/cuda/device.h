// What the rest of the program sees of CUDA: the devices, the work that a kernel is given to, and the faults that kernels
// find. No header of CUDA's is needed to include this.
//
// Nothing under csrc/cuda has run on a GPU yet. It is compiled for sm_80 and sm_90a, and every kernel is run, thread by
// thread, by the emulator (emulator/), with barriers, shuffles and matrix instructions as PTX defines them. What that
// cannot show is listed in the README.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyllm::cuda {

struct Work {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
};

// Whether attention may take sm_90's own instructions (attention_wgmma.cu), which it does not by itself until they have run
// on a GPU. PYLLM_CUDA_WGMMA=1, when the module is loaded, says so.
#if PYLLM_WITH_CUDA
extern bool wgmma_wanted;
#endif

int device_count();  // 0 where there is no driver or no device

// Makes a device this thread's current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_;
};

// What a kernel may find that the host could not have checked without waiting for the device. A kernel writes the first
// one that it finds into memory that the host sees, and goes on; the next call on that device raises it.
enum class Fault : int32_t {
  none,
  embedding_id,
  quantized_embedding_id,
  target,
  key_length,
  page,
  position,
  capacity,
  logits_not_finite,
  logits_all_masked,
  processed_not_finite,
  processed_all_masked,
  history_id,
  given_id,
  recurrent_length,
  wkv_length,
};
struct FaultRecord {
  int32_t claimed, ready;
  Fault fault;
  int64_t at, value, bound;
};

FaultRecord* fault_record(int device);  // where kernels on that device write
void raise_faults(int device);          // throws what is there, once
void synchronize(int device);           // waits for all work, then raise_faults

#if PYLLM_EMULATE_CUDA
extern bool emulating;        // tensors on the CPU go through the CUDA kernels
int64_t emulated_launches();  // so far
int64_t emulated_products();  // of warpgroups, likewise, by any one thread
#endif

}  // namespace pyllm::cuda

// Declares a kernel's function, name(args, work). A build without CUDA never calls it: ops/place.h has refused by then.
#if PYLLM_WITH_CUDA
#define PYLLM_CUDA_KERNEL(name, Args)       \
  namespace cuda {                          \
  void name(const Args& args, const Work&); \
  }
#else
#define PYLLM_CUDA_KERNEL(name, Args)                              \
  namespace cuda {                                                 \
  inline void name(const Args&, const Work&) { __builtin_trap(); } \
  }
#endif
