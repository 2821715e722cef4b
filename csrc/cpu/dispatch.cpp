#include "cpu/dispatch.h"

#include <cstdlib>

#include "cpu/amx.h"
#include "cpu/vnni.h"
#include "tensor.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyllm::cpu {
namespace {

constexpr const char* kNames[kIsas] = {"baseline", "avx2", "avx512"};

bool available(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
#if PYLLM_WITH_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
             __builtin_cpu_supports("f16c");
#else
      return false;
#endif
    case Isa::avx512:
#if PYLLM_WITH_AVX512 && PYLLM_EMULATE_AVX512
      return available(Isa::avx2);
#elif PYLLM_WITH_AVX512
      return available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512cd");
#else
      return false;
#endif
  }
  return false;
}

int best() {
  int found = 0;
  for (int i = 0; i < kIsas; i++)
    if (available(static_cast<Isa>(i))) found = i;
  return found;
}

// Whether the processor has a dot product of bytes on the registers of an instruction set.
bool vnni_of(Isa isa) {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (isa == Isa::avx512) return PYLLM_EMULATE_AVX512 || (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1));
  if (isa == Isa::avx2) return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  (void)isa;
  return false;
}

// Whether there are tile registers for bf16 and bytes, and the system grants them: their state is large, so Linux wants to
// be asked, once a process.
bool amx_granted() {
#if PYLLM_EMULATE_AVX512
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kBytes = 1u << 25, kAll = kBf16 | kTiles | kBytes;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr unsigned kToBf16 = 1u << 5;  // AVX512_BF16, whose conversion the kernels use beside the tiles
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kToBf16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool vnni_wanted = true, amx_wanted = true;

}  // namespace

int chosen_isa = best();

bool has_vnni() {
  static const bool found[kIsas] = {false, vnni_of(Isa::avx2), vnni_of(Isa::avx512)};
  return vnni_wanted && found[chosen_isa];
}

void set_vnni(bool wanted) { vnni_wanted = wanted; }

bool has_amx() {
  static const bool granted = amx_granted();
  return amx_wanted && granted && chosen_isa == static_cast<int>(Isa::avx512);
}

void set_amx(bool wanted) { amx_wanted = wanted; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsas; i++)
    if (available(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  return names;
}

std::string isa_name() { return kNames[chosen_isa]; }

void set_isa(const std::string& name) {
  std::string known;
  for (int i = 0; i < kIsas; i++) {
    if (!available(static_cast<Isa>(i))) continue;
    if (name == kNames[i]) {
      chosen_isa = i;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  fail(Error::value, "PYLLM_ISA must be one of ", known, " on this machine, but got '", name, "'");
}

}  // namespace pyllm::cpu
