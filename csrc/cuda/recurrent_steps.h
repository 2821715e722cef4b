// What the two passes of a recurrent layer share on CUDA devices: how a step is given to blocks, and its product.
//
// A step multiplies what the step before left of each sequence (its hidden state; backward, the gradients of the products
// with w_hh) with w_hh. A block owns some hidden units: the rows of the weight that make them, and all that is kept of
// them. Where the rows of all blocks fit (`resident`), they stay in shared memory for all steps of one launch, whose
// blocks meet once a step, at a count in global memory; what a step leaves for the others lies in two places in turn.
// Where processors are left over, further groups of blocks take other rows of the batch, and never meet the first.
// Otherwise, and for a single step, each step is a launch, and weights come through shared memory in chunks. An H100 keeps
// an LSTM of up to 1056 hidden units in float32 and 1536 in bfloat16, an A100 of 864 and 1024.
//
// The order of an element's sum depends on the kind of layer, the depth and the dtype alone: a sequence's steps have the
// same bits in any batch, on any device, resident or not. Of float32, a warp takes four rows of the weight by up to eight of
// the batch, and its lanes the depth; reading shared memory is the floor. Of 16-bit types, warps take slices of the depth
// through the matrix instructions, whose 16 rows are the batch's and 8 columns hidden units.
#pragma once
#include <type_traits>

#include "args/recurrent.h"
#include "cuda/matrix.h"

namespace pyllm::cuda {

constexpr int kMostThreads = 512;
constexpr int64_t kStageBytes = 64 << 10;  // at most, of both stages

template <class T>
constexpr bool kMatrices = sizeof(T) == 2;
template <class T>
constexpr int kPad = kMatrices<T> ? 8 : 0;  // elements, so that the rows that an ldmatrix reads lie in different banks

constexpr int64_t round_up(int64_t n, int64_t step) { return divided_up(n, step) * step; }

// Parts of the depth that different warps sum, and the depth that they take at a time.
template <class T>
__host__ __device__ constexpr int slices_of(int gates) {
  return kMatrices<T> ? 8 : gates == 1 ? 4 : 1;
}
template <class T>
__host__ __device__ constexpr int granule_of(int gates) {
  return kMatrices<T> ? 128 : 128 * slices_of<T>(gates);
}

struct Share {
  int64_t batch, hidden, depth;
  int64_t group;           // rows of the batch that a group of blocks takes
  int units, gates, tile;  // hidden units of a block, products of a unit, rows of the batch at a time
  int chunk_bits;          // log2 of the depth that is staged at a time, a multiple of the granule
  bool resident;
};

// The lengths that the host could not see, within bounds.
__device__ __forceinline__ int64_t checked_length(const RecurrentShape& s, int64_t b, FaultRecord* record) {
  const int64_t n = s.lengths[b];
  if (n >= 0 && n <= s.time) return n;
  report(record, Fault::recurrent_length, b, n, s.time);
  return n < 0 ? 0 : s.time;
}

// What all threads of a launch prepare before the steps, each from `first` on: checked lengths, where there are some, and
// counts of arrivals.
__device__ __forceinline__ void begin_steps(const RecurrentShape& s, int64_t* lengths, unsigned long long* arrived,
                                            int64_t groups, FaultRecord* record, int64_t first, int64_t step) {
  if (lengths)
    for (int64_t b = first; b < s.batch; b += step) lengths[b] = checked_length(s, b, record);
  for (int64_t i = first; i < groups; i += step) arrived[i] = 0;
}

template <class T>
__device__ __forceinline__ float element_of(const StridedMatrix& m, int64_t row, int64_t column) {
  return to_float(reinterpret_cast<const T*>(m.data)[row * m.row + column * m.column]);
}

// Sums over a warp's lanes of kCount values each: value i ends, alone, in x[0] of some lanes, which get i.
template <int kCount>
__device__ __forceinline__ int scattered_sums(float (&x)[kCount], int lane) {
  int index = 0, width = kCount;
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    if (width == 1) {
      x[0] += __shfl_xor_sync(~0u, x[0], half);
      continue;
    }
    width /= 2;
    const bool upper = lane & half;
    index += upper ? width : 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; i++) {
      if (i >= width) break;
      const float give = upper ? x[i] : x[i + width], keep = upper ? x[i + width] : x[i];
      x[i] = keep + __shfl_xor_sync(~0u, give, half);
    }
  }
  return index;
}

// The products of a block, of `gates` rows for each of its units.
template <class T>
class Products {
  static constexpr int kPack = 16 / sizeof(T), kPackBits = sizeof(T) == 2 ? 3 : 2;

