// The product with a quantised weight, in the order of the CPU's kernel, whose bits it has: x is quantised first; within a
// group everything is whole numbers, and a group adds float(sum) * (scale of x * scale of the weight) in fp32, one group
// after another, whatever the number of rows.
//
// Few rows: a block takes a panel of 8 of the weight's rows. Eight warps read it, 16 bytes a lane and the next ones under
// way, sum up groups in whole numbers, each its own, and leave these in shared memory; a ninth adds the groups of the
// chunk before it in order meanwhile. So memory never waits for the sums, and no split over k changes their order.
//
// Many rows: a warp takes 32 rows by 32 columns. A group is one product of the matrix instruction, for which x is laid out
// beforehand, 16 bytes a lane, and for which a panel lies as it is: all operands come to registers from the caches.
#include "cuda/quantized_linear.h"

#include "cuda/bytes.h"

namespace pyllm::cuda {
namespace {

constexpr int64_t kPanel = kQuantizedPanel, kFewRows = 8;
constexpr int kReaders = 8;                    // warps of a block for few rows that read
constexpr int64_t kTile = 64, kFragment = 16;  // rows of x of a block, and of one matrix instruction

// What a group of a row of x needs beside its values: its scale, and what is added to its products. With minimums, that is
// scale times the sum of the values, for the minimum to be multiplied with; without, the zero point's part of the sums.
struct alignas(8) Scaled {
  float scale, extra;
};

// values: words of four, (rows, groups, words); or [16 rows][group][lane][registers] as the matrix instruction takes them.
template <int kGroup, class T>
__global__ void __launch_bounds__(256)
    quantize(QuantizedLinearArgs a, int64_t padded, bool for_matrices, uint32_t* values, Scaled* scaled) {
  constexpr int kWords = kGroup / 4;
  const QuantizedWeight& w = a.weight;
  const int64_t row_words = w.groups * kWords, count = a.m * row_words;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.x; base < count; base += step) {
    const int64_t i = base + threadIdx.x, row = i / row_words, at = i % row_words, g = at / kWords;
    const T* x = reinterpret_cast<const T*>(a.a) + row * a.a_row;
    float v[4], most = 0;
    int finite = 1, total = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      v[e] = i < count && at * 4 + e < a.k ? to_float(x[at * 4 + e]) : 0.0f;
      most = fmaxf(most, fabsf(v[e]));
      finite = finite && fabsf(v[e]) < INFINITY;
    }
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0u, most, half));
      finite &= __shfl_xor_sync(~0u, finite, half);
    }
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int whole = finite ? static_cast<int>(rintf(v[e] * inverse)) : 0;
      total += whole;
      word |= (static_cast<uint32_t>(whole) & 255) << (8 * e);
    }
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2) total += __shfl_xor_sync(~0u, total, half);
    if (i >= count) continue;
    const int64_t q = at % kWords;
    if (for_matrices) {
      const int64_t lane = row % 8 * 4 + q % 4, piece = row % kFragment / 8 + 2 * (q / 4);
      values[((row / kFragment * w.groups + g) * kWarp + lane) * (kWords / 2) + piece] = word;
    } else {
      values[i] = word;
    }
    if (q != 0) continue;
    const float scale = finite ? most / 127.0f : NAN;
    const float extra =
        w.has_minimums ? scale * static_cast<float>(total) : -static_cast<float>((1 << (w.bits - 1)) * total);
    scaled[g * padded + row] = {scale, extra};
  }
}

// A product's group joins its sum: `whole` holds the products of the values.
template <bool kMinimums>
__device__ __forceinline__ float add_group(float total, float whole, Scaled x, float scale, float minimum) {
  if constexpr (!kMinimums) whole += x.extra;  // both and their sum are whole numbers below 2^24
  total = fmaf(whole, scale * x.scale, total);
  return kMinimums ? fmaf(minimum, x.extra, total) : total;
}

