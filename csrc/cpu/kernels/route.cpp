// Routing to experts. Threads take rows: a softmax over the experts, of which the largest are picked one by one, the first
// of equals first. Then one thread sorts by experts, counting. Nothing but its logits enters what a row gets.
#include "cpu/route.h"

#include <algorithm>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

// The probabilities of a row's experts to p, which has room for whole vectors.
template <class T>
void probabilities(const T* logits, int64_t n, float* p) {
  V largest = set(-__builtin_inff());
  for (int64_t i = 0; i < n; i += W) {
    const int64_t live = std::min<int64_t>(W, n - i);
    V v = get(logits + i, live);
    for (int64_t l = live; l < W; l++) v[l] = -__builtin_inff();
    store(p + i, v);
    largest = max(largest, v);
  }
  const V most = set(max(largest));
  V total{};
  for (int64_t i = 0; i < n; i += W) {
    const V e = exp(load(p + i) - most);
    store(p + i, e);
    total = total + e;
  }
  const V sum_of_all = set(sum(total));
  for (int64_t i = 0; i < n; i += W) store(p + i, load(p + i) / sum_of_all);
}

void pick(const RouteArgs& a, float* p, float* weights, int64_t* experts) {
  float total = 0.0f;
  for (int64_t i = 0; i < a.active; i++) {
    int64_t best = -1;
    for (int64_t e = 0; e < a.experts; e++)
      if (p[e] != -1.0f && (best < 0 || p[e] > p[best])) best = e;
    weights[i] = p[best];
    total += p[best];
    experts[i] = best;
    p[best] = -1.0f;  // taken
  }
  for (int64_t i = 0; a.normalised && i < a.active; i++) weights[i] = weights[i] / total;
}

}  // namespace

void route(const RouteArgs& a) {
  const int64_t padded = (a.experts + W - 1) / W * W;
  parallel_for(a.rows, std::max<int64_t>(1, 8192 / (a.experts * (a.active + 8))), [&](int64_t begin, int64_t end) {
    auto* p = static_cast<float*>(cpu::scratch(padded * sizeof(float), 7));
    for (int64_t row = begin; row < end; row++) {
      with_dtype(a.dtype, [&](auto* tag) {
        probabilities(reinterpret_cast<decltype(tag)>(const_cast<char*>(a.logits)) + row * a.row_step, a.experts, p);
      });
      pick(a, p, a.weights + row * a.active, a.places + row * a.active);  // which are the experts, for now
    }
  });
  const int64_t count = a.rows * a.active;
  std::fill(a.offsets, a.offsets + a.experts + 1, 0);
  for (int64_t i = 0; i < count; i++) a.offsets[a.places[i] + 1]++;
  for (int64_t e = 0; e < a.experts; e++) a.offsets[e + 1] += a.offsets[e];
  for (int64_t i = 0; i < count; i++) {  // offsets[e] goes from e's begin to its end
    const int64_t at = a.offsets[a.places[i]]++;
    a.order[at] = i / a.active;
    a.places[i] = at;
  }
  for (int64_t e = a.experts; e > 0; e--) a.offsets[e] = a.offsets[e - 1];
  a.offsets[0] = 0;
}

}  // namespace pyllm::ISA
