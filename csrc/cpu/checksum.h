#pragma once
#include "cpu/dispatch.h"

namespace pyllm {

constexpr int64_t kChecksumBlock = 1 << 20;  // bytes
constexpr int64_t kChecksumLanes = 64;

// sums (blocks x kChecksumLanes): the words of each block of data. Bytes behind the end count as zeros.
struct ChecksumArgs {
  const uint8_t* data;
  int64_t bytes;
  uint32_t* sums;
};

PYLLM_KERNEL(checksum, ChecksumArgs)

}  // namespace pyllm
