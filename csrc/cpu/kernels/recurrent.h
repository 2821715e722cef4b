// What the two passes of a recurrent layer share: the order of its rows, who computes what, and the product of one step.
//
// A step multiplies the state of every sequence, (batch x depth), with a weight packed once for the whole call in panels
// of kPanel columns, and feeds the sums to the gates at once. Threads own columns of the hidden state (and so their panels
// of the weight, which stay in their caches from step to step) and meet at a barrier once a step; where the weight is
// small enough for every cache and the batch is large, they own rows instead and never meet. An element is summed as in
// gemm.h, in blocks of kBlockK products, so that a step has the bits of `product` on one row.
//
// Rows are kept in order of falling length: those that take part in a step are always the first ones.
#pragma once
#include <algorithm>

#include "cpu/kernels/gemm.h"
#include "cpu/recurrent.h"

namespace pyllm::ISA {
namespace {

// Floats between two rows of a state: whole panels, and not a power of two, which would crowd a few sets of the cache.
int64_t row_floats(int64_t n) { return round_up(n, kPanel) + 16; }

int64_t sequence_of(const RecurrentShape& s, int64_t row) { return s.order ? s.order[row] : row; }
int64_t length_of(const RecurrentShape& s, int64_t sequence) { return s.lengths ? s.lengths[sequence] : s.time; }
int64_t live_rows(const RecurrentShape& s, int64_t t) {  // those whose sequences are longer than t
  int64_t low = 0, high = t < s.time ? s.batch : 0;
  while (s.lengths && low < high) {
    const int64_t middle = (low + high) / 2;
    s.lengths[s.order[middle]] > t ? low = middle + 1 : high = middle;
  }
  return high;
}

// The part of the state that a thread computes: rows and units of kPanel columns.
struct Share {
  int64_t row0, row1, unit0, unit1;
};

constexpr int64_t kSmallWeight = 1 << 15;  // floats that stay in any thread's cache
constexpr int64_t kSmallStep = 1 << 14;    // multiply-adds not worth a second thread

bool splits_rows(int64_t batch, int64_t weight, int threads) {
  return weight <= kSmallWeight && batch >= threads * kTile;
}

Share share_of(int64_t batch, int64_t hidden, int64_t weight, int threads, int rank) {
  const int64_t units = (hidden + kPanel - 1) / kPanel;
  const int64_t across = splits_rows(batch, weight, threads) ? 1 : std::clamp<int64_t>(units, 1, threads);
  const int64_t down = std::min<int64_t>(threads / across, std::max<int64_t>(1, batch));
  const int64_t i = rank / across, j = rank % across;
  if (i >= down) return {0, 0, 0, 0};
  return {i * batch / down, (i + 1) * batch / down, j * units / across, (j + 1) * units / across};
}

int team_for(int64_t batch, int64_t weight) { return batch * weight < kSmallStep ? 1 : cpu::num_threads(); }

// sums[p][r] (+)= rows of a by panel p, a block of at most kBlockK: R rows, P panels.
template <int R, int P>
void step_tile(const float* a, int64_t a_step, int64_t count, const float* b, int64_t panel_step, float* sums,
               int64_t sums_step, int64_t sums_panel, bool add) {
  V s[R][2 * P] = {};
  for (int64_t k = 0; k < count; k++, b += kPanel) {
    V v[2 * P];
    for (int p = 0; p < P; p++) {
      v[2 * p] = load(b + p * panel_step);
      v[2 * p + 1] = load(b + p * panel_step + W);
    }
    for (int r = 0; r < R; r++) {
      const V x = set(a[r * a_step + k]);
      for (int j = 0; j < 2 * P; j++) s[r][j] = fma(x, v[j], s[r][j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2 * P; j++) {
      float* out = sums + r * sums_step + j / 2 * sums_panel + j % 2 * W;
      store(out, add ? load(out) + s[r][j] : s[r][j]);
    }
}

using StepTile = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, int64_t, bool);

StepTile step_tile_of(int64_t rows) {
  constexpr StepTile tiles[] = {step_tile<1, 1>,  step_tile<2, 1>, step_tile<3, 1>, step_tile<4, 1>,
                                step_tile<5, 1>,  step_tile<6, 1>,
#if ISA_AVX512
                                step_tile<7, 1>,  step_tile<8, 1>, step_tile<9, 1>, step_tile<10, 1>,
                                step_tile<11, 1>, step_tile<12, 1>
#endif
  };
  return tiles[rows - 1];
}

// `panels` panels of b by rows of a (`depth` long): row r of panel p at sums + p * sums_panel + r * sums_step.
void step_product(const float* a, int64_t a_step, int64_t rows, const float* b, int64_t depth, int64_t panels,
                  float* sums, int64_t sums_step, int64_t sums_panel, bool add) {
  if (rows == 0) return;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  for (int64_t p = 0; p < panels;) {
    const int64_t wide = rows > 2 ? 1 : std::min<int64_t>(panels - p, 3);
    for (int64_t k = 0; k < depth; k += kBlockK) {
      const int64_t count = std::min(kBlockK, depth - k);
      const float* block = b + p * kPanel * depth + k * kPanel;
      float* out = sums + p * sums_panel;
      const bool adds = add || k > 0;
      if (rows <= 2) {
        constexpr StepTile few[2][3] = {{step_tile<1, 1>, step_tile<1, 2>, step_tile<1, 3>},
                                        {step_tile<2, 1>, step_tile<2, 2>, step_tile<2, 3>}};
        few[rows - 1][wide - 1](a + k, a_step, count, block, kPanel * depth, out, sums_step, sums_panel, adds);
        continue;
      }
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t r0 = t * rows / tiles, r1 = (t + 1) * rows / tiles;
        step_tile_of(r1 - r0)(a + r0 * a_step + k, a_step, count, block, 0, out + r0 * sums_step, sums_step, 0, adds);
      }
    }
    p += wide;
  }
}

template <class T>
VEC V rounded(V v) {  // to the storage type
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T block[W];
  store(block, v);
  return load(block);
}

template <class T>
T* at(char* data, int64_t element) {
  return reinterpret_cast<T*>(data) + element;
}
template <class T>
const T* at(const char* data, int64_t element) {
  return reinterpret_cast<const T*>(data) + element;
}

// A (batch, hidden) state, or zeros, to float rows `step` apart.
template <class T>
void load_state(const RecurrentShape& s, const StridedMatrix& state, float* out, int64_t step) {
  for (int64_t r = 0; r < s.batch; r++, out += step) {
    int64_t j = 0;
    if (state.data) {
      const T* source = at<T>(state.data, sequence_of(s, r) * state.row);
      if (state.column == 1)
        for (; j + W <= s.hidden; j += W) store(out + j, load(source + j));
      for (; j < s.hidden; j++) out[j] = to_float(source[j * state.column]);
    }
    std::fill(out + j, out + step, 0.0f);
  }
}

// member(team, rank) on each thread of a team.
template <class F>
[[maybe_unused]] void together(int most, const F& member) {
  cpu::run_team(
      most, [](const void* f, cpu::Team& team, int rank) { (*static_cast<const F*>(f))(team, rank); }, &member);
}

// body() while the team stays awake between the parallel loops that it makes.
template <class F>
[[maybe_unused]] void awake(const F& body) {
  cpu::keep_awake([](void* p) { (*static_cast<const F*>(p))(); }, const_cast<F*>(&body));
}

}  // namespace
}  // namespace pyllm::ISA
