#include "cuda/emulator/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

#include "cuda/device.h"
#include "tensor.h"

namespace pyllm::cuda {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kThreads = 1024, kLanes = 32;
enum class Waits : uint8_t { no, for_warp, for_block, done };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started;
  Waits waits;
  int turn;  // which of the lane's two places for gifts is next
  dim3 index;
};

struct Emulator {
  std::mutex mutex;
  std::vector<Fiber> fibers{kThreads};
  std::vector<char> shared, gifts = std::vector<char>(2 * kThreads * kGift);
  char* stacks = nullptr;
  int current = 0, count = 0;
  int64_t launches = 0;
  jmp_buf scheduler;
  const std::function<void()>* thread = nullptr;
} e;

void wait(Waits what) {
  Fiber& fiber = e.fibers[e.current];
  fiber.waits = what;
  if (_setjmp(fiber.at) == 0) _longjmp(e.scheduler, 1);
}

void enter() {
  (*e.thread)();
  wait(Waits::done);
}

void resume(int i) {
  Fiber& fiber = e.fibers[i];
  e.current = i;
  threadIdx = fiber.index;
  if (_setjmp(e.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {e.stacks + i * kStack, 0, kStack};
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Lets those go on who have all met: `count` fibers from `first`, where all that are not done wait for `what`.
bool release(int first, int count, Waits what) {
  bool any = false;
  for (int i = first; i < first + count; i++) {
    if (e.fibers[i].waits == what)
      any = true;
    else if (what == Waits::for_warp || e.fibers[i].waits != Waits::done)
      return false;
  }
  if (any)
    for (int i = first; i < first + count; i++)
      if (e.fibers[i].waits == what) e.fibers[i].waits = Waits::no;
  return any;
}

void run_block() {
  for (int i = 0; i < e.count; i++) {
    Fiber& fiber = e.fibers[i];
    const auto n = static_cast<unsigned>(i);
    fiber.started = false;
    fiber.waits = Waits::no;
    fiber.turn = 0;
    fiber.index = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
  }
  while (true) {
    for (int i = 0; i < e.count; i++)
      if (e.fibers[i].waits == Waits::no) resume(i);
    bool more = false, live = false;
    for (int i = 0; i < e.count; i += kLanes)
      more = release(i, i + kLanes <= e.count ? kLanes : e.count - i, Waits::for_warp) || more;
    if (!more) more = release(0, e.count, Waits::for_block);
    for (int i = 0; i < e.count; i++) live = live || e.fibers[i].waits != Waits::done;
    if (!live) return;
    if (!more) fail(Error::runtime, "[emulated CUDA] some threads of a block wait where others never come");
  }
}

}  // namespace

int64_t emulated_launches() { return e.launches; }
char* shared_memory() { return e.shared.data(); }
void meet_block() { wait(Waits::for_block); }
int lane_of_thread() { return e.current % kLanes; }

const char* meet_warp(const void* mine, size_t bytes) {
  Fiber& fiber = e.fibers[e.current];
  const int self = e.current;
  char* gifts = e.gifts.data() + fiber.turn * kThreads * kGift;
  fiber.turn ^= 1;
  if (bytes) std::memcpy(gifts + self * kGift, mine, bytes);
  wait(Waits::for_warp);
  return gifts + self / kLanes * kLanes * kGift;
}

cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) {
  *p = std::malloc(bytes);
  if (!*p) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}

void emulate(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(e.mutex);
  if (!e.stacks) {
    void* stacks = mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stacks == MAP_FAILED) fail(Error::runtime, "[emulated CUDA] no memory for the threads of a block");
    e.stacks = static_cast<char*>(stacks);
  }
  e.launches++;
  e.thread = &thread;
  e.count = static_cast<int>(block.x * block.y * block.z);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        e.shared.assign(shared, static_cast<char>(0xff));
        run_block();
      }
}

}  // namespace pyllm::cuda
