// Attention, forward, over int8 pages with dot products of bytes, in an order of its own, the same for many rows and few:
// numbers stay whole. A query's group of 32 elements becomes whole numbers of 16 bits with a scale, and so do a row's
// weights times the scales of a block's values: planes of bytes, whose products with pages are exact. Only what they add
// up to, over a group of elements or a block of 64 keys, meets the scales, in order. What that rounds is less than what a
// page's bytes have lost by a factor of 256.
//
// Keys go across the lanes by fours of elements, as pages have them; values' elements by fours of keys, for which they are
// packed, once for all rows of a tile. The block that is walked next is asked for meanwhile, a few lines at a time; large
// pages of memory (see pyllm/ops/paging.py) make reading 1.2 times as fast.
#pragma once
#include <array>

#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/bytes.h"
#include "cpu/vnni.h"

namespace pyllm::ISA {
namespace {

#if ISA_AVX512

constexpr int64_t kByteRows = kLanes;  // of a tile, at most, which share what is packed
constexpr int64_t kAtOnce = 4;         // rows that read packed values together
constexpr int64_t kSides = kKeys / W;
constexpr int64_t kQuads = kKeys / 4;                           // of keys
constexpr float kQuerySteps = 127 * 256, kWeightSteps = 65535;  // the largest whole numbers

bool takes_bytes(const AttentionArgs& a) {
  return a.stored == DType::i8 && a.dim % 4 == 0 && a.value_dim % W == 0 && cpu::has_vnni();
}

constexpr int64_t byte_groups(int64_t dim) { return (dim + kInt8Group - 1) / kInt8Group; }

struct ByteBuffers {
  int8_t* queries;      // [row][plane][element]
  float* query_scales;  // [row][group]
  int32_t* query_sums;  // [row][group]: what the keys' offset by 128 adds to a product
  char* keys;           // of a block, as they lie, made unsigned
  char* values;         // [tile of W elements][quad of keys][element][key]
  uint8_t* weights;     // [row of some][plane][group][key]
};

int64_t byte_query_bytes(const AttentionArgs& a, int64_t rows) {
  return round_up(rows * (2 * a.dim + 8 * byte_groups(a.dim)), 64);
}
int64_t byte_buffer_bytes(const AttentionArgs& a) {  // without the queries
  return kKeys * (a.dim + a.value_dim + kAtOnce * 2 * byte_groups(a.value_dim));
}
ByteBuffers byte_buffers_at(const AttentionArgs& a, char* queries, int64_t rows, char* rest) {
  ByteBuffers w;
  w.query_scales = reinterpret_cast<float*>(queries);
  w.query_sums = reinterpret_cast<int32_t*>(w.query_scales + rows * byte_groups(a.dim));
  w.queries = reinterpret_cast<int8_t*>(w.query_sums + rows * byte_groups(a.dim));
  w.keys = rest;
  w.values = w.keys + kKeys * a.dim;
  w.weights = reinterpret_cast<uint8_t*>(w.values + kKeys * a.value_dim);
  return w;
}

// What numbers are multiplied by to become whole ones up to `steps`, and what those are worth: no number where not all are
// finite. Those that are too small for a scale become zeros.
struct WholeScale {
  float up, worth;
};
VEC WholeScale whole_scale(V largest, VI bad, float steps) {
  const float most = max(largest);
  if (bits(bad)) return {0, __builtin_nanf("")};
  return {most > 0x1p-100f ? steps / most : 0.0f, most / steps};
}

VEC VI not_finite(V x) { return x - x != 0.0f; }

VEC VI to_whole(V x, float up) {
  const V magic = set(12582912.0f);
  return as_int(fma(x, set(up), magic)) - as_int(magic);
}

VEC void store_low_bytes(void* p, VI v) {
  using VN = int8_t __attribute__((vector_size(W)));
  const VN bytes = __builtin_convertvector(v, VN);
  std::memcpy(p, &bytes, sizeof bytes);
}

// Query `row` of the tile, of which x are the elements: 256 times the first plane, and the second.
template <class T>
void pack_byte_query(const AttentionArgs& a, const T* x, int64_t row, const ByteBuffers& w) {
  const int64_t groups = byte_groups(a.dim);
  const V factor = set(query_factor(a));
  for (int64_t g = 0; g < groups; g++) {
    alignas(64) int8_t planes[2][kInt8Group];
    const int64_t first = g * kInt8Group, count = std::min(kInt8Group, a.dim - first);
    V values[kInt8Group / W], largest{};
    VI total{}, bad{};
    for (int64_t i = 0; i < kInt8Group / W; i++) {
      const int64_t n = std::clamp<int64_t>(count - i * W, 0, W);
      values[i] = n ? get(x + first + i * W, n) * factor : V{};
      largest = max(abs(values[i]), largest);
      bad |= not_finite(values[i]);
    }
    const WholeScale scale = whole_scale(largest, bad, kQuerySteps);
    if (bits(bad)) std::fill_n(values, kInt8Group / W, V{});  // whose sums as whole numbers would overflow
    for (int64_t i = 0; i < kInt8Group / W; i++) {
      const VI whole = to_whole(values[i], scale.up), high = (whole + 128) >> 8;
      total = total + whole;
      store_low_bytes(planes[0] + i * W, high);
      store_low_bytes(planes[1] + i * W, whole - (high << 8));
    }
    int32_t sum = 0;
    for (int64_t l = 0; l < W; l++) sum += total[l];
    w.query_scales[row * groups + g] = scale.worth;
    w.query_sums[row * groups + g] = 128 * sum;
    for (int64_t i = 0; i < 2; i++) std::memcpy(w.queries + (row * 2 + i) * a.dim + first, planes[i], count);
  }
}

VEC VI four_rows(const int8_t* p, int64_t step) {  // 16 bytes of each
#if __AVX512F__
  const auto row = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step)); };
  __m512i x = _mm512_castsi128_si512(row(0));
  x = _mm512_inserti32x4(x, row(1), 1);
  x = _mm512_inserti32x4(x, row(2), 2);
  return reinterpret_cast<VI>(_mm512_inserti32x4(x, row(3), 3));
