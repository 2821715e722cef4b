// Attention, forward, of bfloat16 and float16 through the matrix instructions of a warp: tiles of 16 rows a warp, an
// online softmax over tiles of keys (Dao et al., 2022, https://arxiv.org/abs/2205.14135). Scores, their maxima and sums
// and the output so far stay in registers, in the layout that the instruction leaves them in: a lane holds two rows, and
// four lanes share one. Exponentials are rounded to the storage type for the second product; sums are of those before
// rounding. Keys and values come by asynchronous copies, in two stages where there is room.
//
// A masked key has a weight of zero, but is multiplied all the same: a value there that is not finite makes NaN of the rows
// that share its tile (keys beyond a sequence's length are never read).
//
// Four warps take 64 rows; where a sequence has 16 or fewer (decoding), one warp takes them. Either way keys may be split;
// then the floor is reading the keys and values once.
#include <type_traits>

#include "cuda/attention_tiles.h"

namespace pyllm::cuda {
namespace {

template <int kDim, int kWarps>
struct Shape {
  static constexpr int kRows = 16 * kWarps, kThreads = kWarp * kWarps, kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr size_t kBytes = (kRows + 2 * kStages * kKeys) * kDim * 2;
};

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
  const Place at = place_of(a, tiles, partials.max ? partials.splits : 1);
  const Tile t =
      tile_of(a, at.batch, at.kv_head, (tiles - 1 - at.tile) * S::kRows, S::kRows, length_of(a, at.batch, record));
  const Range range = seen_in_split(a, t, partials, at.split);
  const int64_t first_key = range.lo / kKeys * kKeys;
  const int64_t steps = range.lo < range.hi ? divided_up(range.hi - first_key, kKeys) : 0;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, group = lane / 4, pair = lane % 4 * 2;
  const int row0 = warp * 16 + group;  // and row0 + 8
  const RowMask masks[2] = {mask_of(a, t, row0), mask_of(a, t, row0 + 8)};
  // Keys that every row of the tile sees need no mask.
  const Range by_all = seen_by_all(a, t);
  const bool plain = !a.query_segments && !a.bias && a.softcap == 0;

  const auto load_keys = [&](int64_t step) {
    const int64_t to = step % S::kStages * kKeys * kDim;
    copy_keys<kDim, S::kThreads>(a, t, first_key + step * kKeys, kKeys, keys + to, values + to, record);
  };
  copy_queries<kDim, S::kThreads>(a, t, a.q, a.q_step, a.dim, queries, S::kRows);
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
    add_products<kDim>(scores, queries + warp * 16 * kDim, k);

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
    add_weighted<kDim>(out, scores, v);
    __syncthreads();  // before the next copies overwrite this stage
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; r++) {  // four lanes have the sum of a row
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = row0 + r * 8;
    if (row >= t.count) continue;
    const int64_t partial = partials.max ? partial_at(a, t, partials, row, at.split) : 0;
    if (!partials.max) {
      store_row(reinterpret_cast<T*>(f.out) + out_row(a, t, row) * a.value_dim, out, r, static_cast<int>(a.value_dim),
                share_of(sum[r]));
    } else if (sum[r] != 0) {
      float* const to = partials.values + partial * a.value_dim + pair;
      check_aligned(to, sizeof(float2));
#pragma unroll
      for (int d = 0; d < kDim / 8; d++)
        if (d * 8 < a.value_dim) *reinterpret_cast<float2*>(to + d * 8) = {out[d][r * 2], out[d][r * 2 + 1]};
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

}  // namespace

bool forward_by_matrices(const AttentionForwardArgs& f, const Partials& partials, const Work& work) {
  if (!fits_matrices(f.in) || !whole_packs(f.out)) return false;
  with_tiles(f.in, [&](auto type, auto dim) {
    using T = decltype(type);
    f.in.queries*(f.in.heads / f.in.kv_heads) <= 16 ? run<T, dim.value, 1>(f, partials, work)
                                                    : run<T, dim.value, 4>(f, partials, work);
  });
  return true;
}

}  // namespace pyllm::cuda
