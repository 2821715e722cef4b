// parallel_for over a team of threads, a team that stays together over many steps, and per-thread scratch memory.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pyllm::cpu {

using Task = void (*)(const void* context, int64_t begin, int64_t end);

int num_threads();
void set_num_threads(int n);
const char* thread_backend();  // "openmp": the team that torch already keeps; "pool": our own

// Calls task(context, begin, end) over [0, n) in pieces of `grain`, handed out as threads become free. Which thread
// takes which piece is not fixed, so no result may depend on it. Nested calls run where they are.
void run_parallel(int64_t n, int64_t grain, Task task, const void* context);

// The threads of one call of run_team: all of them run, and barrier() returns once each has called it.
class Team {
 public:
  int size() const { return size_.load(std::memory_order_relaxed); }
  void barrier();

 private:
  friend struct TeamJob;
  std::atomic<int> size_{1};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};
using Member = void (*)(const void* context, Team& team, int rank);

// Calls member(context, team, rank) for rank 0 to team.size() - 1 at once, each on a thread of its own. The team has at
// most `most` threads, and may have fewer: 1 where this is called from within a parallel region.
void run_team(int most, Member member, const void* context);

// Calls body(context) on the calling thread, whose calls of run_parallel and run_team until it returns find the team
// spinning: for bodies that make many such calls within microseconds of each other. What `body` throws, this does.
void keep_awake(void (*body)(void*), void* context);

// A 64-byte aligned block that belongs to the calling thread and lives until its next call with the same slot.
void* scratch(size_t bytes, int slot);
constexpr int kScratchSlots = 8;

}  // namespace pyllm::cpu
