// Operations of a warp: exchanges, matrix loads and products, asynchronous copies.
#include <algorithm>

#include "runtime.h"

namespace emu {

constexpr unsigned ALL = 0xffffffffu;

Slots warp_exchange(unsigned mask, const void* value, size_t bytes, Site site) {
  Thread& me = *launch->current;
  unsigned lane = me.rank & 31, first = me.rank & ~31u;
  if (!((mask >> lane) & 1)) fail("%s at line %d: lane %u is not in its own mask %08x", site.what, site.line, lane, mask);
  std::vector<Meeting*>& warp = launch->warps[me.rank >> 5];
  auto found = std::find_if(warp.begin(), warp.end(), [mask](const Meeting* m) { return m->mask == mask; });
  if (found == warp.end()) found = warp.insert(warp.end(), new Meeting(mask));
  Meeting& meeting = **found;
  if (meeting.arrived && meeting.site.line != site.line)
    fail("the warp has diverged: %s at line %d meets %s at line %d", site.what, site.line, meeting.site.what, meeting.site.line);
  meeting.site = site;
  Slots slots = meeting.slots[meeting.generation & 1];
  std::memcpy(slots[lane], value, bytes);
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    me.state = State::InWarp;
    me.mask = mask;
    me.site = site;
    yield();
    return slots;
  }
  meeting.arrived = 0;
  meeting.generation++;
  for (unsigned i = 0; i < 32 && first + i < launch->threads.size(); i++) {
    Thread& other = launch->threads[first + i];
    if (((mask >> i) & 1) && other.state == State::InWarp && other.mask == mask) other.state = State::Ready;
  }
  return slots;
}

void warp_barrier(unsigned mask, Site site) {
  unsigned char nothing = 0;
  warp_exchange(mask, &nothing, 1, site);
  if (mask == ALL) launch->current->warp_epoch++;
}

void async_copy(void* shared, const void* global, size_t bytes, size_t from_global) {
  if ((reinterpret_cast<uintptr_t>(shared) | (from_global ? reinterpret_cast<uintptr_t>(global) : 0)) % bytes)
    fail("an asynchronous copy of %zu bytes is not aligned", bytes);
  Copy copy{shared, global, bytes, from_global};
  check_copy(copy, false, __builtin_return_address(0));
  std::memset(shared, 0xff, bytes);  // until it is waited for there is nothing to read
  launch->current->issued.push_back(copy);
}

void async_commit() {
  Thread& me = *launch->current;
  me.groups.push_back(std::move(me.issued));
  me.issued.clear();
}

void async_wait(size_t groups_left) {
  void* caller = __builtin_return_address(0);
  auto& groups = launch->current->groups;
  while (groups.size() > groups_left) {
    for (const Copy& copy : groups.front()) {
      check_copy(copy, true, caller);
      std::memcpy(copy.shared, copy.global, copy.from_global);
      std::memset(static_cast<char*>(copy.shared) + copy.from_global, 0, copy.bytes - copy.from_global);
    }
    groups.erase(groups.begin());
  }
}

// `count` 8x8 matrices of 16-bit elements; lane 8 m + r has the address of row r of matrix m.
void matrix_load(uint32_t* registers, int count, const void* row, bool transposed, Site site) {
  if (lane() < count * 8) touch(row, 16, Access::Read, __builtin_return_address(0));
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s at line %d: a row is not aligned to 16 bytes", site.what, site.line);
  Slots rows = warp_exchange(ALL, &row, sizeof row, site);
  auto row_of = [&](int i) {
    const uint16_t* at;
    std::memcpy(&at, rows[i], sizeof at);
    return at;
  };
  if (lane() == 0) {  // a phase reads 8 rows of 16 bytes; rows in the same 16 bytes of the 128 that banks span take turns
    for (int m = 0; m < count; m++) {
      int hits[8] = {}, most = 0;
      for (int i = 0; i < 8; i++) most = std::max(most, ++hits[reinterpret_cast<uintptr_t>(row_of(8 * m + i)) / 16 % 8]);
      launch->matrix_phases++;
      launch->matrix_conflicts += most - 1;
    }
  }
  int line = lane() >> 2, pair = (lane() & 3) * 2;
  for (int m = 0; m < count; m++) {
    uint32_t low = transposed ? row_of(8 * m + pair)[line] : row_of(8 * m + line)[pair];
    uint32_t high = transposed ? row_of(8 * m + pair + 1)[line] : row_of(8 * m + line)[pair + 1];
    registers[m] = low | high << 16;
  }
}

// d += a b, a [16, 16] by rows, b [16, 8] by columns, in the fragments that the PTX manual gives mma.m16n8k16.
void matrix_multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Pair pair, Site site) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  Slots slots = warp_exchange(ALL, mine, sizeof mine, site);
  auto element = [&](int lane, int reg, int high) {
    uint32_t word;
    std::memcpy(&word, slots[lane] + 4 * reg, sizeof word);
    auto bits = static_cast<uint16_t>(high ? word >> 16 : word);
    return pair == Pair::Half ? from_half(bits) : __int_as_float(static_cast<int>(static_cast<uint32_t>(bits) << 16));
  };
  int group = lane() >> 2, in_group = lane() & 3;
  for (int i = 0; i < 4; i++) {
    int row = group + (i >> 1) * 8, column = in_group * 2 + (i & 1);
    float sum = d[i];
    for (int k = 0; k < 16; k++) {
      int half = k >> 3, holder = (k & 7) >> 1;
      sum += element((row & 7) * 4 + holder, (row >> 3) + 2 * half, k & 1) * element(column * 4 + holder, 4 + half, k & 1);
    }
    d[i] = sum;
  }
}

float from_half(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, sizeof x);
  return static_cast<float>(x);
}

uint16_t to_half(float f) {
  auto x = static_cast<_Float16>(f);
  uint16_t h;
  std::memcpy(&h, &x, sizeof h);
  return h;
}

uint16_t to_bfloat(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
}  // namespace emu