 public:
  // Row gate * hidden + unit of the weight: w + row * w_step, in whole packs of 16 bytes, `depth` elements that count.
  __device__ Products(const Share& share, const T* w, int64_t w_step)
      : s_(share),
        w_(w),
        w_step_(w_step),
        unit0_(static_cast<int64_t>(blockIdx.x) * share.units),
        rows_(share.gates * share.units),
        kept_step_(static_cast<int>(divided_up(share.depth, granule())) * granule() + kPad<T>),
        kept_(reinterpret_cast<T*>(shared_memory())),
        stages_(kept_ + (share.resident ? rows_ * kept_step_ : 0)),
        sums_(reinterpret_cast<float*>(stages_)) {
    if (!s_.resident) return;
    const int packs = (kept_step_ - kPad<T>) / kPack;
    for (int row = threadIdx.x / kWarp; row < rows_; row += blockDim.x / kWarp)
      for (int i = threadIdx.x % kWarp; i < packs; i += kWarp)
        copy_pack(kept_ + row * kept_step_ + i * kPack, weight_row(row), i * kPack);
    end_of_copies();  // the first product waits for them
  }

  // v: `count` rows of what is multiplied, at most a tile. All threads of a block; then `total` is there.
  __device__ void run(const T* v, int64_t v_step, int count) {
    __syncthreads();  // the totals before have been read
    if constexpr (kMatrices<T>) {
      s_.gates == 1   ? multiply_matrices<1>(v, v_step, count)
      : s_.gates == 3 ? multiply_matrices<3>(v, v_step, count)
                      : multiply_matrices<4>(v, v_step, count);
    } else {
      s_.tile == 1   ? multiply<1>(v, v_step, count)
      : s_.tile == 2 ? multiply<2>(v, v_step, count)
      : s_.tile == 4 ? multiply<4>(v, v_step, count)
                     : multiply<8>(v, v_step, count);
    }
    __syncthreads();
  }

  // The product of row `item / units` of the tile and unit `item % units` of the block.
  __device__ float total(int gate, int item) const {
    const float* x = sums_ + gate * s_.tile * s_.units + item;
    float sum = *x;
    for (int slice = 1; slice < slices_of<T>(s_.gates); slice++) sum += *(x += rows_ * s_.tile);
    return sum;
  }

  // f(row of the batch, hidden unit, item) for what this thread has of `count` rows from b0 on; always the same thread's.
  template <class F>
  __device__ void each_item(int64_t b0, int count, const F& f) const {
    for (int i = threadIdx.x; i < count * s_.units; i += blockDim.x) {
      const int64_t unit = unit0_ + i % s_.units;
      if (unit < s_.hidden) f(b0 + i / s_.units, unit, i);
    }
  }

  // f(first row, count) for each tile of the group's rows.
  template <class F>
  __device__ void each_tile(const F& f) const {
    const int64_t begin = blockIdx.y * s_.group, end = begin + s_.group < s_.batch ? begin + s_.group : s_.batch;
    for (int64_t b0 = begin; b0 < end; b0 += s_.tile) f(b0, static_cast<int>(end - b0 < s_.tile ? end - b0 : s_.tile));
  }

 private:
  __device__ int granule() const { return granule_of<T>(s_.gates); }

  __device__ const T* weight_row(int row) const {  // null beyond the hidden size
    const int64_t unit = unit0_ + row % s_.units;
    return unit < s_.hidden ? w_ + (row / s_.units * s_.hidden + unit) * w_step_ : nullptr;
  }

  __device__ void copy_pack(T* to, const T* row, int64_t k) const {  // zeros beyond the depth
    const int64_t left = row ? s_.depth - k : 0, taken = left < 0 ? 0 : left < kPack ? left : kPack;
    copy_async(to, taken ? row + k : w_, static_cast<int>(taken * sizeof(T)));
  }

  // f(weights, their step, v, its step, length) for each chunk of the depth, in order; both are in shared memory.
  template <class F>
  __device__ void each_chunk(const T* v, int64_t v_step, int count, const F& f) const {
    const int chunk = 1 << s_.chunk_bits, step = chunk + kPad<T>, bits = s_.chunk_bits - kPackBits;
    const int staged = s_.resident ? s_.tile : s_.tile + rows_;
    const int64_t chunks = divided_up(s_.depth, chunk);
    const auto stage = [&](int64_t c) {
      T* const to = stages_ + (c % 2 ? staged * step : 0);
      for (int i = threadIdx.x; i < staged << bits; i += blockDim.x) {
        const int row = i >> bits, k = (i & ((1 << bits) - 1)) * kPack;
        const T* from = row < count ? v + row * v_step : row < s_.tile ? nullptr : weight_row(row - s_.tile);
        copy_pack(to + row * step + k, from, c * chunk + k);
      }
    };
    stage(0);
    end_of_copies();
    for (int64_t c = 0; c < chunks; c++) {
      if (c + 1 < chunks) stage(c + 1);
      end_of_copies();
      wait_for_copies<1>();
      __syncthreads();
      const T* now = stages_ + (c % 2 ? staged * step : 0);
      const int left = kept_step_ - kPad<T> - static_cast<int>(c * chunk);
      f(s_.resident ? kept_ + c * chunk : now + s_.tile * step, s_.resident ? kept_step_ : step, now, step,
        left < chunk ? left : chunk);
      __syncthreads();  // before the next copies, or the sums, overwrite this stage
    }
  }

