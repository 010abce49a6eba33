// What all kernels share: types, loads, warp sums, asynchronous copies and matrix products.
//
// Header-free on the device, so that compiling needs no include directory; the loader puts this text before each kernel's.
// With LONGATTN_EMULATOR the same text is C++ for the CPU. PTX stands only here, each wrapper beside its model.
#pragma once
#ifdef LONGATTN_EMULATOR
#include "emulator.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define KERNEL(name)
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define ALL_LANES 0xffffffffu

constexpr int WARP = 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

DEVICE float infinity() { return __int_as_float(0x7f800000); }

// ---- numbers of 16 bits ----
struct __align__(2) f16 { u16 bits; };
struct __align__(2) bf16 { u16 bits; };

DEVICE float to_float(float a) { return a; }
DEVICE float to_float(bf16 a) { return __int_as_float(static_cast<int>(static_cast<u32>(a.bits) << 16)); }
#ifdef LONGATTN_EMULATOR
DEVICE float to_float(f16 a) { return emu::from_half(a.bits); }
DEVICE void from_float(float a, f16& to) { to.bits = emu::to_half(a); }
DEVICE void from_float(float a, bf16& to) { to.bits = emu::to_bfloat(a); }
#else
DEVICE float to_float(f16 a) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(a.bits));
  return r;
}
DEVICE void from_float(float a, f16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(a)); }
DEVICE void from_float(float a, bf16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(a)); }
#endif
DEVICE void from_float(float a, float& to) { to = a; }

// Two numbers in a register, the first in its low half.
template <class T>
DEVICE u32 pair_of(float low, float high) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<u32>(b.bits) << 16;
}

// The numbers of such a register.
template <class T>
DEVICE float low_of(u32 pair) {
  return to_float(T{static_cast<u16>(pair)});
}
template <class T>
DEVICE float high_of(u32 pair) {
  return to_float(T{static_cast<u16>(pair >> 16)});
}

// Bytes 0 and 2 of a word, less 128, as two numbers in a register; both dtypes hold them exactly.
DEVICE u32 bytes_less_128(u32 word, f16) {
  u32 above = (word & 0x00ff00ff) | 0x64006400;  // 1024 + byte
#ifdef LONGATTN_EMULATOR
  return pair_of<f16>(to_float(f16{static_cast<u16>(above)}) - 1152.f, to_float(f16{static_cast<u16>(above >> 16)}) - 1152.f);
#else
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(above), "r"(0x64806480));
  return r;
#endif
}
DEVICE u32 bytes_less_128(u32 word, bf16) {
  constexpr int ABOVE = 0x4b000000;  // 2^23 + byte
  float low = __int_as_float(ABOVE | (word & 0xff)) - 8388736.f, high = __int_as_float(ABOVE | (word >> 16 & 0xff)) - 8388736.f;
  return static_cast<u32>(__float_as_int(low)) >> 16 | (__float_as_int(high) & 0xffff0000u);
}

// c + the sum of products of four signed bytes.
DEVICE int dot_of_bytes(u32 a, u32 b, int c) {
#ifdef LONGATTN_EMULATOR
  for (int i = 0; i < 4; i++) c += static_cast<signed char>(a >> 8 * i) * static_cast<signed char>(b >> 8 * i);
  return c;
#else
  int r;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}

// ---- vectors of 16 bytes ----
template <class T>
struct __align__(16) Vector16 {
  static constexpr int SIZE = 16 / sizeof(T);
  T at[SIZE];
};

template <class T>
DEVICE Vector16<T> load16(const T* from) {
#ifdef LONGATTN_EMULATOR
  // The compiler may split the load, which would hide from the checks that it is not aligned.
  if (reinterpret_cast<uintptr_t>(from) % 16) emu::fail("a load of 16 bytes is not aligned");
#endif
  return *reinterpret_cast<const Vector16<T>*>(from);
}

// ---- sums over lanes whose numbers differ in the bits of WIDTH - 1 ----
template <int WIDTH>
DEVICE float lanes_max(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
template <int WIDTH>
DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int step = WIDTH / 2; step; step >>= 1) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// ---- asynchronous copies to shared memory, 16 bytes each, or 8; zeros where `valid` is false ----
#ifdef LONGATTN_EMULATOR
DEVICE void copy_async(void* shared, const void* global, bool valid) { emu::async_copy(shared, global, 16, valid ? 16 : 0); }
DEVICE void copy8_async(void* shared, const void* global, bool valid) { emu::async_copy(shared, global, 8, valid ? 8 : 0); }
DEVICE void commit_async() { emu::async_commit(); }
template <int LEFT>
DEVICE void wait_async() {
  emu::async_wait(LEFT);
}
#else
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE void copy_async(void* shared, const void* global, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
}
DEVICE void copy8_async(void* shared, const void* global, bool valid) {
  int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
}
DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif

// ---- matrix products of a warp ----
// Four 8x8 matrices of 16-bit numbers; lane 8 m + r gives the address of row r of matrix m.
#ifdef LONGATTN_EMULATOR
#define load_matrices(registers, row) emu::matrix_load(registers, 4, row, false, EMU_SITE("ldmatrix"))
#define load_matrices_transposed(registers, row) emu::matrix_load(registers, 4, row, true, EMU_SITE("ldmatrix.trans"))
#else
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
#endif

// d[16, 8] += a[16, 16] b[16, 8], fragments as the PTX manual gives them for mma.m16n8k16.
#ifdef LONGATTN_EMULATOR
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
  emu::matrix_multiply(d, a, b0, b1, emu::Pair::Half, EMU_SITE("mma"));
}
DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
  emu::matrix_multiply(d, a, b0, b1, emu::Pair::Bfloat, EMU_SITE("mma"));
}
#else
#define MULTIPLY(T)                                                                                                            \
  DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, T) {                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #T "." #T ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                              \
  }
MULTIPLY(f16)
MULTIPLY(bf16)
#undef MULTIPLY
#endif

// A tile of rows of 16-bit numbers in shared memory, DIM numbers a row without padding. Pieces of 16 bytes lie at places that
// depend on the row, so that the 8 rows of a matrix load fall into different banks.
template <class T, int DIM>
struct Tile {
  static constexpr int PIECES = DIM / 8;
  T* base;

  DEVICE T* piece(int row, int piece) const {
    // Rows narrower than all banks share them: 128 bytes hold 64 / DIM rows.
    constexpr int ROWS_A_LINE = DIM < 64 ? 64 / DIM : 1;
    constexpr int SWAPPED = PIECES < 8 ? PIECES : 8;
    return base + row * DIM + (piece ^ ((row / ROWS_A_LINE) % SWAPPED)) * 8;
  }
};

// ---- where the rows of a batch and a head lie, in elements ----
struct Strides {
  i64 batch, head, row;
};
