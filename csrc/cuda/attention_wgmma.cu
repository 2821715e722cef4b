// Attention, forward, of bfloat16 and float16 on Hopper (sm_90a), for many queries: what attention_mma.cu does, with the
// products of warpgroups and the copy engine (wgmma.h).
//
// A block takes 128 rows, less where the group of heads does not divide them. Its first warpgroup only copies: one thread of
// it asks for the queries, then for tiles of keys and values, a tile of keys before the values of the one ahead of it, in two
// rings of kStages places. A place has a barrier that says it is full, where the copied bytes arrive, and one that says it
// is empty, where each warp that computes arrives. The other two warpgroups compute, 64 rows each. A tile lies in shared
// memory in slabs of 64 columns, rows of 128 bytes, swizzled. Scores come from queries and keys in shared memory; they
// become weights in registers, which are already laid out as the second product takes them, rounded to the storage type;
// sums are of those before rounding. The product with a tile's values runs while the next tile's scores are softened.
//
// A row's maximum is that of its products, before the scale, which enters with the subtraction: it must be positive. A
// masked key has a weight of zero, but is multiplied all the same: a value there that is not finite makes NaN of the rows
// that share its tile. Values beyond a sequence's length, which a box may copy, are replaced by zeros.
#include <type_traits>

#include "cuda/attention_tiles.h"
#include "cuda/wgmma.h"

// Of what is compiled for devices, only that for sm_90a has these instructions.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYLLM_HAS_WGMMA 1
#endif

