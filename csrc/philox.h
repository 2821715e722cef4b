// Philox 4x32-10 (Salmon et al., 2011): random numbers as a pure function of (key, counter), so that who asks, when and
// on which thread or device do not matter. Internal linkage, as each instruction set compiles its own.
#pragma once
#include <cstdint>

namespace pyllm {
namespace {

struct Words {
  uint32_t w[4];
};

[[maybe_unused]] constexpr Words philox(uint64_t key, uint64_t counter) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32), c = 0, d = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p = 0xD2511F53ull * a, q = 0xCD9E8D57ull * c;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(p);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// In [0, 1), with 53 random bits.
[[maybe_unused]] constexpr double uniform(uint64_t key, uint64_t counter) {
  const Words words = philox(key, counter);
  return ((words.w[0] >> 5) * 0x1p26 + (words.w[1] >> 6)) * 0x1p-53;
}

}  // namespace
}  // namespace pyllm
