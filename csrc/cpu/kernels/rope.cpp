// Rotary position embedding. Threads take positions: a position's sines and cosines are computed once, in a few vectors,
// and turn all heads of all sequences that share it, so that neither a table nor a second pass over memory is needed. The
// angle is the product in float that models were trained with (at position 100,000 it is off by up to 0.004, and they have
// learnt so); it is reduced in double, and its sine and cosine are floats. Nothing but the position enters an angle: a
// token gets the same bits in any batch or chunk.
#include "cpu/rope.h"

#include <algorithm>
#include <type_traits>

#include "cpu/kernels/functions.h"

namespace pyllm::ISA {
namespace {

struct Turn {  // by one position: what multiplies an element, and what multiplies the other one of its pair
  float *own, *other;
};

// Half-split pairs keep one cosine and sine a frequency. Interleaved pairs keep both twice, the first sine negated, so
// that a turn is x * own + swapped(x) * other.
void fill(const RopeArgs& a, float position, const Turn& turn) {
  const int64_t half = a.rotary / 2;
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = std::min<int64_t>(W, half - i);
    VD angle{};
    for (int64_t k = 0; k < n; k++) angle[k] = position * a.inv_freq[i + k];
    V sine, cosine;
    sincos(angle, sine, cosine);
    sine = sine * (a.scale * sign);
    cosine = cosine * a.scale;
    if (!a.interleaved) {
      write(turn.own + i, cosine, n);
      write(turn.other + i, sine, n);
      continue;
    }
    for (int64_t k = 0; k < n; k++) {
      turn.own[2 * (i + k)] = turn.own[2 * (i + k) + 1] = cosine[k];
      turn.other[2 * (i + k)] = -sine[k];
      turn.other[2 * (i + k) + 1] = sine[k];
    }
  }
}

template <class T>
VEC void turn_halves(const T* x, T* out, int64_t half, const Turn& turn) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = std::min<int64_t>(W, half - i);
    const V a = get(x + i, n), b = get(x + half + i, n), c = get(turn.own + i, n), s = get(turn.other + i, n);
    write(out + i, fma(-b, s, a * c), n);
    write(out + half + i, fma(a, s, b * c), n);
  }
}

template <class T>
VEC void turn_pairs(const T* x, T* out, int64_t rotary, const Turn& turn) {
  for (int64_t i = 0; i < rotary; i += W) {
    const int64_t n = std::min<int64_t>(W, rotary - i);
    const V v = get(x + i, n);
    write(out + i, fma(__builtin_shuffle(v, lane_index() ^ 1), get(turn.other + i, n), v * get(turn.own + i, n)), n);
  }
}

}  // namespace

void rope(const RopeArgs& a) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const int64_t sequences = a.shared ? a.batch : 1, rows = a.shared ? a.length : a.batch * a.length;
    const int64_t grain = 8192 / (sequences * a.heads * a.width + 1) + 1;
    parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
      auto* buffer = static_cast<float*>(cpu::scratch(2 * a.rotary * sizeof(float), 0));
      const Turn turn{buffer, buffer + a.rotary};
      for (int64_t row = begin; row < end; row++) {
        const auto position =
            static_cast<float>(a.positions_dtype == DType::i64 ? reinterpret_cast<const int64_t*>(a.positions)[row]
                                                               : reinterpret_cast<const int32_t*>(a.positions)[row]);
        fill(a, position, turn);
        const int64_t time = row % a.length, first = row / a.length;
        for (int64_t b = first; b < first + sequences; b++) {
          const T* x = reinterpret_cast<const T*>(a.x) + b * a.x_batch + time * a.x_time;
          T* out = reinterpret_cast<T*>(a.out) + (b * a.length + time) * a.heads * a.width;
          for (int64_t h = 0; h < a.heads; h++, x += a.x_head, out += a.width) {
            a.interleaved ? turn_pairs(x, out, a.rotary, turn) : turn_halves(x, out, a.rotary / 2, turn);
            if (a.rotary < a.width)
              std::memcpy(static_cast<void*>(out + a.rotary), x + a.rotary, (a.width - a.rotary) * sizeof(T));
          }
        }
      }
    });
  });
}

}  // namespace pyllm::ISA
