// Routing to experts. Threads take rows: a softmax over the experts, of which the largest are picked one by one, the first
// of equals first. Then one thread sorts by experts, counting. Nothing but its logits enters what a row gets.
//
// Backward, with the gradients g of the weights w of a row: the logit of an expert that it goes to gets w (g - sum(g w));
// where the weights are the probabilities p themselves, all get -p sum(g w), and those experts w g more.
#include "cpu/route.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/functions.h"

namespace pyllm::ISA {
namespace {

// The probabilities of a row's experts to p, which has room for whole vectors; lanes beyond are 0.
template <class T>
void probabilities(const T* logits, int64_t n, float* p) {
  V largest = set(-__builtin_inff());
  for (int64_t i = 0; i < n; i += W) {
    const int64_t live = std::min<int64_t>(W, n - i);
    V v = get(logits + i, live);
    if (live != W) v = keep(v, live, -__builtin_inff());
    store(p + i, v);
    largest = max(largest, v);
  }
  const V most = set(max(largest));
  V total{};
  for (int64_t i = 0; i < n; i += W) {
    const int64_t live = std::min<int64_t>(W, n - i);
    V e = load(p + i) - most;
    if (live != W) e = keep(e, live, 0);  // whose exponential is no denormal, which would take 100 cycles
    e = exp(e);
    if (live != W) e = keep(e, live, 0);
    store(p + i, e);
    total = total + e;
  }
  const V sum_of_all = set(sum(total));
  for (int64_t i = 0; i < n; i += W) store(p + i, load(p + i) / sum_of_all);
}

// What is taken leaves p as -1. Vectors alone are written and read there: a lane that was written by itself would have to
// be in the cache before a vector with it could be read.
void pick(const RouteArgs& a, float* p, float* weights, int64_t* experts) {
  float total = 0.0f;
  if (const int64_t live = a.experts % W) {
    float* last = p + a.experts - live;
    store(last, keep(load(last), live, -1.0f));
  }
  const bool numbers = p[0] == p[0];  // or all of them are not
  for (int64_t i = 0; i < a.active; i++) {
    int64_t best = i, vector = i / W * W;
    if (numbers) {
      V largest = load(p);
      for (int64_t e = W; e < a.experts; e += W) largest = max(largest, load(p + e));
      const float top = max(largest);
      uint32_t found = 0;
      for (vector = -W; found == 0;) found = bits(load(p + (vector += W)) == top);
      best = vector + __builtin_ctz(found);
    }
    weights[i] = p[best];
    total += p[best];
    experts[i] = best;
    store(p + vector, lane_index() == static_cast<int32_t>(best - vector) ? set(-1.0f) : load(p + vector));
  }
  for (int64_t i = 0; a.normalised && i < a.active; i++) weights[i] = weights[i] / total;
}

template <class T>
void backward_row(const RouteBackwardArgs& a, int64_t row, float* d) {
  const float *w = a.weights + row * a.active, *g = a.dweights + row * a.active;
  float along = 0.0f;
  for (int64_t i = 0; i < a.active; i++) along += g[i] * w[i];
  if (a.normalised) {
    std::fill(d, d + a.experts, 0.0f);
  } else {
    probabilities(reinterpret_cast<const T*>(a.logits) + row * a.row_step, a.experts, d);
    for (int64_t e = 0; e < a.experts; e += W) store(d + e, -along * load(d + e));
  }
  for (int64_t i = 0; i < a.active; i++) {
    const int64_t* next = std::upper_bound(a.offsets, a.offsets + a.experts + 1, a.places[row * a.active + i]);
    d[next - a.offsets - 1] += w[i] * (a.normalised ? g[i] - along : g[i]);
  }
  T* out = reinterpret_cast<T*>(a.dlogits) + row * a.experts;
  for (int64_t e = 0; e < a.experts; e += W) {
    const int64_t n = std::min<int64_t>(W, a.experts - e);
    write(out + e, load(d + e), n);
  }
}

}  // namespace

void route(const RouteArgs& a) {
  const int64_t padded = (a.experts + W - 1) / W * W;
  parallel_for(a.rows, std::max<int64_t>(1, 65536 / (a.experts * (a.active + 8))), [&](int64_t begin, int64_t end) {
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
  for (int64_t row = 0, i = 0; row < a.rows; row++)  // offsets[e] goes from e's begin to its end
    for (int64_t end = i + a.active; i < end; i++) {
      const int64_t at = a.offsets[a.places[i]]++;
      a.order[at] = row;
      a.places[i] = at;
    }
  for (int64_t e = a.experts; e > 0; e--) a.offsets[e] = a.offsets[e - 1];
  a.offsets[0] = 0;
}

void route_backward(const RouteBackwardArgs& a) {
  const int64_t padded = (a.experts + W - 1) / W * W;
  parallel_for(a.rows, std::max<int64_t>(1, 16384 / (a.experts + 32 * a.active)), [&](int64_t begin, int64_t end) {
    auto* d = static_cast<float*>(cpu::scratch(padded * sizeof(float), 7));
    with_dtype(a.dtype, [&](auto* tag) {
      for (int64_t row = begin; row < end; row++) backward_row<std::remove_pointer_t<decltype(tag)>>(a, row, d);
    });
  });
}

}  // namespace pyllm::ISA
