// parallel_for over a team of threads, and per-thread scratch memory.
#pragma once
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

// A 64-byte aligned block that belongs to the calling thread and lives until its next call with the same slot.
void* scratch(size_t bytes, int slot);
constexpr int kScratchSlots = 8;

}  // namespace pyllm::cpu
