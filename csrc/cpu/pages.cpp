#include "cpu/pages.h"

#include <sys/mman.h>

namespace pyllm::cpu {

void prefer_large_pages(void* p, int64_t bytes) {
  constexpr int64_t kLeast = 4 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kLeast) return;
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: nothing depends on its being taken
#endif
}

}  // namespace pyllm::cpu
