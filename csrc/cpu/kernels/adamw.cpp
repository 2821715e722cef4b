// A step of AdamW over all tensors in one parallel region, in pieces of the same size whatever tensor they are of. An
// element is read once (parameter, gradient, both moments) and written once (all but the gradient): 28 bytes in fp32,
// which is what bounds it.
#include "cpu/adamw.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/kernels/vec.h"
#include "cpu/threads.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements

template <class T, class M>
void update(const AdamwTensor& t, const AdamwSettings& s, float factor, int64_t begin, int64_t end) {
  auto* parameter = reinterpret_cast<T*>(t.parameter);
  const auto* gradient = reinterpret_cast<const T*>(t.gradient);
  auto *first = reinterpret_cast<M*>(t.first), *second = reinterpret_cast<M*>(t.second);
  const V scale = set(factor), rate1 = set(s.rate1), beta2 = set(s.beta2), rate2 = set(s.rate2), root = set(s.root);
  const V eps = set(s.eps), kept = set(s.kept), rate = set(-s.rate);
  const auto some = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const V g = get(gradient + i, n) * scale, m0 = get(first + i, n);
    const V m = fma(g - m0, rate1, m0);
    const V v = fma(g * rate2, g, get(second + i, n) * beta2);
    write(first + i, m, n);
    write(second + i, v, n);
    write(parameter + i, fma(m / fma(sqrt(v), root, eps), rate, get(parameter + i, n) * kept), n);
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) some(i, W);
  if (i < end) some(i, end - i);
}

}  // namespace

void adamw(const AdamwArgs& p) {
  std::vector<int64_t> ends(p.tensor_count);  // of each tensor's pieces
  int64_t pieces = 0;
  for (int64_t i = 0; i < p.tensor_count; i++) ends[i] = pieces += (p.tensors[i].count + kPiece - 1) / kPiece;
  const float scale = p.settings.scale_at ? *p.settings.scale_at : p.settings.scale;
  with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto step = p.moment_dtype == DType::f32 ? update<T, float> : update<T, T>;
    parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; piece++) {
        const auto at = std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin();
        const AdamwTensor& t = p.tensors[at];
        const int64_t from = (piece - (at ? ends[at - 1] : 0)) * kPiece;
        step(t, p.settings, scale, from, std::min(from + kPiece, t.count));
      }
    });
  });
}

}  // namespace pyllm::ISA
