// A checksum of files, as fast as memory is read: threads take blocks of a MiB. A block is 64 words of 32 bits side by side,
// and each of these lanes takes in one word after the other: exclusive or, rotation, multiplication by an odd number. Every
// step can be undone, so that a change of one word never goes unseen, and others do once in 2^32 times a lane.
#include "cpu/checksum.h"

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

using VU = uint32_t __attribute__((vector_size(W * 4)));
constexpr int64_t kRow = 4 * kChecksumLanes;
constexpr int kVectors = kChecksumLanes / W;
constexpr uint32_t kOdd = 0x9e3779b1;

VEC void take_row(const uint8_t* data, VU* h) {
  UNROLL for (int v = 0; v < kVectors; v++) {
    VU x;
    std::memcpy(&x, data + v * W * 4, sizeof x);
    x ^= h[v];
    h[v] = (x << 15 | x >> 17) * kOdd;
  }
}

}  // namespace

void checksum(const ChecksumArgs& a) {
  parallel_for((a.bytes + kChecksumBlock - 1) / kChecksumBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      VU h[kVectors];
      for (int v = 0; v < kVectors; v++)
        for (int l = 0; l < W; l++) h[v][l] = kOdd * (v * W + l + 1);
      const uint8_t* data = a.data + block * kChecksumBlock;
      int64_t left = std::min(kChecksumBlock, a.bytes - block * kChecksumBlock);
      for (; left >= kRow; left -= kRow, data += kRow) take_row(data, h);
      if (left > 0) {
        uint8_t last[kRow] = {};
        std::memcpy(last, data, left);
        take_row(last, h);
      }
      std::memcpy(a.sums + block * kChecksumLanes, h, sizeof h);
    }
  });
}

}  // namespace pyllm::ISA
