// Checks of every load and store: bounds, alignment, races, shared memory that nothing has written.
//
// For each byte of the arguments and of shared memory: who wrote it last, who has read it since, and after which barriers.
// Two accesses of which one writes are in order if one thread makes both, if a block-wide barrier lies between them, or, within
// a warp, a barrier of the whole warp. Blocks are never in order.
#include <link.h>

#include <cstdio>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "runtime.h"

namespace emu {
namespace {

constexpr size_t MOST_REPORTS = 16;

struct Moment {
  uint32_t block = 0, epoch = 0, warp_epoch = 0;
  int thread = -1;
};

struct Byte {
  Moment written, read;
  bool atomic = false;       // the last write was
  bool initialised = false;  // shared memory: something has been written
  bool pending = false;      // an asynchronous copy into it has not been waited for
  bool other_blocks = false, other_threads = false, other_warps = false;  // more than one reader since the last barrier
};

struct Buffer {
  uintptr_t from = 0, to = 0;
  int argument = -1;  // -1: shared memory
  bool writable = true;
  std::vector<Byte> bytes;

  bool holds(uintptr_t at) const { return at >= from && at < to; }
};

std::vector<Buffer> arguments;
Buffer shared;
uintptr_t stacks_from, stacks_to, module_from, module_to;
std::string reports;
std::set<std::tuple<std::string, uintptr_t>> reported;

Moment now() {
  const Thread& thread = *launch->current;
  return {launch->block, launch->epoch, thread.warp_epoch, static_cast<int>(thread.rank)};
}

void report(const char* kind, const Buffer* buffer, uintptr_t at, uintptr_t caller, const Moment* other = nullptr) {
  if (reported.size() >= MOST_REPORTS || !reported.emplace(kind, caller).second) return;
  char line[256], place[64] = "", against[64] = "";
  if (buffer && buffer->argument >= 0)
    std::snprintf(place, sizeof place, ", byte %zu of argument %d", static_cast<size_t>(at - buffer->from), buffer->argument);
  else if (buffer)
    std::snprintf(place, sizeof place, ", byte %zu of shared memory", static_cast<size_t>(at - buffer->from));
  if (other) std::snprintf(against, sizeof against, " after block %u, thread %d", other->block, other->thread);
  std::snprintf(line, sizeof line, "%s%s, by block %u, thread %u%s @%zx\n", kind, place, launch->block, launch->current->rank, against,
                static_cast<size_t>(caller - module_from));
  reports += line;
}

Buffer* find(uintptr_t at) {
  if (shared.holds(at)) return &shared;
  for (Buffer& buffer : arguments)
    if (buffer.holds(at)) return &buffer;
  return nullptr;
}

// Argument that ends nearest before an address, to name what was overrun.
const Buffer* before(uintptr_t at) {
  const Buffer* best = shared.to && at >= shared.to && at - shared.to < 4096 ? &shared : nullptr;
  for (const Buffer& buffer : arguments)
    if (buffer.from <= at && (!best || buffer.from > best->from)) best = &buffer;
  return best;
}

bool in_order(const Moment& earlier, const Moment& later) {
  if (earlier.block != later.block) return false;
  if (earlier.epoch < later.epoch || earlier.thread == later.thread) return true;
  return earlier.thread / 32 == later.thread / 32 && earlier.warp_epoch < later.warp_epoch;
}

void read(Buffer& buffer, size_t i, const Moment& me, bool atomic, uintptr_t caller) {
  Byte& byte = buffer.bytes[i];
  if (byte.pending) {
    report("read before an asynchronous copy was waited for", &buffer, buffer.from + i, caller);
    byte.pending = false;
  }
  if (buffer.argument < 0 && !byte.initialised) {
    report("read of shared memory that nothing has written", &buffer, buffer.from + i, caller);
    byte.initialised = true;
  }
  if (byte.written.thread >= 0 && !(atomic && byte.atomic) && !in_order(byte.written, me))
    report("race: read without a barrier after a write", &buffer, buffer.from + i, caller, &byte.written);
  if (atomic) return;  // counts as the write that follows
  Moment& last = byte.read;
  if (last.thread < 0 || (last.block == me.block && last.epoch != me.epoch)) {
    byte.other_threads = byte.other_warps = false;
  } else if (last.block != me.block) {
    byte.other_blocks = true;
    byte.other_threads = byte.other_warps = false;
  } else if (last.thread != me.thread) {
    byte.other_threads = true;
    byte.other_warps |= last.thread / 32 != me.thread / 32;
  }
  last = me;
}

void write(Buffer& buffer, size_t i, const Moment& me, bool atomic, uintptr_t caller) {
  Byte& byte = buffer.bytes[i];
  if (byte.pending) report("write over an asynchronous copy that was not waited for", &buffer, buffer.from + i, caller);
  if (byte.written.thread >= 0 && !(atomic && byte.atomic) && !in_order(byte.written, me))
    report("race: two writes without a barrier", &buffer, buffer.from + i, caller, &byte.written);
  if (byte.read.thread >= 0) {
    const Moment& last = byte.read;
    bool ordered = in_order(last, me) && !byte.other_blocks;
    // More readers than the last since the barrier: all of them must lie before this warp's own barrier.
    if (ordered && last.epoch == me.epoch && byte.other_threads)
      ordered = !byte.other_warps && last.thread / 32 == me.thread / 32 && last.warp_epoch < me.warp_epoch;
    if (!ordered) report("race: write without a barrier after a read", &buffer, buffer.from + i, caller, &last);
  }
  byte.written = me;
  byte.atomic = atomic;
  byte.initialised = true;
  byte.read = Moment{};
  byte.other_blocks = byte.other_threads = byte.other_warps = false;
}

void check(uintptr_t at, size_t bytes, Access access, uintptr_t caller) {
  if (!launch || !launch->current || (at >= stacks_from && at < stacks_to)) return;
  bool writes = access != Access::Read, atomic = access == Access::Atomic;
  Buffer* buffer = find(at);
  if (!buffer && !writes && at >= module_from && at < module_to) return;  // a constant table
  if (!buffer || at + bytes > buffer->to) {
    report(writes ? "write out of bounds" : "read out of bounds", buffer ? buffer : before(at), at, caller);
    fail("stopped before an access out of bounds");
  }
  if (at % bytes) report("access that is not aligned", buffer, at, caller);
  if (writes && !buffer->writable) report("write to a read-only array", buffer, at, caller);
  Moment me = now();
  for (size_t i = at - buffer->from; i < at - buffer->from + bytes; i++) {
    if (!writes || atomic) read(*buffer, i, me, atomic, caller);
    if (writes) write(*buffer, i, me, atomic, caller);
  }
}

int find_module(dl_phdr_info* info, size_t, void*) {
  auto mine = reinterpret_cast<uintptr_t>(&find_module);
  for (int i = 0; i < info->dlpi_phnum; i++) {
    uintptr_t from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    if (info->dlpi_phdr[i].p_type != PT_LOAD || mine < from || mine >= from + info->dlpi_phdr[i].p_memsz) continue;
    module_from = info->dlpi_addr;
    for (int k = 0; k < info->dlpi_phnum; k++)
      if (info->dlpi_phdr[k].p_type == PT_LOAD)
        module_to = info->dlpi_addr + info->dlpi_phdr[k].p_vaddr + info->dlpi_phdr[k].p_memsz;
    return 1;
  }
  return 0;
}
}  // namespace

void touch(const void* at, size_t bytes, Access access, void* caller) {
  check(reinterpret_cast<uintptr_t>(at), bytes, access, reinterpret_cast<uintptr_t>(caller));
}

void check_block(const unsigned char* from, size_t bytes) {
  shared = Buffer{};
  shared.from = reinterpret_cast<uintptr_t>(from);
  shared.to = shared.from + bytes;
  shared.bytes.assign(bytes, Byte{});
}

void check_stacks(const char* from, size_t bytes) {
  stacks_from = reinterpret_cast<uintptr_t>(from);
  stacks_to = stacks_from + bytes;
}

void check_copy(const Copy& copy, bool done, void* caller) {
  if (!done && copy.from_global) touch(copy.global, copy.from_global, Access::Read, caller);
  auto set = [&](bool pending) {
    auto at = reinterpret_cast<uintptr_t>(copy.shared);
    for (size_t i = 0; shared.holds(at) && i < copy.bytes; i++) shared.bytes[at - shared.from + i].pending = pending;
  };
  if (done) set(false);
  touch(copy.shared, copy.bytes, Access::Write, caller);
  if (!done) set(true);
}

// Forgets the arguments and reports of an earlier launch.
extern "C" void emu_reset() {
  arguments.clear();
  reports.clear();
  reported.clear();
  dl_iterate_phdr(find_module, nullptr);
}

// Memory that the kernel may use: argument `argument`, `bytes` from `from` on.
extern "C" void emu_argument(const void* from, size_t bytes, int argument, int writable) {
  Buffer buffer;
  buffer.from = reinterpret_cast<uintptr_t>(from);
  buffer.to = buffer.from + bytes;
  buffer.argument = argument;
  buffer.writable = writable;
  buffer.bytes.assign(bytes, Byte{});
  arguments.push_back(std::move(buffer));
}

// What the last launch did wrong, a line each; after '@' the place in the module.
extern "C" const char* emu_reports() { return reports.c_str(); }
}  // namespace emu

// What the compiler's instrumentation calls.
#define CALLER __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n)                                                                             \
  void __tsan_read##n(void* at) { emu::touch(at, n, emu::Access::Read, CALLER); }             \
  void __tsan_write##n(void* at) { emu::touch(at, n, emu::Access::Write, CALLER); }           \
  void __tsan_unaligned_read##n(void* at) { emu::touch(at, n, emu::Access::Read, CALLER); }   \
  void __tsan_unaligned_write##n(void* at) { emu::touch(at, n, emu::Access::Write, CALLER); } \
  void __tsan_volatile_read##n(void* at) { emu::touch(at, n, emu::Access::Read, CALLER); }    \
  void __tsan_volatile_write##n(void* at) { emu::touch(at, n, emu::Access::Write, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
static void each(void* at, size_t n, emu::Access access, void* caller) {
  for (size_t i = 0; i < n; i++) emu::touch(static_cast<char*>(at) + i, 1, access, caller);
}
void __tsan_read_range(void* at, size_t n) { each(at, n, emu::Access::Read, CALLER); }
void __tsan_write_range(void* at, size_t n) { each(at, n, emu::Access::Write, CALLER); }
}
