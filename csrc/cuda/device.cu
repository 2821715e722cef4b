#include "cuda/device.h"

#include <map>
#include <mutex>

#include "cuda/launch.h"
#include "tensor.h"

namespace pyllm::cuda {
namespace {

std::mutex mutex;  // guards what is below
std::map<int, FaultRecord*> records;
std::map<int, cudaMemPool_t> pools;
std::map<int, Capacity> capacities;

const char* text_of(Fault fault) {
  switch (fault) {
    case Fault::embedding_id:
      return "[embedding] ids must be in [0, ";
    case Fault::quantized_embedding_id:
      return "[quantized_embedding] ids must be in [0, ";
    case Fault::target:
      return "[cross_entropy] targets must be in [0, ";
    case Fault::key_length:
      return "[attention] key_lengths, within what bias covers, must be in [0, ";
    case Fault::page:
      return "[attention, write_pages] page_table must be in [0, ";
    case Fault::position:
      return "[write_pages] positions must be in [0, ";
    case Fault::capacity:
      return "[next_positions] lengths with the new tokens must be in [0, ";
    case Fault::history_id:
      return "[sample] history must be -1 or in [0, ";
    case Fault::given_id:
      return "[sample] given must be -1 or in [0, ";
    case Fault::logits_not_finite:
      return "[sample] logits must be finite or -infinity, but NaN or infinity is in row ";
    case Fault::logits_all_masked:
      return "[sample] logits must have a finite element in each row, but all are -infinity in row ";
    case Fault::processed_not_finite:
      return "[sample] logits with penalties and logit_bias must be finite or -infinity, but NaN or infinity is in "
             "row ";
    case Fault::processed_all_masked:
      return "[sample] penalties and logit_bias must leave a finite logit in each row, but all are -infinity in row ";
    case Fault::recurrent_length:
      return "[rnn, gru, lstm] lengths must be in [0, ";
    case Fault::wkv_length:
      return "[wkv] lengths must be in [0, ";
    case Fault::none:
      break;
  }
  return "";
}

// While it lives, this thread may do what is no part of a graph although it captures one.
class BesideGraphs {
 public:
  BesideGraphs() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_), "leaving a capture"); }
  ~BesideGraphs() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideGraphs(const BesideGraphs&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Scratch memory comes from a pool of our own, which keeps what it has between calls.
cudaMemPool_t pool_of(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = pools.find(device);
  if (found != pools.end()) return found->second;
  const BesideGraphs beside;
  cudaMemPoolProps props{};
  props.allocType = cudaMemAllocationTypePinned;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = device;
  cudaMemPool_t pool;
  check_cuda(cudaMemPoolCreate(&pool, &props), "a memory pool");
  uint64_t keep = UINT64_MAX;
  check_cuda(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "a memory pool");
  return pools[device] = pool;
}

}  // namespace

#if PYLLM_EMULATE_CUDA
bool emulating = false;
#endif

int device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

OnDevice::OnDevice(int device) {
  check_cuda(cudaGetDevice(&before_), "the current device");
  if (before_ != device) check_cuda(cudaSetDevice(device), "another device");
}
OnDevice::~OnDevice() { cudaSetDevice(before_); }

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not found again by someone else
  fail(Error::runtime, "[cuda] ", what, " failed: ", cudaGetErrorString(error));
}

void refuse_capture(const char* op, const Work& work) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(work.stream), &status), "asking for a capture");
  if (status != cudaStreamCaptureStatusNone)
    fail(Error::runtime, "[", op, "] must not be captured in a CUDA graph, for what it reads of the host's memory");
}

void fail_launch(const dim3& grid, const dim3& block, size_t shared, size_t most_shared) {
  fail(Error::value, "[cuda] a launch must have at most 2147483647 x 65535 x 65535 blocks of 1024 threads and ",
       most_shared, " bytes, but got ", grid.x, " x ", grid.y, " x ", grid.z, " of ", block.x, " x ", block.y, " x ",
       block.z, " and ", shared);
}

Capacity capacity_of(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = capacities.find(device);
  if (found != capacities.end()) return found->second;
  int processors = 0, shared = 0, together = 0, major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "a device's attribute");
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "a device's attribute");
  check_cuda(cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device), "a device's attribute");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "a device's attribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "a device's attribute");
  return capacities[device] = {processors, static_cast<size_t>(shared), together != 0, major == 9 && minor == 0};
}

Scratch::Scratch(const Work& work, size_t bytes) : stream_(static_cast<cudaStream_t>(work.stream)) {
  if (bytes) check_cuda(cudaMallocFromPoolAsync(&data_, bytes, pool_of(work.device), stream_), "scratch memory");
}
Scratch::~Scratch() {
  if (data_) cudaFreeAsync(data_, stream_);
}

FaultRecord* fault_record(int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  FaultRecord*& record = records[device];
  if (!record) {
    const BesideGraphs beside;
    void* memory = nullptr;
    check_cuda(cudaHostAlloc(&memory, sizeof(FaultRecord), cudaHostAllocMapped), "pinned memory");
    record = new (memory) FaultRecord{};
  }
  return record;
}

void raise_faults(int device) {
  FaultRecord* record = fault_record(device);
  const auto ready = [&] { return __atomic_load_n(&record->ready, __ATOMIC_ACQUIRE) != 0; };
  if (!ready()) return;
  FaultRecord found;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!ready()) return;  // another thread has it
    found = *record;
    __atomic_store_n(&record->ready, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&record->claimed, 0, __ATOMIC_RELEASE);  // from here on a kernel may write the next
  }
  const bool row = found.fault >= Fault::logits_not_finite && found.fault <= Fault::processed_all_masked;
  if (row) fail(Error::value, text_of(found.fault), found.at, " (found on the device, in an earlier call)");
  const bool length =
      found.fault == Fault::key_length || found.fault == Fault::recurrent_length || found.fault == Fault::wkv_length;
  fail(length ? Error::value : Error::index, text_of(found.fault), found.bound, length ? "], but got " : "), but got ",
       found.value, " at element ", found.at, " (found on the device, in an earlier call)");
}

void synchronize(int device) {
  const OnDevice current(device);
  check_cuda(cudaDeviceSynchronize(), "work on the device");
  raise_faults(device);
}

}  // namespace pyllm::cuda
