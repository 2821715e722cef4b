// Embedding: rows of a table, and the gradient of the table. Forward: a warp takes an id and copies its row; one that is
// not in the table is reported, and its row is NaN.
//
// Backward has no atomics, so that the sums have one order. An id's place in the sorted order is a count: how many ids are
// smaller, and how many equal ones stand before it. That is a comparison of each with each, some 10^8 of which take a
// GPU some microseconds; it costs less than a sort up to about 10^5 ids, and more beyond. Then the first of each run of
// equal ids has a block sum the rows of the run, in the order of their positions.
#include "cuda/embedding.h"

#include "cuda/numbers.h"

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

// sorted[place of position i] = i, for the ids in the vocabulary; -1 for the rest, which come last.
__global__ void __launch_bounds__(kThreads) sort_ids(EmbeddingBackwardArgs a, int64_t* sorted, FaultRecord* record) {
  __shared__ int64_t tile[kThreads];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto key_at = [&](int64_t at) {
    const int64_t id = integer_at(a.ids, a.ids_dtype, at);
    return id >= 0 && id < a.vocabulary ? id : INT64_MAX;
  };
  const int64_t key = i < a.count ? key_at(i) : INT64_MAX;
  int64_t place = 0;
  for (int64_t first = 0; first < a.count; first += kThreads) {
    __syncthreads();
    if (first + threadIdx.x < a.count) tile[threadIdx.x] = key_at(first + threadIdx.x);
    __syncthreads();
    const int64_t n = a.count - first < kThreads ? a.count - first : kThreads;
    for (int64_t j = 0; j < n; j++) place += tile[j] < key || (tile[j] == key && first + j < i);
  }
  if (i >= a.count) return;
  if (key == INT64_MAX) report(record, Fault::embedding_id, i, integer_at(a.ids, a.ids_dtype, i), a.vocabulary);
  sorted[place] = key == INT64_MAX ? -1 : i;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_runs(EmbeddingBackwardArgs a, const int64_t* sorted) {
  const int64_t position = sorted[blockIdx.x];
  if (position < 0) return;
  const int64_t id = integer_at(a.ids, a.ids_dtype, position);
  const auto same = [&](int64_t place) {
    return sorted[place] >= 0 && integer_at(a.ids, a.ids_dtype, sorted[place]) == id;
  };
  if (blockIdx.x > 0 && same(blockIdx.x - 1)) return;
  T* out = reinterpret_cast<T*>(a.dweight) + id * a.width;
  for (int64_t column = threadIdx.x; column < a.width; column += blockDim.x) {
    float sum = 0;
    for (int64_t place = blockIdx.x; place < a.count && same(place); place++)
      sum += to_float(reinterpret_cast<const T*>(a.dy)[sorted[place] * a.dy_step + column]);
    out[column] = from_float<T>(sum);
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
  if (!a.zeroed) set_zero(a.dweight, a.vocabulary * a.width * size_of(a.dtype), work);
  const Scratch sorted(work, a.count * sizeof(int64_t));
  launch(sort_ids, {divided_up(a.count, kThreads)}, dim3(kThreads), 0, work, a, sorted.as<int64_t>(),
         fault_record(work.device));
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(sum_runs<T>, {a.count}, dim3(kThreads), 0, work, a, sorted.as<const int64_t>());
  });
}

}  // namespace pyllm::cuda
