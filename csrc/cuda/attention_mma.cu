// Attention, forward, of bfloat16 and float16 through the matrix instructions of a warp: tiles of 16 rows a warp, an
// online softmax over tiles of keys (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Scores, their maxima and sums
// and the output so far stay in registers, in the layout that the instruction leaves them in: a lane holds two rows, and
// four lanes share one. Exponentials are rounded to the storage type for the second product; sums are of those before
// rounding. Keys and values come by asynchronous copies, in two stages where there is room.
//
// A masked key has a weight of zero, but is multiplied all the same: a value there that is not finite makes NaN of the rows
// that share its tile (keys beyond a sequence's length are never read).
//
// Shared memory holds rows of kDim elements (beyond the head's size: zeros) in chunks of 16 bytes; chunk c of row r stands
// at c ^ (r % 8), so that the eight rows that an ldmatrix reads lie in different banks.
//
// Four warps take 64 rows; where a sequence has few rows (decoding), one warp takes them and a split of the keys, and the
// floor is reading the keys and values once.
#include <type_traits>

#include "cuda/attention_rows.h"
#include "cuda/matrix.h"

namespace pyllm::cuda {
namespace {

template <int kDim, int kWarps>
struct Shape {
  static constexpr int kRows = 16 * kWarps, kThreads = kWarp * kWarps, kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr size_t kBytes = (kRows + 2 * kStages * kKeys) * kDim * 2;
};

template <int kDim, class T>
__device__ __forceinline__ T* chunk_at(T* rows, int row, int chunk) {
  return rows + row * kDim + ((chunk ^ (row % 8)) * 8);
}

// Rows [0, count) at row_of(i), each `dim` elements, to shared memory, and zeros beyond, for which `valid` is not read.
template <int kDim, int kThreads, class T, class F>
__device__ __forceinline__ void copy_rows(T* to, int rows, int count, int dim, const void* valid, const F& row_of) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int left = row < count ? dim - chunk * 8 : 0, taken = left < 0 ? 0 : left < 8 ? left : 8;
    copy_async(chunk_at<kDim>(to, row, chunk), taken ? row_of(row) + chunk * 8 : valid, taken * 2);
  }
}