  template <int kRows>
  __device__ void multiply(const float* v, int64_t v_step, int count) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slices = slices_of<T>(s_.gates);
    const int slice = warp % slices, quad = warp / slices;
    float sum[4 * kRows] = {};
    each_chunk(v, v_step, count, [&](const float* w, int w_step, const float* x, int x_step, int length) {
      for (int k = slice * 128 + lane * 4; k < length; k += slices * 128) {
        float4 a[4];
#pragma unroll
        for (int q = 0; q < 4; q++) a[q] = *reinterpret_cast<const float4*>(w + (quad * 4 + q) * w_step + k);
#pragma unroll
        for (int b = 0; b < kRows; b++) {
          const float4 h = *reinterpret_cast<const float4*>(x + b * x_step + k);
#pragma unroll
          for (int q = 0; q < 4; q++) {
            float& to = sum[q * kRows + b];
            to = fmaf(a[q].w, h.w, fmaf(a[q].z, h.z, fmaf(a[q].y, h.y, fmaf(a[q].x, h.x, to))));
          }
        }
      }
    });
    const int i = scattered_sums(sum, lane), row = quad * 4 + i / kRows;
    if (lane % (kWarp / (4 * kRows)) == 0)
      sums_[((slice * s_.gates + row / s_.units) * s_.tile + i % kRows) * s_.units + row % s_.units] = sum[0];
  }

  template <int kGates>
  __device__ void multiply_matrices(const T* v, int64_t v_step, int count) {
    constexpr int kSlices = slices_of<T>(kGates);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slice = warp % kSlices,
              octet = warp / kSlices * 8;
    float sum[2][kGates][4] = {};  // of two tiles of 16 rows
    each_chunk(v, v_step, count, [&](const T* w, int w_step, const T* x, int x_step, int length) {
      for (int k = slice * 16; k < length; k += kSlices * 16) {
        uint32_t b[kGates + 1][2];
#pragma unroll
        for (int gate = 0; gate < kGates; gate += 2) {  // 8 units by 16 of the depth, of two gates at once
          const int own = gate + lane / 16 < kGates ? gate + lane / 16 : kGates - 1;
          uint32_t two_gates[4];
          load_matrices<false>(two_gates, w + (own * s_.units + octet + lane % 8) * w_step + k + lane / 8 % 2 * 8);
          b[gate][0] = two_gates[0], b[gate][1] = two_gates[1];
          b[gate + 1][0] = two_gates[2], b[gate + 1][1] = two_gates[3];
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
          if (m * 16 >= count) break;
          uint32_t a[4];
          load_matrices<false>(a, x + (m * 16 + lane % 16) * x_step + k + lane / 16 * 8);
#pragma unroll
          for (int gate = 0; gate < kGates; gate++) multiply_add<T>(sum[m][gate], a, b[gate]);
        }
      }
    });
#pragma unroll
    for (int m = 0; m < 2; m++) {
      if (m * 16 >= count) break;
#pragma unroll
      for (int gate = 0; gate < kGates; gate++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int row = m * 16 + lane / 4 + i / 2 * 8, unit = octet + lane % 4 * 2;
          float* to = sums_ + ((slice * kGates + gate) * s_.tile + row) * s_.units + unit;
          *reinterpret_cast<float2*>(to) = float2{sum[m][gate][i], sum[m][gate][i + 1]};
        }
    }
  }

  const Share s_;
  const T* const w_;
  const int64_t w_step_, unit0_;
  const int rows_, kept_step_;
  T *const kept_, *const stages_;
  float* const sums_;
};

