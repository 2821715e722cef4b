// bf16 by bf16 on the tile registers: C's squares of 32 x 32, two tiles of A by two of B for every 32 of k, sums in the
// registers. A's rows are read where they lie if k lies along them; B's panels are packed by pairs of k into the
// first-level cache, and every square of a column passes by. Between blocks of k the sums rest in memory as they are.
// Where A has few rows and k lies along B's columns, the two change places: B is read where it lies and A is packed, for
// the price of transposing C.
//
// An element of C is one chain over k's tiles, in order, from zero or from what was in C.
#include "cpu/amx.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/tiles.h"

namespace pyllm::ISA {

#if ISA_AVX512

namespace {

constexpr int64_t kSide = 2 * kTileSide;             // of a square
constexpr int64_t kMaxDepth = 1024;                  // of k, whose sums stay in registers
constexpr int64_t kShort = 256, kShortDepth = 4096;  // the same for few rows: it is B's rows that should be read whole
constexpr int64_t kBlockDepth = 256;                 // of more, between which they rest in memory
constexpr int64_t kStrip = 512;                      // columns whose sums rest together
constexpr int64_t kMaxHeight = 2048;                 // rows that pass by a panel
constexpr int64_t kRowBytes = 2 * kSide * 2;         // of a panel: a pair of k for each column
constexpr int64_t kFewRows = 32;
static_assert(kSide == kPanel);

Lines columns_of(const Product& p) { return {static_cast<const bf16*>(p.b.data), p.b.column_step, p.b.row_step, p.n}; }

struct Left {  // rows of A: tile after tile along k
  const char* data;
  int64_t row_bytes, step_bytes;
};

// Rows of a square whose sums wait to be rounded to bf16.
struct Waiting {
  const float *from, *bias;
  bf16* to;
  int64_t c_step, rows = 0;

