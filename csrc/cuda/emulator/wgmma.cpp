#include "cuda/emulator/wgmma.h"

#include <algorithm>
#include <deque>
#include <vector>

#include "cuda/device.h"

namespace pyllm::cuda {
namespace {

constexpr uint32_t kWindow =
    0x410;  // the address at which a block's shared memory begins, a multiple of 16 bytes alone
constexpr int64_t kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

// Of 128-byte swizzling: chunks of 16 bytes change places within 128 bytes, by the place of these in 1024.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// What a GPU keeps in a barrier's 64 bits is its own affair.
struct Barrier {
  uint16_t arrivals, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Barrier) == 8);

template <class F>
void change(uint64_t* at, const F& f) {
  check_aligned(at, 8);
  Barrier barrier;
  std::memcpy(&barrier, at, 8);
  f(barrier);
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase = barrier.phase ^ 1u;
    barrier.pending = barrier.arrivals;
  }
  std::memcpy(at, &barrier, 8);
}

void arrive_with(uint64_t* at, int32_t bytes) {
  change(at, [&](Barrier& barrier) {
    if (barrier.pending == 0) return complain("a barrier has more arrivals than it was made for");
    if (bytes > kMostBytes) return complain("a barrier expects more bytes than it can count");
    barrier.bytes = barrier.bytes + bytes;
    barrier.pending--;
  });
}

struct Copy {
  char* to;
  CUtensorMap map;
  int at[4];
  uint64_t* barrier;
};
std::vector<Copy> late;  // copies that were asked for, and nobody has waited for

void finish(const Copy& copy) {
  const CUtensorMap& map = copy.map;
  const uint32_t begin = shared_address(copy.to);
  const int64_t rows = map.box[1] * map.box[2] * map.box[3], bytes = map.box[0] * 2;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t x[3] = {copy.at[1] + row % map.box[1], copy.at[2] + row / map.box[1] % map.box[2],
                          copy.at[3] + row / map.box[1] / map.box[2]};
    bool within = true;
    const char* from = map.data;
    for (int i = 0; i < 3; i++) {
      within = within && x[i] >= 0 && x[i] < map.size[i + 1];
      from += x[i] * map.bytes[i];
    }
    for (int64_t i = 0; i < map.box[0]; i++) {
      const int64_t column = copy.at[0] + i;
      char* place = shared_memory() + (swizzled(begin + static_cast<uint32_t>(row * bytes + i * 2)) - kWindow);
      if (within && column >= 0 && column < map.size[0])
        std::memcpy(place, from + column * 2, 2);
      else
        std::memset(place, 0, 2);
    }
  }
  change(copy.barrier, [&](Barrier& b) { b.bytes = b.bytes - static_cast<int32_t>(rows * bytes); });
}

// Element `k` of the sum in row (or, where the tile's rows are summed over, column) `i` of a tile.
uint16_t element(uint64_t tile, bool columns, int i, int k) {
  const auto field = [&](int from) { return static_cast<uint32_t>(tile >> from & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  constexpr uint64_t kUsed =
      UINT64_C(0xc0003fff3fff3fff);  // base offset, bits 49 to 51: 0, for tiles at multiples of 1024
  if (tile >> 62 != 1 || tile & ~kUsed) {
    complain("a product's descriptor must say that rows of 128 bytes are swizzled from a multiple of 1024 on");
    return 0;
  }
  const auto in_eights = [&](int row) { return row % 8 * 128 + row / 8 * stride; };
  const uint32_t address =
      swizzled(start + (columns ? i % 64 * 2 + i / 64 * leading + in_eights(k) : in_eights(i) + k * 2));
  uint16_t bits = 0;
  if (address < kWindow || address - kWindow + 2 > shared_size())
    complain("a product reads beyond a block's shared memory");
  else
    std::memcpy(&bits, shared_memory() + (address - kWindow), 2);
  return bits;
}

struct Products {  // of a thread
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  bool begun = false;
};
std::vector<Products> all;  // of the fibers
int64_t products = 0;

void multiply(const Product& p) {
  constexpr int kSums = 16;
  const int lane = lane_of_thread(), warp = fiber_in_block() / 32 % 4;
  float a[2][kSums], b[kSums];
  const char* gifts = p.a ? meet_warp(p.a, 16) : nullptr;
  for (int r = 0; r < 2; r++)
    for (int k = 0; k < kSums; k++) {
      uint16_t bits;
      if (gifts)
        std::memcpy(&bits, gifts + (lane / 4 * 4 + k % 8 / 2) * kGift + (k / 8 * 2 + r) * 4 + k % 2 * 2, 2);
      else
        bits = element(p.a_tile, false, warp * 16 + lane / 4 + r * 8, k);
      a[r][k] = p.widen(bits);
    }
  for (int n = 0; n < p.tiles; n++)
    for (int c = 0; c < 2; c++) {
      for (int k = 0; k < kSums; k++) b[k] = p.widen(element(p.b_tile, p.columns, n * 8 + lane % 4 * 2 + c, k));
      for (int r = 0; r < 2; r++) {
        float& to = p.c[n * 4 + r * 2 + c];
        float sum = p.add ? to : 0;
        for (int k = 0; k < kSums; k++) sum = fmaf(a[r][k], b[k], sum);
        to = sum;
      }
    }
}

}  // namespace

int64_t emulated_products() { return products; }

uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - shared_memory()) + kWindow;
}