// A matrix to rows of whole packs, `step` elements apart.
template <class T>
__global__ void __launch_bounds__(256) pack_rows(StridedMatrix m, int64_t rows, int64_t columns, T* out, int64_t step) {
  __shared__ T tile[32][33];
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * 32, column0 = static_cast<int64_t>(blockIdx.y) * 32;
  const bool down = m.row < m.column;  // rows run faster in memory
  const int lane = threadIdx.x;
  for (int other = threadIdx.y; other < 32; other += blockDim.y) {
    const int i = down ? lane : other, j = down ? other : lane;
    if (row0 + i < rows && column0 + j < columns)
      tile[i][j] = reinterpret_cast<const T*>(m.data)[(row0 + i) * m.row + (column0 + j) * m.column];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += blockDim.y)
    if (row0 + i < rows && column0 + lane < columns) out[(row0 + i) * step + column0 + lane] = tile[i][lane];
}

// Places in one piece of scratch memory.
class Parts {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += round_up(bytes, 256);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

template <class T>
bool in_packs(const StridedMatrix& m) {
  return m.column == 1 && whole_packs(m.data, m.row * sizeof(T));
}

struct Shared {
  Share share;
  Grid grid;
  dim3 block;
  size_t bytes;
};

template <class T>
Shared shared_out(const Share& s, const Grid& grid) {
  const int64_t rows = s.gates * s.units, step = (int64_t{1} << s.chunk_bits) + kPad<T>;
  const int64_t kept = s.resident ? rows * (round_up(s.depth, granule_of<T>(s.gates)) + kPad<T>) : 0;
  const int64_t stages = 2 * (s.resident ? s.tile : s.tile + rows) * step * static_cast<int64_t>(sizeof(T));
  const int64_t sums = slices_of<T>(s.gates) * rows * s.tile * static_cast<int64_t>(sizeof(float));
  const int64_t warps = kMatrices<T> ? slices_of<T>(s.gates) * s.units / 8 : slices_of<T>(s.gates) * rows / 4;
  return {s, grid, dim3(static_cast<unsigned>(warps * kWarp)),
          static_cast<size_t>(kept) * sizeof(T) + static_cast<size_t>(std::max(stages, sums))};
}

// How `steps` steps of `gates` products a unit are shared out.
template <class T>
Shared share_of(int64_t batch, int64_t hidden, int gates, int64_t depth, int64_t steps, const Work& work) {
  // The batch in so many groups; as much of the depth at a time as the stages may have, and as there is room for.
  const auto with = [&](int units, int tile, bool resident, int64_t groups, size_t room) {
    const int64_t group = divided_up(divided_up(batch, tile), groups) * tile;
    const Grid grid{divided_up(hidden, units), divided_up(batch, group)};
    Share s{batch, hidden, depth, group, units, gates, tile, 0, resident};
    while (1 << s.chunk_bits < granule_of<T>(gates)) s.chunk_bits++;
    Shared shared = shared_out<T>(s, grid);
    const int64_t bytes = (resident ? tile : tile + gates * units) * 2 * static_cast<int64_t>(sizeof(T));
    while (int64_t{1} << s.chunk_bits < depth && bytes * ((2 << s.chunk_bits) + kPad<T>) <= kStageBytes) {
      s.chunk_bits++;
      const Shared larger = shared_out<T>(s, grid);
      if (larger.bytes > room) break;
      shared = larger;
    }
    return shared;
  };
  const Capacity device = capacity_of(work.device);
  const int tile = kMatrices<T> ? (batch > 16 ? 32 : 16) : batch > 4 ? 8 : batch > 2 ? 4 : batch > 1 ? 2 : 1;
  if (steps > 1 && device.together)
    for (const int units : {8, 16}) {
      const int64_t possible = device.processors / divided_up(hidden, units);
      if (possible == 0) continue;
      const bool all = kMatrices<T> && batch <= 16 * possible;  // small tiles make more groups, and take less room
      for (const int own : {all ? 16 : tile, kMatrices<T> ? 16 : tile}) {
        const Shared shared = with(units, own, true, std::min(divided_up(batch, own), possible), device.shared);
        if (shared.bytes <= device.shared) return shared;
      }
    }
  return with(8, tile, false, divided_up(batch, tile), kMaxShared);
}

// kernel(args, share, w, w_step, room, first, last) for all steps, in one launch where the weights stay, else one by one.
template <class Args, class T, class Room>
void launch_steps(void (*kernel)(Args, Share, const T*, int64_t, Room, int64_t, int64_t), const Shared& shared,
                  const Work& work, const Args& args, const T* w, int64_t w_step, const Room& room, int64_t steps) {
  const auto& [share, grid, block, bytes] = shared;
  if (share.resident)
    return launch_together(kernel, grid, block, bytes, work, args, share, w, w_step, room, int64_t{0}, steps);
  for (int64_t i = 0; i < steps; i++) launch(kernel, grid, block, bytes, work, args, share, w, w_step, room, i, i + 1);
}

}  // namespace pyllm::cuda
