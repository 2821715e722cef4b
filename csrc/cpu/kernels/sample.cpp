// Sampling from a row of logits without sorting it. The row is walked in fixed chunks of 1,024, which threads share when
// there are fewer rows than threads; within a chunk the largest logit of every block of 64 is kept. Those block maxima do
// the pruning: the k-th largest of them is a lower bound for top-k, so only a few blocks are looked at again, and any
// search for logits above some border skips the blocks below it.
//
// "The smallest t such that the weights of the keys above t sum to less than the target" is top-k (every weight 1),
// top-p and, with closeness to the entropy as the key, typical sampling: `border` finds it by bisection, and shrinks its
// list as it goes. Where top-k leaves a short list everything else happens on that list. Else (`wide`) top-p
// estimates its border from the block maxima and one more logit of each block, and the pass that sums the weights of
// each chunk also sums those above two thresholds around the estimate, and lists the logits between them: where the border
// lies there, as it nearly always does, no other pass follows. The estimate decides how long that list is, never what the
// border is.
//
// The draw walks the chunks' sums, then one chunk. All sums have an order that the row's own length fixes.
#include "cpu/sample.h"

#include <type_traits>

#include "cpu/kernels/border.h"
#include "cpu/kernels/functions.h"
#include "philox.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kBlock = 64, kChunk = 1024, kBlocksPerChunk = kChunk / kBlock;
constexpr int64_t kShort = 2048;  // rows up to this are one list from the start

// sum + exp(x) for x <= 0; never less than exp(-87), so that sums need no care for denormals.
VEC V plus_exp(V sum, V x) {
  V p, power;
  exp_in_parts(max(set(-87.0f), x), p, power);
  return fma(p, power, sum);
}

// Lanes of v in (low, high]: the compiler would make whole vectors of the truth.
VEC uint32_t lanes_between(V v, V low, V high) {
#if __AVX512F__
  return _mm512_cmp_ps_mask(v, low, _CMP_GT_OQ) & ~_mm512_cmp_ps_mask(v, high, _CMP_GT_OQ);
#else
  return bits((v > low) & ~(v > high));
#endif
}
VEC uint32_t lanes_not_finite(V v) {  // -infinity, which masks, is well
#if __AVX512F__
  return _mm512_cmp_ps_mask(v, set(kInfinity), _CMP_NLT_UQ);
#else
  return bits(~(v < kInfinity));
#endif
}
VEC V add_above(V sum, V w, V v, V border) {
#if __AVX512F__
  return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(v, border, _CMP_GT_OQ), sum, w);
#else
  return sum + select(v > border, w, V{});
#endif
}

// Writes these lanes of v, one after the other, and maybe what lies behind them up to p + W; their number.
VEC int64_t put_lanes(float* p, V v, uint32_t lanes) {
#if __AVX512F__
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), v));
#else
  if (lanes == 0) return 0;
  float all[W];
  store(all, v);
  for (uint32_t left = lanes; left; left &= left - 1) *p++ = all[__builtin_ctz(left)];
#endif
  return __builtin_popcount(lanes);
}

// Scratch memory for one row.
struct Room {
  float *copy, *keys, *weights, *closeness, *spare_keys, *spare_weights;  // (vocab,)
  int32_t* ids;                                                           // (vocab,)
  float *block_max, *block_sample;                                        // (blocks,)
  float *chunk_max, *raw_max, *raw, *all, *high, *low, *scale, *kept;     // (chunks,)
  int64_t* counts;                                                        // (chunks,)
  uint8_t* bad;                                                           // (chunks,)
  int32_t *table_ids, *table_counts;                                      // (slots,)
  int64_t slots;

