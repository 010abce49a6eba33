// CUDA's language on a CPU, for one kernel source at a time. Included by common.cuh when LONGATTN_EMULATOR is defined.
//
// A thread of the grid is a fiber; the threads of a block take turns on one thread of the system, block after block.
// Loads and stores of the kernel are reported by code that the compiler inserts (-fsanitize=thread, without its library);
// check.cpp answers those calls. README.md says what is found and what is not modelled.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

// Functions of the emulator itself: their loads and stores are not the kernel's.
#define EMU_UNCHECKED __attribute__((no_sanitize("thread"), noinline, noipa))

namespace emu {

struct Index {
  unsigned x, y, z;
};

// Where in the source something happens.
struct Site {
  const char* what;
  int line;
};

struct Running {
  Index thread, block, block_size, grid_size;
  unsigned rank;          // of the thread in its block
  unsigned char* shared;  // the block's dynamic shared memory
};
extern Running running;

enum class Access { Read, Write, Atomic };

void fail(const char* format, ...);
void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// Gives `value` to the lanes of `mask`; returns what lane i gave at `[i]`, once all have.
using Slots = unsigned char (*)[64];
Slots warp_exchange(unsigned mask, const void* value, size_t bytes, Site site);

// Tells the checks of an access that the compiler does not see.
void touch(const void* at, size_t bytes, Access access, void* caller);

void async_copy(void* shared, const void* global, size_t bytes, size_t from_global);
void async_commit();
void async_wait(size_t groups_left);
void matrix_load(uint32_t* registers, int count, const void* row, bool transposed, Site site);

// What a register of two elements holds.
enum class Pair { Half, Bfloat };
void matrix_multiply(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Pair pair, Site site);

float from_half(uint16_t h);
uint16_t to_half(float x);
uint16_t to_bfloat(float x);

inline int lane() { return static_cast<int>(running.rank & 31); }

template <class T>
EMU_UNCHECKED T shuffle(unsigned mask, T value, int source, Site site) {
  Slots slots = warp_exchange(mask, &value, sizeof value, site);
  if (!((mask >> (source & 31)) & 1)) fail("%s at line %d reads lane %d, which is not in mask %08x", site.what, site.line, source & 31, mask);
  T result;
  std::memcpy(&result, slots[source & 31], sizeof result);
  return result;
}

EMU_UNCHECKED inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  unsigned char value = predicate;
  Slots slots = warp_exchange(mask, &value, 1, site);
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if ((mask >> i) & 1) result |= static_cast<unsigned>(slots[i][0]) << i;
  return result;
}

// Lane that a shuffle within segments of `width` lanes reads; its own where it would leave the segment.
inline int lane_up(int delta, int width) { return lane() % width < delta ? lane() : lane() - delta; }
inline int lane_down(int delta, int width) { return lane() % width + delta >= width ? lane() : lane() + delta; }

template <class T, class F>
EMU_UNCHECKED T atomic(T* at, F update) {
  touch(at, sizeof(T), Access::Atomic, __builtin_return_address(0));
  T old = *at;
  *at = update(old);
  return old;
}

// A kernel as Python starts it: its arguments by pointers, and one letter per parameter to check them against.
template <class... A, size_t... I>
EMU_UNCHECKED void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}
template <class... A>
EMU_UNCHECKED void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>{});
}
template <class T>
constexpr char letter() {
  if (std::is_pointer_v<T>) return 'p';
  if (std::is_same_v<T, float>) return 'f';
  if (std::is_same_v<T, int>) return 'i';
  if (std::is_same_v<T, unsigned>) return 'u';
  return std::is_same_v<T, long long> ? 'l' : '?';
}
template <class... A>
const char* signature(void (*)(A...)) {
  static const char letters[] = {letter<A>()..., 0};
  return letters;
}
}  // namespace emu

// Makes a kernel visible to Python.
#define KERNEL(name)                                                                    \
  extern "C" void emu_kernel_##name(void** arguments) { emu::call(&name, arguments); } \
  extern "C" const char* emu_signature_##name() { return emu::signature(&name); }

#define DYNAMIC_SHARED(name) unsigned char* name = emu::running.shared

#define threadIdx (emu::running.thread)
#define blockIdx (emu::running.block)
#define blockDim (emu::running.block_size)
#define gridDim (emu::running.grid_size)

#define EMU_SITE(what) (emu::Site{what, __LINE__})
#define __syncthreads() emu::block_barrier(EMU_SITE("__syncthreads"))
#define __syncwarp() emu::warp_barrier(0xffffffffu, EMU_SITE("__syncwarp"))
#define __shfl_sync(mask, v, from) emu::shuffle(mask, v, from, EMU_SITE("__shfl_sync"))
#define __shfl_xor_sync(mask, v, x) emu::shuffle(mask, v, emu::lane() ^ (x), EMU_SITE("__shfl_xor_sync"))
#define __shfl_up_sync(mask, v, d) emu::shuffle(mask, v, emu::lane_up(d, 32), EMU_SITE("__shfl_up_sync"))
#define __shfl_down_sync(mask, v, d) emu::shuffle(mask, v, emu::lane_down(d, 32), EMU_SITE("__shfl_down_sync"))
#define __ballot_sync(mask, p) emu::ballot(mask, p, EMU_SITE("__ballot_sync"))
#define __any_sync(mask, p) (emu::ballot(mask, p, EMU_SITE("__any_sync")) != 0)
#define __all_sync(mask, p) (emu::ballot(mask, p, EMU_SITE("__all_sync")) == (mask))

template <class T>
inline T atomicAdd(T* at, T x) {
  return emu::atomic(at, [x](T old) EMU_UNCHECKED { return static_cast<T>(old + x); });
}
template <class T>
inline T atomicMax(T* at, T x) {
  return emu::atomic(at, [x](T old) EMU_UNCHECKED { return old > x ? old : x; });
}
template <class T>
inline T atomicMin(T* at, T x) {
  return emu::atomic(at, [x](T old) EMU_UNCHECKED { return old < x ? old : x; });
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float __int_as_float(int i) {
  float f;
  std::memcpy(&f, &i, sizeof f);
  return f;
}
inline int __float_as_int(float f) {
  int i;
  std::memcpy(&i, &f, sizeof i);
  return i;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