void make_barrier(uint64_t* barrier, uint32_t arrivals) {
  check_aligned(barrier, 8);
  if (arrivals == 0 || arrivals > kMostArrivals) complain("a barrier is made for 1 to 2^20 - 1 arrivals");
  const Barrier made{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
  std::memcpy(barrier, &made, 8);
}
void arrive(uint64_t* barrier) { arrive_with(barrier, 0); }
void arrive_expecting(uint64_t* barrier, uint32_t bytes) { arrive_with(barrier, static_cast<int32_t>(bytes)); }
void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  for (;;) {
    Barrier now;
    std::memcpy(&now, barrier, 8);
    if (now.phase != parity) return;
    const auto awaited = [&](const Copy& copy) { return copy.barrier == barrier; };
    const auto found = std::find_if(late.begin(), late.end(), awaited);
    if (found == late.end()) {
      let_others_run();
    } else {
      finish(*found);
      late.erase(found);
    }
  }
}

void copy_box(void* to, const CUtensorMap& map, const int (&at)[4], uint64_t* barrier) {
  check_aligned(&map, 64);
  const uint32_t begin = shared_address(to);
  const int64_t bytes = map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2;
  if (begin % 128) complain("a box with swizzled rows of 128 bytes must begin at a multiple of 128 bytes");
  if (begin - kWindow + static_cast<size_t>(bytes) > shared_size())
    return complain("a box ends beyond a block's shared memory");
  const Copy copy{static_cast<char*>(to), map, {at[0], at[1], at[2], at[3]}, barrier};
  blockIdx.x % 2 ? late.push_back(copy) : finish(copy);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* size, const cuuint64_t* bytes, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fits = rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
              box[0] * 2 == 128;  // the emulator's: boxes of whole rows
  for (int i = 0; i < 4; i++)
    fits = fits && size[i] >= 1 && size[i] <= UINT64_C(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  for (int i = 0; i < 3; i++) fits = fits && bytes[i] % 16 == 0 && bytes[i] < UINT64_C(1) << 40;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  map->data = static_cast<const char*>(data);
  for (int i = 0; i < 4; i++) map->size[i] = static_cast<int64_t>(size[i]), map->box[i] = box[i];
  for (int i = 0; i < 3; i++) map->bytes[i] = static_cast<int64_t>(bytes[i]);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** found, int, cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *found = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

void forget_unfinished() {
  late.clear();
  all.assign(static_cast<size_t>(fibers_at_once()), Products());
}

void begin_products() {
  meet_warp(nullptr, 0);
  all[fiber_of_thread()].begun = true;
}
void give_product(const Product& product) {
  meet_warp(nullptr, 0);
  Products& mine = all[fiber_of_thread()];
  if (!mine.begun) complain("products must begin with begin_products, and again after a wait for some");
  mine.open.push_back(product);
  products++;
}
void end_of_products() {
  Products& mine = all[fiber_of_thread()];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
void wait_for_products(size_t pending) {
  meet_warp(nullptr, 0);
  const int self = fiber_of_thread();
  all[self].begun = false;
  if (all[self].groups.size() > pending) let_all_run();
  while (all[self].groups.size() > pending) {
    const std::vector<Product> group = std::move(all[self].groups.front());
    all[self].groups.pop_front();
    for (const Product& product : group) multiply(product);
  }
}

}  // namespace pyllm::cuda
