// Fibers, blocks and block-wide barriers.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>

#include "runtime.h"

#if !defined(__x86_64__)
#error "emu_switch is written for x86-64"
#endif
// Saves what a call must keep, then goes on where the other stack left off.
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emu_switch, .-emu_switch
)");
extern "C" void emu_switch(void** save, void* to);

namespace emu {

Running running;
Launch* launch = nullptr;

constexpr size_t STACK = 64 << 10;
constexpr int SAVED_REGISTERS = 6;
constexpr size_t SHARED_ALIGNMENT = 128;  // the width of all banks

void yield() { emu_switch(&launch->current->stack_pointer, launch->scheduler); }

void fail(const char* format, ...) {
  Thread* thread = launch->current;
  if (!launch->failed) {
    launch->failed = true;
    va_list list;
    va_start(list, format);
    int n = std::vsnprintf(launch->message, launch->message_size, format, list);
    va_end(list);
    size_t used = std::min(static_cast<size_t>(n), launch->message_size);
    if (thread)
      std::snprintf(launch->message + used, launch->message_size - used, " (block %u,%u,%u, thread %u)", running.block.x,
                    running.block.y, running.block.z, thread->rank);
  }
  if (thread) {
    thread->state = State::Done;
    yield();
  }
}

static void run_thread() {
  launch->entry(launch->arguments);
  Thread& thread = *launch->current;
  if (!thread.issued.empty() || !thread.groups.empty()) fail("a thread ends with asynchronous copies it never waited for");
  thread.state = State::Done;
  yield();
  std::abort();
}

void block_barrier(Site site) {
  Thread& thread = *launch->current;
  thread.state = State::AtBarrier;
  thread.site = site;
  yield();
}

static void resume(Thread& thread) {
  launch->current = &thread;
  running.thread = thread.index;
  running.rank = thread.rank;
  emu_switch(&launch->scheduler, thread.stack_pointer);
  launch->current = nullptr;
}

static void prepare(Thread& thread, unsigned rank) {
  Index size = running.block_size;
  char* stack = thread.stack;
  thread = Thread{};
  thread.stack = stack;
  thread.rank = rank;
  thread.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
  // As if it had been called: a return address, and the registers that emu_switch will pop.
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + STACK - 64) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  top -= SAVED_REGISTERS;
  std::fill(top, top + SAVED_REGISTERS, nullptr);
  thread.stack_pointer = top;
}

// What keeps every thread that is not done from going on; releases a barrier that all have reached.
static void meet_or_fail(bool any_ran) {
  std::vector<Thread>& threads = launch->threads;
  const Thread* waiting = nullptr;
  size_t at_barrier = 0, done = 0;
  bool same = true;
  for (const Thread& thread : threads) {
    done += thread.state == State::Done;
    if (thread.state != State::AtBarrier) continue;
    same &= !waiting || waiting->site.line == thread.site.line;
    waiting = &thread;
    at_barrier++;
  }
  if (at_barrier && at_barrier + done == threads.size()) {
    if (!same) return fail("threads of a block wait at different __syncthreads");
    if (done) return fail("__syncthreads at line %d: %zu threads wait, %zu have ended", waiting->site.line, at_barrier, done);
    launch->epoch++;
    for (Thread& thread : threads) thread.state = State::Ready;
    return;
  }
  if (any_ran) return;
  for (const Thread& thread : threads)
    if (thread.state == State::InWarp)
      return fail("deadlock: thread %u waits in %s at line %d for the lanes of %08x; %zu threads are at a barrier, %zu have ended",
                  thread.rank, thread.site.what, thread.site.line, thread.mask, at_barrier, done);
}

static void run_block(int order, std::mt19937& random) {
  std::vector<Thread>& threads = launch->threads;
  launch->epoch++;
  for (auto& warp : launch->warps) {
    for (Meeting* meeting : warp) delete meeting;
    warp.clear();
  }
  std::memset(running.shared, 0xff, launch->shared_bytes);  // a NaN in every format
  check_block(running.shared, launch->shared_bytes);
  for (unsigned i = 0; i < threads.size(); i++) prepare(threads[i], i);
  std::vector<unsigned> turns(threads.size());
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  while (!launch->failed) {
    if (order == 2) std::shuffle(turns.begin(), turns.end(), random);
    bool any_ran = false;
    for (unsigned i : turns) {
      if (threads[i].state != State::Ready) continue;
      resume(threads[i]);
      any_ran = true;
      if (launch->failed) return;
    }
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::Done; })) return;
    meet_or_fail(any_ran);
  }
}

// Runs a grid. `order`: threads take turns forwards (0), backwards (1), shuffled (2). Returns 0, or 1 with a message.
extern "C" int emu_launch(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block, size_t shared,
                          int order, unsigned seed, char* message, size_t message_size, unsigned long* matrix_loads) {
  Launch now;
  launch = &now;
  now.entry = entry;
  now.arguments = arguments;
  now.message = message;
  now.message_size = message_size;
  now.threads.resize(static_cast<size_t>(block[0]) * block[1] * block[2]);
  now.warps.resize((now.threads.size() + 31) / 32);
  size_t stacks = STACK * now.threads.size();
  auto memory = static_cast<char*>(mmap(nullptr, stacks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) {
    std::snprintf(message, message_size, "no memory for the stacks of %zu threads", now.threads.size());
    return 1;
  }
  check_stacks(memory, stacks);
  for (size_t i = 0; i < now.threads.size(); i++) now.threads[i].stack = memory + i * STACK;
  std::vector<unsigned char> room(shared + SHARED_ALIGNMENT);
  now.shared_bytes = shared;
  running.block_size = {block[0], block[1], block[2]};
  running.grid_size = {grid[0], grid[1], grid[2]};
  running.shared = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) & (SHARED_ALIGNMENT - 1));
  std::mt19937 random(seed);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0] && !now.failed; x++) {
        running.block = {x, y, z};
        run_block(order, random);
        now.block++;
      }
  for (auto& warp : now.warps)
    for (Meeting* meeting : warp) delete meeting;
  munmap(memory, stacks);
  matrix_loads[0] = now.matrix_phases;
  matrix_loads[1] = now.matrix_conflicts;
  launch = nullptr;
  return now.failed;
}
}  // namespace emu