  VEC void finish(int64_t count) {
    for (; rows > 0 && count > 0; rows--, count--, from += kSide, to += c_step) {
      V low = load(from), high = load(from + W);
      if (bias) low = low + load(bias), high = high + load(bias + W);
      store_bf16(to, low, high);
    }
  }
};

struct Ahead {  // rows that are fetched while others are multiplied
  const char* data;
  int64_t row_bytes, rows;
};

// kDown tiles of rows by two of columns, `steps` tiles of k: sums to c (32 x 32). What waits is finished
// in the shadow of the products.
template <int kDown>
void square(const Left& a, const char* b, int64_t steps, float* c, bool first, const Ahead& ahead, Waiting& waiting) {
  constexpr int64_t c_bytes = kSide * sizeof(float);
  float* below = c + kTileSide * kSide;
  if (first) {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (kDown == 2) zero_tile<2>(), zero_tile<3>();
  } else {
    load_tile<0>(c, c_bytes), load_tile<1>(c + W, c_bytes);
    if constexpr (kDown == 2) load_tile<2>(below, c_bytes), load_tile<3>(below + W, c_bytes);
  }
  const char* left = a.data;
  const int64_t at_once = (kSide + steps - 1) / steps;
  for (int64_t s = 0; s < steps; s++, left += a.step_bytes, b += kPairs * kRowBytes) {
    for (int64_t row = 0; row < ahead.rows; row++)
      __builtin_prefetch(ahead.data + row * ahead.row_bytes + s * 64, 0, 2);
    load_tile<4>(left, a.row_bytes);
    load_tile<6>(b, kRowBytes);
    load_tile<7>(b + kRowBytes / 2, kRowBytes);
    dot_bf16_tiles<0, 4, 6>();
    dot_bf16_tiles<1, 4, 7>();
    waiting.finish(at_once);
    if constexpr (kDown == 2) {
      load_tile<5>(left + kTileSide * a.row_bytes, a.row_bytes);
      dot_bf16_tiles<2, 5, 6>();
      dot_bf16_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, c_bytes), store_tile<1>(c + W, c_bytes);
  if constexpr (kDown == 2) store_tile<2>(below, c_bytes), store_tile<3>(below + W, c_bytes);
}

VEC void finish(const Product& p, int64_t i, int64_t j, int64_t n, V v) {
  if (p.bias) v = v + get(p.bias + j, n);
  with_dtype(p.c_dtype, [&](auto* tag) { write(static_cast<decltype(tag)>(p.c) + i * p.c_step + j, v, n); });
}
VEC V start(const Product& p, int64_t i, int64_t j, int64_t n) {
  V v{};
  with_dtype(p.c_dtype, [&](auto* tag) { v = get(static_cast<decltype(tag)>(p.c) + i * p.c_step + j, n); });
  return v;
}

// Rows i0..i1, at most kMaxHeight, by columns j0..j1.
void many_rows(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t rows = i1 - i0, height = round_up(rows, kSide);
  const int64_t whole_depth = rows <= kShort ? kShortDepth : kMaxDepth;
  const int64_t block = p.k <= whole_depth ? round_up(p.k, kDepth) : kBlockDepth, blocks = (p.k + block - 1) / block;
  const int64_t left_bytes = height * block * sizeof(bf16), right_bytes = block / 2 * kRowBytes;
  auto* copy = static_cast<char*>(cpu::scratch(
      left_bytes + right_bytes + (blocks == 1 ? 2 * kSide : height * kStrip / kSide) * kSide * sizeof(float), 7));
  char* panel = copy + left_bytes;
  auto* wide = reinterpret_cast<float*>(panel + right_bytes);
  const Lines a = {static_cast<const bf16*>(p.a.data) + i0 * p.a.row_step, p.a.row_step, p.a.column_step, rows};
  const Lines b = columns_of(p);
  const int64_t packed_rows = round_up(p.k, kDepth) / 2;                       // of a packed panel
  const int64_t ahead_rows = (kSide + height / kSide - 1) / (height / kSide);  // with each square
  const TileShapes shapes(kTileSide, kPairs);
  Waiting waiting;
  for (int64_t left = j0; left < j1; left += kStrip) {
    const int64_t right = std::min(left + kStrip, j1);
    for (int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += block) {
      const int64_t depth = std::min(block, p.k - k0), steps = (depth + kDepth - 1) / kDepth;
      // Rows a multiple of 2 kB apart would fall into few sets of the first-level cache, and push each other out.
      const bool in_place = a.k_step == 1 && depth % kDepth == 0 && a.step % 1024 != 0, last = k0 + block >= p.k;
      const int64_t whole = in_place ? rows / kSide * kSide : 0;  // rows that are read where they lie
      if (left == j0 || blocks > 1)
        for (int64_t i = whole; i < height; i += kTileSide)
          for (int64_t s = 0; i < rows && s < steps; s++)
            pack_tile(a, p.k, i, k0 + s * kDepth, false,
                      copy + i / kSide * kSide * block * 2 + s * kSide * 64 + i % kSide * 64, 64);
      for (int64_t j = left; j < right; j += kSide) {
        const char* right_tiles = static_cast<const char*>(p.packed_narrow);
        if (right_tiles) {
          right_tiles += (j / kSide * packed_rows + k0 / 2) * kRowBytes;
        } else {
          for (int64_t s = 0; s < steps; s++)
            for (int64_t side = 0; side < 2 && j + side * kTileSide < p.n; side++)
              pack_tile(b, p.k, j + side * kTileSide, k0 + s * kDepth, true,
                        panel + s * kPairs * kRowBytes + side * kRowBytes / 2, kRowBytes);
          right_tiles = panel;
        }
        // B's next panel, packed, or as it lies where k lies along its columns.
        Ahead ahead{right_tiles + packed_rows * kRowBytes, steps * 64, ahead_rows};
        if (!p.packed_narrow)
          ahead = {reinterpret_cast<const char*>(b.data + (j + kSide) * b.step + k0), 2 * b.step,
                   b.k_step == 1 ? ahead_rows : 0};
        const int64_t columns = std::min(kSide, right - j);
        for (int64_t i = 0; i < rows; i += kSide) {
          const Left tiles = i < whole
                                 ? Left{reinterpret_cast<const char*>(a.data + i * a.step + k0), 2 * a.step, 2 * kDepth}
                                 : Left{copy + i * block * 2, 64, kSide * 64};
          float* c = blocks == 1 ? wide + i / kSide % 2 * kSide * kSide : wide + (j - left) * height + i * kSide;
          const int64_t live = std::min(kSide, rows - i);
          const auto each = [&](const auto& f) {
            for (int64_t r = 0; r < live; r++)
              for (int64_t at = 0; at < columns; at += W)
                f(i0 + i + r, j + at, std::min<int64_t>(W, columns - at), c + r * kSide + at);
          };
          const bool first = k0 == 0 && !p.accumulate;
          if (k0 == 0 && p.accumulate)
            each([&](int64_t row, int64_t column, int64_t n, float* to) { store(to, start(p, row, column, n)); });
          (live > kTileSide ? square<2> : square<1>)(tiles, right_tiles, steps, c, first, ahead, waiting);
          ahead.data += ahead.rows * ahead.row_bytes;
          waiting.finish(kSide);
          if (last && columns == kSide && p.c_dtype == DType::bf16)
            waiting = {c, p.bias ? p.bias + j : nullptr, static_cast<bf16*>(p.c) + (i0 + i) * p.c_step + j, p.c_step,
                       live};
          else if (last)
            each([&](int64_t row, int64_t at, int64_t n, float* from) { finish(p, row, at, n, load(from)); });
        }
      }
    }
  }
  waiting.finish(kSide);
}

// At most kFewRows rows i0..i1 of A, packed as right factors, by columns j0..j1 of B, read where they lie: C transposed.
template <int kRight>
void few_rows(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  constexpr int kLeft = 2;
  constexpr int64_t kWide = kLeft * kTileSide, kAhead = 8;
  const int64_t rows = i1 - i0, steps = (p.k + kDepth - 1) / kDepth, whole = p.k / kDepth;
  const int64_t width = kRight == 1 ? rows : kTileSide;  // columns of a tile of C transposed
  auto* x = static_cast<char*>(cpu::scratch((kRight * steps + kLeft) * kTileBytes, 7));
  char* copy = x + kRight * steps * kTileBytes;  // of B's columns at its edges
  const Lines a = {static_cast<const bf16*>(p.a.data) + i0 * p.a.row_step, p.a.row_step, p.a.column_step, rows};
  const Lines b = columns_of(p);
  for (int64_t s = 0; s < steps; s++)
    for (int r = 0; r < kRight; r++)
      pack_tile(a, p.k, r * kTileSide, s * kDepth, true, x + (s * kRight + r) * kTileBytes, 64);
  const TileShapes shapes(static_cast<int>(width), kPairs);
  const int64_t c_bytes = width == 1 ? 4 : 64;
  alignas(64) float c[kLeft][kRight][kTileSide * kTileSide];
  for (int64_t j = j0; j < j1; j += kWide) {
    const auto live = [&](int l) { return std::clamp<int64_t>(j1 - j - l * kTileSide, 0, kTileSide); };
    for (int l = 0; p.accumulate && l < kLeft; l++)
      for (int r = 0; live(l) && r < kRight; r++) {
        V lines[W] = {};
        for (int64_t i = 0; i < std::min(kTileSide, rows - r * kTileSide); i++)
          lines[i] = start(p, i0 + r * kTileSide + i, j + l * kTileSide, live(l));
        if (width > 1) transpose(lines);
        for (int64_t i = 0; i < (width > 1 ? W : 1); i++) store(c[l][r] + i * W, lines[i]);
      }
    if (p.accumulate) {
      load_tile<0>(c[0][0], c_bytes), load_tile<1>(c[1][0], c_bytes);
      if constexpr (kRight == 2) load_tile<2>(c[0][1], c_bytes), load_tile<3>(c[1][1], c_bytes);
    } else {
      zero_tile<0>(), zero_tile<1>();
      if constexpr (kRight == 2) zero_tile<2>(), zero_tile<3>();
    }
    const bool inside = j + kWide <= j1;
    const auto step = [&](const char* first, const char* second, int64_t row_bytes, int64_t s) {
      load_tile<4>(first, row_bytes);
      load_tile<5>(second, row_bytes);
      load_tile<6>(x + s * kRight * kTileBytes, 64);
      dot_bf16_tiles<0, 4, 6>();
      dot_bf16_tiles<1, 5, 6>();
      if constexpr (kRight == 2) {
        load_tile<7>(x + (s * kRight + 1) * kTileBytes, 64);
        dot_bf16_tiles<2, 4, 7>();
        dot_bf16_tiles<3, 5, 7>();
      }
    };
    const int64_t in_place = inside ? whole : 0, row_bytes = 2 * b.step;
    const auto* column = reinterpret_cast<const char*>(b.data + j * b.step);
    for (int64_t s = 0; s < in_place; s++) {
      const int64_t next = s + kAhead;
      const char* ahead = next < steps ? column + next * 64 : column + kWide * row_bytes + (next - steps) * 64;
      UNROLL for (int64_t l = 0; l < kWide; l++) __builtin_prefetch(ahead + l * row_bytes);
      step(column + s * 64, column + s * 64 + kTileSide * row_bytes, row_bytes, s);
    }
    const Lines edge = {b.data, b.step, b.k_step, j1};
    for (int64_t s = in_place; s < steps; s++) {
      for (int l = 0; l < kLeft; l++)
        if (live(l)) pack_tile(edge, p.k, j + l * kTileSide, s * kDepth, false, copy + l * kTileBytes, 64);
      step(copy, copy + kTileBytes, 64, s);
    }
    store_tile<0>(c[0][0], c_bytes), store_tile<1>(c[1][0], c_bytes);
    if constexpr (kRight == 2) store_tile<2>(c[0][1], c_bytes), store_tile<3>(c[1][1], c_bytes);
    for (int l = 0; l < kLeft; l++)
      for (int r = 0; live(l) && r < kRight; r++) {
        V lines[W];
        for (int64_t i = 0; i < (width > 1 ? W : 1); i++) lines[i] = load(c[l][r] + i * W);
        if (width > 1) transpose(lines);
        for (int64_t i = 0; i < std::min(kTileSide, rows - r * kTileSide); i++)
          finish(p, i0 + r * kTileSide + i, j + l * kTileSide, live(l), lines[i]);
      }
  }
}

}  // namespace

bool on_tiles(const Product& p) {
  return p.a.dtype == DType::bf16 && p.b.dtype == DType::bf16 && !p.packed && !p.plain && p.k > 0 && cpu::has_amx();
}

void tiles_block(const Product& p, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  if (!p.packed_narrow && p.b.row_step == 1 && i1 - i0 <= kFewRows)
    return (i1 - i0 <= kTileSide ? few_rows<1> : few_rows<2>)(p, i0, i1, j0, j1);
  for (int64_t i = i0; i < i1; i += kMaxHeight) many_rows(p, i, std::min(i + kMaxHeight, i1), j0, j1);
}

#else

bool on_tiles(const Product&) { return false; }
void tiles_block(const Product&, int64_t, int64_t, int64_t, int64_t) {}

#endif

}  // namespace pyllm::ISA
