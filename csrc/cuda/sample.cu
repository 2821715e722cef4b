// Sampling from a row of logits without sorting it, a block a row. What the CPU's kernel promises is promised here: the
// same steps, and a draw by the same random number, the first id in ascending order at which the sum of the probabilities
// left passes it. (Where sums differ in their last bits, a border or a draw that is that close may fall differently.)
//
// Top-k, top-p and typical sampling each look for a border: the smallest t such that the keys above t weigh less than a
// target. It is found in three passes over the row: the first adds up the weights of the keys by their upper 11 bits, the
// second, of those whose upper bits are the border's, by the next 11, the last by the rest. There weights are whole
// numbers, whose sums have no order; all other sums have one that the row's length fixes. Nothing is taken out of the
// row: a key counts if its logit is at least `lowest`.
#include "cuda/sample.h"

#include "cuda/numbers.h"
#include "philox.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 2048, kBits = 11;
constexpr int64_t kChunk = 1024;  // ids whose weights are summed together for the draw

// Floats and whole numbers in the same order.
__device__ __forceinline__ uint32_t ordered(float x) {
  const auto bits = static_cast<uint32_t>(__float_as_int(x));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(uint32_t i) {
  return __int_as_float(static_cast<int32_t>(i >> 31 ? i & 0x7fffffffu : ~i));
}

struct Room {  // for the threads' results
  double sums[kWarp];
  float most[kWarp];
  int64_t id;
  double total;
  unsigned long long weights[kBins], parts[kWarp], above;  // for the border
  int bin;
};

// f(i) for each id, neighbours to neighbouring threads.
template <class F>
__device__ __forceinline__ void each(int64_t vocab, const F& f) {
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) f(i);
}

// A weight of at most 1 as a whole number; those of 2^28 ids have a sum in 64 bits.
__device__ __forceinline__ unsigned long long whole(float weight) {
  return static_cast<unsigned long long>(weight * 0x1p36f);
}

struct Key {
  bool counts;
  float key;
  unsigned long long weight;
};

// The highest bin with which the weights of the bins from there up, and `above`, reach the target; -1 if none does.
__device__ int reached_at(double target, unsigned long long above, Room& room) {
  constexpr int kEach = kBins / kThreads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp,
            top = kBins - 1 - static_cast<int>(threadIdx.x) * kEach;
  unsigned long long mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; i++) mine += room.weights[top - i];
  unsigned long long up_to = mine;  // this thread, of the warp's
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const unsigned long long other = __shfl_up_sync(~0u, up_to, by);
    if (lane >= by) up_to += other;
  }
  if (lane == kWarp - 1) room.parts[warp] = up_to;
  if (threadIdx.x == 0) room.bin = -1;
  __syncthreads();
  unsigned long long before = above + up_to - mine;
  for (int w = 0; w < warp; w++) before += room.parts[w];
  if (static_cast<double>(before) < target && static_cast<double>(before + mine) >= target) {  // one thread at most
    int bin = top;
    while (static_cast<double>(before + room.weights[bin]) < target) before += room.weights[bin--];
    room.bin = bin;
    room.above = before;
  }
  __syncthreads();
  return room.bin;
}

