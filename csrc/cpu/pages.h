// Memory that is about to be written for the first time.
#pragma once
#include <cstdint>

namespace pyllm::cpu {

// Asks for large pages under [p, p + bytes). What the allocator maps afresh (from 32 MiB on, always; less, as often as the
// end of its heap is given back, which in training can be on each call) is otherwise faulted in 4 KiB at a time, which
// costs several times as much as writing it. Blocks below 4 MiB hold too few whole pages and are left alone.
void prefer_large_pages(void* p, int64_t bytes);

}  // namespace pyllm::cpu