__device__ __forceinline__ void put(const QuantizedLinearArgs& a, int64_t row, int64_t column, float y) {
  if (row >= a.m || column >= a.weight.n) return;
  if (a.bias) y += float_at(a.bias, a.dtype, column);
  put_at(a.c, a.dtype, row * a.weight.n + column, y);
}

template <int kBits, int kGroup, int kRows, bool kMinimums>
__global__ void __launch_bounds__((kReaders + 1) * kWarp)
    few_rows(QuantizedLinearArgs a, const uint32_t* values, const Scaled* scaled) {
  constexpr int kWords = kGroup * kBits / 32, kOwn = 16 / kWords;  // groups that a warp reads at once
  constexpr int kChunk = kReaders * kOwn, kSums = kRows < 4 ? 1 : kRows / 4;
  __shared__ float wholes[2][kChunk][kRows][kPanel];
  __shared__ float scales[2][kChunk][kPanel], minimums[2][kMinimums ? kChunk : 1][kPanel];
  __shared__ Scaled of_x[2][kChunk][kRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t groups = a.weight.groups, group_bytes = a.weight.group_bytes(kPanel);
  const int64_t chunks = divided_up(groups, kChunk);
  const char* panel = a.panels + blockIdx.x * groups * group_bytes;
  // A lane reads quad `quad` of four of the panel's rows, those of its half; in the end it has the sum of row `mine`, as
  // do, where there are eight quads, two lanes.
  const int half = lane % 2, quad = lane / 2 % kWords, own = warp * kOwn + lane / (2 * kWords);
  const int mine = half * 4 + quad % 2 * 2 + quad / 2 % 2;
  const bool writes = quad < 4;

  struct Fetched {
    uint4 words;
    float scale, minimum;
    Scaled x;
  };
  const auto fetch = [&](int64_t chunk) {
    Fetched f{};
    const int64_t g = chunk * kChunk + own;
    if (warp >= kReaders || g >= groups) return f;
    const char* group = panel + g * group_bytes;
    f.words = *reinterpret_cast<const uint4*>(group + quad * kPanel * 4 + half * 16);
    if (!writes) return f;
    const char* beside = group + kWords * kPanel * 4;
    f.scale = float_at(beside, a.weight.scale_dtype, mine);
    if constexpr (kMinimums) f.minimum = float_at(beside, a.weight.scale_dtype, kPanel + mine);
    if (mine < kRows) f.x = scaled[g * kRows + mine];
    return f;
  };

  float total[kSums] = {};
  Fetched next = fetch(0);
  for (int64_t chunk = 0; chunk <= chunks; chunk++) {
    if (warp < kReaders && chunk < chunks) {
      const Fetched now = next;
      next = fetch(chunk + 1);
      const int64_t g = chunk * kChunk + own;
      const bool live = g < groups;
      const int at = chunk % 2;
      const uint32_t words[4] = {now.words.x, now.words.y, now.words.z, now.words.w};
#pragma unroll
      for (int row = 0; row < kRows; row++) {
        const uint32_t* x = values + (row * groups + (live ? g : 0)) * (kGroup / 4) + quad;
        int32_t s[4] = {};
#pragma unroll
        for (int r = 0; r < 4; r++) {
          if constexpr (kBits == 4)
            s[r] = dot_bytes(dot_bytes(0, words[r] & 0x0f0f0f0f, x[0]), words[r] >> 4 & 0x0f0f0f0f, x[4]);
          else
            s[r] = dot_bytes(0, words[r], x[0]);
        }
        // Sums over the quads: a lane gives away half of what it has, and then half of the rest.
        const bool odd = quad % 2, second = quad / 2 % 2;
        const int32_t low = odd ? s[2] : s[0], high = odd ? s[3] : s[1];
        const int32_t a0 = low + __shfl_xor_sync(~0u, odd ? s[0] : s[2], 2);
        const int32_t a1 = high + __shfl_xor_sync(~0u, odd ? s[1] : s[3], 2);
        int32_t whole = (second ? a1 : a0) + __shfl_xor_sync(~0u, second ? a0 : a1, 4);
        if constexpr (kWords == 8) whole += __shfl_xor_sync(~0u, whole, 8);
        if (live && writes) wholes[at][own][row][mine] = static_cast<float>(whole);
      }
      if (live && writes) {
        scales[at][own][mine] = now.scale;
        if constexpr (kMinimums) minimums[at][own][mine] = now.minimum;
        if (mine < kRows) of_x[at][own][mine] = now.x;
      }
    } else if (warp == kReaders && chunk > 0 && lane < kRows * kPanel) {
      const int at = (chunk - 1) % 2, column = lane % kPanel;
      const int64_t left = groups - (chunk - 1) * kChunk;
      const int count = static_cast<int>(left < kChunk ? left : kChunk);
#pragma unroll 4
      for (int g = 0; g < count; g++) {
        const float scale = scales[at][g][column], minimum = kMinimums ? minimums[at][g][column] : 0.0f;
#pragma unroll
        for (int i = 0; i < kSums; i++) {
          const int row = lane / kPanel + 4 * i;
          total[i] = add_group<kMinimums>(total[i], wholes[at][g][row][column], of_x[at][g][row], scale, minimum);
        }
      }
    }
    __syncthreads();
  }
  if (warp != kReaders || lane >= kRows * kPanel) return;
#pragma unroll
  for (int i = 0; i < kSums; i++) put(a, lane / kPanel + 4 * i, blockIdx.x * kPanel + lane % kPanel, total[i]);
}

template <int kBits, int kGroup, bool kMinimums>
__global__ void __launch_bounds__(128)
    many_rows(QuantizedLinearArgs a, int64_t padded, const uint32_t* values, const Scaled* scaled) {
  constexpr int kRegisters = kGroup / 16, kDown = 2, kAcross = 4;  // matrices of a warp
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, pair = lane % 4 * 2;
  const int64_t groups = a.weight.groups, group_bytes = a.weight.group_bytes(kPanel),
                panel_bytes = groups * group_bytes;
  const int64_t panels = divided_up(a.weight.n, kPanel);
  const int64_t row0 = blockIdx.x * kTile + warp % 2 * kDown * kFragment;
  const int64_t panel0 = blockIdx.y * kTile / kPanel + warp / 2 * kAcross;

  struct Fetched {
    uint32_t x[kDown][2 * kRegisters], words[kAcross][kBits == 4 ? 1 : kRegisters];
    Scaled of_x[kDown][2];
    float scales[kAcross][2], minimums[kMinimums ? kAcross : 1][2];
  };
  const auto fetch = [&](int64_t g) {
    Fetched f{};
    if (g >= groups) return f;
#pragma unroll
    for (int i = 0; i < kDown; i++) {
      const uint32_t* from = values + (((row0 / kFragment + i) * groups + g) * kWarp + lane) * (2 * kRegisters);
      if constexpr (kRegisters == 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        f.x[i][0] = v.x, f.x[i][1] = v.y, f.x[i][2] = v.z, f.x[i][3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        f.x[i][0] = v.x, f.x[i][1] = v.y;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) f.of_x[i][h] = scaled[g * padded + row0 + i * kFragment + h * 8 + lane / 4];
    }
#pragma unroll
    for (int j = 0; j < kAcross; j++) {
      const int64_t panel = panel0 + j < panels ? panel0 + j : panels - 1;
      const char* group = a.panels + panel * panel_bytes + g * group_bytes;
      const auto* words = reinterpret_cast<const uint32_t*>(group) + lane % 4 * kPanel + lane / 4;
      f.words[j][0] = words[0];
      if constexpr (kBits == 8 && kRegisters == 2) f.words[j][1] = words[4 * kPanel];
      const char* beside = group + kGroup * kBits / 8 * kPanel;
#pragma unroll
      for (int c = 0; c < 2; c++) {
        f.scales[j][c] = float_at(beside, a.weight.scale_dtype, pair + c);
        if constexpr (kMinimums) f.minimums[j][c] = float_at(beside, a.weight.scale_dtype, kPanel + pair + c);
      }
    }
    return f;
  };

  float total[kDown][kAcross][4] = {};
  Fetched next = fetch(0);
  for (int64_t g = 0; g < groups; g++) {
    const Fetched now = next;
    next = fetch(g + 1);
#pragma unroll
    for (int j = 0; j < kAcross; j++) {
      uint32_t b[kRegisters];
      if constexpr (kBits == 4) {
        b[0] = now.words[j][0] & 0x0f0f0f0f;
        b[1] = now.words[j][0] >> 4 & 0x0f0f0f0f;
      } else {
#pragma unroll
        for (int r = 0; r < kRegisters; r++) b[r] = now.words[j][r];
      }
#pragma unroll
      for (int i = 0; i < kDown; i++) {
        int32_t whole[4] = {};
        multiply_add_bytes<kRegisters>(whole, now.x[i], b);
#pragma unroll
        for (int e = 0; e < 4; e++)
          total[i][j][e] = add_group<kMinimums>(total[i][j][e], static_cast<float>(whole[e]), now.of_x[i][e / 2],
                                                now.scales[j][e % 2], kMinimums ? now.minimums[j][e % 2] : 0.0f);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kDown; i++)
#pragma unroll
    for (int j = 0; j < kAcross; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        put(a, row0 + i * kFragment + e / 2 * 8 + lane / 4, (panel0 + j) * kPanel + pair + e % 2, total[i][j][e]);
}

template <int kBits, int kGroup, bool kMinimums>
void run(const QuantizedLinearArgs& a, const Work& work) {
  const int64_t groups = a.weight.groups, row_words = groups * kGroup / 4, panels = divided_up(a.weight.n, kPanel);
  const bool few = a.m <= kFewRows;
  const int64_t padded = !few ? divided_up(a.m, kTile) * kTile : a.m <= 2 ? a.m : a.m <= 4 ? 4 : kFewRows;
  const Scratch values(work, padded * row_words * sizeof(uint32_t)), scaled(work, padded * groups * sizeof(Scaled));
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    launch(quantize<kGroup, T>, {blocks_for(divided_up(a.m * row_words, 256))}, dim3(256), 0, work, a, padded, !few,
           values.as<uint32_t>(), scaled.as<Scaled>());
  });
  const auto* x = values.as<const uint32_t>();
  const auto* of_x = scaled.as<const Scaled>();
  if (!few)
    return launch(many_rows<kBits, kGroup, kMinimums>, {padded / kTile, divided_up(panels * kPanel, kTile)}, dim3(128),
                  0, work, a, padded, x, of_x);
  const auto kernel = padded == 1   ? few_rows<kBits, kGroup, 1, kMinimums>
                      : padded == 2 ? few_rows<kBits, kGroup, 2, kMinimums>
                      : padded == 4 ? few_rows<kBits, kGroup, 4, kMinimums>
                                    : few_rows<kBits, kGroup, 8, kMinimums>;
  launch(kernel, {panels}, dim3((kReaders + 1) * kWarp), 0, work, a, x, of_x);
}

}  // namespace

void quantized_linear(const QuantizedLinearArgs& a, const Work& work) {
  if (a.m == 0) return;
  const bool minimums = a.weight.has_minimums;
  if (a.weight.bits == 4) return minimums ? run<4, 32, true>(a, work) : run<4, 32, false>(a, work);
  if (a.weight.group == 16) return minimums ? run<8, 16, true>(a, work) : run<8, 16, false>(a, work);
  minimums ? run<8, 32, true>(a, work) : run<8, 32, false>(a, work);
}

}  // namespace pyllm::cuda
