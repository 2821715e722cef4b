// fp32 by fp32 on the tile registers, as three parts of bf16 (kernels/parts.h).
//
// Of A's rows and B's columns the fewer are held: cut, for a block of k, into a share of the second-level cache. The
// others pass by, 32 at a time, each cut once; what is cut next, and the part of C that is added to next, are fetched
// meanwhile. C's squares of 32 x 32 are summed in the registers, and rest in C itself between blocks of k. A step
// multiplies 32 of k, in an order of the six products in which one part changes at a time: more tiles would have to be
// loaded otherwise. It takes 120 ns, the cutting of 32 x 32 elements as much, so that everything is shaped to cut
// little. At most 16 rows of A change places with B, whose columns are then cut without a transposition where k lies
// along them, each step while the one before is multiplied.
//
// An element of C is one chain over k's tiles and the six products of each, from zero, the bias, or what was in C.
// Parts below 2^-126 count as zero, as the registers have it, and an infinite factor gives NaN: its middle part is one.
#include "cpu/kernels/gemm_parts.h"

#include "cpu/amx.h"
#include "cpu/kernels/gemm_panels.h"
#include "cpu/kernels/gemm_pieces.h"
#include "cpu/kernels/parts.h"

namespace pyllm::ISA {

#if ISA_AVX512

namespace {

constexpr int64_t kSide = 2 * kTileSide;        // of a square
constexpr int64_t kStepBytes = 2 * kCutBytes;   // of a square's lines
constexpr int64_t kHeldBytes = 7 << 17;         // a share of the second-level cache
constexpr int64_t kStoring = 4;                 // steps between two stores
constexpr int64_t kCutting = 34;                // multiply-adds in the time of cutting an element
constexpr int64_t kShallow = 128, kDeep = 256;  // k for which as many lines are held as fit

constexpr int64_t kLeastSide = 64, kLeastDepth = 16;  // that pay

// A square's lines: step after step, 16 lines and 16 more.
void cut_square(const Floats& x, int64_t k, int64_t line, int64_t k0, int64_t depth, bool right, char* out) {
  for (int64_t at = k0; at < k0 + depth; at += kDepth, out += kStepBytes)
    for (int side = 0; side < 2; side++) cut_lines(x, k, line + side * kTileSide, at, right, out + side * kCutBytes);
}

// Lines of memory, fetched while others are multiplied: `rows` pieces of `width` bytes, `step` apart, in as many parts
// as `times` says.
class Ahead {
 public:
  Ahead(const void* corner, int64_t rows, int64_t step, int64_t width, int64_t times)
      : row_(static_cast<const char*>(corner)), rows_(rows), step_(step), width_(width) {
    each_ = (rows * ((width + 63) / 64) + times - 1) / times;
  }
  VEC void fetch() {
    for (int64_t l = 0; l < each_ && rows_ > 0; l++) {
      __builtin_prefetch(row_ + at_);
      at_ += 64;
      if (at_ >= width_) at_ = 0, row_ += step_, rows_--;
    }
  }

