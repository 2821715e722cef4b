// What the system is told of memory that is about to be written for the first time, or that is not read again soon.
#pragma once
#include <cstdint>

namespace pyllm::cpu {

// Asks for large pages under [p, p + bytes). What the allocator maps afresh (from 32 MiB on, always; less, as often as the
// end of its heap is given back, which in training can be on each call) is otherwise faulted in 4 KiB at a time, which
// costs several times as much as writing it. Blocks below 4 MiB hold too few whole pages and are left alone.
void prefer_large_pages(void* p, int64_t bytes);

// Unmaps the whole pages of a file within [p, p + bytes), which are mapped again where they are read. Nothing, if any of
// them has been written to: that is in memory alone. Says whether it did.
bool give_back_file_pages(const void* p, int64_t bytes);

}  // namespace pyllm::cpu
