#include "cuda/emulator/copies.h"

#include <cstring>
#include <unordered_map>
#include <vector>

#include "cuda/device.h"
#include "cuda/emulator/emulator.h"

namespace pyllm::cuda {
namespace {

struct Copy {
  char* to;
  const void* from;
  size_t bytes, size;
};

struct Copies {  // of a thread, those under way
  std::vector<Copy> copies;
  std::vector<size_t> ends;  // of groups, in `copies`
};

// A launch's threads; what one leaves under way at its end never arrives. Launches come one after another.
Copies& of_thread() {
  static std::unordered_map<size_t, Copies> threads;
  static int64_t launch = 0;
  if (launch != emulated_launches()) threads.clear();
  launch = emulated_launches();
  const size_t block = (static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const size_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return threads[block * 1024 + thread];
}

}  // namespace

void begin_copy(void* to, const void* from, size_t bytes, size_t size) {
  std::memset(to, 0xff, size);
  of_thread().copies.push_back({static_cast<char*>(to), from, bytes, size});
}

void end_copies() {
  Copies& own = of_thread();
  own.ends.push_back(own.copies.size());
}

void finish_copies(int pending) {
  Copies& own = of_thread();
  const size_t groups = own.ends.size(), left = static_cast<size_t>(pending);
  if (groups <= left) return;
  const size_t done = own.ends[groups - left - 1];
  for (size_t i = 0; i < done; i++) {
    const Copy& c = own.copies[i];
    std::memset(c.to, 0, c.size);
    if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
  }
  own.copies.erase(own.copies.begin(), own.copies.begin() + done);
  own.ends.erase(own.ends.begin(), own.ends.end() - pending);
  for (size_t& end : own.ends) end -= done;
}

}  // namespace pyllm::cuda
