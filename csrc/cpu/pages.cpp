#include "cpu/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

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

bool give_back_file_pages(const void* p, int64_t bytes) {
#ifdef __linux__
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page;
  if (bytes <= 0 || begin >= end) return false;
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return false;
  constexpr uint64_t kPresent = uint64_t{1} << 63, kSwapped = uint64_t{1} << 62, kOfFile = uint64_t{1} << 61;
  bool clean = true;
  uint64_t entries[512];
  for (uintptr_t at = begin; clean && at < end;) {
    const auto count = std::min<uintptr_t>(end - at, 512);
    const auto size = static_cast<ssize_t>(count * sizeof(uint64_t));
    clean = pread(map, entries, size, static_cast<off_t>(at * sizeof(uint64_t))) == size;
    for (uintptr_t i = 0; clean && i < count; i++)
      clean = !(entries[i] & (kPresent | kSwapped)) || entries[i] & kOfFile;
    at += count;
  }
  close(map);
  return clean && madvise(reinterpret_cast<void*>(begin * page), (end - begin) * page, MADV_DONTNEED) == 0;
#else
  (void)p, (void)bytes;
  return false;
#endif
}

}  // namespace pyllm::cpu
