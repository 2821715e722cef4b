// Attention, backward, of bfloat16 and float16 through the matrix instructions of a warp. A block owns 64 rows, for the
// gradient of the queries, or 64 keys, for those of keys and values, and walks the other side, whose tiles come by
// asynchronous copies in two stages. A warp has 16 of what is owned: the products of these with the other side's tile, for
// the scores and for the gradients of the weights, stay in registers in the layout in which they are the first factor of
// the products that are added up. With P the weights, dP = dO V' and dS = P (dP - delta): dQ = dS K, dK = dS' Q,
// dV = P' dO, where P and dS are rounded to the storage type.
//
// Seven products a tile where one pass over both sides would take five: that one has to add to gradients that other blocks
// write, in whatever order. Here every sum has one order, and the same inputs give the same bits. With heads of more than
// 128 the gradients of keys and of values do not fit in the registers together, and each has a kernel of its own.
//
// What is masked has a weight of zero, but is multiplied all the same (keys beyond a sequence's length are never read).
#include <type_traits>

#include "cuda/attention_tiles.h"

namespace pyllm::cuda {
namespace {

enum class Gradient { queries, keys_and_values, keys, values };

template <int kDim, bool kByKeys>
struct Shape {
  static constexpr int kOwn = 64, kThreads = 128, kStages = 2, kOther = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kRows = kByKeys ? kOther : kOwn, kRowStages = kByKeys ? kStages : 1;
  static constexpr size_t kBytes =
      (kOwn + kStages * kOther) * 2 * kDim * 2 + kRows * (kRowStages * 2 * sizeof(float) + sizeof(RowMask));
};

template <class T, int kDim, Gradient kOf>
__global__ void __launch_bounds__(128)
    walk(AttentionBackwardArgs f, const float* delta, int64_t tiles, FaultRecord* record) {
  constexpr bool kByKeys = kOf != Gradient::queries;
  constexpr bool kOfScores = kOf != Gradient::values;
  constexpr bool kOfWeights = kOf == Gradient::values || kOf == Gradient::keys_and_values;
  using S = Shape<kDim, kByKeys>;
  constexpr int kOther = S::kOther, kTiles = kOther / 8, kRows = S::kRows;
  const AttentionArgs& a = f.in;
  T* const own = reinterpret_cast<T*>(shared_memory());
  T* const own_values = own + S::kOwn * kDim;  // or gradients of results, beside queries
  T* const other = own_values + S::kOwn * kDim;
  T* const other_values = other + S::kStages * kOther * kDim;
  auto* const lse = reinterpret_cast<float*>(other_values + S::kStages * kOther * kDim);
  float* const deltas = lse + S::kRowStages * kRows;
  auto* const masks = reinterpret_cast<RowMask*>(deltas + S::kRowStages * kRows);

  const auto load_rows = [&](const Tile& t, T* q, T* dout, int stage) {
    copy_queries<kDim, S::kThreads>(a, t, a.q, a.q_step, a.dim, q, kRows);
    copy_queries<kDim, S::kThreads>(a, t, f.dout, f.dout_step, a.value_dim, dout, kRows);
    for (int i = threadIdx.x; i < kRows; i += S::kThreads) {
      const int to = stage * kRows + i;
      if (i < t.count) {
        copy_async(lse + to, f.lse + lse_at(a, t, i));
        copy_async(deltas + to, delta + lse_at(a, t, i));
      } else {
        lse[to] = INFINITY;
        deltas[to] = 0;
      }
    }
  };
  const auto set_masks = [&](const Tile& t) {
    for (int i = threadIdx.x; i < kRows; i += S::kThreads) masks[i] = mask_of(a, t, i);
  };

  // What has the most to walk comes first: with a causal mask the first keys and the last rows.
  const Place at = place_of(a, tiles);
  const int64_t length = length_of(a, at.batch, record), group = a.heads / a.kv_heads;
  const int64_t owned = (kByKeys ? at.tile : tiles - 1 - at.tile) * S::kOwn;
  Tile t = tile_of(a, at.batch, at.kv_head, kByKeys ? 0 : owned, kRows, length);
  Range others;  // rows or keys
  if constexpr (kByKeys) {
    const Range queries = queries_that_see(a, length, owned, owned + S::kOwn);
    others = {queries.lo * group, queries.hi * group};
    copy_keys<kDim, S::kThreads>(a, t, owned, S::kOwn, own, own_values, record);
  } else {
    others = seen_by_some(a, t);
    load_rows(t, own, own_values, 0);
    set_masks(t);
  }
  const int64_t first_other = others.lo / kOther * kOther;
  const int64_t steps = others.lo < others.hi ? divided_up(others.hi - first_other, kOther) : 0;
  const auto load_other = [&](int64_t step) {
    const int stage = static_cast<int>(step % S::kStages);
    const int64_t first = first_other + step * kOther;
    T *const to = other + stage * kOther * kDim, *const to_values = other_values + stage * kOther * kDim;
    if constexpr (kByKeys)
      load_rows(tile_of(a, at.batch, at.kv_head, first, kRows, length), to, to_values, stage);
    else
      copy_keys<kDim, S::kThreads>(a, t, first, kOther, to, to_values, record);
  };
  if (steps > 0) load_other(0);
  end_of_copies();

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, pair = lane % 4 * 2;
  const int own0 = warp * 16 + lane / 4;  // and own0 + 8
  const bool plain = !a.query_segments && !a.bias && a.softcap == 0 && !f.dweights;
  const float factor = product_factor(a);
  float by_scores[kOfScores ? kDim / 8 : 1][4] = {}, by_weights[kOfWeights ? kDim / 8 : 1][4] = {};
  for (int64_t step = 0; step < steps; step++) {
    if (step + 1 < steps) load_other(step + 1);
    end_of_copies();
    const int stage = static_cast<int>(step % S::kStages);
    const int64_t first = first_other + step * kOther;
    if constexpr (kByKeys) t = tile_of(a, at.batch, at.kv_head, first, kRows, length);
    // Where every row sees every key no mask is needed.
    const Range all = seen_by_all(a, t);
    const int64_t first_key = kByKeys ? owned : first;
    const bool whole = plain && first_key >= all.lo && first_key + (kByKeys ? S::kOwn : kOther) <= all.hi;
    if (kByKeys && !whole) set_masks(t);
    wait_for_copies<1>();
    __syncthreads();
    T *const x = other + stage * kOther * kDim, *const x_values = other_values + stage * kOther * kDim;
    const float *const kept_lse = lse + (kByKeys ? stage * kRows : 0), *const kept_delta =
                                                                           deltas + (kByKeys ? stage * kRows : 0);

    float scores[kTiles][4] = {}, dscores[kTiles][4] = {};
    add_products<kDim>(scores, own + warp * 16 * kDim, x);
    if constexpr (kOfScores) add_products<kDim>(dscores, own_values + warp * 16 * kDim, x_values);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int mine = own0 + i / 2 * 8, theirs = n * 8 + pair + i % 2;
        const int row = kByKeys ? theirs : mine;
        const Kept kept{kept_lse[row], kept_delta[row]};
        if (whole) {
          const float weight = exp2f(fmaf(scores[n][i], factor, -kept.lse));
          scores[n][i] = weight;
          dscores[n][i] = weight * (dscores[n][i] - kept.delta) * a.scale;
        } else {
          const Gradients g =
              gradients_of(f, t, masks[row], kept, first_key + (kByKeys ? mine : theirs), scores[n][i], dscores[n][i]);
          scores[n][i] = g.weight;
          dscores[n][i] = g.product;
        }
      }
    if constexpr (kOfScores) add_weighted<kDim>(by_scores, dscores, x);
    if constexpr (kOfWeights) add_weighted<kDim>(by_weights, scores, x_values);
    __syncthreads();  // before the next copies overwrite this stage
  }
  wait_for_copies<0>();

#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = own0 + r * 8;
    const int dim = static_cast<int>(a.dim), value_dim = static_cast<int>(a.value_dim);
    if constexpr (kByKeys) {
      if (owned + row >= a.keys) continue;
      const int64_t to = (at.batch * a.keys + owned + row) * a.kv_heads + at.kv_head;
      if constexpr (kOfScores) store_row(reinterpret_cast<T*>(f.dk) + to * dim, by_scores, r, dim, 1.0f);
      if constexpr (kOfWeights) store_row(reinterpret_cast<T*>(f.dv) + to * value_dim, by_weights, r, value_dim, 1.0f);
    } else if (row < t.count) {
      store_row(reinterpret_cast<T*>(f.dq) + out_row(a, t, row) * dim, by_scores, r, dim, 1.0f);
    }
  }
}