#else
  char block[64];
  for (int64_t i = 0; i < 4; i++) std::memcpy(block + i * 16, p + i * step, 16);
  return load_lanes(block);
#endif
}

// In each 16 bytes, four by four, columns become rows.
VEC VI transpose_fours(VI x) {
  VB places;
  UNROLL for (int i = 0; i < 4 * W; i++) places[i] = static_cast<int8_t>(i / 16 * 16 + i % 4 * 4 + i % 16 / 4);
  return reinterpret_cast<VI>(__builtin_shuffle(reinterpret_cast<VB>(x), places));
}

void pack_byte_values(const Stored<int8_t>& v, char* out) {
  for (int64_t d = 0; d < v.dim; d += W)
    for (int64_t quad = 0; quad < kQuads; quad++, out += 64) {
      const VI packed = transpose_fours(four_rows(v.data + d * kKeys + quad * 16, kInt8Quad * kKeys));
      std::memcpy(out, &packed, sizeof packed);
    }
}

constexpr int32_t kUnsigned = static_cast<int32_t>(0x80808080);  // makes bytes unsigned by an offset of 128

void make_unsigned(const Stored<int8_t>& k, char* out) {
  const VI offset = set_int(kUnsigned);
  for (int64_t i = 0; i < k.dim * kKeys; i += 64) {
    const VI numbers = load_lanes(k.data + i) ^ offset;
    std::memcpy(out + i, &numbers, sizeof numbers);
  }
}

V load_byte_scales(const Stored<int8_t>& x, int64_t group, int64_t key) {
  return load(reinterpret_cast<const bf16*>(x.data + int8_scale_at(x.dim, key, group * kInt8Group)));
}

