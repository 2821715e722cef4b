// Memory that is about to be written for the first time.
#pragma once
#include <cstdint>

namespace pyllm::cpu {

// Asks for large pages under [p, p + bytes). What the allocator maps afresh on each call (32 MiB and more) is otherwise
// faulted in 4 KiB at a time, which costs several times as much as writing it. Smaller blocks are reused and left alone.
void prefer_large_pages(void* p, int64_t bytes);

}  // namespace pyllm::cpu
