// The element types. Kernels include this and never tensor.h: its errors are for the layer above.
#pragma once
#include <cstdint>

namespace pyllm {

enum class DType : uint8_t { f32, bf16, f16, f64, i64, i32, boolean, u8, i8 };

constexpr const char* name_of(DType t) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64", "int64",
                                   "int32",   "bool",     "uint8",   "int8"};
  return names[static_cast<int>(t)];
}

constexpr int64_t size_of(DType t) {
  constexpr int64_t sizes[] = {4, 2, 2, 8, 8, 4, 1, 1, 1};
  return sizes[static_cast<int>(t)];
}

// The 16-bit storage types as plain bits; arithmetic happens in float, see kernels/vec.h.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace pyllm
