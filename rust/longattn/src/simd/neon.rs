//! AArch64 Advanced SIMD: four floats. Part of the baseline of every AArch64 target.

use super::{Kernel, Simd};
use half::{bf16, f16};
use std::arch::aarch64::*;

#[derive(Clone, Copy)]
pub(super) struct Neon(());

#[inline(never)]
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon(()))
}

// Advanced SIMD is in the baseline of this architecture. What SAFETY lines add is about memory.
#[allow(unused_unsafe, reason = "intrinsics of the baseline are safe from Rust 1.87 on")]
impl Simd for Neon {
    type F32 = float32x4_t;
    type I32 = int32x4_t;
    const LANES: usize = 4;
    const ROWS: usize = 12;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        run(kernel)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        instructions!(vdupq_n_f32(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        // SAFETY: the caller vouches for four floats.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> float32x4_t {
        // The scalar conversion of `half` uses the CPU's own instruction where there is one.
        // SAFETY: the caller vouches for four elements.
        let x = unsafe { p.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32);
        // SAFETY: there are four floats.
        unsafe { vld1q_f32(x.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        // SAFETY: the caller vouches for four elements.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> float32x4_t {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let bytes = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))))
        }
    }
    #[inline(always)]
    unsafe fn decode4(self, p: *const u8, high: bool, scale: f32, offset: f32) -> float32x4_t {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let four = p.cast::<u32>().read_unaligned();
            let codes = if high { four >> 4 } else { four } & 0x0f0f_0f0f;
            let codes = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(u64::from(codes)))));
            self.fma(vcvtq_f32_u32(codes), vdupq_n_f32(scale), vdupq_n_f32(offset))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the caller vouches for four floats.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vdivq_f32(a, b))
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        instructions!(vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        instructions!(vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn select_less(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        instructions!(vbslq_f32(vcltq_f32(a, b), x, y))
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        instructions!(vrndnq_f32(a))
    }
    #[inline(always)]
    fn power2(self, a: float32x4_t) -> float32x4_t {
        instructions!(vreinterpretq_f32_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(a))))
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        instructions!(vaddvq_f32(a))
    }
    #[inline(always)]
    fn max_lane(self, a: float32x4_t) -> f32 {
        instructions!(vmaxnmvq_f32(a))
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
    fn splat_i32(self, x: i32) -> int32x4_t {
        instructions!(vdupq_n_s32(x))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> int32x4_t {
        // SAFETY: the caller vouches for a vector.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(p)) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: int32x4_t) {
        // SAFETY: the caller vouches for a vector.
        unsafe { vst1q_u8(p, vreinterpretq_u8_s32(v)) }
    }
    #[inline(always)]
    fn add_i32(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        instructions!(vaddq_s32(a, b))
    }
    #[inline(always)]
    unsafe fn load_table16(self, p: *const u8) -> int32x4_t {
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { self.load_bytes(p) }
    }
    #[inline(always)]
    fn lookup16(self, table: int32x4_t, a: int32x4_t) -> int32x4_t {
        instructions!(vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), vreinterpretq_u8_s32(a))))
    }
    #[inline(always)]
    unsafe fn lookup256<const N: usize>(self, table: *const u8, a: [int32x4_t; N]) -> [int32x4_t; N] {
        // SAFETY: the caller vouches for 256 bytes.
        unsafe {
            let mut found = [vdupq_n_u8(0); N];
            for i in 0..4 {
                // Bytes outside this quarter keep what was found.
                let quarter = vld1q_u8_x4(table.add(64 * i));
                for n in 0..N {
                    let at = vsubq_u8(vreinterpretq_u8_s32(a[n]), vdupq_n_u8(64 * i as u8));
                    found[n] = vqtbx4q_u8(found[n], quarter, at);
                }
            }
            let mut out = a;
            for n in 0..N {
                out[n] = vreinterpretq_s32_u8(found[n]);
            }
            out
        }
    }
    #[inline(always)]
    fn and(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        instructions!(vandq_s32(a, b))
    }
    #[inline(always)]
    fn add_16(self, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        instructions!(vreinterpretq_s32_u16(vaddq_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b))))
    }
    #[inline(always)]
    fn shift_right_16<const BITS: i32>(self, a: int32x4_t) -> int32x4_t {
        instructions!({
            let x = vreinterpretq_u16_s32(a);
            vreinterpretq_s32_u16(vshlq_u16(x, vdupq_n_s16(-(BITS as i16))))
        })
    }
    #[inline(always)]
    fn dot4(self, acc: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        instructions!({
            // Codes are at most 15, so reading them as signed bytes changes nothing.
            let (x, y) = (vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
            let low = vmull_s8(vget_low_s8(x), vget_low_s8(y));
            let high = vmull_high_s8(x, y);
            vpadalq_s16(acc, vpaddq_s16(low, high))
        })
    }
    #[inline(always)]
    fn to_f32(self, a: int32x4_t) -> float32x4_t {
        instructions!(vcvtq_f32_s32(a))
    }
}
