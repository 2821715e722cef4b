#include "cpu/paging.h"

#include "cpu/attention.h"
#include "cuda/paging.h"
#include "ops/ops.h"
#include "ops/place.h"

namespace pyllm::ops {

int64_t page_tile() { return kKeyTile; }

void prefer_large_pages(const TensorView& t) {
  const Place place("prefer_large_pages", "t", t);
  check_contiguous("prefer_large_pages", "t", t);
  place.prefer_large_pages(t);
}

bool give_back_file_pages(const TensorView& t) {
  check_device("give_back_file_pages", "t", t);
  int64_t reach = t.numel() ? 1 : 0;
  for (int i = 0; i < t.ndim && reach; i++) reach += (t.size(i) - 1) * t.step(i);
  return reach == t.numel() && cpu::give_back_file_pages(t.data, reach * size_of(t.dtype));
}

void next_positions(const TensorView& lengths, const TensorView& positions, const TensorView& totals,
                    int64_t capacity) {
  const char* op = "next_positions";
  const Place place(op, "lengths", lengths);
  check_dtype(op, "lengths", lengths, DType::i64);
  check_ndim(op, "lengths", lengths, 1);
  check_contiguous(op, "lengths", lengths);
  check_dtype(op, "positions", positions, DType::i64);
  check_ndim(op, "positions", positions, 2);
  const int64_t batch = lengths.size(0), count = positions.size(1);
  check_shape(op, "positions", positions, batch, count);
  check_dtype(op, "totals", totals, DType::i64);
  check_shape(op, "totals", totals, batch);
  for (const TensorView* t : {&positions, &totals}) {
    check_contiguous(op, t == &totals ? "totals" : "positions", *t);
    check_writable(op, t == &totals ? "totals" : "positions", *t);
  }
  if (place.cuda())
    return cuda::next_positions(
        {batch, count, capacity, lengths.as<int64_t>(), positions.as<int64_t>(), totals.as<int64_t>()}, place.work());
  for (int64_t b = 0; b < batch; b++) {
    const int64_t length = lengths.as<int64_t>()[b];
    check(length >= 0, "[", op, "] lengths must be 0 or more, but got ", length, " at ", b);
    check(length <= capacity && count <= capacity - length, "[", op, "] the state holds ", capacity,
          " positions, but got ", count, " tokens after ", length, ", in row ", b);
  }
  for (int64_t b = 0; b < batch; b++) {
    const int64_t length = lengths.as<int64_t>()[b];
    for (int64_t t = 0; t < count; t++) positions.as<int64_t>()[b * count + t] = length + t;
    totals.as<int64_t>()[b] = length + count;
  }
}

void write_pages(const TensorView& pages, const TensorView& rows, const TensorView& page_table,
                 const TensorView& positions) {
  const char* op = "write_pages";
  const Place place(op, "pages", pages);
  check_device(op, "pages", pages);
  const bool bytes = pages.dtype == DType::i8;
  if (!bytes) check_float(op, "pages", pages);
  if (bytes && place.cuda())
    fail(Error::not_implemented, "[", op, "] pages must be of the rows' dtype on a CUDA device, but got int8");
  check_ndim(op, "pages", pages, 4);
  check_contiguous(op, "pages", pages);
  check_writable(op, "pages", pages);
  bytes ? check_float(op, "rows", rows) : check_dtype(op, "rows", rows, pages.dtype);
  check_ndim(op, "rows", rows, 4);
  check_inner_stride(op, "rows", rows);
  const int64_t batch = rows.size(0), time = rows.size(1), page_size = pages.size(1);
  const int64_t dim = bytes ? int8_dim(pages.size(3)) : pages.size(3);
  check_shape(op, "rows", rows, batch, time, pages.size(2), dim);
  check(!bytes || pages.size(3) == int8_width(dim), "[", op, "] pages must have ", int8_width(dim),
        " bytes for a head of ", dim, ", but got ", pages.size(3));
  check(!bytes || page_size % kKeyTile == 0, "[", op, "] a page of int8 must have a multiple of ", kKeyTile,
        " positions, but got ", page_size);
  check_dtype(op, "page_table", page_table, DType::i32);
  check_ndim(op, "page_table", page_table, 2);
  check_inner_stride(op, "page_table", page_table);
  check_shape(op, "page_table", page_table, batch, page_table.size(1));
  check_device(op, "positions", positions);
  if (positions.dtype != DType::i64 && positions.dtype != DType::i32)
    fail(Error::type, "[", op, "] positions must be int64 or int32, but got ", name_of(positions.dtype));
  check_shape(op, "positions", positions, batch, time);
  check_ids(op, "positions", positions, page_table.size(1) * page_size);
  for (int64_t b = 0; b < batch && !place.cuda(); b++)
    for (int64_t t = 0; t < time; t++) {
      const int64_t i = b * time + t;
      const int64_t at =
          (positions.dtype == DType::i64 ? positions.as<int64_t>()[i] : positions.as<int32_t>()[i]) / page_size;
      const int32_t page = page_table.as<int32_t>()[b * page_table.step(0) + at];
      if (page < 0 || page >= pages.size(0))
        fail(Error::index, "[", op, "] page_table[", b, ", ", at, "] must be in [0, ", pages.size(0), "), but got ",
             page);
    }
  if (rows.numel() == 0) return;
  const int64_t size = size_of(rows.dtype), stored = size_of(pages.dtype);
  const WritePagesArgs args{batch,
                            time,
                            pages.size(2),
                            dim,
                            pages.size(3) * stored,
                            rows.dtype,
                            bytes,
                            rows.data,
                            rows.step(0) * size,
                            rows.step(1) * size,
                            rows.step(2) * size,
                            pages.data,
                            pages.step(0) * stored,
                            pages.step(1) * stored,
                            page_size,
                            page_table.as<int32_t>(),
                            page_table.step(0),
                            positions.data,
                            positions.dtype,
                            pages.size(0),
                            page_table.size(1)};
  place.cuda() ? cuda::write_pages(args, place.work()) : pyllm::write_pages(args);
}

}  // namespace pyllm::ops
