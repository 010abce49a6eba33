//! Portable vectors: arrays of four floats, which compilers vectorise at the target's baseline.

use super::{Kernel, Simd};
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(super) struct Scalar;

#[inline(never)]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Scalar)
}

const N: usize = 4;

#[inline(always)]
fn zip(a: [f32; N], b: [f32; N], f: impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type F32 = [f32; N];
    type I32 = [i32; N];
    const LANES: usize = N;
    const ROWS: usize = 4;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run(kernel)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; N] {
        // SAFETY: the caller vouches for N elements.
        unsafe { p.cast::<[f32; N]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> [f32; N] {
        // SAFETY: the caller vouches for N elements.
        unsafe { p.cast::<[f16; N]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> [f32; N] {
        // SAFETY: the caller vouches for N elements.
        unsafe { p.cast::<[u16; N]>().read_unaligned() }.map(|x| f32::from_bits(u32::from(x) << 16))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> [f32; N] {
        // SAFETY: the caller vouches for N bytes.
        unsafe { p.cast::<[u8; N]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn decode4(self, p: *const u8, high: bool, scale: f32, offset: f32) -> [f32; N] {
        // SAFETY: the caller vouches for N bytes.
        let bytes = unsafe { p.cast::<[u8; N]>().read() };
        bytes.map(|x| offset + scale * f32::from(if high { x >> 4 } else { x & 15 }))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; N]) {
        // SAFETY: the caller vouches for N elements.
        unsafe { p.cast::<[f32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn fma(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // Not f32::mul_add: without the instruction that is a library call per element.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn select_less(self, a: [f32; N], b: [f32; N], x: [f32; N], y: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn round(self, a: [f32; N]) -> [f32; N] {
        // Adding and subtracting 1.5 * 2^23 leaves the nearest integer, for |x| < 2^22.
        a.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn power2(self, a: [f32; N]) -> [f32; N] {
        a.map(|x| f32::from_bits(x.to_bits() << 23))
    }
    #[inline(always)]
    fn sum(self, a: [f32; N]) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn max_lane(self, a: [f32; N]) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller vouches for four rows of four floats on both sides.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * from_stride + j) };
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> [i32; N] {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [i32; N] {
        // SAFETY: the caller vouches for 4 * N bytes.
        unsafe { p.cast::<[i32; N]>().read_unaligned() }
    }
    const DOT_BYTES: bool = true;
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: [i32; N]) {
        // SAFETY: the caller vouches for the bytes.
        unsafe { p.cast::<[i32; N]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add_i32(self, a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }
    #[inline(always)]
    unsafe fn load_table16(self, p: *const u8) -> [i32; N] {
        // SAFETY: the caller vouches for 16 bytes, which N integers are.
        unsafe { self.load_bytes(p) }
    }
    #[inline(always)]
    fn lookup16(self, table: [i32; N], a: [i32; N]) -> [i32; N] {
        let table: [[u8; 4]; N] = table.map(i32::to_ne_bytes);
        a.map(|x| i32::from_ne_bytes(x.to_ne_bytes().map(|b| table[usize::from(b >> 2 & 3)][usize::from(b & 3)])))
    }
    #[inline(always)]
    unsafe fn lookup256<const M: usize>(self, table: *const u8, a: [[i32; N]; M]) -> [[i32; N]; M] {
        // SAFETY: the caller vouches for 256 bytes, and no byte is beyond them.
        a.map(|a| a.map(|x| i32::from_ne_bytes(x.to_ne_bytes().map(|b| unsafe { *table.add(usize::from(b)) }))))
    }
    #[inline(always)]
    fn and(self, a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    fn add_16(self, a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| {
            let (a, b) = (a[i] as u32, b[i] as u32);
            let low = (a & 0xffff).wrapping_add(b & 0xffff) & 0xffff;
            ((a & 0xffff_0000).wrapping_add(b & 0xffff_0000) | low) as i32
        })
    }
    #[inline(always)]
    fn shift_right_16<const BITS: i32>(self, a: [i32; N]) -> [i32; N] {
        a.map(|x| {
            let x = x as u32;
            ((((x >> 16) >> BITS) << 16) | ((x & 0xffff) >> BITS)) as i32
        })
    }
    #[inline(always)]
    fn dot4(self, acc: [i32; N], a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| {
            let (u, v) = (a[i].to_ne_bytes(), b[i].to_ne_bytes());
            acc[i] + (0..4).map(|t| i32::from(u[t]) * i32::from(v[t] as i8)).sum::<i32>()
        })
    }
    #[inline(always)]
    fn to_f32(self, a: [i32; N]) -> [f32; N] {
        a.map(|x| x as f32)
    }
}
