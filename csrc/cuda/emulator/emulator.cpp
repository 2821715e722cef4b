#include "cuda/emulator/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "tensor.h"

namespace pyllm::cuda {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kLanes = 32, kGroup = 4 * kLanes;
enum class Waits : uint8_t { no, for_warp, for_group, for_block, for_others, for_turn, done };

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started;
  Waits waits;
  int turn;  // which of the lane's two places for gifts is next
  dim3 index, block;
};

struct Emulator {
  std::mutex mutex;
  std::vector<Fiber> fibers;  // of the blocks that run at once, `count` of each
  std::vector<char> shared, gifts;
  char* stacks = nullptr;
  int current = 0, count = 0, room = 0;
  size_t shared_bytes = 0;
  int64_t launches = 0;
  const char* wrong = nullptr;  // what a GPU would not have done
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
  blockIdx = fiber.block;
  if (_setjmp(e.scheduler) != 0) return;
  fiber.waits = Waits::no;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {e.stacks + i * kStack, 0, kStack};
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Lets those go on who have all met: `count` fibers from `first` that all wait for `what`; for a block, those that are done
// need not.
bool release(int first, int count, Waits what) {
  bool any = false;
  for (int i = first; i < first + count; i++) {
    if (e.fibers[i].waits == what)
      any = true;
    else if (what != Waits::for_block || e.fibers[i].waits != Waits::done)
      return false;
  }
  if (any)
    for (int i = first; i < first + count; i++)
      if (e.fibers[i].waits == what) e.fibers[i].waits = Waits::no;
  return any;
}

void make_room(int fibers) {
  if (fibers <= e.room) return;
  if (e.stacks) munmap(e.stacks, e.room * kStack);
  e.stacks = nullptr;
  e.room = 0;
  void* stacks =
      mmap(nullptr, fibers * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail(Error::runtime, "[emulated CUDA] no memory for the threads of a block");
  e.stacks = static_cast<char*>(stacks);
  e.room = fibers;
  e.fibers.resize(fibers);
  e.gifts.resize(2 * fibers * kGift);
}

dim3 index_in(const dim3& shape, unsigned n) { return dim3(n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y); }

// `count` fibers of a warp from `first`, as far as they get without the others; whether they got anywhere.
bool run_warp(int first, int count, bool back) {
  bool moved = false;
  for (int i = first; i < first + count; i++)
    if (e.fibers[i].waits == Waits::for_turn) e.fibers[i].waits = Waits::no;
  for (bool more = true; more; back = !back, moved = moved || more) {
    more = false;
    for (int n = 0; n < count; n++) {
      const int i = first + (back ? count - 1 - n : n);
      const Waits before = e.fibers[i].waits;
      if (before != Waits::no && before != Waits::for_others) continue;
      resume(i);
      more = more || before == Waits::no || e.fibers[i].waits != Waits::for_others;
    }
    more = release(first, count, Waits::for_warp) || more;
  }
  return moved;
}

// Likewise the warps of a block, whose fibers begin at `first`.
bool run_block(int first, bool back) {
  const int warps = (e.count + kLanes - 1) / kLanes;
  bool moved = false;
  for (bool more = true; more; back = !back, moved = moved || more) {
    more = false;
    for (int n = 0; n < warps; n++) {
      const int i = (back ? warps - 1 - n : n) * kLanes;
      more = run_warp(first + i, std::min(kLanes, e.count - i), back) || more;
    }
    for (int i = 0; i + kGroup <= e.count; i += kGroup) more = release(first + i, kGroup, Waits::for_group) || more;
    more = release(first, e.count, Waits::for_block) || more;
  }
  return moved;
}

constexpr size_t kBeyond = 4 << 10;  // bytes after a block's shared memory, which nobody may write

void check_shared(int blocks) {
  for (int b = 1; b <= blocks; b++) {
    const char* end = e.shared.data() + b * e.shared_bytes;
    if (std::any_of(end - kBeyond, end, [](char c) { return c != static_cast<char>(0xff); }))
      fail(Error::runtime, "[emulated CUDA] a block writes beyond its shared memory");
  }
}

// `blocks` blocks from `first`, together. A block, and a warp of one, runs as far ahead of the others as it can, and they take
// turns from the first to the last and back, so that what relies on an order, or on an even pace, is found.
void run_blocks(unsigned first, int blocks) {
  const int fibers = blocks * e.count;
  for (int i = 0; i < fibers; i++) {
    Fiber& fiber = e.fibers[i];
    fiber.started = false;
    fiber.waits = Waits::no;
    fiber.turn = 0;
    fiber.index = index_in(blockDim, static_cast<unsigned>(i % e.count));
    fiber.block = index_in(gridDim, first + static_cast<unsigned>(i / e.count));
  }
  e.shared.assign(blocks * e.shared_bytes, static_cast<char>(0xff));
  forget_unfinished();
  for (bool back = false;; back = !back) {
    bool moved = false, live = false;
    for (int n = 0; n < blocks; n++) moved = run_block((back ? blocks - 1 - n : n) * e.count, back) || moved;
    for (int i = 0; i < fibers; i++) live = live || e.fibers[i].waits != Waits::done;
    if (!live) return check_shared(blocks);
    if (!moved) fail(Error::runtime, "[emulated CUDA] some threads wait where others never come");
  }
}

}  // namespace

int64_t emulated_launches() { return e.launches; }
char* shared_memory() { return e.shared.data() + e.current / e.count * e.shared_bytes; }
size_t shared_size() { return e.shared_bytes; }
void meet_block() { wait(Waits::for_block); }
void meet_group() { wait(Waits::for_group); }
void let_others_run() { wait(Waits::for_others); }
void let_all_run() {
  for (int turn = 0; turn < 2; turn++) wait(Waits::for_turn);  // the others' warps go forth and back
}
int fibers_at_once() { return e.room; }
int fiber_of_thread() { return e.current; }
int fiber_in_block() { return e.current % e.count; }
int lane_of_thread() { return fiber_in_block() % kLanes; }

void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) complain("an address is not aligned as a GPU needs it");
}
void complain(const char* what) {
  if (!e.wrong) e.wrong = what;
}

const char* meet_warp(const void* mine, size_t bytes) {
  Fiber& fiber = e.fibers[e.current];
  const int self = e.current, lane = lane_of_thread();
  char* gifts = e.gifts.data() + static_cast<size_t>(fiber.turn) * e.room * kGift;
  fiber.turn ^= 1;
  if (bytes) std::memcpy(gifts + self * kGift, mine, bytes);
  wait(Waits::for_warp);
  return gifts + (self - lane) * kGift;
}

cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) {
  *p = std::malloc(bytes);
  if (!*p) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  return cudaSuccess;
}

void emulate(dim3 grid, dim3 block, size_t shared, bool together, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(e.mutex);
  const unsigned blocks = grid.x * grid.y * grid.z, step = together ? blocks : 1;
  e.count = static_cast<int>(block.x * block.y * block.z);
  make_room(static_cast<int>(step) * e.count);
  e.launches++;
  e.thread = &thread;
  e.shared_bytes = (shared + 15) / 16 * 16 + kBeyond;
  gridDim = grid;
  blockDim = block;
  for (unsigned first = 0; first < blocks; first += step) run_blocks(first, static_cast<int>(step));
  if (const char* wrong = std::exchange(e.wrong, nullptr)) fail(Error::runtime, "[emulated CUDA] ", wrong);
}

}  // namespace pyllm::cuda
