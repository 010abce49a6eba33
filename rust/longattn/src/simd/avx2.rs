//! AVX2 with FMA and F16C: eight floats.

use super::{
    Kernel, LaneRows, Next, PANEL_VECTORS, RepeatedQuad, Simd, avx2_codes, avx2_products, avx2_rows, stored_keys,
};
use crate::tensor::Storage;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// For eight bits the places of those that are set, in order; the rest are 0.
static PLACES: [[u8; 8]; 256] = {
    let mut places = [[0; 8]; 256];
    let mut bits = 0;
    while bits < 256 {
        let (mut n, mut place) = (0, 0);
        while place < 8 {
            if bits >> place & 1 == 1 {
                places[bits][n] = place as u8;
                n += 1;
            }
            place += 1;
        }
        bits += 1;
    }
    places
};

#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

// An `Avx2` only exists inside `run`: with it, the CPU has the instructions. What SAFETY lines add is about memory.
impl Simd for Avx2 {
    type F32 = __m256;
    type I32 = __m256i;
    const LANES: usize = 8;
    const ROWS: usize = avx2_products::ROWS;
    const MULTIPLIES: bool = true;
    const MULTIPLIES_STORED: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the CPU has what it had when `run` made this value.
        unsafe { run(kernel) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        instructions!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: the caller vouches for eight floats.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> __m256 {
        // SAFETY: the caller vouches for eight elements.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller vouches for eight elements.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m256 {
        // SAFETY: the caller vouches for eight bytes.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn decode4(self, p: *const u8, high: bool, scale: f32, offset: f32) -> __m256 {
        // SAFETY: the caller vouches for eight bytes.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let codes =
                if high { _mm256_srli_epi32::<4>(bytes) } else { _mm256_and_si256(bytes, _mm256_set1_epi32(15)) };
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(scale), _mm256_set1_ps(offset))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller vouches for eight floats.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        instructions!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn multiply<const R: usize>(
        self,
        sums: &mut [[__m256; PANEL_VECTORS]; R],
        k: usize,
        a: *const f32,
        lda: usize,
        b: *const f32,
        ldb: usize,
    ) {
        let rows = sums.first_chunk_mut().expect("as many rows as ROWS says");
        // SAFETY: the caller's promise.
        *rows = unsafe { avx2_products::multiply(*rows, k, a, lda, b, ldb) };
    }
    #[inline(always)]
    unsafe fn stored_dots<const R: usize, const C: usize>(
        self,
        storage: Storage,
        keys: [*const u8; C],
        next: Option<Next>,
        queries: [*const f32; R],
        steps: usize,
    ) -> [[__m256; C]; R] {
        // SAFETY: the caller's promise.
        unsafe { avx2_rows::dots(storage, keys, next, queries, steps) }
    }
    #[inline(always)]
    unsafe fn add_stored<const R: usize>(
        self,
        storage: Storage,
        rows: &[*const u8],
        next: Option<Next>,
        d: usize,
        last: usize,
        weights: *const f32,
        stride: usize,
        outputs: *mut f32,
        output_stride: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { avx2_rows::add::<R>(storage, rows, next, d, last, weights, stride, outputs, output_stride) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        instructions!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn select_less(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        instructions!(_mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        instructions!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn power2(self, a: __m256) -> __m256 {
        instructions!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(a))))
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        instructions!({
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        })
    }
    #[inline(always)]
    fn sums<const R: usize, const C: usize>(self, v: [[__m256; C]; R]) -> [[f32; C]; R] {
        let mut sums = [[0.0; C]; R];
        if R * C == 8 {
            // SAFETY: `sums` holds the eight floats that are written.
            unsafe {
                let mut all = [v[0][0]; 8];
                for i in 0..8 {
                    all[i] = v[i / C][i % C];
                }
                let a = _mm256_hadd_ps(_mm256_hadd_ps(all[0], all[1]), _mm256_hadd_ps(all[2], all[3]));
                let b = _mm256_hadd_ps(_mm256_hadd_ps(all[4], all[5]), _mm256_hadd_ps(all[6], all[7]));
                let sum = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
                _mm256_storeu_ps(sums.as_mut_ptr().cast(), sum);
            }
        } else if C == stored_keys(R) {
            for i in (0..R * C).step_by(6) {
                let mut six = [v[0][0]; 6];
                for (j, six) in six.iter_mut().enumerate() {
                    *six = v[(i + j) / C][(i + j) % C];
                }
                for (j, sum) in instructions!(sums_of_six(six)).into_iter().enumerate() {
                    sums[(i + j) / C][(i + j) % C] = sum;
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
    unsafe fn load_pairs(self, rows: &LaneRows, at: usize) -> [__m256; 2] {
        // SAFETY: the caller vouches for eight bytes of each row.
        unsafe {
            let mut two = [_mm_setzero_ps(); 4];
            for (i, two) in two.iter_mut().enumerate() {
                let (a, b) = (rows.row(2 * i).add(at).cast::<f64>(), rows.row(2 * i + 1).add(at).cast::<f64>());
                *two = _mm_castpd_ps(_mm_set_pd(b.read_unaligned(), a.read_unaligned()));
            }
            let a = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(two[0]), two[2]);
            let b = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(two[1]), two[3]);
            [_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b)]
        }
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        instructions!({
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        })
    }
    #[inline(always)]
    fn at_least(self, a: __m256, b: __m256) -> u32 {
        instructions!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b)) as u32)
    }
    #[inline(always)]
    unsafe fn store_some(self, p: *mut f32, v: __m256, bits: u32) {
        // SAFETY: the caller vouches for eight floats.
        unsafe {
            let places = _mm_loadl_epi64(PLACES[bits as usize].as_ptr().cast());
            _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(places)));
        }
    }
    #[inline(always)]
    fn turn4(self, [a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
        instructions!({
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab2, cd2) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab2, cd2),
                _mm256_shuffle_ps::<0xee>(ab2, cd2),
            ]
        })
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller vouches for eight rows of eight floats on both sides.
        unsafe {
            let row = |i: usize| _mm256_loadu_ps(from.add(i * from_stride));
            // Pairs of rows, then quadruples, each within 128-bit halves; then the halves change places.
            let pair: [_; 8] = std::array::from_fn(|i| {
                let (a, b) = (row(i / 2 * 2), row(i / 2 * 2 + 1));
                if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
            });
            let quad: [_; 8] = std::array::from_fn(|i| {
                let (a, b) = (pair[i / 4 * 4 + i % 4 / 2], pair[i / 4 * 4 + i % 4 / 2 + 2]);
                if i % 2 == 0 { _mm256_shuffle_ps::<0x44>(a, b) } else { _mm256_shuffle_ps::<0xee>(a, b) }
            });
            for i in 0..4 {
                _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(quad[i], quad[i + 4]));
                _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(quad[i], quad[i + 4]));
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> __m256i {
        instructions!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m256i {
        // SAFETY: the caller vouches for a vector.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, p: *mut u8, v: __m256i) {
        // SAFETY: the caller vouches for a vector.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    fn add_i32(self, a: __m256i, b: __m256i) -> __m256i {
        instructions!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    unsafe fn load_table16(self, p: *const u8) -> __m256i {
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    fn lookup16(self, table: __m256i, a: __m256i) -> __m256i {
        instructions!(_mm256_shuffle_epi8(table, a))
    }
    #[inline(always)]
    unsafe fn lookup256<const N: usize>(self, table: *const u8, a: [__m256i; N]) -> [__m256i; N] {
        // SAFETY: the caller vouches for 256 bytes.
        unsafe {
            let mut found = [_mm256_setzero_si256(); N];
            for i in 0..16 {
                let part = self.load_table16(table.add(16 * i));
                let (high, limit) = (_mm256_set1_epi8((i << 4) as i8), _mm256_set1_epi8(0x70));
                for n in 0..N {
                    // Above 0x7f, which the shuffle turns into 0, unless the high half is i.
                    let at = _mm256_adds_epu8(_mm256_xor_si256(a[n], high), limit);
                    found[n] = _mm256_or_si256(found[n], _mm256_shuffle_epi8(part, at));
                }
            }
            found
        }
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        instructions!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn add_16(self, a: __m256i, b: __m256i) -> __m256i {
        instructions!(_mm256_add_epi16(a, b))
    }
    #[inline(always)]
    fn shift_right_16<const BITS: i32>(self, a: __m256i) -> __m256i {
        instructions!(_mm256_srli_epi16::<BITS>(a))
    }
    #[inline(always)]
    fn dot4(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        instructions!(_mm256_add_epi32(acc, self.lengthen(_mm256_maddubs_epi16(a, b))))
    }
    const SHORT_SUMS: bool = true;
    #[inline(always)]
    fn dot4_short(self, acc: __m256i, a: __m256i, b: __m256i) -> __m256i {
        instructions!(_mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b)))
    }
    #[inline(always)]
    fn lengthen(self, sums: __m256i) -> __m256i {
        instructions!(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)))
    }
    const CODE_DOTS: bool = true;
    #[inline(always)]
    unsafe fn code_dots<const BITS: usize, const G: usize>(
        self,
        sums: [[__m256i; 2]; G],
        groups: usize,
        codes: *const u8,
        ahead: usize,
        second_cache: bool,
        quads: *const RepeatedQuad,
    ) -> [[__m256i; 2]; G] {
        // SAFETY: the caller's promise.
        unsafe { avx2_codes::dots::<BITS, G>(sums, groups, codes, ahead, second_cache, quads) }
    }
    #[inline(always)]
    fn to_f32(self, a: __m256i) -> __m256 {
        instructions!(_mm256_cvtepi32_ps(a))
    }
}

/// Sums of the lanes of each vector, of which two share one once their halves are added.
#[target_feature(enable = "avx2")]
#[inline]
fn sums_of_six(v: [__m256; 6]) -> [f32; 6] {
    let mut halves = [v[0]; 3];
    for (i, halves) in halves.iter_mut().enumerate() {
        let (a, b) = (v[i], v[i + 3]);
        *halves = _mm256_add_ps(_mm256_blend_ps::<0xf0>(a, b), _mm256_permute2f128_ps::<0x21>(a, b));
    }
    let [x, y, z] = halves;
    // x0 + x2, y0 + y2, x1 + x3, y1 + y3 of each half, and z0 + z2, z1 + z3 in its first two places.
    let xy = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    let z = _mm256_add_ps(z, _mm256_permute_ps::<0x0e>(z));
    let sums = _mm256_add_ps(_mm256_shuffle_ps::<0x04>(xy, z), _mm256_shuffle_ps::<0x5e>(xy, z));
    let mut all = [0.0; 8];
    // SAFETY: there are eight floats.
    unsafe { _mm256_storeu_ps(all.as_mut_ptr(), sums) };
    [all[0], all[1], all[2], all[4], all[5], all[6]]
}
