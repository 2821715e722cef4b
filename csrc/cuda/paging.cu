// Keys and values to their places in pages, a warp a (position, head), in pieces as large as all addresses allow. What has
// no place is reported and left out.
#include "cuda/paging.h"

#include "cuda/numbers.h"

namespace pyllm::cuda {
namespace {

template <class Word>
__global__ void __launch_bounds__(256) write(WritePagesArgs a, FaultRecord* record) {
  const int64_t rows = a.batch * a.time * a.heads, words = a.bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < rows;
       i += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t head = i % a.heads, at = i / a.heads, batch = at / a.time;
    const int64_t position = integer_at(a.positions, a.positions_dtype, at), most = a.sequence_pages * a.page_size;
    if (position < 0 || position >= most) {
      report(record, Fault::position, at, position, most);
      continue;
    }
    const int64_t entry = batch * a.table_step + position / a.page_size, page = a.page_table[entry];
    if (page < 0 || page >= a.page_count) {
      report(record, Fault::page, entry, page, a.page_count);
      continue;
    }
    auto* to = reinterpret_cast<Word*>(a.pages + page * a.page_step + position % a.page_size * a.position_step +
                                       head * a.bytes);
    const auto* from =
        reinterpret_cast<const Word*>(a.rows + batch * a.row_batch + at % a.time * a.row_time + head * a.row_head);
    for (int64_t w = threadIdx.x; w < words; w += blockDim.x) to[w] = from[w];
  }
}

__global__ void __launch_bounds__(128) next(NextPositionsArgs a, FaultRecord* record) {
  for (int64_t b = blockIdx.x; b < a.batch; b += gridDim.x) {
    const int64_t length = a.lengths[b];
    if (threadIdx.x == 0) {
      if (length < 0 || length > a.capacity || a.count > a.capacity - length)
        report(record, Fault::capacity, b, length, a.capacity + 1 - a.count);
      a.totals[b] = length + a.count;
    }
    for (int64_t t = threadIdx.x; t < a.count; t += blockDim.x) a.positions[b * a.count + t] = length + t;
  }
}

}  // namespace

void write_pages(const WritePagesArgs& a, const Work& work) {
  const int64_t blocks = blocks_for(divided_up(a.batch * a.time * a.heads, 8));
  const bool whole =
      whole_packs(a.rows, a.row_batch) && whole_packs(a.pages, a.row_time) && a.row_head % 16 == 0 && a.bytes % 16 == 0;
  const auto kernel = whole ? write<uint4> : write<uint16_t>;
  launch(kernel, {blocks}, dim3(kWarp, 8), 0, work, a, fault_record(work.device));
}

void next_positions(const NextPositionsArgs& a, const Work& work) {
  launch(next, {blocks_for(a.batch)}, dim3(128), 0, work, a, fault_record(work.device));
}

}  // namespace pyllm::cuda
