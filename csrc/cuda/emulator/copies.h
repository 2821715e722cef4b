// Asynchronous copies to shared memory, as late as a GPU may make them: what is being copied to holds NaN until the thread
// that began the copy waits for its group, and what it waits for is copied then. So a wait too few, a group that was never
// ended and a copy into what others still read all show in what comes out.
#pragma once
#include <cstddef>

namespace pyllm::cuda {

// `bytes` from `from`, and zeros up to `size`. A thread's own groups alone are ended and finished.
void begin_copy(void* to, const void* from, size_t bytes, size_t size);
void end_copies();
void finish_copies(int pending);  // all groups but the last `pending`

}  // namespace pyllm::cuda
