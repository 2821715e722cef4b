// What the machine can do at most, for benchmarks to compare with. The multiply-adds run in twelve independent chains,
// enough to hide their latency and few enough for sixteen registers.
// Reading adds into eight chains, in blocks that threads take as they become free.
#include "cpu/ceilings.h"

#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

VEC void keep_in_register(V& v) {  // the compiler must take it that v is read and changed here
#if defined(__x86_64__)
#if ISA_AVX512 && !__AVX512F__
  asm volatile("" : "+m"(v));
#else
  asm volatile("" : "+v"(v));
#endif
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

}  // namespace

void multiply_add(const MultiplyAddArgs& a) {
  parallel_for(cpu::num_threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      V sums[kMultiplyAdds] = {}, x = set(0.5f), y = set(0.25f);
      for (V& s : sums) keep_in_register(s);  // else they are equal, and one
      for (int64_t i = 0; i < a.rounds; i++) {
        for (V& s : sums) s = fma(s, x, y);
        keep_in_register(x);
        keep_in_register(y);
      }
      for (V& s : sums) keep_in_register(s);
    }
  });
  *a.flops = 2 * W * kMultiplyAdds * a.rounds * cpu::num_threads();
}

void read(const ReadArgs& a) {
  constexpr int64_t kChains = 8, kStep = kChains * W;
  parallel_for(a.count / kStep, 1 << 12, [&](int64_t begin, int64_t end) {
    V sums[kChains] = {};
    for (const float* p = a.data + begin * kStep; p < a.data + end * kStep; p += kStep)
      for (int64_t c = 0; c < kChains; c++) sums[c] = sums[c] + load(p + c * W);
    for (V& s : sums) keep_in_register(s);
  });
}

}  // namespace pyllm::ISA
