// Embedding: rows of a table, and the gradient of the table. Forward: a warp takes an id and copies its row; one that is
// not in the table is reported, and its row is NaN.
//
// Backward sorts the ids, stably, with where they stand: from the lowest 8 bits up, in each pass a count of the digits of
// every block's ids, the sums of the counts before each, and every id to its place. Then a block sums the rows of each run
// of equal ids in 64 places of the sorted order; runs that cross such borders leave partial sums, which are added in order.
// Nothing is added to floats by several threads, so the sums have one order.
#include "cuda/embedding.h"

#include <utility>

#include "cuda/numbers.h"
#include "tensor.h"

namespace pyllm::cuda {
namespace {

constexpr int kThreads = 256;

template <class Word>
__global__ void __launch_bounds__(kThreads)
    copy_rows(EmbeddingArgs a, int64_t words, int64_t step, int64_t nan, FaultRecord* record) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < a.count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t id = integer_at(a.ids, a.ids_dtype, i);
    const bool good = id >= 0 && id < a.vocabulary;
    if (!good && threadIdx.x == 0) report(record, Fault::embedding_id, i, id, a.vocabulary);
    const Word* from = reinterpret_cast<const Word*>(a.weight) + (good ? id * step : 0);
    Word* to = reinterpret_cast<Word*>(a.out) + i * words;
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) {
      if (good) {
        to[w] = from[w];
      } else if constexpr (sizeof(Word) == 16) {
        const auto half = static_cast<uint32_t>(nan);
        to[w] = Word{half, half, half, half};
      } else {
        to[w] = static_cast<Word>(nan);
      }
    }
  }
}

constexpr int kDigits = 256, kBits = 8;
constexpr int64_t kTile = 8 * kThreads;  // ids that a block sorts
constexpr int kPlaces = 64;              // of the sorted ids whose rows are summed together

struct Ids {  // with where they stood; an id that is not in the vocabulary has become its size, and comes last
  uint32_t *id, *position;
};

// What a pass sorts: the ids as they are given, or as the pass before left them.
__device__ __forceinline__ uint32_t id_at(const EmbeddingBackwardArgs& a, const Ids& from, int64_t i) {
  if (from.id) return from.id[i];
  const int64_t id = integer_at(a.ids, a.ids_dtype, i);
  return static_cast<uint32_t>(id >= 0 && id < a.vocabulary ? id : a.vocabulary);
}

// counts (digits, blocks)
__global__ void __launch_bounds__(kThreads)
    count_digits(EmbeddingBackwardArgs a, Ids from, int shift, uint32_t* counts, FaultRecord* record) {
  __shared__ uint32_t mine[kDigits];
  mine[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * kTile, last = first + kTile < a.count ? first + kTile : a.count;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
    const uint32_t id = id_at(a, from, i);
    if (id == a.vocabulary && !from.id)
      report(record, Fault::embedding_id, i, integer_at(a.ids, a.ids_dtype, i), a.vocabulary);
    atomicAdd(&mine[id >> shift & (kDigits - 1)], 1u);
  }
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = mine[threadIdx.x];
}

// Each count becomes the sum of those before it; one block.
__global__ void __launch_bounds__(1024) add_before(uint32_t* counts, int64_t n) {
  __shared__ uint32_t parts[kWarp];
  const int64_t each = divided_up(n, 1024), first = threadIdx.x * each, last = first + each < n ? first + each : n;
  uint32_t mine = 0;
  for (int64_t i = first; i < last; i++) mine += counts[i];
  uint32_t before = mine;
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, before, by);
    if (static_cast<int>(threadIdx.x) % kWarp >= by) before += other;
  }
  if (threadIdx.x % kWarp == kWarp - 1) parts[threadIdx.x / kWarp] = before;
  __syncthreads();
  before -= mine;
  for (unsigned w = 0; w < threadIdx.x / kWarp; w++) before += parts[w];
  for (int64_t i = first; i < last; i++) {
    const uint32_t count = counts[i];
    counts[i] = before;
    before += count;
  }
}

__global__ void __launch_bounds__(kThreads)
    move_ids(EmbeddingBackwardArgs a, Ids from, Ids to, int shift, const uint32_t* before) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ uint32_t next[kDigits], counts[kWarps][kDigits];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  next[threadIdx.x] = before[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
  const int64_t first = blockIdx.x * kTile, last = first + kTile < a.count ? first + kTile : a.count;
  for (int64_t round = first; round < last; round += kThreads) {
    const int64_t i = round + threadIdx.x;
    const uint32_t id = i < last ? id_at(a, from, i) : 0;
    const int digit = i < last ? static_cast<int>(id >> shift & (kDigits - 1)) : kDigits;
    int equal = 0, earlier = 0;  // lanes
    for (int l = 0; l < kWarp; l++) {
      const bool same = __shfl_sync(~0u, digit, l) == digit;
      equal += same;
      earlier += same && l < lane;
    }
    for (int w = 0; w < kWarps; w++) counts[w][threadIdx.x] = 0;
    __syncthreads();
    if (i < last && earlier == 0) counts[warp][digit] = equal;
    __syncthreads();
    if (i < last) {
      uint32_t place = next[digit] + earlier;
      for (int w = 0; w < warp; w++) place += counts[w][digit];
      to.id[place] = id;
      to.position[place] = from.id ? from.position[i] : static_cast<uint32_t>(i);
    }
    __syncthreads();
    for (int w = 0; w < kWarps; w++) next[threadIdx.x] += counts[w][threadIdx.x];
  }
}

