// GGML's packed weights, block by block, as the whole numbers, scales and minimums that they are made of. Threads take rows;
// a block's whole numbers stay in the first-level cache until they are written in the layout that is wanted. The floor is
// the memory read and written.
#include "cpu/packed_blocks.h"

#include <atomic>

#include "cpu/kernels/vec.h"

namespace pyllm::ISA {
namespace {

constexpr int64_t kMost = 256, kMostGroups = 16;  // of a block

struct Block {
  uint8_t whole[kMost];
  float scales[kMostGroups], minimums[kMostGroups];
};

float half_at(const uint8_t* p) {
  f16 value;
  std::memcpy(&value, p, sizeof value);
  return to_float(value);
}

// count values: the low halves of as many half bytes, then the high ones.
void nibbles(const uint8_t* p, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count / 2; i++) {
    out[i] = p[i] & 15;
    out[count / 2 + i] = p[i] >> 4;
  }
}

// 32 values get a fifth bit each.
void fifth_bits(const uint8_t* p, uint8_t* out) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  for (int i = 0; i < 32; i++) out[i] |= (bits >> i & 1) << 4;
}

// The 8 scales and minimums, 6 bits each, that Q4_K and Q5_K begin with.
void scales_of_six_bits(const uint8_t* p, Block& out) {
  const float scale = half_at(p), minimum = half_at(p + 2);
  const uint8_t *low = p + 4, *middle = p + 8, *high = p + 12;
  for (int i = 0; i < 4; i++) {
    out.scales[i] = scale * static_cast<float>(low[i] & 63);
    out.scales[4 + i] = scale * static_cast<float>((high[i] & 15) | (low[i] >> 6 << 4));
    out.minimums[i] = -(minimum * static_cast<float>(middle[i] & 63));
    out.minimums[4 + i] = -(minimum * static_cast<float>((high[i] >> 4) | (middle[i] >> 6 << 4)));
  }
}

template <PackedBlocks kKind>
void read(const uint8_t* p, Block& out) {
  if constexpr (kKind == PackedBlocks::q4_k || kKind == PackedBlocks::q5_k) {
    scales_of_six_bits(p, out);
    const uint8_t* quarters = p + (kKind == PackedBlocks::q4_k ? 16 : 48);
    for (int q = 0; q < 4; q++) nibbles(quarters + 32 * q, 64, out.whole + 64 * q);
    if constexpr (kKind == PackedBlocks::q5_k)
      for (int group = 0; group < 8; group++)
        for (int i = 0; i < 32; i++) out.whole[32 * group + i] |= (p[16 + i] >> group & 1) << 4;
  } else if constexpr (kKind == PackedBlocks::q6_k) {
    const float scale = half_at(p + 208);
    for (int i = 0; i < 16; i++) out.scales[i] = scale * static_cast<float>(static_cast<int8_t>(p[192 + i]));
    for (int half = 0; half < 2; half++)
      for (int quarter = 0; quarter < 4; quarter++)
        for (int i = 0; i < 32; i++) {
          const uint8_t low = p[64 * half + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
          const uint8_t high = p[128 + 32 * half + i] >> (2 * quarter) & 3;
          out.whole[128 * half + 32 * quarter + i] = low | high << 4;
        }
  } else {
    constexpr bool kMinimum = kPackedBlocks[static_cast<int>(kKind)].has_minimums;
    const uint8_t* rest = p + (kMinimum ? 4 : 2);
    out.scales[0] = half_at(p);
    if constexpr (kMinimum) out.minimums[0] = half_at(p + 2);
    if constexpr (kKind == PackedBlocks::q8_0) {
      for (int i = 0; i < 32; i++) out.whole[i] = rest[i] ^ 128;
    } else if constexpr (kKind == PackedBlocks::q5_0 || kKind == PackedBlocks::q5_1) {
      nibbles(rest + 4, 32, out.whole);
      fifth_bits(rest, out.whole);
    } else {
      nibbles(rest, 32, out.whole);
    }
  }
}

template <PackedBlocks kKind>
void unpack(const UnpackBlocksArgs& a) {
  constexpr PackedBlocksShape own = kPackedBlocks[static_cast<int>(kKind)];
  const int shift = a.minimums ? 0 : (1 << (a.bits - 1)) - own.zero;
  const int64_t parts = own.values / a.group, width = own.values * a.bits / 8;
  std::atomic<bool> finite{true};
  parallel_for(a.rows, std::max<int64_t>(1, 32768 / (a.blocks * own.values + 1)), [&](int64_t begin, int64_t end) {
    Block block;
    float bad = 0.0f;
    for (int64_t i = begin * a.blocks; i < end * a.blocks; i++) {
      read<kKind>(a.raw + i * own.bytes, block);
      for (int64_t j = 0; j < own.values; j++) block.whole[j] = static_cast<uint8_t>(block.whole[j] + shift);
      uint8_t* out = a.values + i * width;
      if (a.bits == 8)
        std::memcpy(out, block.whole, own.values);
      else
        for (int64_t j = 0; j < width; j++)
          out[j] = static_cast<uint8_t>(block.whole[2 * j] | block.whole[2 * j + 1] << 4);
      const auto put_at = [&](char* to, int64_t at, float value) {
        if (a.scale_dtype == DType::f16) {
          put(reinterpret_cast<f16*>(to) + at, value);
          value = to_float(reinterpret_cast<f16*>(to)[at]);  // a minimum made here may be beyond a half
        } else {
          reinterpret_cast<float*>(to)[at] = value;
        }
        bad += value * 0.0f;
      };
      for (int64_t part = 0; part < parts; part++) {
        const int64_t group = part * a.group / own.group;
        put_at(a.scales, i * parts + part, block.scales[group]);
        if (a.minimums)
          put_at(a.minimums, i * parts + part,
                 own.has_minimums ? block.minimums[group] : block.scales[group] * static_cast<float>(-own.zero));
      }
    }
    if (bad != 0.0f) finite.store(false, std::memory_order_relaxed);
  });
  *a.finite = finite.load();
}

}  // namespace

void unpack_blocks(const UnpackBlocksArgs& a) {
  switch (a.kind) {
    case PackedBlocks::q4_0:
      return unpack<PackedBlocks::q4_0>(a);
    case PackedBlocks::q4_1:
      return unpack<PackedBlocks::q4_1>(a);
    case PackedBlocks::q5_0:
      return unpack<PackedBlocks::q5_0>(a);
    case PackedBlocks::q5_1:
      return unpack<PackedBlocks::q5_1>(a);
    case PackedBlocks::q8_0:
      return unpack<PackedBlocks::q8_0>(a);
    case PackedBlocks::q4_k:
      return unpack<PackedBlocks::q4_k>(a);
    case PackedBlocks::q5_k:
      return unpack<PackedBlocks::q5_k>(a);
    case PackedBlocks::q6_k:
      return unpack<PackedBlocks::q6_k>(a);
  }
}

}  // namespace pyllm::ISA