template <class T, int kDim, Gradient kOf>
void run(const AttentionBackwardArgs& f, const float* delta, int64_t all, const Work& work) {
  using S = Shape<kDim, kOf != Gradient::queries>;
  const int64_t tiles = divided_up(all, S::kOwn);
  launch(walk<T, kDim, kOf>, {f.in.batch * f.in.kv_heads * tiles}, dim3(S::kThreads), S::kBytes, work, f, delta, tiles,
         fault_record(work.device));
}

}  // namespace

bool backward_by_matrices(const AttentionBackwardArgs& f, const float* delta, const Work& work) {
  const AttentionArgs& a = f.in;
  if (!fits_matrices(a) || !whole_chunks(f.dout, f.dout_step)) return false;
  if (!whole_packs(f.dq) || !whole_packs(f.dk) || !whole_packs(f.dv)) return false;
  with_tiles(a, [&](auto type, auto dim) {
    using T = decltype(type);
    constexpr int kDim = dim.value;
    if (f.dq) run<T, kDim, Gradient::queries>(f, delta, a.queries * (a.heads / a.kv_heads), work);
    if (!f.dk) return;
    if constexpr (kDim <= 128) {
      run<T, kDim, Gradient::keys_and_values>(f, delta, a.keys, work);
    } else {
      run<T, kDim, Gradient::keys>(f, delta, a.keys, work);
      run<T, kDim, Gradient::values>(f, delta, a.keys, work);
    }
  });
  return true;
}

}  // namespace pyllm::cuda