 private:
  const char* row_;
  int64_t rows_, step_, width_, each_, at_ = 0;
};

struct Sums {  // a square's, rows `step` bytes apart
  float* data;
  int64_t step;
  float* below() const { return reinterpret_cast<float*>(reinterpret_cast<char*>(data) + kTileSide * step); }
};

// 32 lines by 32 over `steps` of k: from `start`, or zero, to `end`. The first store after some 600 ns without one
// takes the time of two steps, so that some come between, of sums that nobody reads.
void square(const char* left, const char* right, int64_t steps, const Sums& start, const Sums& end, Ahead& source,
            Ahead& sums) {
  alignas(64) char unread[kTileBytes];
  if (start.data) {
    load_tile<0>(start.data, start.step), load_tile<1>(start.data + W, start.step);
    load_tile<2>(start.below(), start.step), load_tile<3>(start.below() + W, start.step);
  } else {
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  }
  for (int64_t s = 0; s < steps; s++, left += kStepBytes, right += kStepBytes) {
    source.fetch();
    sums.fetch();
    if (s % kStoring == kStoring - 1) store_tile<0>(unread, 64);
    dot_step<kParts, 2, 2>(left, kCutBytes, right, kCutBytes);
  }
  store_tile<0>(end.data, end.step), store_tile<1>(end.data + W, end.step);
  store_tile<2>(end.below(), end.step), store_tile<3>(end.below() + W, end.step);
}

struct Factor {
  Floats lines;
  int64_t begin, end;
  bool right;
};

// Lines that are held at a time: the more the less is cut, the fewer the less often C is read.
int64_t held_lines(int64_t lines, int64_t k) {
  const int64_t most = kHeldBytes / 6 / std::clamp(k, kShallow, kDeep) / kSide * kSide;
  const int64_t times = (lines + most - 1) / most;
  return round_up((lines + times - 1) / times, kSide);
}

Floats rows_of(const Product& p) { return {static_cast<const float*>(p.a.data), p.a.row_step, p.a.column_step, p.m}; }
Floats columns_of(const Product& p) {
  return {static_cast<const float*>(p.b.data), p.b.column_step, p.b.row_step, p.n};
}

// Memory where a square's lines lie, from k0 on, `depth` of k.
Ahead source_of(const Factor& f, int64_t line, int64_t k0, int64_t depth, int64_t times) {
  const int64_t lines = std::clamp<int64_t>(f.end - line, 0, kSide), size = sizeof(float);
  const float* corner = f.lines.data + line * f.lines.step + k0 * f.lines.k_step;
  if (f.lines.k_step == 1) return {corner, lines, f.lines.step * size, depth * size, times};
  return {corner, lines && f.lines.step == 1 ? depth : 0, f.lines.k_step * size, lines * size, times};
}

void many_rows(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Factor left{rows_of(p), i0, i1, false}, right{columns_of(p), j0, j1, true};
  const bool hold_left = i1 - i0 < j1 - j0;
  const Factor &held = hold_left ? left : right, &passing = hold_left ? right : left;
  const int64_t lines = held_lines(held.end - held.begin, p.k);
  const int64_t most = std::max(kHeldBytes / 6 / lines / kDepth * kDepth, kDepth);
  const int64_t depth = std::min(round_up(p.k, kDepth), most), lines_bytes = depth / kDepth * kStepBytes;
  auto* copy = static_cast<char*>(cpu::scratch((lines / kSide + 1) * lines_bytes, 7));
  char* passes = copy + lines / kSide * lines_bytes;
  alignas(64) float edge[kSide][kSide];
  auto* c = static_cast<float*>(p.c);
  const TileShapes shapes(kTileSide, kPairs);
  for (int64_t h0 = held.begin; h0 < held.end; h0 += lines) {
    const int64_t h1 = std::min(h0 + lines, held.end), squares = (h1 - h0 + kSide - 1) / kSide;
    for (int64_t k0 = 0; k0 < p.k; k0 += depth) {
      const int64_t count = std::min(depth, p.k - k0), steps = (count + kDepth - 1) / kDepth;
      for (int64_t s = 0; s < squares; s++)
        cut_square(held.lines, p.k, h0 + s * kSide, k0, count, held.right, copy + s * lines_bytes);
      for (int64_t line = passing.begin; line < passing.end; line += kSide) {
        cut_square(passing.lines, p.k, line, k0, count, passing.right, passes);
        Ahead source = source_of(passing, line + kSide, k0, count, squares * steps);
        for (int64_t s = 0; s < squares; s++) {
          const char* holds = copy + s * lines_bytes;
          const int64_t h = h0 + s * kSide, i = hold_left ? h : line, j = hold_left ? line : h;
          const int64_t rows = std::min(kSide, i1 - i), columns = std::min(kSide, j1 - j);
          const bool whole = rows == kSide && columns == kSide, starts = k0 == 0 && !p.accumulate;
          float* corner = c + i * p.c_step + j;
          const auto each = [&](const auto& f) {
            for (int64_t r = 0; r < rows; r++)
              for (int64_t column = 0; column < columns; column += W)
                f(corner + r * p.c_step + column, edge[r] + column, column, std::min<int64_t>(W, columns - column));
          };
          const Sums end = whole ? Sums{corner, p.c_step * 4} : Sums{edge[0], kSide * 4};
          Sums start = end;
          if (starts && !p.bias)
            start.data = nullptr;
          else if (starts && whole)
            start = {const_cast<float*>(p.bias) + j, 0};
          else if (!whole)
            each([&](float* to, float* sums, int64_t column, int64_t n) {
              store(sums, get(starts ? p.bias + j + column : to, n));
            });
          const bool more = s + 1 < squares;
          const int64_t next_h = more ? h + kSide : h0, next_line = more ? line : line + kSide;
          const int64_t next_i = hold_left ? next_h : next_line, next_j = hold_left ? next_line : next_h;
          Ahead next_sums(c + next_i * p.c_step + next_j, std::clamp<int64_t>(i1 - next_i, 0, kSide), p.c_step * 4,
                          kSide * 4, steps);
          square(hold_left ? holds : passes, hold_left ? passes : holds, steps, start, end, source, next_sums);
          if (!whole) each([&](float* to, float* sums, int64_t, int64_t n) { write(to, load(sums), n); });
        }
      }
    }
  }
}

// At most 16 rows of A, as the right factor, by B's columns as the left one: C transposed.
void few_rows(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  constexpr int kWide = 4;
  const Floats rows = rows_of(p), columns = columns_of(p);
  const int64_t steps = (p.k + kDepth - 1) / kDepth;
  auto* x = static_cast<char*>(cpu::scratch((steps + 2 * kWide) * kCutBytes, 7));
  char* block = x + steps * kCutBytes;
  for (int64_t s = 0; s < steps; s++) cut_lines(rows, p.k, i0, s * kDepth, true, x + s * kCutBytes);
  alignas(64) float sums[kWide][kTileSide * kTileSide];
  auto* c = static_cast<float*>(p.c);
  const TileShapes shapes(kTileSide, kPairs);
  for (int64_t j = j0; j < j1; j += kWide * kTileSide) {
    const auto each = [&](const auto& f) {
      for (int t = 0; t < kWide && j + t * kTileSide < j1; t++)
        f(sums[t], j + t * kTileSide, std::min(kTileSide, j1 - j - t * kTileSide));
    };
    if (p.bias || p.accumulate) {
      each([&](float* s, int64_t column, int64_t n) {
        V lines[W] = {};
        for (int64_t i = i0; i < i1; i++) lines[i - i0] = get(p.bias ? p.bias + column : c + i * p.c_step + column, n);
        transpose(lines);
        UNROLL for (int l = 0; l < W; l++) store(s + l * W, lines[l]);
      });
      load_tile<0>(sums[0], 64), load_tile<1>(sums[1], 64), load_tile<2>(sums[2], 64), load_tile<3>(sums[3], 64);
    } else {
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    }
    for (int64_t s = 0; s <= steps; s++) {  // cuts a step, and multiplies the one before
      const char* right = x + (s - 1) * kCutBytes;
      char* to = block + s % 2 * kWide * kCutBytes;
      const char* from = block + (s + 1) % 2 * kWide * kCutBytes;
      if (s > 0) {
        load_tile<4>(right + kHigh * kTileBytes, 64), load_tile<5>(right + kMiddle * kTileBytes, 64);
        load_tile<6>(right + kLow * kTileBytes, 64);
      }
      const auto tile = [&]<int kSum>() {
        if (s < steps) cut_lines(columns, p.k, j + kSum * kTileSide, s * kDepth, false, to + kSum * kCutBytes);
        if (s == 0) return;
        load_tile<7>(from + kSum * kCutBytes + kLow * kTileBytes, 64);
        dot_bf16_tiles<kSum, 7, 4>();  // in the order of `square`
        load_tile<7>(from + kSum * kCutBytes + kMiddle * kTileBytes, 64);
        dot_bf16_tiles<kSum, 7, 4>(), dot_bf16_tiles<kSum, 7, 5>();
        load_tile<7>(from + kSum * kCutBytes + kHigh * kTileBytes, 64);
        dot_bf16_tiles<kSum, 7, 5>(), dot_bf16_tiles<kSum, 7, 4>(), dot_bf16_tiles<kSum, 7, 6>();
      };
      tile.template operator()<0>(), tile.template operator()<1>();
      tile.template operator()<2>(), tile.template operator()<3>();
    }
    store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64), store_tile<2>(sums[2], 64), store_tile<3>(sums[3], 64);
    each([&](float* s, int64_t column, int64_t n) {
      V lines[W];
      UNROLL for (int l = 0; l < W; l++) lines[l] = load(s + l * W);
      transpose(lines);
      for (int64_t i = i0; i < i1; i++) write(c + i * p.c_step + column, lines[i - i0], n);
    });
  }
}

bool cuts(const Product& p) {
  const bool wide = p.a.dtype == DType::f32 && p.b.dtype == DType::f32 && p.c_dtype == DType::f32;
  return wide && p.k > 0 && cpu::has_amx();
}

}  // namespace

void product_in_parts(const Product& p) {
  if (!cuts(p)) return product(p);
  if (p.m <= kTileSide) {
    constexpr int64_t kColumns = 256;
    return parallel_for((p.n + kColumns - 1) / kColumns, 1 + (1 << 15) / (p.k * kColumns), [&](int64_t i, int64_t end) {
      few_rows(p, 0, p.m, i * kColumns, std::min(end * kColumns, p.n));
    });
  }
  in_pieces(
      p, kSide, kSide,
      [&](int64_t h, int64_t w) {
        const int64_t least = std::min(h, w);
        return kCutting * (least + std::max(h, w) * ((least - 1) / held_lines(least, p.k) + 1));
      },
      many_rows);
}

bool parts_pay(const Product& p) { return cuts(p) && p.m >= kLeastSide && p.n >= kLeastSide && p.k >= kLeastDepth; }

#else

void product_in_parts(const Product& p) { product(p); }
bool parts_pay(const Product&) { return false; }

#endif

void gradient_product(const Product& p) { (parts_pay(p) ? product_in_parts : product)(p); }

}  // namespace pyllm::ISA