// Scores of R rows from `row` on against a block's keys, to x. kPrepared: made unsigned before. Where they are not, `asked`
// lines of what is ahead go with each step.
template <int R, bool kPrepared>
void score_bytes(const AttentionArgs& a, int64_t row, const ByteBuffers& w, const Stored<int8_t>& k,
                 float (*x)[2 * kKeys], Ahead& ahead, int64_t asked) {
  const VI offset = set_int(kUnsigned);
  const int64_t groups = byte_groups(a.dim);
  const int8_t* const queries = w.queries + row * 2 * a.dim;
  for (int64_t g = 0; g < groups; g++) {
    VI of_high[R][kSides], of_low[R][kSides];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int64_t side = 0; side < kSides; side++) {
      of_high[r][side] = VI{};
      of_low[r][side] = set_int(-w.query_sums[(row + r) * groups + g]);
    }
    const int64_t end = std::min(a.dim, (g + 1) * kInt8Group);
    for (int64_t d = g * kInt8Group; d < end; d += 4) {
      if (!kPrepared) ahead.ask(asked);
      VI keys[kSides];
      UNROLL for (int64_t side = 0; side < kSides; side++) {
        const int64_t at = d * kKeys + side * 64;
        keys[side] = kPrepared ? load_lanes(w.keys + at) : load_lanes(k.data + at) ^ offset;
      }
      UNROLL for (int r = 0; r < R; r++) {
        const VI h = broadcast_lane(queries + 2 * r * a.dim + d), l = broadcast_lane(queries + (2 * r + 1) * a.dim + d);
        UNROLL for (int64_t side = 0; side < kSides; side++) {
          of_high[r][side] = dot_bytes(of_high[r][side], keys[side], h);
          of_low[r][side] = dot_bytes(of_low[r][side], keys[side], l);
        }
      }
    }
    UNROLL for (int64_t side = 0; side < kSides; side++) {
      const V scale = load_byte_scales(k, g, side * W);
      UNROLL for (int r = 0; r < R; r++) {
        const V whole = __builtin_convertvector((of_high[r][side] << 8) + of_low[r][side], V);
        const V before = g ? load(x[r] + side * W) : V{};
        store(x[r] + side * W, fma(whole * set(w.query_scales[(row + r) * groups + g]), scale, before));
      }
    }
  }
}

// From the scores of `some` rows to their weights, times the scales of the values, as whole numbers; what they are worth,
// by groups of values, and what the rows' sums are to be multiplied by. Row by row in each step: they wait for each other
// less than a row's steps do.
void weigh_bytes(const AttentionArgs& a, const Rows& rows, const Panel& p, int64_t first, int64_t some,
                 const Block& block, Range seen, const ByteBuffers& w, const Stored<int8_t>& v, float (*x)[2 * kKeys],
                 State s, float* factor, float (*worth)[byte_groups(256)]) {
  const int64_t groups = byte_groups(a.value_dim);
  V base[kAtOnce];
  for (int64_t r = 0; r < some; r++) base[r] = finish_row(a, rows, p, first + r, block, seen, x[r]);
  for (int64_t r = 0; r < some; r++) {
    float& old_max = s.max[first + r];
    const V m = max(set(max(base[r])), set(old_max));
    base[r] = finite_or_zero(m);
    factor[r] = rescale(set(old_max), m)[0];
    old_max = m[0];
  }
  for (int64_t r = 0; r < some; r++) {
    V total{};
    UNROLL for (int64_t i = 0; i < kSides; i++) {
      const bool inside = i * W >= seen.lo && i * W < seen.hi;
      const V score = inside ? load(x[r] + i * W) : set(-kInfinity);
      const VI masked = score == -kInfinity;
      const V weight = exp2(score - base[r]);
      total = total + select(masked, V{}, weight);
      store(x[r] + i * W, select(masked, set(-1.0f), weight));
    }
    s.total[first + r] = s.total[first + r] * factor[r] + sum(total);
  }
  for (int64_t g = 0; g < groups; g++) {
    V scales[kSides];
    UNROLL for (int64_t i = 0; i < kSides; i++) scales[i] = load_byte_scales(v, g, i * W);
    for (int64_t r = 0; r < some; r++) {
      V scaled[kSides], largest{};
      VI bad{};
      UNROLL for (int64_t i = 0; i < kSides; i++) {
        const V weight = load(x[r] + i * W);
        scaled[i] = select(weight < 0.0f, V{}, weight * scales[i]);
        largest = max(scaled[i], largest);
        bad |= not_finite(scaled[i]);
      }
      const WholeScale scale = whole_scale(largest, bad, kWeightSteps);
      worth[r][g] = scale.worth;
      uint8_t *high = w.weights + (r * 2 * groups + g) * kKeys, *low = high + groups * kKeys;
      UNROLL for (int64_t i = 0; i < kSides; i++) {
        const VI whole = to_whole(scaled[i], scale.up);
        store_low_bytes(high + i * W, whole >> 8);
        store_low_bytes(low + i * W, whole);
      }
    }
  }
}