// partial: (chunks of places, 2, width): of a run that began before the chunk, and of one that ends after it.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_runs(EmbeddingBackwardArgs a, Ids sorted, float* partial) {
  __shared__ uint32_t ids[kPlaces], positions[kPlaces];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPlaces;
  const int n = static_cast<int>(a.count - first < kPlaces ? a.count - first : kPlaces);
  if (static_cast<int>(threadIdx.x) < n) {
    ids[threadIdx.x] = sorted.id[first + threadIdx.x];
    positions[threadIdx.x] = sorted.position[first + threadIdx.x];
  }
  __syncthreads();
  const bool goes_on = first > 0 && sorted.id[first - 1] == ids[0];
  const bool ends_later = first + n < a.count && sorted.id[first + n] == ids[n - 1];
  for (int64_t column = threadIdx.x; column < a.width; column += kThreads) {
    float sum = 0;
    bool from_before = goes_on;
    for (int p = 0; p < n && ids[p] < a.vocabulary; p++) {
      sum += to_float(reinterpret_cast<const T*>(a.dy)[positions[p] * a.dy_step + column]);
      if (p + 1 < n && ids[p + 1] == ids[p]) continue;
      if (from_before)
        partial[blockIdx.x * 2 * a.width + column] = sum;
      else if (p + 1 == n && ends_later)
        partial[(blockIdx.x * 2 + 1) * a.width + column] = sum;
      else
        reinterpret_cast<T*>(a.dweight)[ids[p] * a.width + column] = from_float<T>(sum);
      sum = 0;
      from_before = false;
    }
  }
}

// The run that begins in a chunk and ends after it, if there is one.
template <class T>
__global__ void __launch_bounds__(kThreads) join_runs(EmbeddingBackwardArgs a, Ids sorted, const float* partial) {
  const int64_t end = (static_cast<int64_t>(blockIdx.x) + 1) * kPlaces;
  if (end >= a.count) return;
  const uint32_t id = sorted.id[end];
  if (id >= a.vocabulary || sorted.id[end - 1] != id || (end > kPlaces && sorted.id[end - kPlaces - 1] == id)) return;
  for (int64_t column = threadIdx.x; column < a.width; column += kThreads) {
    float sum = partial[(blockIdx.x * 2 + 1) * a.width + column];
    for (int64_t place = end; place < a.count && sorted.id[place] == id; place += kPlaces)
      sum += partial[place / kPlaces * 2 * a.width + column];
    reinterpret_cast<T*>(a.dweight)[id * a.width + column] = from_float<T>(sum);
  }
}

}  // namespace

void embedding_forward(const EmbeddingArgs& a, const Work& work) {
  const int64_t size = size_of(a.dtype), bytes = a.width * size, step = a.weight_step * size;
  const auto run = [&](auto* tag, int64_t nan) {
    using Word = std::remove_pointer_t<decltype(tag)>;
    constexpr int64_t kBytes = sizeof(Word);
    launch(copy_rows<Word>, {blocks_for(divided_up(a.count, kThreads / kWarp))}, dim3(kWarp, kThreads / kWarp), 0, work,
           a, bytes / kBytes, step / kBytes, nan, fault_record(work.device));
  };
  if (bytes == 0) return;
  const int64_t nan = size == 4 ? 0x7fffffff : 0x7fff7fff;  // 0x7fff is NaN as bfloat16 and as float16
  if (whole_packs(a.weight, step) && whole_packs(a.out, bytes))
    run(static_cast<uint4*>(nullptr), nan);
  else if (size == 4)
    run(static_cast<uint32_t*>(nullptr), nan);
  else
    run(static_cast<uint16_t*>(nullptr), nan);
}

void embedding_backward(const EmbeddingBackwardArgs& a, const Work& work) {
  if (a.count > 0 && (a.vocabulary >= UINT32_MAX || a.count > UINT32_MAX))
    fail(Error::value,
         "[embedding] a gradient on a CUDA device must be of fewer than 4294967295 rows and ids, but got ",
         a.vocabulary, " and ", a.count);
  if (!a.zeroed) set_zero(a.dweight, a.vocabulary * a.width * size_of(a.dtype), work);
  if (a.count == 0) return;
  const int64_t blocks = divided_up(a.count, kTile), chunks = divided_up(a.count, kPlaces);
  const Scratch ids(work, 4 * a.count * sizeof(uint32_t)), counts(work, kDigits * blocks * sizeof(uint32_t));
  const Scratch partial(work, chunks * 2 * a.width * sizeof(float));
  auto* const room = ids.as<uint32_t>();
  Ids from{}, to{room, room + a.count}, spare{room + 2 * a.count, room + 3 * a.count};
  for (int shift = 0; shift == 0 || a.vocabulary >> shift > 0; shift += kBits) {
    launch(count_digits, {blocks}, dim3(kThreads), 0, work, a, from, shift, counts.as<uint32_t>(),
           fault_record(work.device));
    launch(add_before, {1}, dim3(1024), 0, work, counts.as<uint32_t>(), kDigits * blocks);
    launch(move_ids, {blocks}, dim3(kThreads), 0, work, a, from, to, shift, counts.as<const uint32_t>());
    from = to;
    std::swap(to, spare);
  }
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(sum_runs<T>, {chunks}, dim3(kThreads), 0, work, a, from, partial.as<float>());
    launch(join_runs<T>, {chunks}, dim3(kThreads), 0, work, a, from, partial.as<const float>());
  });
}

}  // namespace pyllm::cuda
