// The gradient of attention's bias, of bfloat16 and float16 inputs through the matrix instructions of a warp: what reaches
// the scores, dS = P (dP - delta), summed over whatever the bias was broadcast over. A block takes 64 queries of one head
// by a tile of keys, and adds up, in registers, such tiles along the axes of length 1 in the bias. Where the bias is so
// small that this makes few blocks, each does a piece of its tiles, and the pieces are added in order: how many there are
// depends on the sizes alone.
#include <type_traits>

#include "cuda/attention_tiles.h"

namespace pyllm::cuda {
namespace {

constexpr int kRows = 64, kThreads = 128;
constexpr int64_t kBlocks = 528;  // that fill a GPU

template <int kDim>
struct Shape {
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr size_t kBytes = (kRows + kKeys) * 2 * kDim * 2;
};

// Tiles along batch, heads, queries and keys: those that have blocks of their own, and those that a block adds up.
struct Cut {
  int64_t own[4], over[4], pieces;

  __host__ __device__ int64_t blocks() const { return own[0] * own[1] * own[2] * own[3]; }
  __host__ __device__ int64_t parts() const { return over[0] * over[1] * over[2] * over[3]; }
};

// partial: (pieces, the bias's elements), or null where the only piece is the gradient.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    add_tiles(AttentionBackwardArgs f, const float* delta, Cut cut, float* partial, FaultRecord* record) {
  constexpr int kKeys = Shape<kDim>::kKeys, kTiles = kKeys / 8;
  const AttentionArgs& a = f.in;
  T* const queries = reinterpret_cast<T*>(shared_memory());
  T* const douts = queries + kRows * kDim;
  T* const keys = douts + kRows * kDim;
  T* const values = keys + kKeys * kDim;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, pair = lane % 4 * 2;
  const int row0 = warp * 16 + lane / 4;  // and row0 + 8
  const int64_t piece = blockIdx.x % cut.pieces;
  int64_t own[4], rest = blockIdx.x / cut.pieces;
  for (int i = 3; i >= 0; i--) {
    own[i] = rest % cut.own[i];
    rest /= cut.own[i];
  }
  float sums[kTiles][4] = {};
  for (int64_t part = piece; part < cut.parts(); part += cut.pieces) {
    int64_t at[4], left = part;
    for (int i = 3; i >= 0; i--) {  // one of the two is 0
      at[i] = own[i] + left % cut.over[i];
      left /= cut.over[i];
    }
    const Tile t = tile_of_head(a, at[0], at[1], at[2] * kRows, kRows, length_of(a, at[0], record));
    const int64_t first = at[3] * kKeys;
    const Range range = seen_by_some(a, t);
    if (range.lo >= first + kKeys || range.hi <= first) continue;
    __syncthreads();  // the tiles before have been read
    copy_queries<kDim, kThreads>(a, t, a.q, a.q_step, a.dim, queries, kRows);
    copy_queries<kDim, kThreads>(a, t, f.dout, f.dout_step, a.value_dim, douts, kRows);
    copy_keys<kDim, kThreads>(a, t, first, kKeys, keys, values, record);
    end_of_copies();
    RowMask masks[2];
    Kept kept[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row0 + r * 8;
      masks[r] = mask_of(a, t, row);
      kept[r] = row < t.count ? Kept{f.lse[lse_at(a, t, row)], delta[lse_at(a, t, row)]} : Kept{0, 0};
    }
    wait_for_copies<0>();
    __syncthreads();
    float scores[kTiles][4] = {}, dscores[kTiles][4] = {};
    add_products<kDim>(scores, queries + warp * 16 * kDim, keys);
    add_products<kDim>(dscores, douts + warp * 16 * kDim, values);
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[n][i] +=
            gradients_of(f, t, masks[i / 2], kept[i / 2], first + n * 8 + pair + i % 2, scores[n][i], dscores[n][i])
                .score;
  }

  auto* const tile = reinterpret_cast<float*>(shared_memory());  // kRows x kKeys
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) tile[(row0 + i / 2 * 8) * kKeys + n * 8 + pair + i % 2] = sums[n][i];
  __syncthreads();
  const int64_t* const size = f.dbias_size;
  const int down = size[2] == 1 ? kRows : 1, across = size[3] == 1 ? kKeys : 1;  // rows and keys of an element
  const int64_t first_row = own[2] * kRows, first_key = own[3] * kKeys;
  const int rows = static_cast<int>(size[2] - first_row < kRows ? size[2] - first_row : kRows);
  const int columns = static_cast<int>(size[3] - first_key < kKeys ? size[3] - first_key : kKeys);
  for (int e = threadIdx.x; e < rows * columns; e += kThreads) {
    const int row = e / columns, column = e % columns;
    float sum = 0;
    for (int r = row; r < row + down; r++)
      for (int c = column; c < column + across; c++) sum += tile[r * kKeys + c];
    const int64_t element = ((own[0] * size[1] + own[1]) * size[2] + first_row + row) * size[3] + first_key + column;
    if (partial)
      partial[piece * size[0] * size[1] * size[2] * size[3] + element] = sum;
    else
      put_at(f.dbias, a.bias_dtype, element, sum);
  }
}

__global__ void __launch_bounds__(128)
    add_pieces(AttentionBackwardArgs f, const float* partial, int64_t elements, int64_t pieces) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int64_t p = 0; p < pieces; p++) sum += partial[p * elements + i];
  put_at(f.dbias, f.in.bias_dtype, i, sum);
}

}  // namespace

bool bias_by_matrices(const AttentionBackwardArgs& f, const float* delta, const Work& work) {
  const AttentionArgs& a = f.in;
  if (!fits_matrices(a) || !whole_chunks(f.dout, f.dout_step)) return false;
  with_tiles(a, [&](auto type, auto dim) {
    using T = decltype(type);
    using S = Shape<dim.value>;
    const int64_t tiles[4] = {a.batch, a.heads, divided_up(a.queries, kRows), divided_up(a.keys, S::kKeys)};
    Cut cut{};
    int64_t elements = 1;
    for (int i = 0; i < 4; i++) {
      cut.own[i] = f.dbias_size[i] == 1 ? 1 : tiles[i];
      cut.over[i] = f.dbias_size[i] == 1 ? tiles[i] : 1;
      elements *= f.dbias_size[i];
    }
    cut.pieces = std::clamp<int64_t>(divided_up(kBlocks, cut.blocks()), 1, std::max<int64_t>(1, cut.parts()));
    const Scratch partial(work, cut.pieces > 1 ? cut.pieces * elements * sizeof(float) : 0);
    launch(add_tiles<T, dim.value>, {cut.blocks() * cut.pieces}, dim3(kThreads), S::kBytes, work, f, delta, cut,
           partial.as<float>(), fault_record(work.device));
    if (cut.pieces > 1)
      launch(add_pieces, {divided_up(elements, 128)}, dim3(128), 0, work, f, partial.as<const float>(), elements,
             cut.pieces);
  });
  return true;
}

}  // namespace pyllm::cuda