template <class T, int kDim, int kWarps>
__global__ void __launch_bounds__(kWarp* kWarps)
    walk(AttentionForwardArgs f, Partials partials, int64_t tiles, FaultRecord* record) {
  using S = Shape<kDim, kWarps>;
  constexpr int kKeys = S::kKeys, kTiles = kKeys / 8;  // tiles of 8 keys, as the instruction takes them
  const AttentionArgs& a = f.in;
  T* const queries = reinterpret_cast<T*>(shared_memory());
  T* const keys = queries + S::kRows * kDim;           // kStages times kKeys rows
  T* const values = keys + S::kStages * kKeys * kDim;  // likewise

  // The last tile of rows first: with a causal mask it has the most keys.
  const int64_t splits = partials.max ? partials.splits : 1, split = blockIdx.x % splits;
  const int64_t tile_index = tiles - 1 - blockIdx.x / splits % tiles, head = blockIdx.x / splits / tiles;
  const Tile t = tile_of(a, head / a.kv_heads, head % a.kv_heads, tile_index * S::kRows, S::kRows, record);
  Range range = seen_by_some(a, t);
  if (partials.max) {
    if (range.lo < split * kSplit) range.lo = split * kSplit;
    if (range.hi > (split + 1) * kSplit) range.hi = (split + 1) * kSplit;
  }
  const int64_t first_key = range.lo / kKeys * kKeys;
  const int64_t steps = range.lo < range.hi ? divided_up(range.hi - first_key, kKeys) : 0;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, pair = lane % 4 * 2;
  const int row0 = warp * 16 + group;  // and row0 + 8
  const RowMask masks[2] = {mask_of(a, t, row0), mask_of(a, t, row0 + 8)};
  // Keys that every row of the tile sees need no mask.
  const Range by_all{visible(a, t.length, t.query(t.count - 1)).lo, visible(a, t.length, t.query(0)).hi};
  const bool plain = !a.query_segments && !a.bias && a.softcap == 0;

  const auto load_keys = [&](int64_t step) {
    const int64_t first = first_key + step * kKeys;
    const int stage = static_cast<int>(step % S::kStages);
    const int count = static_cast<int>(t.length - first < kKeys ? t.length - first : kKeys);
    // A tile lies within one page.
    const T* k = key_at<T>(a, a.k, a.k_step, t, first, record);
    const T* v = key_at<T>(a, a.v, a.v_step, t, first, record);
    copy_rows<kDim, S::kThreads>(keys + stage * kKeys * kDim, kKeys, k ? count : 0, static_cast<int>(a.dim), a.q,
                                 [&](int j) { return k + j * a.k_step[1]; });
    copy_rows<kDim, S::kThreads>(values + stage * kKeys * kDim, kKeys, v ? count : 0, static_cast<int>(a.value_dim),
                                 a.q, [&](int j) { return v + j * a.v_step[1]; });
  };

  copy_rows<kDim, S::kThreads>(queries, S::kRows, static_cast<int>(t.count), static_cast<int>(a.dim), a.q,
                               [&](int i) { return query_at<T>(a.q, a.q_step, t, i); });
  if (steps > 0) load_keys(0);
  end_of_copies();

  float out[kDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int64_t step = 0; step < steps; step++) {
    if (step + 1 < steps) load_keys(step + 1);
    end_of_copies();
    wait_for_copies<1>();
    __syncthreads();
    T* const k = keys + step % S::kStages * kKeys * kDim;
    T* const v = values + step % S::kStages * kKeys * kDim;

    float scores[kTiles][4] = {};
#pragma unroll
    for (int d = 0; d < kDim / 16; d++) {
      uint32_t q[4];  // 16 rows by 16 elements of the head
      load_matrices<false>(q, chunk_at<kDim>(queries, warp * 16 + lane % 16, d * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];  // 16 keys by 16 elements: the two halves of 8 keys, then of the next 8
        load_matrices<false>(b, chunk_at<kDim>(k, n * 8 + lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
        multiply_add<T>(scores[n], q, {b[0], b[1]});
        multiply_add<T>(scores[n + 1], q, {b[2], b[3]});
      }
    }

    const int64_t first = first_key + step * kKeys;
    const bool whole = plain && first >= by_all.lo && first + kKeys <= by_all.hi;
    const float factor = product_factor(a);
    float most[2] = {max[0], max[1]};
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int64_t key = first + n * 8 + pair + i % 2;
        float capped = 0;
        scores[n][i] = whole ? scores[n][i] * factor : score_of(a, t, masks[i / 2], key, scores[n][i], capped);
        most[i / 2] = fmaxf(most[i / 2], scores[n][i]);
      }
    float rescale[2], base[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      base[r] = finite_or_zero(most[r]);
      rescale[r] = exp2f(max[r] - base[r]);
      max[r] = most[r];
      sum[r] *= rescale[r];
    }
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scores[n][i] = exp2f(scores[n][i] - base[i / 2]);
        sum[i / 2] += scores[n][i];
      }
#pragma unroll
    for (int d = 0; d < kDim / 8; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) out[d][i] *= rescale[i / 2];
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const uint32_t p[4] = {two<T>(scores[n][0], scores[n][1]), two<T>(scores[n][2], scores[n][3]),
                             two<T>(scores[n + 1][0], scores[n + 1][1]), two<T>(scores[n + 1][2], scores[n + 1][3])};
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t b[4];  // 16 keys by 16 elements of the value
        load_matrices<true>(b, chunk_at<kDim>(v, n * 8 + lane % 16, d + lane / 16));
        multiply_add<T>(out[d], p, {b[0], b[1]});
        multiply_add<T>(out[d + 1], p, {b[2], b[3]});
      }
    }
    __syncthreads();  // before the next copies overwrite this stage
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; r++) {  // four lanes have the sum of a row
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = row0 + r * 8;
    if (row >= t.count) continue;
    const float scale = partials.max ? 1.0f : sum[r] == 0 ? 0.0f : 1.0f / sum[r];
    const int64_t partial = partials.max ? partial_at(a, t, partials, row, split) : 0;
    T* to = reinterpret_cast<T*>(f.out) + out_row(a, t, row) * a.value_dim;
#pragma unroll
    for (int d = 0; d < kDim / 8; d++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = d * 8 + pair + i;
        if (column >= a.value_dim) continue;
        if (partials.max)
          partials.values[partial * a.value_dim + column] = out[d][r * 2 + i];
        else
          to[column] = from_float<T>(out[d][r * 2 + i] * scale);
      }
    if (lane % 4 != 0) continue;
    if (partials.max) {
      partials.max[partial] = max[r];
      partials.sum[partial] = sum[r];
    } else if (f.lse) {
      f.lse[lse_at(a, t, row)] = lse_of(max[r], sum[r]);
    }
  }
}

template <class T, int kDim, int kWarps>
void run(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  using S = Shape<kDim, kWarps>;
  const AttentionArgs& a = f.in;
  const int64_t tiles = divided_up(a.queries * (a.heads / a.kv_heads), S::kRows);
  launch(walk<T, kDim, kWarps>, {a.batch * a.kv_heads * tiles * (partials.max ? partials.splits : 1)},
         dim3(S::kThreads), S::kBytes, work, f, partials, tiles, fault_record(work.device));
}

template <class T, int kDim>
void run(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  partials.max ? run<T, kDim, 1>(f, partials, work) : run<T, kDim, 4>(f, partials, work);
}

template <class T>
void run(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  const int64_t dim = std::max(f.in.dim, f.in.value_dim);
  dim <= 64    ? run<T, 64>(f, partials, work)
  : dim <= 128 ? run<T, 128>(f, partials, work)
               : run<T, 256>(f, partials, work);
}

}  // namespace

bool forward_by_matrices(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  const AttentionArgs& a = f.in;
  if (a.dtype == DType::f32 || a.dim % 8 != 0 || a.value_dim % 8 != 0) return false;
  bool whole = whole_packs(a.q) && whole_packs(a.k) && whole_packs(a.v);
  for (int i = 0; i < 3; i++) whole = whole && a.q_step[i] % 8 == 0 && a.k_step[i] % 8 == 0 && a.v_step[i] % 8 == 0;
  if (!whole) return false;
  a.dtype == DType::bf16 ? run<bf16>(f, partials, work) : run<f16>(f, partials, work);
  return true;
}

}  // namespace pyllm::cuda