namespace pyllm::cuda {

bool wgmma_wanted = false;

namespace {

constexpr int kRows = 128, kWarpgroups = 2, kThreads = (1 + kWarpgroups) * kWarpgroup;
constexpr int kCopying = 24, kComputing = 240;  // registers of a thread, out of what all have when the block begins
static_assert(kCopying + kWarpgroups * kComputing <= (1 + kWarpgroups) * (65536 / kThreads / 8 * 8));
constexpr int kBoxKeys = 64;                              // keys of a box: a page has a multiple of them
constexpr int kRowBytes = kMapRow * 2, kSwizzled = 1024;  // bytes after which the swizzle repeats

template <int kDim>
struct Shape {
  static constexpr int kKeys = kDim <= 128 ? 128 : 64, kStages = kDim <= 64 ? 4 : 2, kSlabs = kDim / kMapRow;
  static constexpr int kQueryBytes = kSlabs * kRows * kRowBytes, kStageBytes = kSlabs * kKeys * kRowBytes;
  static constexpr size_t kBytes = kSwizzled + kQueryBytes + 2 * kStages * kStageBytes + (4 * kStages + 1) * 8;
};

[[maybe_unused]] __device__ __forceinline__ float exp2_of(float x) {  // 0 where it would be subnormal
#if PYLLM_EMULATE_CUDA
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// A tile's rows of the queries' box: whole queries, each with all heads of its group.
__host__ __device__ constexpr int64_t rows_of_tile(int64_t group) { return kRows / group * group; }

// Where a key lies along the two outer axes of its map: in a sequence or, with a page table, in a page. Beyond the length no
// page is looked up; what no page holds is named as one too many, which the copy engine gives zeros for.
struct Row {
  int row, block;
};
[[maybe_unused]] __device__ __forceinline__ Row row_of(const AttentionArgs& a, const Tile& t, uint32_t key,
                                                       FaultRecord* record) {
  if (!a.page_table) return {static_cast<int>(key), static_cast<int>(t.batch)};
  const auto page_size = static_cast<uint32_t>(a.page_size);  // of 32 bits: the thread that copies has few registers
  int64_t page = a.pages;
  if (key < t.length) {
    const int64_t entry = t.batch * a.table_step + key / page_size, named = a.page_table[entry];
    if (named >= 0 && named < a.pages)
      page = named;
    else
      report(record, Fault::page, entry, named, a.pages);
  }
  return {static_cast<int>(key % page_size), static_cast<int>(page)};
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    walk([[maybe_unused]] AttentionForwardArgs f, [[maybe_unused]] const __grid_constant__ CUtensorMap query_map,
         [[maybe_unused]] const __grid_constant__ CUtensorMap key_map,
         [[maybe_unused]] const __grid_constant__ CUtensorMap value_map, [[maybe_unused]] int64_t tiles,
         [[maybe_unused]] FaultRecord* record) {
#if PYLLM_HAS_WGMMA
  using S = Shape<kDim>;
  constexpr int kKeys = S::kKeys, kStages = S::kStages, kTiles = kKeys / 8;  // tiles of 8 keys
  constexpr int kParts = kDim <= 128 ? 1 : 2, kColumns = kDim / 8 / kParts;  // of the output: tiles of 8 columns
  const AttentionArgs& a = f.in;
  char* const queries = shared_memory() + (kSwizzled - shared_address(shared_memory()) % kSwizzled) % kSwizzled;
  char* const keys = queries + S::kQueryBytes;           // kStages places
  char* const values = keys + kStages * S::kStageBytes;  // likewise
  auto* const queries_full = reinterpret_cast<uint64_t*>(values + kStages * S::kStageBytes);
  uint64_t *const keys_full = queries_full + 1, *const keys_empty = keys_full + kStages;
  uint64_t *const values_full = keys_empty + kStages, *const values_empty = values_full + kStages;

  // The last tile of rows first: with a causal mask it has the most keys.
  const Place at = place_of(a, tiles);
  const int64_t group = a.heads / a.kv_heads, most = rows_of_tile(group), first_row = (tiles - 1 - at.tile) * most;
  const Tile t = tile_of(a, at.batch, at.kv_head, first_row, most, length_of(a, at.batch, record));
  const Range range = seen_by_some(a, t);
  const int64_t first_key = range.lo / kKeys * kKeys;
  const int64_t steps = range.lo < range.hi ? divided_up(range.hi - first_key, kKeys) : 0;

  if (threadIdx.x == 0) {
    make_barrier(queries_full, 1);
    for (int s = 0; s < kStages; s++) {
      make_barrier(keys_full + s, 1);
      make_barrier(values_full + s, 1);
      make_barrier(keys_empty + s, kWarpgroups * 4);
      make_barrier(values_empty + s, kWarpgroups * 4);
    }
    publish_barriers();
  }
  __syncthreads();
  const auto stage_of = [](int64_t step) { return static_cast<int>(step % kStages); };
  const auto phase_of = [](int64_t step) { return static_cast<uint32_t>(step / kStages % 2); };

  if (threadIdx.x < kWarpgroup) {
    give_registers_back<kCopying>();
    if (threadIdx.x != 0 || steps == 0) return;
    prefetch_map(query_map);
    prefetch_map(key_map);
    prefetch_map(value_map);
    const int kv_head = static_cast<int>(t.kv_head);
    arrive_expecting(queries_full, static_cast<uint32_t>(most) * kDim * 2);
    for (int s = 0; s < S::kSlabs; s++)
      copy_box(
          queries + s * kRows * kRowBytes, query_map,
          {s * kMapRow, static_cast<int>(t.first_head), static_cast<int>(t.first_query), static_cast<int>(t.batch)},
          queries_full);
    const auto load = [&](int64_t step, char* to, const CUtensorMap& map, uint64_t* full, uint64_t* empty) {
      const int stage = stage_of(step);
      const auto first = static_cast<uint32_t>(first_key + step * kKeys);
      wait_for_phase(empty + stage, phase_of(step) ^ 1);
      arrive_expecting(full + stage, S::kStageBytes);
      for (int part = 0; part < kKeys / kBoxKeys; part++) {
        const Row from = row_of(a, t, first + part * kBoxKeys, record);
        for (int s = 0; s < S::kSlabs; s++)
          copy_box(to + stage * S::kStageBytes + (s * kKeys + part * kBoxKeys) * kRowBytes, map,
                   {s * kMapRow, kv_head, from.row, from.block}, full + stage);
      }
    };
    load(0, keys, key_map, keys_full, keys_empty);
    for (int64_t step = 0; step < steps; step++) {
      if (step + 1 < steps) load(step + 1, keys, key_map, keys_full, keys_empty);
      load(step, values, value_map, values_full, values_empty);
    }
    return;
  }

  take_registers<kComputing>();
  const int lane = threadIdx.x % kWarp, warpgroup = threadIdx.x / kWarpgroup - 1;
  const int pair = lane % 4 * 2, row0 = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;  // and row0 + 8, of `mine`
  const int64_t before = warpgroup * (kRows / kWarpgroups);
  const Tile mine = tile_of(a, at.batch, at.kv_head, first_row + before,
                            most - before < kRows / kWarpgroups ? most - before : kRows / kWarpgroups, t.length);
  const RowMask masks[2] = {mask_of(a, mine, row0), mask_of(a, mine, row0 + 8)};
  // Keys that every row sees need no mask.
  const Range by_all = mine.count > 0 ? seen_by_all(a, mine) : Range{0, 0};
  const float factor = a.softcap > 0 ? 1.0f : product_factor(a);  // makes scores of what `scores` holds

  const uint64_t query_tile =
      tile_descriptor(shared_address(queries) + static_cast<uint32_t>(before) * kRowBytes, 8 * kRowBytes);
  const uint64_t key_tile = tile_descriptor(shared_address(keys), 8 * kRowBytes);
  const uint64_t value_tile = tile_descriptor(shared_address(values), 8 * kRowBytes, kKeys * kRowBytes);
  // The same, bytes further.
  const auto further = [](uint64_t tile, int bytes) { return tile + bytes / 16; };

  float scores[kTiles][4], out[kParts][kColumns][4] = {};
  uint32_t weights[kTiles / 2][4];
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, rescale[2];

  const auto multiply = [&](int stage) {  // queries by keys
#pragma unroll
    for (int d = 0; d < kDim / 16; d++) {
      const int slab = d / 4, in_row = d % 4 * 32;
      multiply_rows<T>(scores, further(query_tile, slab * kRows * kRowBytes + in_row),
                       further(key_tile, stage * S::kStageBytes + slab * kKeys * kRowBytes + in_row), d > 0);
    }
    end_of_products();
  };
  const auto add_values = [&](int stage) {
#pragma unroll
    for (int j = 0; j < kKeys / 16; j++)
#pragma unroll
      for (int p = 0; p < kParts; p++)
        add_weighted_rows<T>(
            out[p], weights[j],
            further(value_tile,
                    stage * S::kStageBytes + p * kColumns * 8 / kMapRow * kKeys * kRowBytes + j * 16 * kRowBytes));
    end_of_products();
  };
  const auto wait_for_keys = [&](int64_t step) {
    if (step < steps) wait_for_phase(keys_full + stage_of(step), phase_of(step));
  };
  const auto release = [&](uint64_t* empty) {
    if (lane == 0) arrive(empty);
  };
  // Makes exponentials of products, and adds them to the sums; what was added before them is to be taken `rescale` times.
  const auto soften = [&](int64_t first) {
    if (a.softcap > 0) {
      const float in = product_factor(a), by = a.softcap * kLog2e;
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] = tanhf(scores[n][i] * in) * by;
    }
    if (first < by_all.lo || first + kKeys > by_all.hi) {
      int lo[2], hi[2];  // keys of this tile that each row sees
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int64_t from = masks[r].range.lo - first, to = masks[r].range.hi - first;
        lo[r] = static_cast<int>(from < 0 ? 0 : from < kKeys ? from : kKeys);
        hi[r] = static_cast<int>(to < 0 ? 0 : to < kKeys ? to : kKeys);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = n * 8 + pair + i % 2;
          if (key < lo[i / 2] || key >= hi[i / 2]) scores[n][i] = -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float largest = max[r];
#pragma unroll
      for (int n = 0; n < kTiles; n++) largest = fmaxf(largest, fmaxf(scores[n][r * 2], scores[n][r * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const float base = finite_or_zero(largest) * factor;
      rescale[r] = exp2_of(fmaf(max[r], factor, -base));
      max[r] = largest;
      sum[r] *= rescale[r];
#pragma unroll
      for (int n = 0; n < kTiles; n++)
#pragma unroll
        for (int i = r * 2; i < r * 2 + 2; i++) {
          scores[n][i] = exp2_of(fmaf(scores[n][i], factor, -base));
          sum[r] += scores[n][i];
        }
    }
  };
  const auto keep_weights = [&] {
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) weights[n / 2][n % 2 * 2 + r] = two<T>(scores[n][r * 2], scores[n][r * 2 + 1]);
  };

  if (steps > 0) {
    wait_for_phase(queries_full, 0);
    wait_for_keys(0);
    begin_products();
    multiply(0);
    wait_for_products<0>();
    settle(scores);
    release(keys_empty);
    soften(first_key);
    keep_weights();
    wait_for_keys(1);
    for (int64_t step = 1; step < steps; step++) {  // scores of this step, values of the one before
      const int stage = stage_of(step), last = stage_of(step - 1);
      begin_products();
      multiply(stage);
      wait_for_phase(values_full + last, phase_of(step - 1));
      begin_products();
      add_values(last);
      wait_for_products<1>();
      settle(scores);
      release(keys_empty + stage);
      soften(first_key + step * kKeys);
      settle(scores);
      wait_for_keys(step + 1);  // here, so that compilers leave what precedes beside the other product
      wait_for_products<0>();
      settle(weights);
#pragma unroll
      for (int p = 0; p < kParts; p++) settle(out[p]);
      release(values_empty + last);
#pragma unroll
      for (int p = 0; p < kParts; p++)
#pragma unroll
        for (int d = 0; d < kColumns; d++)
#pragma unroll
          for (int i = 0; i < 4; i++) out[p][d][i] *= rescale[i / 2];
      keep_weights();
    }
    const int last = stage_of(steps - 1);
    wait_for_phase(values_full + last, phase_of(steps - 1));
    const int64_t left = t.length - first_key - (steps - 1) * kKeys;
    if (left < kKeys && t.length < a.keys) {  // both warpgroups write the same zeros, each before it reads them
      constexpr int kPieces = kRowBytes / 16;
      for (int i = static_cast<int>(left) * kPieces + threadIdx.x % kWarpgroup; i < kKeys * kPieces; i += kWarpgroup)
#pragma unroll
        for (int s = 0; s < S::kSlabs; s++)
          reinterpret_cast<uint4*>(values + last * S::kStageBytes + s * kKeys * kRowBytes)[i] = uint4{0, 0, 0, 0};
      publish_writes();
      meet_warpgroup(1 + warpgroup);
    }
    begin_products();
    add_values(last);
    wait_for_products<0>();
#pragma unroll
    for (int p = 0; p < kParts; p++) settle(out[p]);
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {  // four lanes have the sum of a row
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = row0 + r * 8;
    if (row >= mine.count) continue;
    T* const to = reinterpret_cast<T*>(f.out) + out_row(a, mine, row) * a.value_dim;
#pragma unroll
    for (int p = 0; p < kParts; p++)
      store_row(to + p * kColumns * 8, out[p], r, static_cast<int>(a.value_dim) - p * kColumns * 8, share_of(sum[r]));
    if (lane % 4 == 0 && f.lse) f.lse[lse_at(a, mine, row)] = lse_of(max[r] * factor, sum[r]);
  }
#else
  __trap();  // the host launches this on sm_90 alone
#endif
}

// The axes of a tensor's map, the innermost first.
struct Axes {
  int64_t size[4], step[3];
};
Axes queries_of(const AttentionArgs& a) {
  return {{a.dim, a.heads, a.queries, a.batch}, {a.q_step[2], a.q_step[1], a.q_step[0]}};
}
Axes keys_of(const AttentionArgs& a, int64_t dim, const int64_t* step) {
  const bool pages = a.page_table != nullptr;
  return {{dim, a.kv_heads, pages ? a.page_size : a.keys, pages ? a.pages : a.batch}, {step[2], step[1], step[0]}};
}

// What this kernel takes, where it is wanted; all else is attention_mma.cu's or attention.cu's. Few rows are split over their
// keys there; a bias and segments are read there. A tile has all heads of a group, and keys are counted in 32 bits. Steps
// that the copy engine cannot follow are those of axes that are broadcast (0), and from 2^40 bytes on.
bool fits(const AttentionForwardArgs& f, const Work& work) {
  const AttentionArgs& a = f.in;
  const int64_t group = a.heads / a.kv_heads;
  const auto mapped = [](const char* data, const Axes& x) { return has_map(data, x.size, x.step); };
  return wgmma_wanted && capacity_of(work.device).warpgroups && fits_matrices(a) && whole_packs(f.out) && !a.bias &&
         !a.query_segments && a.queries * group > kFewRows && group <= kRows && a.scale > 0 &&
         a.keys < INT64_C(1) << 31 && mapped(a.q, queries_of(a)) && mapped(a.k, keys_of(a, a.dim, a.k_step)) &&
         mapped(a.v, keys_of(a, a.value_dim, a.v_step));
}

template <class T, int kDim>
void run(const AttentionForwardArgs& f, const Work& work) {
  using S = Shape<kDim>;
  const AttentionArgs& a = f.in;
  const int64_t group = a.heads / a.kv_heads, tiles = divided_up(a.queries * group, rows_of_tile(group));
  const auto map_of = [&](const char* data, const Axes& x, const int64_t (&box)[3]) {
    return tensor_map("attention", a.dtype, data, x.size, x.step, box);
  };
  const CUtensorMap queries = map_of(a.q, queries_of(a), {group, kRows / group, 1});
  const CUtensorMap keys = map_of(a.k, keys_of(a, a.dim, a.k_step), {1, kBoxKeys, 1});
  const CUtensorMap values = map_of(a.v, keys_of(a, a.value_dim, a.v_step), {1, kBoxKeys, 1});
  launch_large(walk<T, kDim>, {a.batch * a.kv_heads * tiles}, dim3(kThreads), S::kBytes, work, f, queries, keys, values,
               tiles, fault_record(work.device));
}

}  // namespace

bool forward_by_warpgroups(const AttentionForwardArgs& f, const Work& work) {
  if (!fits(f, work)) return false;
  with_tiles(f.in, [&](auto type, auto dim) { run<decltype(type), dim.value>(f, work); });
  return true;
}

}  // namespace pyllm::cuda
