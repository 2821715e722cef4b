#include "cpu/packed_blocks.h"

#include <iterator>
#include <string>

#include "ops/ops.h"

namespace pyllm::ops {
namespace {

constexpr const char* kNames[] = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};

int kind_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kNames); i++)
    if (name == kNames[i]) return static_cast<int>(i);
  fail(Error::value, "[unpack_blocks] kind must be Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K, but got ", name);
}

}  // namespace

bool unpack_blocks(const std::string& kind, const TensorView& raw, const TensorView& values, const TensorView& scales,
                   const TensorView& minimums, int64_t bits, int64_t group) {
  const char* op = "unpack_blocks";
  const int index = kind_of(kind);
  const PackedBlocksShape& own = kPackedBlocks[index];
  check(bits == 8 || bits == own.bits, "[", op, "] bits must be 8", own.bits == 4 ? " or 4" : "", ", but got ", bits);
  check(group == own.group || (group == 16 && bits == 8), "[", op, "] groups must be of ", own.group,
        " values or, of 8 bits, of 16, but got ", group);
  check(minimums.present() || !own.has_minimums, "[", op, "] minimums must be given for ", kind, ", but got none");
  check_dtype(op, "raw", raw, DType::u8);
  check_ndim(op, "raw", raw, 3);
  check_shape(op, "raw", raw, raw.size(0), raw.size(1), own.bytes);
  check_contiguous(op, "raw", raw);
  const int64_t rows = raw.size(0), count = raw.size(1) * own.values;
  check_dtype(op, "values", values, DType::u8);
  check_shape(op, "values", values, rows, count * bits / 8);
  const DType dtype = scales.dtype == DType::f16 && own.half_scales ? DType::f16 : DType::f32;
  for (const TensorView* t : {&scales, &minimums}) {
    if (!t->present() && t == &minimums) continue;
    const char* name = t == &scales ? "scales" : "minimums";
    check_dtype(op, name, *t, dtype);
    check_shape(op, name, *t, rows, count / group);
    check_contiguous(op, name, *t);
    check_writable(op, name, *t);
  }
  check_contiguous(op, "values", values);
  check_writable(op, "values", values);
  bool finite = true;
  pyllm::unpack_blocks({static_cast<PackedBlocks>(index), rows, raw.size(1), raw.as<uint8_t>(), static_cast<int>(bits),
                        group, dtype, values.as<uint8_t>(), scales.data, minimums.present() ? minimums.data : nullptr,
                        &finite});
  return finite;
}

}  // namespace pyllm::ops
