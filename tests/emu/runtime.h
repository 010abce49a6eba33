// What the parts of the emulator's runtime share: a launch and its threads.
#pragma once
#include "emulator.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <vector>

namespace emu {

struct Copy {
  void* shared;
  const void* global;
  size_t bytes, from_global;
};

enum class State { Ready, AtBarrier, InWarp, Done };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Index index{};
  unsigned rank = 0;
  State state = State::Ready;
  Site site{"", 0};   // where it waits
  unsigned mask = 0;  // and, in a warp operation, with whom
  uint32_t warp_epoch = 0;
  std::vector<Copy> issued;               // asynchronous copies not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

// Lanes of one mask that meet in an operation. Two sets of slots: a lane may be one operation ahead of another.
struct Meeting {
  explicit Meeting(unsigned lanes) : mask(lanes) {}
  unsigned mask, arrived = 0, generation = 0;
  Site site{"", 0};
  unsigned char slots[2][32][64];
};

struct Launch {
  void (*entry)(void**) = nullptr;
  void** arguments = nullptr;
  std::vector<Thread> threads;
  std::vector<std::vector<Meeting*>> warps;
  size_t shared_bytes = 0;
  Thread* current = nullptr;
  void* scheduler = nullptr;  // stack pointer of the loop over threads
  uint32_t block = 0;         // serial number of the block
  uint32_t epoch = 0;         // block-wide barriers so far
  char* message = nullptr;    // of the error that ended it
  size_t message_size = 0;
  bool failed = false;
  unsigned long matrix_phases = 0, matrix_conflicts = 0;
};
extern Launch* launch;

// Gives the turn back. A thread whose state is Done never gets it again.
void yield();

// A new block starts: its shared memory holds nothing.
void check_block(const unsigned char* shared, size_t bytes);
// Memory of the threads' own variables, which nothing needs to check.
void check_stacks(const char* from, size_t bytes);
// An asynchronous copy was issued, or has been waited for.
void check_copy(const Copy& copy, bool done, void* caller);
}  // namespace emu
