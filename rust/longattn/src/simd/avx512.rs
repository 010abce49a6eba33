//! AVX-512 (F, BW, DQ, VL): sixteen floats; dot products of bytes (VNNI) and of bf16 pairs where the CPU has them.

use super::{Kernel, LaneRows, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool, const BF16: bool, const VBMI: bool>(());

/// # Safety
/// The CPU has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<false, false, false>(()))
}

/// # Safety
/// As [`run`], and the CPU has AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn run_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true, false, false>(()))
}

/// # Safety
/// As [`run_vnni`], and the CPU has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn run_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<true, true, false>(()))
}

/// # Safety
/// As [`run`], and the CPU has AVX-512 VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
#[inline(never)]
unsafe fn run_vbmi<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<false, false, true>(()))
}

/// A vector whose quarters hold a partial sum each of `a`, `b`, `c` and `d`.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn sums4(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    }
}

/// The quarters of two vectors added in pairs: those of `a`, then those of `b`.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn halves(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
}

/// The transpose of 16 x 16 floats.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn transposed(rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: the caller's promise.
    unsafe {
        // Pairs of rows, then quadruples, each within 128-bit quarters; then the quarters change places in two rounds.
        let mut pair = rows;
        for i in 0..8 {
            pair[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pair[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        // quad[4 g + c]: column c + 4 * quarter of rows 4 g .. 4 g + 3
        let mut quad = rows;
        for i in 0..8 {
            let (a, b) = (pair[i / 2 * 4 + i % 2], pair[i / 2 * 4 + i % 2 + 2]);
            quad[2 * i] = _mm512_shuffle_ps::<0x44>(a, b);
            quad[2 * i + 1] = _mm512_shuffle_ps::<0xee>(a, b);
        }
        let mut columns = rows;
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(quad[c], quad[4 + c]);
            let high = _mm512_shuffle_f32x4::<0xdd>(quad[c], quad[4 + c]);
            let low2 = _mm512_shuffle_f32x4::<0x88>(quad[8 + c], quad[12 + c]);
            let high2 = _mm512_shuffle_f32x4::<0xdd>(quad[8 + c], quad[12 + c]);
            columns[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
            columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
        }
        columns
    }
}

// An `Avx512` only exists inside the `run` of its parameters: with it, the CPU has the instructions. What SAFETY lines add is about
// memory.
impl<const VNNI: bool, const BF16: bool, const VBMI: bool> Simd for Avx512<VNNI, BF16, VBMI> {
    type F32 = __m512;
    type I32 = __m512i;
    const LANES: usize = 16;
    const ROWS: usize = 12;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the CPU has what every `run` that makes such a value asks for.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        instructions!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn decode4(self, p: *const u8, high: bool, scale: f32, offset: f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe {
            // The sixteen values a code can have, looked up by the low four bits of each lane.
            let codes = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            let values = _mm512_fmadd_ps(codes, _mm512_set1_ps(scale), _mm512_set1_ps(offset));
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            _mm512_permutexvar_ps(if high { _mm512_srli_epi32::<4>(bytes) } else { bytes }, values)
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        instructions!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        instructions!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn select_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        instructions!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        instructions!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn power2(self, a: __m512) -> __m512 {
        instructions!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(a))))
    }
    #[inline(always)]
    fn exp2_rough(self, x: __m512) -> __m512 {
        // 2^r for 0 <= r < 1, relative error below 1.5e-7 and none at 0: scaling rounds the exponent down, as the rest is taken.
        const POWERS: [f32; 6] = [0.001_867_13, 0.009_017_031, 0.055_799_913, 0.240_164_44, 0.693_151_3, 1.0];
        instructions!({
            let r = _mm512_reduce_ps::<1>(x);
            let mut p = _mm512_set1_ps(POWERS[0]);
            for c in &POWERS[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
            }
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(normal, p, x)
        })
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        instructions!(_mm512_reduce_add_ps(a))
    }
    const SUMS: usize = 16;
    #[inline(always)]
    fn sums<const R: usize, const C: usize>(self, v: [[__m512; C]; R]) -> [[f32; C]; R] {
        let mut sums = [[0.0; C]; R];
        if R * C == 16 || R * C == 8 {
            // SAFETY: `sums` holds the sixteen or eight floats that are written.
            unsafe {
                let mut all = [v[0][0]; 16];
                for i in 0..R * C {
                    all[i] = v[i / C][i % C];
                }
                let out = sums.as_mut_ptr().cast::<f32>();
                let first = halves(sums4(all[0], all[1], all[2], all[3]), sums4(all[4], all[5], all[6], all[7]));
                if R * C == 16 {
                    let (a, b) = (sums4(all[8], all[9], all[10], all[11]), sums4(all[12], all[13], all[14], all[15]));
                    _mm512_storeu_ps(out, halves(first, halves(a, b)));
                } else {
                    _mm256_storeu_ps(out, _mm512_castps512_ps256(halves(first, first)));
                }
            }
        } else {
            for (sums, v) in sums.iter_mut().zip(&v) {
                for (sum, &v) in sums.iter_mut().zip(v) {
                    *sum = self.sum(v);
                }
            }
        }
        sums
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        instructions!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn at_least(self, a: __m512, b: __m512) -> u32 {
        instructions!(u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b)))
    }
    #[inline(always)]
    unsafe fn store_some(self, p: *mut f32, v: __m512, bits: u32) {
        // In registers and stored whole: to memory straight away takes far longer on some processors.
        // SAFETY: the caller vouches for sixteen floats.
        instructions!(_mm512_storeu_ps(p, _mm512_maskz_compress_ps(bits as u16, v)))
    }
    #[inline(always)]
    fn turn4(self, [a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
        instructions!({
            let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
            let (ab2, cd2) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
            [
                _mm512_shuffle_ps::<0x44>(ab, cd),
                _mm512_shuffle_ps::<0xee>(ab, cd),
                _mm512_shuffle_ps::<0x44>(ab2, cd2),
                _mm512_shuffle_ps::<0xee>(ab2, cd2),
            ]
        })
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller vouches for sixteen rows of sixteen floats on both sides.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * from_stride));
            }
            let columns = transposed(rows);
            for (i, &column) in columns.iter().enumerate() {
                _mm512_storeu_ps(to.add(i * to_stride), column);
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m512i {
        instructions!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m512i {
        // SAFETY: the caller vouches for a vector.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes_first(self, p: *const u8, n: usize) -> __m512i {
        // SAFETY: the caller vouches for n bytes; masked loads touch no others.
        unsafe { _mm512_maskz_loadu_epi8(!(u64::MAX.checked_shl(n as u32).unwrap_or(0)), p.cast()) }
    }
    #[inline(always)]
    unsafe fn transpose_words(self, rows: &LaneRows, at: usize, n: usize, to: *mut u8) {
        // SAFETY: the caller vouches for n bytes of each row and for sixteen vectors of `to`; masked loads touch no others.
        unsafe {
            let mut words = [_mm512_setzero_ps(); 16];
            for (lane, words) in words.iter_mut().enumerate() {
                let row = rows.row(lane).add(at);
                let bytes = if n == 64 { self.load_bytes(row) } else { self.load_bytes_first(row, n) };
                *words = _mm512_castsi512_ps(bytes);
            }
            let columns = transposed(words);
            for (t, &column) in columns.iter().enumerate() {
                _mm512_storeu_ps(to.add(64 * t).cast(), column);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, rows: &LaneRows, at: usize) -> [__m512; 2] {
        // SAFETY: the caller vouches for eight bytes of each row.
        unsafe {
            let mut eight = [_mm512_setzero_pd(); 2];
            for (half, eight) in eight.iter_mut().enumerate() {
                let mut four = [_mm256_setzero_pd(); 2];
                for (quarter, four) in four.iter_mut().enumerate() {
                    let mut two = [_mm_setzero_pd(); 2];
                    for (eighth, two) in two.iter_mut().enumerate() {
                        let lane = 8 * half + 4 * quarter + 2 * eighth;
                        let (a, b) = (rows.row(lane).add(at).cast::<f64>(), rows.row(lane + 1).add(at).cast::<f64>());
                        *two = _mm_set_pd(b.read_unaligned(), a.read_unaligned());
                    }
                    *four = _mm256_insertf128_pd::<1>(_mm256_castpd128_pd256(two[0]), two[1]);
                }
                *eight = _mm512_insertf64x4::<1>(_mm512_castpd256_pd512(four[0]), four[1]);
            }
            let [a, b] = [_mm512_castpd_ps(eight[0]), _mm512_castpd_ps(eight[1])];
            let first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let second = _mm512_or_si512(first, _mm512_set1_epi32(1));
            [_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b)]
        }
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8, n: usize) -> __m512i {
        // SAFETY: the caller vouches for n bytes; masked loads touch no others.
        unsafe {
            let bytes = if n == 32 {
                _mm256_loadu_si256(p.cast())
            } else {
                _mm512_castsi512_si256(self.load_bytes_first(p, n))
            };
            let shifts = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(4));
            let shifted = _mm512_srlv_epi16(_mm512_broadcast_i64x4(bytes), shifts);
            _mm512_and_si512(shifted, _mm512_set1_epi8(15))
        }
    }
    #[inline(always)]
    fn interleave(self, x: [__m512i; 4]) -> [__m512i; 4] {
        instructions!({
            let (low, high) = (_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]));
            let (low2, high2) = (_mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3]));
            [
                _mm512_unpacklo_epi16(low, low2),
                _mm512_unpackhi_epi16(low, low2),
                _mm512_unpacklo_epi16(high, high2),
                _mm512_unpackhi_epi16(high, high2),
            ]
        })
    }
    #[inline(always)]
    fn in_order(self, v: [__m512; 4]) -> [__m512; 4] {
        instructions!({
            // Quarter q of vector t is the t-th part of quarter q of the bytes.
            let (a, b) = (_mm512_shuffle_f32x4::<0x44>(v[0], v[1]), _mm512_shuffle_f32x4::<0x44>(v[2], v[3]));
            let (c, d) = (_mm512_shuffle_f32x4::<0xee>(v[0], v[1]), _mm512_shuffle_f32x4::<0xee>(v[2], v[3]));
            [
                _mm512_shuffle_f32x4::<0x88>(a, b),
                _mm512_shuffle_f32x4::<0xdd>(a, b),
                _mm512_shuffle_f32x4::<0x88>(c, d),
                _mm512_shuffle_f32x4::<0xdd>(c, d),
            ]
        })
    }
    #[inline(always)]
    fn digits(self, x: __m512) -> __m512i {
        instructions!({
            let bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_set1_ps(8_388_608.0)));
            // 128 more in the last two bytes carry into the next where they should; then they are taken away again.
            let bits = _mm512_xor_si512(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8080)), _mm512_set1_epi32(0x8080));
            let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_shuffle_epi8(bits, _mm512_broadcast_i32x4(order))
        })
    }
    const DOT_BYTES: bool = VNNI;
    #[inline(always)]
    fn call_bytes<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value with VNNI proves that the CPU has it.
        unsafe { if VNNI { run_vnni(kernel) } else { run(kernel) } }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: __m512i) {
        // SAFETY: the caller vouches for a vector.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    fn add_i32(self, a: __m512i, b: __m512i) -> __m512i {
        instructions!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    unsafe fn load_table16(self, p: *const u8) -> __m512i {
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    fn lookup16(self, table: __m512i, a: __m512i) -> __m512i {
        instructions!(_mm512_shuffle_epi8(table, a))
    }
    #[inline(always)]
    unsafe fn lookup256<const N: usize>(self, table: *const u8, a: [__m512i; N]) -> [__m512i; N] {
        // SAFETY: the caller vouches for 256 bytes.
        unsafe {
            let mut found = [_mm512_setzero_si512(); N];
            if VBMI {
                let part: [__m512i; 4] = std::array::from_fn(|i| self.load_bytes(table.add(64 * i)));
                for n in 0..N {
                    let low = _mm512_permutex2var_epi8(part[0], a[n], part[1]);
                    let high = _mm512_permutex2var_epi8(part[2], a[n], part[3]);
                    found[n] = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(a[n]), high);
                }
            } else {
                for i in 0..16 {
                    let part = self.load_table16(table.add(16 * i));
                    let (high, limit) = (_mm512_set1_epi8((i << 4) as i8), _mm512_set1_epi8(0x70));
                    for n in 0..N {
                        // Above 0x7f, which the shuffle turns into 0, unless the high half is i.
                        let at = _mm512_adds_epu8(_mm512_xor_si512(a[n], high), limit);
                        found[n] = _mm512_or_si512(found[n], _mm512_shuffle_epi8(part, at));
                    }
                }
            }
            found
        }
    }
    #[inline(always)]
    fn call_tables<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: VBMI is asked for right here.
        unsafe { if is_x86_feature_detected!("avx512vbmi") { run_vbmi(kernel) } else { run(kernel) } }
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        instructions!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn add_16(self, a: __m512i, b: __m512i) -> __m512i {
        instructions!(_mm512_add_epi16(a, b))
    }
    #[inline(always)]
    fn shift_right_16<const BITS: i32>(self, a: __m512i) -> __m512i {
        instructions!(_mm512_srl_epi16(a, _mm_cvtsi32_si128(BITS)))
    }
    #[inline(always)]
    fn dot4(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        instructions!({
            if VNNI {
                _mm512_dpbusd_epi32(acc, a, b)
            } else {
                _mm512_add_epi32(acc, self.lengthen(_mm512_maddubs_epi16(a, b)))
            }
        })
    }
    const SHORT_SUMS: bool = !VNNI;
    #[inline(always)]
    fn dot4_short(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        if VNNI {
            return self.dot4(acc, a, b);
        }
        instructions!(_mm512_add_epi16(acc, _mm512_maddubs_epi16(a, b)))
    }
    #[inline(always)]
    fn lengthen(self, sums: __m512i) -> __m512i {
        if VNNI { sums } else { instructions!(_mm512_madd_epi16(sums, _mm512_set1_epi16(1))) }
    }
    #[inline(always)]
    fn call_pairs<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value with BF16 proves that the CPU has it, and VNNI.
        unsafe { if BF16 { run_bf16(kernel) } else { run(kernel) } }
    }
    const DOT2_BF16: bool = BF16;
    #[inline(always)]
    fn dot2_bf16(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        if BF16 {
            // SAFETY: both types are 512 plain bits.
            unsafe {
                _mm512_dpbf16_ps(
                    acc,
                    std::mem::transmute::<__m512i, __m512bh>(a),
                    std::mem::transmute::<__m512i, __m512bh>(b),
                )
            }
        } else {
            acc
        }
    }
    #[inline(always)]
    fn interleave_pairs(self, [a, b]: [__m512i; 2]) -> [__m512i; 2] {
        instructions!([_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)])
    }
    #[inline(always)]
    fn in_order_pairs(self, [low, high]: [__m512; 2]) -> [__m512; 2] {
        instructions!({
            // Quarter q of `low` holds numbers 8 q to 8 q + 3, that of `high` the next four.
            let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            let second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            [_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)]
        })
    }
    #[inline(always)]
    fn weave_pairs(self, x: [__m512i; 2]) -> [__m512i; 2] {
        let [low, high] = self.interleave_pairs(x);
        let whole = instructions!([_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]);
        let [first, second] = self.in_order_pairs(whole);
        instructions!([_mm512_castps_si512(first), _mm512_castps_si512(second)])
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: __m512) {
        if BF16 {
            // SAFETY: both types are sixteen numbers of two plain bytes, for which the caller vouches.
            unsafe { _mm256_storeu_si256(p.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v))) }
        } else {
            unreachable!("only where pairs are multiplied");
        }
    }
    #[inline(always)]
    fn split_bf16(self, v: __m512) -> [__m512; 2] {
        instructions!({
            let part = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0xffff_0000_u32 as i32));
            let part = _mm512_castsi512_ps(part);
            [part, _mm512_sub_ps(v, part)]
        })
    }
    #[inline(always)]
    fn half_up_bf16(self, v: __m512) -> __m512 {
        instructions!(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000))))
    }
    #[inline(always)]
    fn pair_bf16(self, a: __m512, b: __m512) -> __m512 {
        instructions!({
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            // a >> 16 | b & mask
            let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(a), b, mask))
        })
    }
    #[inline(always)]
    fn narrow_bf16(self, a: __m512, b: __m512) -> __m512i {
        if BF16 {
            // SAFETY: a value with BF16 proves that the CPU has it; both types are 512 plain bits.
            unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)) }
        } else {
            unreachable!("only where pairs are multiplied");
        }
    }

    #[inline(always)]
    fn to_f32(self, a: __m512i) -> __m512 {
        instructions!(_mm512_cvtepi32_ps(a))
    }
}