  Room(int64_t chunks, int64_t history_length) {
    const int64_t padded = chunks * kChunk, blocks = chunks * kBlocksPerChunk;
    slots = 1;
    while (slots < 2 * history_length) slots *= 2;
    auto* p = static_cast<char*>(cpu::scratch(28 * padded + 8 * blocks + 64 * 24 + 41 * chunks + 8 * slots, 0));
    const auto take = [&](auto*& out, int64_t count) {
      out = reinterpret_cast<std::remove_reference_t<decltype(out)>>(p);
      p += (count * static_cast<int64_t>(sizeof *out) + 63) / 64 * 64;
    };
    for (float** f : {&copy, &keys, &weights, &closeness, &spare_keys, &spare_weights}) take(*f, padded);
    take(ids, padded);
    for (float** f : {&block_max, &block_sample}) take(*f, blocks);
    for (float** f : {&chunk_max, &raw_max, &raw, &all, &high, &low, &scale, &kept}) take(*f, chunks);
    take(counts, chunks);
    take(bad, chunks);
    take(table_ids, slots);
    take(table_counts, slots);
  }
};

template <class T>
struct Row {
  const SampleArgs& a;
  const SampleSettings& s;
  const int64_t row, vocab = a.vocab, chunks = (vocab + kChunk - 1) / kChunk, blocks = (vocab + kBlock - 1) / kBlock;
  const T* x = reinterpret_cast<const T*>(a.logits) + row * a.logits_stride;
  const float* bias = a.bias ? a.bias + row * a.bias_stride : nullptr;
  const bool penalised = a.history_length > 0 && (s.repetition != 1 || s.frequency != 0 || s.presence != 0);
  const bool altered = penalised || bias, copied = altered || !std::is_same_v<T, float>;
  const bool greedy = s.temperature == 0, listed = (s.top_k > 0 && s.top_k < vocab) || vocab <= kShort;
  const float cold = greedy ? 1.0f : s.temperature < 1e-30f ? 1e30f : 1.0f / s.temperature;
  const Room m{chunks, penalised ? a.history_length : 0};
  const float* z = copied ? m.copy : reinterpret_cast<const float*>(x);
  const int64_t given = a.given ? a.given[row] : -1;  // an id that is taken, whatever would be drawn
  bool given_stays = false;
  float best = 0;
  double total = 0;  // of the weights exp((z - best) * cold) that are left