// sums[r][d..] * factor[r] + what the weights of R rows make of N tiles of packed values, which share their scales.
template <int R, int N>
VEC void add_bytes_at(int64_t d, int64_t groups, const ByteBuffers& w, const float (*worth)[byte_groups(256)],
                      const float* factor, float* sums, int64_t sums_step) {
  const char* values = w.values + d * kKeys;
  const uint8_t* weights = w.weights + d / kInt8Group * kKeys;
  VI of_high[R][N] = {}, of_low[R][N] = {};
  for (int64_t quad = 0; quad < kQuads; quad++) {
    VI v[N];
    UNROLL for (int n = 0; n < N; n++) v[n] = load_lanes(values + n * W * kKeys + quad * 64);
    UNROLL for (int r = 0; r < R; r++) {
      const uint8_t* of = weights + r * 2 * groups * kKeys + quad * 4;
      const VI high = broadcast_lane(of), low = broadcast_lane(of + groups * kKeys);
      UNROLL for (int n = 0; n < N; n++) {
        of_high[r][n] = dot_bytes(of_high[r][n], high, v[n]);
        of_low[r][n] = dot_bytes(of_low[r][n], low, v[n]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < N; n++) {
    float* at = sums + r * sums_step + d + n * W;
    const V whole = __builtin_convertvector((of_high[r][n] << 8) + of_low[r][n], V);
    store(at, fma(whole, set(worth[r][d / kInt8Group]), load(at) * factor[r]));
  }
}
template <int R>
void add_bytes(const AttentionArgs& a, const ByteBuffers& w, const float (*worth)[byte_groups(256)],
               const float* factor, float* sums, int64_t sums_step) {
  constexpr int kTogether = kInt8Group / W;
  const int64_t groups = byte_groups(a.value_dim);
  int64_t d = 0;
  for (; d + kInt8Group <= a.value_dim; d += kInt8Group)
    add_bytes_at<R, kTogether>(d, groups, w, worth, factor, sums, sums_step);
  for (; d < a.value_dim; d += W) add_bytes_at<R, 1>(d, groups, w, worth, factor, sums, sums_step);
}

// Lanes 4 i to 4 i + 3 of the result are what the four such fours of x[i] add up to.
VEC VI add_fours(const VI* x) {
  VI even, odd;
  UNROLL for (int i = 0; i < W; i++) {
    even[i] = i / 4 * 8 + i % 4;
    odd[i] = i / 4 * 8 + 4 + i % 4;
  }
  const auto half = [&](VI a, VI b) { return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd); };
  return half(half(x[0], x[1]), half(x[2], x[3]));
}

// The same for one row, without packing: keys lie across the lanes by fours, and join in the end.
void add_bytes_of_one(const AttentionArgs& a, const ByteBuffers& w, const Stored<int8_t>& v, const float* worth,
                      float factor, float* sums, Ahead& ahead, int64_t asked) {
  const int64_t groups = byte_groups(a.value_dim);
  VI spread[kSides];
  UNROLL for (int side = 0; side < kSides; side++) UNROLL for (int i = 0; i < W; i++) spread[side][i] =
      side * 4 + i / 4;
  for (int64_t g = 0; g < groups; g++) {
    VI high[kSides], low[kSides];
    UNROLL for (int64_t side = 0; side < kSides; side++) {
      high[side] = __builtin_shuffle(load_lanes(w.weights + g * kKeys), spread[side]);
      low[side] = __builtin_shuffle(load_lanes(w.weights + (groups + g) * kKeys), spread[side]);
    }
    for (int64_t d = g * kInt8Group; d < std::min(a.value_dim, (g + 1) * kInt8Group); d += W) {
      VI whole[4];
      UNROLL for (int64_t i = 0; i < 4; i++) {
        ahead.ask(asked);
        VI of_high{}, of_low{};
        UNROLL for (int64_t side = 0; side < kSides; side++) {
          const VI values = transpose_fours(load_lanes(v.data + (d + i * kInt8Quad) * kKeys + side * 64));
          of_high = dot_bytes(of_high, high[side], values);
          of_low = dot_bytes(of_low, low[side], values);
        }
        whole[i] = (of_high << 8) + of_low;
      }
      const V added = __builtin_convertvector(add_fours(whole), V);
      store(sums + d, fma(added, set(worth[g]), load(sums + d) * factor));
    }
  }
}

// The block of keys from `first` on, for up to kByteRows rows.
void walk_bytes(const AttentionArgs& a, const Rows& rows, const Panel& p, const ByteBuffers& w, int64_t first,
                Ahead ahead, int64_t sums_step, State s) {
  Block block;
  set_block(a, rows, first, block);
  const Range live = live_keys(a, p, block), seen{live.lo / W * W, live.hi};
  if (live.lo == live.hi) return;
  const Stored<int8_t> k = stored_keys<int8_t>(a, rows, first), v = stored_values<int8_t>(a, rows, first);
  const bool one = rows.count == 1;
  if (!one) {
    make_unsigned(k, w.keys);
    pack_byte_values(v, w.values);
  }
  const int64_t steps = one ? (a.dim + a.value_dim) / 4 : (rows.count + kAtOnce - 1) / kAtOnce * 2;
  const int64_t asked = ahead.left() / steps + 1;
  for (int64_t r0 = 0; r0 < rows.count; r0 += kAtOnce) {
    const int64_t some = std::min(kAtOnce, rows.count - r0);
    float factor[kAtOnce], worth[kAtOnce][byte_groups(256)];
    alignas(64) float x[kAtOnce][2 * kKeys];
    int64_t scored = 0;
    for (; scored + 2 <= some; scored += 2) score_bytes<2, true>(a, r0 + scored, w, k, x + scored, ahead, 0);
    if (scored < some)
      (one ? score_bytes<1, false> : score_bytes<1, true>)(a, r0 + scored, w, k, x + scored, ahead, asked);
    if (!one) ahead.ask(asked);
    weigh_bytes(a, rows, p, r0, some, block, seen, w, v, x, s, factor, worth);
    if (one) return add_bytes_of_one(a, w, v, worth[0], factor[0], s.sums, ahead, asked);
    ahead.ask(asked);
    const auto add = std::array{add_bytes<1>, add_bytes<2>, add_bytes<3>, add_bytes<4>};
    add[some - 1](a, w, worth, factor, s.sums + r0 * sums_step, sums_step);
  }
}

#else  // there are none

constexpr int64_t kByteRows = 1;

struct ByteBuffers {};
bool takes_bytes(const AttentionArgs&) { return false; }
int64_t byte_query_bytes(const AttentionArgs&, int64_t) { return 0; }
int64_t byte_buffer_bytes(const AttentionArgs&) { return 0; }
ByteBuffers byte_buffers_at(const AttentionArgs&, char*, int64_t, char*) { return {}; }
template <class T>
void pack_byte_query(const AttentionArgs&, const T*, int64_t, const ByteBuffers&) {}
void walk_bytes(const AttentionArgs&, const Rows&, const Panel&, const ByteBuffers&, int64_t, Ahead, int64_t, State) {}

#endif

}  // namespace
}  // namespace pyllm::ISA
