// A step of AdamW over many tensors at once, a block a piece of one of them, in packs of 16 bytes: what bounds it is
// memory. The table of tensors is an argument of the kernel, so that a launch needs no copy and can be captured; as many
// tensors go to a launch as fit there. The arithmetic is the CPU's, and so are the bits.
#include "cuda/adamw.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

constexpr int kTensors = 80, kThreads = 256;  // of a launch; of a block
constexpr int64_t kPiece = 4096;              // elements of a block

struct Table {
  AdamwTensor tensors[kTensors];
  int32_t first[kTensors + 1];  // piece of each, and one past the last
};
static_assert(sizeof(Table) + sizeof(AdamwSettings) <= 4000, "arguments of a kernel take 4 KiB at the most");

template <class T, class M>
__global__ void __launch_bounds__(kThreads) update(Table table, int count, AdamwSettings s) {
  const auto piece = static_cast<int32_t>(blockIdx.x);
  int low = 0, high = count - 1;  // the last tensor whose first piece is not beyond this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first[middle] <= piece)
      low = middle;
    else
      high = middle - 1;
  }
  const AdamwTensor t = table.tensors[low];
  const int64_t from = (piece - table.first[low]) * kPiece, end = from + kPiece < t.count ? from + kPiece : t.count;
  const float scale = s.scale_at ? *s.scale_at : s.scale;
  auto* parameter = reinterpret_cast<T*>(t.parameter);
  const auto* gradient = reinterpret_cast<const T*>(t.gradient);
  auto *first = reinterpret_cast<M*>(t.first), *second = reinterpret_cast<M*>(t.second);
  const auto whole = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wp = whole(parameter), wg = whole(gradient), w1 = whole(first), w2 = whole(second);

  // A pack of the parameter's elements, and as many moments in one pack of theirs or in two.
  constexpr int kSize = Pack<T>::kSize, kParts = kSize / Pack<M>::kSize, kPart = Pack<M>::kSize;
  for (int64_t i = from + threadIdx.x * kSize; i < end; i += kThreads * kSize) {
    const int64_t left = end - i;
    const Pack<T> g = load_pack(gradient + i, left, wg);
    Pack<T> p = load_pack(parameter + i, left, wp);
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const int64_t at = i + part * kPart, rest = left - part * kPart;
      if (rest <= 0) break;
      Pack<M> m = load_pack(first + at, rest, w1), v = load_pack(second + at, rest, w2);
#pragma unroll
      for (int k = 0; k < kPart; k++) {
        const float x = __fmul_rn(g.x[part * kPart + k], scale);
        m.x[k] = fmaf(__fsub_rn(x, m.x[k]), s.rate1, m.x[k]);
        v.x[k] = fmaf(__fmul_rn(x, s.rate2), x, __fmul_rn(v.x[k], s.beta2));
        float& y = p.x[part * kPart + k];
        y = fmaf(m.x[k] / fmaf(sqrtf(v.x[k]), s.root, s.eps), -s.rate, __fmul_rn(y, s.kept));
      }
      store_pack(first + at, m, rest, w1);
      store_pack(second + at, v, rest, w2);
    }
    store_pack(parameter + i, p, left, wp);
  }
}

}  // namespace

void adamw(const AdamwArgs& a, const Work& work) {
  with_dtype(a.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto kernel = a.moment_dtype == DType::f32 ? update<T, float> : update<T, T>;
    for (int64_t at = 0; at < a.tensor_count;) {
      Table table{};
      int count = 0;
      int64_t pieces = 0;
      for (; at < a.tensor_count && count < kTensors; at++, count++) {
        const int64_t more = divided_up(a.tensors[at].count, kPiece);
        if (pieces + more > INT32_MAX) break;
        table.tensors[count] = a.tensors[at];
        table.first[count] = static_cast<int32_t>(pieces);
        pieces += more;
      }
      if (count == 0) fail_launch(dim3(UINT32_MAX), dim3(kThreads), 0, kMaxShared);  // 2^43 elements in one tensor
      table.first[count] = static_cast<int32_t>(pieces);
      launch(kernel, {pieces}, dim3(kThreads), 0, work, table, count, a.settings);
    }
  });
}

}  // namespace pyllm::cuda