  V weight(V logits) const { return exp_nonpositive((logits - best) * cold); }
  int64_t end_of(int64_t chunk) const { return (chunk + 1) * kChunk < vocab ? (chunk + 1) * kChunk : vocab; }
  int64_t block_end(int64_t block) const { return (block + 1) * kBlock < vocab ? (block + 1) * kBlock : vocab; }
  template <class F>
  void each_chunk(const F& f) const {
    parallel_for(chunks, 16, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c++) f(c);
    });
  }

  float max_of(const float* p, int64_t begin, int64_t end) const {
    V v = set(-kInfinity);
    each(begin, end, [&](int64_t i, int64_t n) { v = max(get_or_lowest(p + i, n), v); });
    return max(v);
  }

  // Copies the chunk's logits where they need to be changed (kAltered) or widened, and takes its maxima.
  template <bool kAltered>
  void scan(int64_t c) const {
    V raw = set(-kInfinity), chunk = set(-kInfinity);
    uint32_t raw_bad = 0, bad = 0;
    for (int64_t b = c * kBlocksPerChunk; b < (c + 1) * kBlocksPerChunk && b < blocks; b++) {
      V block = set(-kInfinity);
      const int64_t begin = b * kBlock, end = block_end(b);
      each(begin, end, [&](int64_t i, int64_t n) {
        V v = get_or_lowest(x + i, n);
        raw_bad |= lanes_not_finite(v);
        if constexpr (kAltered) {
          raw = max(v, raw);
          if (bias) v = v + get(bias + i, n);
          bad |= lanes_not_finite(v);
        }
        if (kAltered || !std::is_same_v<T, float>) write(m.copy + i, v, n);
        block = max(v, block);
      });
      chunk = max(block, chunk);
      m.block_max[b] = max(block);
      const auto count = static_cast<uint32_t>(end - begin), at = static_cast<uint32_t>(b) * 37 % count;
      const float sampled = z[begin + at];
      m.block_sample[b] = sampled == m.block_max[b] ? z[begin + (at + 1 == count ? 0 : at + 1)] : sampled;
    }
    m.chunk_max[c] = max(chunk);
    m.raw_max[c] = kAltered ? max(raw) : m.chunk_max[c];
    m.bad[c] = (raw_bad != 0) | ((kAltered ? bad : raw_bad) != 0) << 1;
  }

  // Sums over the chunk, relative to its own largest, of exp(logit) and, where kWeights says so, of the weights; with
  // kBand also of the weights above two thresholds, and the logits between these go to keys + c * kChunk.
  template <bool kRaw, bool kWeights, bool kBand, class U>
  void sum_chunk(int64_t c, const U* p, float largest, float low = 0, float high = 0) const {
    const V reference = set(largest == -kInfinity ? 0.0f : largest);
    V raw{}, all{}, above_low{}, above_high{};
    float* listed = m.keys + c * kChunk;
    each(c * kChunk, end_of(c), [&](int64_t i, int64_t n) {
      const V v = get_or_lowest(p + i, n), x = v - reference;
      if constexpr (kRaw) raw = plus_exp(raw, x);
      if constexpr (!kWeights) return;
      const V w = plus_exp(V{}, x * cold);
      all = all + w;
      if constexpr (!kBand) return;
      above_low = add_above(above_low, w, v, set(low));
      above_high = add_above(above_high, w, v, set(high));
      listed += put_lanes(listed, v, lanes_between(v, set(low), set(high)));
    });
    if constexpr (kRaw) m.raw[c] = sum(raw);
    if constexpr (kWeights) m.all[c] = sum(all);
    if constexpr (kBand) {
      m.low[c] = sum(above_low);
      m.high[c] = sum(above_high);
      m.counts[c] = listed - (m.keys + c * kChunk);
    }
  }

  // scale = exp((maxima - top) * factor); the total of sums * scale.
  double rescale(const float* maxima, float top, float factor, const float* sums) const {
    each(0, chunks,
         [&](int64_t i, int64_t n) { write(m.scale + i, exp_nonpositive((get(maxima + i, n) - top) * factor), n); });
    return scaled_total(sums);
  }
  double scaled_total(const float* sums) const {
    double t = 0;
    for (int64_t c = 0; c < chunks; c++) t += sums[c] * m.scale[c];
    return t;
  }

  // Applies the penalties to the copy: the distinct ids of the history are counted in a hash table. False if a logit
  // overflows.
  bool penalise() const {
    for (int64_t i = 0; i < m.slots; i++) m.table_ids[i] = -1;
    const int64_t* history = a.history + row * a.history_stride;
    for (int64_t j = 0; j < a.history_length; j++) {
      const int32_t id = static_cast<int32_t>(history[j * a.history_step]);
      if (id < 0) continue;
      int64_t i = (static_cast<uint32_t>(id) * 2654435769u >> 7) & (m.slots - 1);
      while (m.table_ids[i] != -1 && m.table_ids[i] != id) i = (i + 1) & (m.slots - 1);
      m.table_counts[i] = m.table_ids[i] == id ? m.table_counts[i] + 1 : 1;
      m.table_ids[i] = id;
    }
    bool finite = true;
    for (int64_t i = 0; i < m.slots; i++) {
      const int32_t id = m.table_ids[i];
      if (id < 0) continue;
      float v = to_float(x[id]);
      v = v > 0 ? v / s.repetition : v * s.repetition;
      v = v - m.table_counts[i] * s.frequency - s.presence;
      if (bias) v = v + bias[id];
      m.copy[id] = v;
      finite = finite && v < kInfinity;
    }
    for (int64_t i = 0; i < m.slots; i++)
      if (const int64_t id = m.table_ids[i]; id >= 0)
        m.block_max[id / kBlock] = max_of(z, id / kBlock * kBlock, block_end(id / kBlock));
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t first = c * kBlocksPerChunk;
      m.chunk_max[c] = max_of(m.block_max, first, first + kBlocksPerChunk < blocks ? first + kBlocksPerChunk : blocks);
    }
    return finite;
  }

  // Lists the chunk's logits in [from, to] at keys + at, their ids beside them.
  int64_t gather(int64_t c, float from, float to, int64_t at) const {
    if (m.chunk_max[c] < from) return 0;
    const int64_t start = at;
    for (int64_t b = c * kBlocksPerChunk; b < (c + 1) * kBlocksPerChunk && b < blocks; b++) {
      if (m.block_max[b] < from) continue;
      each(b * kBlock, block_end(b), [&](int64_t i, int64_t n) {
        const V v = get_or_lowest(z + i, n);
        for (uint32_t lanes = bits((v >= from) & (v <= to)); lanes; lanes &= lanes - 1) {
          const int64_t id = i + __builtin_ctz(lanes);
          m.ids[at] = static_cast<int32_t>(id);
          m.keys[at] = z[id];
          at++;
        }
      });
    }
    return at - start;
  }
  // Sums of f(i, lanes) over a list: vectors within a stretch of kChunk, then doubles.
  template <class F>
  double sum_list(int64_t n, const F& f) const {
    double t = 0;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      V s{};
      each(begin, begin + kChunk < n ? begin + kChunk : n, [&](int64_t i, int64_t k) { s = s + f(i, k); });
      t += sum(s);
    }
    return t;
  }
  // The weights of keys[begin, begin + n), each times `factor`.
  void weigh(int64_t begin, int64_t n, float factor = 1) const {
    each(begin, begin + n, [&](int64_t i, int64_t k) { write(m.weights + i, weight(get(m.keys + i, k)) * factor, k); });
  }
  double weigh_all(int64_t n) const {
    weigh(0, n);
    return sum_list(n, [&](int64_t i, int64_t k) { return get(m.weights + i, k); });
  }
  float border_of(const float* keys, const float* weights, int64_t n, double target) const {
    return border({const_cast<float*>(keys), const_cast<float*>(weights), n}, target,
                  {m.spare_keys, m.spare_weights, n});
  }
  int64_t filter(const float* keys, int64_t n, float t) const {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++) {
      const bool stays = keys[i] >= t;
      m.ids[kept] = m.ids[i];
      m.keys[kept] = m.keys[i];
      kept += stays;
    }
    return kept;
  }
  float with_min_p(float t) const {
    const float of_min_p = s.min_p > 0 ? best + __builtin_logf(s.min_p) / cold : -kInfinity;
    return t > of_min_p ? t : of_min_p;
  }

  int64_t greedy_id() const {
    int64_t b = 0;
    while (m.block_max[b] != best) b++;
    int64_t i = b * kBlock;
    while (z[i] != best) i++;
    return i;
  }

  int64_t keep_typical(int64_t n) const {
    const double all = weigh_all(n);
    const double mean = sum_list(n, [&](int64_t i, int64_t k) {  // of (z - best) * cold: log(all) less the entropy
      const V w = get(m.weights + i, k);
      return select(w > 0.0f, w * ((get(m.keys + i, k) - best) * cold), V{});
    });
    const V centre = set(static_cast<float>(mean / all));
    each(0, n,
         [&](int64_t i, int64_t k) { write(m.closeness + i, -abs((get(m.keys + i, k) - best) * cold - centre), k); });
    return filter(m.closeness, n, border_of(m.closeness, m.weights, n, s.typical_p * all));
  }

  int64_t list_from(float t) const {
    int64_t n = 0;
    for (int64_t c = 0; c < chunks; c++) n += gather(c, t > kLowest ? t : kLowest, kInfinity, n);
    return n;
  }

  // All that is left to do with n ids in the list: top-p, where asked, min-p, typical, the draw.
  int64_t draw_from_list(int64_t n, bool nucleus, double u) {
    float t = -kInfinity;
    if (nucleus) {
      const double all = weigh_all(n);
      t = border_of(m.keys, m.weights, n, s.top_p * all);
    }
    t = with_min_p(t);
    if (t > -kInfinity) n = filter(m.keys, n, t);
    if (s.typical_p < 1) n = keep_typical(n);
    total = weigh_all(n);
    for (int64_t i = 0; i < n; i++) given_stays |= m.ids[i] == given;
    double passed = 0;
    int64_t id = 0;
    for (int64_t i = 0; i < n && passed <= u * total; i++) {
      if (m.weights[i] == 0) continue;
      passed += m.weights[i];
      id = m.ids[i];
    }
    return id;
  }

  int64_t draw_top_k(double u) {
    float t = -kInfinity;
    if (s.top_k < vocab && s.top_k > 0) {
      if (s.top_k <= blocks) t = border_of(m.block_max, nullptr, blocks, static_cast<double>(s.top_k));
      int64_t n = list_from(t);
      if (s.top_k < n) n = filter(m.keys, n, border_of(m.keys, nullptr, n, static_cast<double>(s.top_k)));
      return draw_from_list(n, s.top_p < 1, u);
    }
    return draw_from_list(list_from(t), s.top_p < 1, u);
  }

  // Two thresholds that top-p's border is likely to lie between, from the block maxima, which are known, and one more
  // logit of each block, which stands for the rest.
  void estimate(float& low, float& high) const {
    const int64_t n = 2 * blocks;
    std::memcpy(m.keys, m.block_max, blocks * sizeof(float));
    std::memcpy(m.keys + blocks, m.block_sample, blocks * sizeof(float));
    weigh(0, blocks);
    weigh(blocks, blocks, kBlock - 1);
    const double all = sum_list(n, [&](int64_t i, int64_t k) { return get(m.weights + i, k); });
    const double p = s.top_p, margin = 7 * p * (1 - p) / __builtin_sqrt(static_cast<double>(blocks));
    high = p > margin ? border_of(m.keys, m.weights, n, (p - margin) * all) : kInfinity;
    low = p + margin < 1 ? border_of(m.keys, m.weights, n, (p + margin) * all) : -kInfinity;
    if (low > -kInfinity) low = unordered(ordered(low) - 1);  // which may be the border: lies between them, then
  }

  // Top-p's border, from the chunks' sums and a list of the logits between the two thresholds next to it. Leaves in
  // `kept` each chunk's weight from there up.
  float nucleus(float low, float high) const {
    const double target = s.top_p * scaled_total(m.all);
    double above = scaled_total(m.high);
    const float *base = nullptr, *sums[] = {m.high, m.low};
    float from = high, to = kInfinity;
    bool listed = false;
    if (above >= target) {
      above = 0;
    } else {
      const double above_low = scaled_total(m.low);
      listed = above_low >= target;
      base = listed ? sums[0] : sums[1];
      from = listed ? low : -kInfinity;
      to = listed ? high : low;
      above = listed ? above : above_low;
    }
    const float first = from == kInfinity ? from : unordered(ordered(from) + 1);
    if (!listed) each_chunk([&](int64_t c) { m.counts[c] = gather(c, first, to, c * kChunk); });
    int64_t n = 0;
    for (int64_t c = 0; c < chunks; c++) {
      std::memmove(m.keys + n, m.keys + c * kChunk, m.counts[c] * sizeof(float));
      n += m.counts[c];
    }
    weigh(0, n);
    const float t = n ? border_of(m.keys, m.weights, n, target - above) : to;
    for (int64_t c = 0, i = 0; c < chunks; c++) {
      V kept{};
      each(i, i + m.counts[c], [&](int64_t j, int64_t k) {
        kept = kept + select(get_or_lowest(m.keys + j, k) >= t, get(m.weights + j, k), V{});
      });
      m.kept[c] = sum(kept) + (base ? base[c] * m.scale[c] : 0.0f);
      i += m.counts[c];
    }
    return t;
  }

  float sum_from(int64_t c, float t) const {
    V kept{};
    if (m.chunk_max[c] < t) return 0;
    each(c * kChunk, end_of(c), [&](int64_t i, int64_t n) {
      const V v = get_or_lowest(z + i, n);
      kept = kept + select(v >= t, weight(v), V{});
    });
    return sum(kept);
  }

  int64_t draw_wide(float low, float high, double u) {
    float t = -kInfinity;
    if (s.top_p < 1)
      t = nucleus(low, high);
    else
      each(0, chunks, [&](int64_t i, int64_t n) { write(m.kept + i, get(m.all + i, n) * get(m.scale + i, n), n); });
    const float lowest = with_min_p(t);
    if (s.typical_p < 1) return draw_from_list(list_from(lowest), false, u);
    if (lowest > t) each_chunk([&](int64_t c) { m.kept[c] = sum_from(c, lowest); });
    for (int64_t c = 0; c < chunks; c++) total += m.kept[c];
    given_stays = given >= 0 && z[given] >= lowest;
    double passed = 0;
    int64_t chosen = 0;
    for (int64_t c = 0; c < chunks; c++) {
      if (m.kept[c] == 0) continue;
      chosen = c;
      if (passed + m.kept[c] > u * total) break;
      passed += m.kept[c];
    }
    int64_t id = chosen * kChunk;
    for (int64_t i = chosen * kChunk; i < end_of(chosen) && passed <= u * total; i += W) {
      const V v = get_or_lowest(z + i, end_of(chosen) - i < W ? end_of(chosen) - i : W);
      const V w = select(v >= lowest, weight(v), V{});
      for (int k = 0; k < W && passed <= u * total; k++) {
        if (w[k] == 0) continue;
        passed += w[k];
        id = i + k;
      }
    }
    return id;
  }

  SampleStatus run() {
    const bool wide = !greedy && !listed, thresholds = wide && s.top_p < 1, split = penalised || thresholds;
    const bool same = wide && !altered && cold == 1;  // the weights are the exponentials of the logits
    float low = -kInfinity, high = -kInfinity;
    const auto sums = [&](int64_t c) {
      const float raw = m.raw_max[c], largest = m.chunk_max[c];
      if (!wide || altered) sum_chunk<true, false, false>(c, x, raw);
      if (!wide) return;
      if (thresholds)
        altered ? sum_chunk<false, true, true>(c, z, largest, low, high)
                : sum_chunk<true, true, true>(c, z, largest, low, high);
      else if (same)
        sum_chunk<true, false, false>(c, z, largest), m.all[c] = m.raw[c];
      else
        altered ? sum_chunk<false, true, false>(c, z, largest) : sum_chunk<true, true, false>(c, z, largest);
    };
    each_chunk([&](int64_t c) {
      altered ? scan<true>(c) : scan<false>(c);
      if (!split) sums(c);
    });
    uint8_t bad = 0;
    for (int64_t c = 0; c < chunks; c++) bad |= m.bad[c];
    if (bad & 1) return SampleStatus::bad_logits;
    const float raw_best = max_of(m.raw_max, 0, chunks);
    if (raw_best == -kInfinity) return SampleStatus::all_masked;
    if (bad || (penalised && !penalise())) return SampleStatus::bad_processed;
    best = max_of(m.chunk_max, 0, chunks);
    if (best == -kInfinity) return SampleStatus::all_masked_by_bias;
    if (thresholds) estimate(low, high);
    if (split) each_chunk(sums);
    const double raw_total = rescale(m.raw_max, raw_best, 1, m.raw);
    if (wide && !same) rescale(m.chunk_max, best, cold, m.all);

    const double u = uniform(s.seed, s.position);
    const int64_t drawn = greedy ? greedy_id() : wide ? draw_wide(low, high, u) : draw_top_k(u);
    const int64_t id = given < 0 ? drawn : given;
    const bool possible = id == drawn || (given_stays && !greedy);
    a.ids[row] = id;
    a.logprobs[row] = static_cast<float>(static_cast<double>(to_float(x[id])) - raw_best - __builtin_log(raw_total));
    a.processed[row] = !possible ? -kInfinity
                       : greedy  ? 0.0f
                                 : static_cast<float>((z[id] - best) * cold - __builtin_log(total));
    return SampleStatus::ok;
  }
};

}  // namespace

void sample(const SampleArgs& a) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto rows = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) a.status[i] = Row<T>{a, a.settings[i], i}.run();
    };
    if (a.rows >= cpu::num_threads() || a.vocab <= 16 * kChunk)
      parallel_for(a.rows, 16 * kChunk / a.vocab + 1, rows);
    else
      rows(0, a.rows);
  });
}

}  // namespace pyllm::ISA
