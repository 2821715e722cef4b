// Sums over the rows of a matrix, as of a linear layer's bias gradient: blocks of rows first, then the blocks in order.
// How the rows are cut depends on their number alone.
#include "cuda/column_sum.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

constexpr int64_t kMaxBlocks = 128;

__global__ void __launch_bounds__(128) sum_rows(ColumnSumArgs a, int64_t per_block, float* partial) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  const int64_t first = blockIdx.y * per_block, last = first + per_block < a.m ? first + per_block : a.m;
  float sum = 0;
  for (int64_t row = first; row < last; row++) sum += float_at(a.a, a.dtype, row * a.a_row + i);
  partial[blockIdx.y * a.n + i] = sum;
}

__global__ void __launch_bounds__(128) add_blocks(ColumnSumArgs a, const float* partial, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  float sum = 0;
  for (int64_t block = 0; block < blocks; block++) sum += partial[block * a.n + i];
  put_at(a.sums, a.sums_dtype, i, sum);
}

}  // namespace

void column_sum(const ColumnSumArgs& a, const Work& work) {
  const int64_t per_block = std::max<int64_t>(32, divided_up(a.m, kMaxBlocks)), blocks = divided_up(a.m, per_block);
  const Scratch partial(work, blocks * a.n * sizeof(float));
  launch(sum_rows, {divided_up(a.n, 128), blocks}, dim3(128), 0, work, a, per_block, partial.as<float>());
  launch(add_blocks, {divided_up(a.n, 128)}, dim3(128), 0, work, a, partial.as<const float>(), blocks);
}

}  // namespace pyllm::cuda
