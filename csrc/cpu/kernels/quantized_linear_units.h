// A weight of 4 bits in units, widened to bytes: what many rows pass by.
#pragma once
#include "cpu/kernels/bytes.h"
#include "cpu/kernels/quantized_linear.h"

namespace pyllm::ISA {
namespace {

using Halves = uint16_t __attribute__((vector_size(W * 4)));
using Bytes = uint8_t __attribute__((vector_size(W * 4)));

// An element of a panel is value * multiple + minimum of a span's units, below 128 in size: that + `zero`, modulo 256, to
// place(group, quad, half of the columns), and the units by put_units(the span's first group, half, units), of so many groups.
template <class Place, class PutUnits>
void widen_in_units(const QuantizedWeight& w, int64_t groups, const char* panel, int zero, const Place& place,
                    const PutUnits& put_units) {
  constexpr int64_t kHalf = W * 4;
  const int64_t group_bytes = w.group_bytes(kPanel), quads = w.value_bytes() / 4;
  for (int64_t first = 0; first < groups; first += w.span) {
    const char* next = panel + (first + w.span) * group_bytes;  // of the next panel, in the end
    for (int64_t byte = 0; byte < w.span * group_bytes; byte += 64) __builtin_prefetch(next + byte);
    for (int64_t half = 0; half < 2; half++) {
      const int64_t count = std::min(w.span, groups - first);
      const Units unit = units_of(w, panel + first * group_bytes, count, half * W);
      put_units(first, half, unit.size);
      const auto whole = [&](const char* scales, int64_t at) {
        return __builtin_convertvector(load_scale(scales, w.scale_dtype, at) * unit.inverse, VI);
      };
      for (int64_t g = first; g < first + count; g++) {
        const char *values = panel + g * group_bytes + half * kHalf,
                   *scales = panel + g * group_bytes + quads * kPanel * 4;
        const VI multiple = whole(scales, half * W);
        const VI minimum = w.has_minimums ? whole(scales, kPanel + half * W) : multiple * -8;
        const VI negative = multiple < 0, size = (multiple ^ negative) - negative;
        const auto factor = reinterpret_cast<Halves>(size | size << 16);
        const VI byte = (minimum - negative + zero) & 255, two = byte | byte << 8;
        const auto rest = reinterpret_cast<Bytes>(two | two << 16);
        const auto put = [&](int64_t quad, VI v) {  // products are below 256: none reaches its neighbour's byte
          const auto product = reinterpret_cast<VI>(reinterpret_cast<Halves>(v & 0x0f0f0f0f) * factor) ^ negative;
          const Bytes bytes = reinterpret_cast<Bytes>(product) + rest;
          std::memcpy(place(g, quad, half), &bytes, sizeof bytes);
        };
        for (int64_t q = 0; q < quads; q++) {
          const VI both = load_lanes(values + q * 2 * kHalf);
          put(q, both);
          put(quads + q, both >> 4);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyllm::ISA