// The border of the keys key_of(i), which is one of them; -infinity where all together weigh less than `target`.
template <class F>
__device__ float border(int64_t vocab, double target, Room& room, const F& key_of) {
  uint32_t found = 0;  // the upper bits of the border
  unsigned long long above = 0;
  for (int left = 32; left > 0;) {  // bits
    const int shift = left > kBits ? left - kBits : 0;
    for (int i = threadIdx.x; i < kBins; i += kThreads) room.weights[i] = 0;
    __syncthreads();
    each(vocab, [&](int64_t i) {
      const Key k = key_of(i);
      const uint32_t bits = ordered(k.key);
      if (k.counts && (left == 32 || bits >> left == found))
        atomicAdd(&room.weights[bits >> shift & (kBins - 1)], k.weight);
    });
    __syncthreads();
    const int bin = reached_at(target, above, room);
    if (bin < 0) return -INFINITY;
    above = room.above;
    found = found << (left - shift) | static_cast<uint32_t>(bin);
    left = shift;
  }
  return unordered(found);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    draw(SampleArgs a, float* logits, int32_t* counts, double* chunk_sums, FaultRecord* record) {
  __shared__ Room room;
  const int64_t row = blockIdx.x, vocab = a.vocab, chunks = divided_up(vocab, kChunk);
  const SampleSettings s = a.settings[row];
  const T* x = reinterpret_cast<const T*>(a.logits) + row * a.logits_stride;
  const float* bias = a.bias ? a.bias + row * a.bias_stride : nullptr;
  float* z = logits + row * vocab;
  const bool penalised = a.history_length > 0 && (s.repetition != 1 || s.frequency != 0 || s.presence != 0);
  const bool greedy = s.temperature == 0;
  const float cold = greedy ? 1.0f : s.temperature < 1e-30f ? 1e30f : 1.0f / s.temperature;

  // 1. Penalties and bias; what is wrong with a row.
  int32_t* seen = counts + (penalised ? row * vocab : 0);  // how often an id is in the history
  if (penalised) {
    each(vocab, [&](int64_t i) { seen[i] = 0; });
    __syncthreads();
    const int64_t* history = a.history + row * a.history_stride;
    for (int64_t j = threadIdx.x; j < a.history_length; j += kThreads) {
      const int64_t id = history[j * a.history_step];
      if (id < -1 || id >= vocab) report(record, Fault::history_id, row * a.history_length + j, id, vocab);
      if (id >= 0 && id < vocab) atomicAdd(&seen[id], 1);
    }
    __syncthreads();
  }
  float raw_best = -INFINITY, best = -INFINITY, raw_bad = 0, bad = 0;
  each(vocab, [&](int64_t i) {
    float v = to_float(x[i]);
    if (!(v < INFINITY)) raw_bad = 1;
    raw_best = fmaxf(raw_best, v);
    if (penalised && seen[i] > 0) {
      v = v > 0 ? v / s.repetition : v * s.repetition;
      v = v - static_cast<float>(seen[i]) * s.frequency - s.presence;
    }
    if (bias) v += bias[i];
    if (!(v < INFINITY)) bad = 1;
    z[i] = v;
    best = fmaxf(best, v);
  });
  raw_best = row_max(raw_best, room.most);
  best = row_max(best, room.most);
  raw_bad = row_max(raw_bad, room.most);
  bad = row_max(bad, room.most);
  const Fault fault = raw_bad > 0             ? Fault::logits_not_finite
                      : raw_best == -INFINITY ? Fault::logits_all_masked
                      : bad > 0               ? Fault::processed_not_finite
                      : best == -INFINITY     ? Fault::processed_all_masked
                                              : Fault::none;
  if (fault != Fault::none) {
    if (threadIdx.x == 0) {
      report(record, fault, row, 0, 0);
      a.ids[row] = 0;
      a.logprobs[row] = a.processed[row] = NAN;
    }
    return;
  }
  double raw_total = 0;
  each(vocab, [&](int64_t i) { raw_total += expf(to_float(x[i]) - raw_best); });
  raw_total = row_sum(raw_total, room.sums);
  float lowest = -INFINITY, closest = -INFINITY;  // a logit's least, and, for typical sampling, its closeness's
  float centre = 0;
  const auto scaled = [&](int64_t i) { return (z[i] - best) * cold; };
  const auto closeness = [&](int64_t i) { return -fabsf(scaled(i) - centre); };
  // With the id that is given, or else drawn; `total` is that of the weights.
  const auto finish = [&](int64_t drawn, double total) {
    const int64_t given = a.given ? a.given[row] : -1;
    const bool good = given >= -1 && given < vocab;
    if (!good) report(record, Fault::given_id, row, given, vocab);
    const int64_t id = good && given >= 0 ? given : drawn;
    const bool possible = id == drawn || (!greedy && z[id] >= lowest && closeness(id) >= closest);
    a.ids[row] = id;
    a.logprobs[row] = good ? static_cast<float>(static_cast<double>(to_float(x[id])) - raw_best - log(raw_total)) : NAN;
    a.processed[row] = !good       ? NAN
                       : !possible ? -INFINITY
                       : greedy    ? 0.0f
                                   : static_cast<float>(scaled(id) - log(total));
  };
  if (greedy) {
    float first = -INFINITY;  // minus the lowest id with the largest logit, in two parts that a float holds exactly
    float rest = -INFINITY;
    each(vocab, [&](int64_t i) {
      if (z[i] == best && first == -INFINITY)
        first = -static_cast<float>(i / kChunk), rest = -static_cast<float>(i % kChunk);
    });
    const float chunk = row_max(first, room.most), within = row_max(first == chunk ? rest : -INFINITY, room.most);
    if (threadIdx.x == 0) finish(static_cast<int64_t>(-chunk) * kChunk + static_cast<int64_t>(-within), 1);
    return;
  }

  // 2. Which ids stay.
  const auto weight = [&](int64_t i) { return z[i] >= lowest && closeness(i) >= closest ? expf(scaled(i)) : 0.0f; };
  const auto stays = [&](int64_t i) { return z[i] > -INFINITY && z[i] >= lowest; };
  const auto weigh = [&] {
    double sum = 0;
    each(vocab, [&](int64_t i) { sum += weight(i); });
    return row_sum(sum, room.sums);
  };
  // That many of all the weights together.
  const auto share = [&](float of) {
    unsigned long long all = 0;
    each(vocab, [&](int64_t i) { all += whole(weight(i)); });
    return static_cast<double>(of) * static_cast<double>(row_sum(all, room.parts));
  };
  if (s.top_k > 0 && s.top_k < vocab)
    lowest = border(vocab, static_cast<double>(s.top_k), room, [&](int64_t i) { return Key{stays(i), z[i], 1}; });
  if (s.top_p < 1)
    lowest = border(vocab, share(s.top_p), room, [&](int64_t i) { return Key{stays(i), z[i], whole(weight(i))}; });
  if (s.min_p > 0) lowest = fmaxf(lowest, best + logf(s.min_p) / cold);
  if (s.typical_p < 1) {
    const double all = weigh();
    double mean = 0;  // of the scaled logits: log(all) less the entropy
    each(vocab, [&](int64_t i) {
      const float w = weight(i);
      if (w > 0) mean += w * scaled(i);
    });
    centre = static_cast<float>(row_sum(mean, room.sums) / all);
    closest = border(vocab, share(s.typical_p), room,
                     [&](int64_t i) { return Key{stays(i), closeness(i), whole(weight(i))}; });
  }

  // 3. The draw: a warp sums a chunk; one thread finds the chunk, one warp the id.
  double* sums = chunk_sums + row * chunks;
  const int lane = threadIdx.x % kWarp;
  for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kThreads / kWarp) {
    double sum = 0;
    const int64_t end = (c + 1) * kChunk < vocab ? (c + 1) * kChunk : vocab;
    for (int64_t i = c * kChunk + lane; i < end; i += kWarp) sum += weight(i);
    sum = warp_sum(sum);
    if (lane == 0) sums[c] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0, passed = 0;
    for (int64_t c = 0; c < chunks; c++) total += sums[c];
    const double point = uniform(static_cast<uint64_t>(s.seed), static_cast<uint64_t>(s.position)) * total;
    int64_t chosen = 0;
    for (int64_t c = 0; c < chunks; c++) {
      if (sums[c] == 0) continue;
      chosen = c;
      if (passed + sums[c] > point) break;
      passed += sums[c];
    }
    room.id = chosen;
    room.total = total;
    room.sums[0] = point - passed;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const int64_t chunk = room.id, end = (chunk + 1) * kChunk < vocab ? (chunk + 1) * kChunk : vocab;
  const double point = room.sums[0], total = room.total;
  double passed = 0;
  int64_t id = -1;  // the first that passes the point, or else the last with a weight
  for (int64_t first = chunk * kChunk; first < end; first += kWarp) {
    const float w = first + lane < end ? weight(first + lane) : 0.0f;
    for (int l = 0; l < kWarp; l++) {
      const float other = __shfl_sync(~0u, w, l);
      if (other == 0 || (id >= 0 && passed > point)) continue;
      passed += other;
      id = first + l;
    }
  }
  if (lane == 0) finish(id, total);
}

}  // namespace

void sample(const SampleArgs& a, const Work& work) {
  if (a.rows == 0) return;
  refuse_capture("sample", work);  // where settings and positions would be those of now each time
  const size_t bytes = a.rows * sizeof(SampleSettings);
  const Scratch settings(work, bytes), logits(work, a.rows * a.vocab * sizeof(float));
  const Scratch sums(work, a.rows * divided_up(a.vocab, kChunk) * sizeof(double));
  const Scratch counts(work, a.history_length > 0 ? a.rows * a.vocab * sizeof(int32_t) : 0);
  check_cuda(cudaMemcpyAsync(settings.as<void>(), a.settings, bytes, cudaMemcpyHostToDevice,
                             static_cast<cudaStream_t>(work.stream)),
             "copying settings");
  SampleArgs on_device = a;
  on_device.settings = settings.as<SampleSettings>();
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(draw<T>, {a.rows}, dim3(kThreads), 0, work, on_device, logits.as<float>(), counts.as<int32_t>(),
           sums.as<double>(), fault_record(work.device));
  });
}

}  // namespace pyllm::cuda
