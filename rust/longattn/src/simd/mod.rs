//! SIMD vectors: one small trait, one implementation per instruction set, chosen at run time.
//!
//! A kernel is written once, generic over [`Simd`], and marked `#[inline(always)]` with everything it calls; [`dispatch`] runs it
//! inside a function that has the instruction set's `target_feature`s switched on. A value of a type that implements [`Simd`] is
//! the proof that the CPU has the features: only this module makes them.
//!
//! Vectors never pass through a closure that an iterator adaptor calls: it may be compiled as a function of its own, without the
//! features, and every instruction in it becomes a call.

/// What an instruction set does with vectors alone. What reads or writes memory has an `unsafe` block of its own.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! instructions {
    ($instructions:expr) => {{
        // SAFETY: used in methods of types that implement `Simd`, values of which prove that the CPU has the instructions.
        unsafe { $instructions }
    }};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_codes;
#[cfg(target_arch = "x86_64")]
mod avx2_products;
#[cfg(target_arch = "x86_64")]
mod avx2_rows;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
mod memory;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
pub(crate) mod tiles;

pub use isa::{Isa, check_environment, cpu_features, current, set_current};
pub(crate) use memory::{asks_second_cache, prefetch, prefetch_into};

use crate::tensor::{DType, Element, Storage};
use half::{bf16, f16};

/// Vectors of `f32` (and of 32-bit groups of bytes) of one instruction set.
///
/// Pointer operations read or write exactly `LANES` (or the first `n`) elements and need no alignment.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// `LANES` floats.
    type F32: Copy;
    /// `LANES` 32-bit integers, each also seen as four bytes.
    type I32: Copy;
    /// Floats in a vector.
    const LANES: usize;
    /// Rows of the matrix micro-kernel: `ROWS * PANEL_VECTORS` accumulators fit the register file.
    const ROWS: usize;

    /// Runs a part of a kernel as a function of its own, for the base of the instruction set (without products of bytes or of bf16).
    ///
    /// Large kernels are made of such parts: what is inlined into one function for every storage format takes minutes to compile.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }
    fn splat(self, x: f32) -> Self::F32;
    /// # Safety
    /// `p` is readable for `LANES` elements.
    unsafe fn load(self, p: *const f32) -> Self::F32;
    /// # Safety
    /// `p` is readable for `LANES` elements.
    unsafe fn load_f16(self, p: *const f16) -> Self::F32;
    /// # Safety
    /// `p` is readable for `LANES` elements.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::F32;
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn load_u8(self, p: *const u8) -> Self::F32;
    /// `offset + scale * code` of `LANES` codes of 4 bits, which are the low halves of `LANES` bytes, or the high ones.
    ///
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn decode4(self, p: *const u8, high: bool, scale: f32, offset: f32) -> Self::F32;
    /// # Safety
    /// `p` is writable for `LANES` elements.
    unsafe fn store(self, p: *mut f32, v: Self::F32);
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `x` where `a < b`, else `y`.
    fn select_less(self, a: Self::F32, b: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32;
    /// To the nearest integer.
    fn round(self, a: Self::F32) -> Self::F32;
    /// The bits of `a`, 23 places up: `2^(n - 1)` of [`ROUND`]` + n` for `-126 < n <= 128`, 0 of [`ROUND`]` - 126`.
    fn power2(self, a: Self::F32) -> Self::F32;
    /// Sum of the lanes.
    fn sum(self, a: Self::F32) -> f32;
    /// Vectors whose lanes [`Self::sums`] adds up best together: that many accumulators fit the register file.
    const SUMS: usize = 8;
    /// Sum of the lanes of each vector.
    #[inline(always)]
    fn sums<const R: usize, const C: usize>(self, v: [[Self::F32; C]; R]) -> [[f32; C]; R] {
        let mut sums = [[0.0; C]; R];
        for (sums, v) in sums.iter_mut().zip(&v) {
            for (sum, &v) in sums.iter_mut().zip(v) {
                *sum = self.sum(v);
            }
        }
        sums
    }
    /// Largest lane.
    fn max_lane(self, a: Self::F32) -> f32;
    /// A bit per lane, the first lane's lowest: whether `a >= b`.
    #[inline(always)]
    fn at_least(self, a: Self::F32, b: Self::F32) -> u32 {
        let (mut x, mut y) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
        // SAFETY: the arrays hold MAX_LANES >= LANES floats.
        unsafe {
            self.store(x.as_mut_ptr(), a);
            self.store(y.as_mut_ptr(), b);
        }
        (0..Self::LANES).fold(0, |bits, i| bits | u32::from(x[i] >= y[i]) << i)
    }
    /// Writes the lanes whose bits are set one after another. What comes behind them is overwritten.
    ///
    /// # Safety
    /// `p` is writable for `LANES` floats.
    #[inline(always)]
    unsafe fn store_some(self, p: *mut f32, v: Self::F32, bits: u32) {
        let mut x = [0f32; MAX_LANES];
        // SAFETY: the array holds MAX_LANES >= LANES floats.
        unsafe { self.store(x.as_mut_ptr(), v) };
        let (mut to, mut left) = (p, bits);
        while left != 0 {
            // SAFETY: as many floats as there are bits, LANES at most.
            unsafe {
                to.write(x[left.trailing_zeros() as usize]);
                to = to.add(1);
            }
            left &= left - 1;
        }
    }
    /// Each four lanes of four vectors, transposed: lanes `4 q..4 q + 4` of vector t come from lane `4 q + t` of each.
    #[inline(always)]
    fn turn4(self, v: [Self::F32; 4]) -> [Self::F32; 4] {
        let mut from = [[0f32; MAX_LANES]; 4];
        let mut turned = v;
        // SAFETY: the arrays hold MAX_LANES >= LANES floats.
        unsafe {
            for (from, v) in from.iter_mut().zip(v) {
                self.store(from.as_mut_ptr(), v);
            }
            for (t, to) in turned.iter_mut().enumerate() {
                let mut lanes = [0f32; MAX_LANES];
                for i in 0..Self::LANES {
                    lanes[i] = from[i % 4][i / 4 * 4 + t];
                }
                *to = self.load(lanes.as_ptr());
            }
        }
        turned
    }

    /// Transposes a block of `LANES x LANES` floats; rows are `stride` floats apart.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for `LANES` rows of `LANES` floats, and they do not overlap.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);

    fn splat_i32(self, x: i32) -> Self::I32;
    /// # Safety
    /// `p` is readable for `4 * LANES` bytes.
    unsafe fn load_bytes(self, p: *const u8) -> Self::I32;
    /// # Safety
    /// `p` is writable for `4 * LANES` bytes.
    unsafe fn store_bytes(self, p: *mut u8, v: Self::I32);
    fn add_i32(self, a: Self::I32, b: Self::I32) -> Self::I32;
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Sums of 16-bit halves; what does not fit is lost.
    fn add_16(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// A table of 16 bytes for [`Self::lookup16`].
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn load_table16(self, p: *const u8) -> Self::I32;
    /// Bytes of `table` at the places that the bytes of `a`, 0 to 15, name, in each 16 bytes of both.
    fn lookup16(self, table: Self::I32, a: Self::I32) -> Self::I32;
    /// The entries of a table of 256 bytes for each byte of `N` vectors; fast in kernels that run by [`Self::call_tables`].
    ///
    /// # Safety
    /// `table` is readable for 256 bytes.
    unsafe fn lookup256<const N: usize>(self, table: *const u8, a: [Self::I32; N]) -> [Self::I32; N];
    /// As [`Self::call`], with lookups in large tables.
    #[inline(always)]
    fn call_tables<K: Kernel>(self, kernel: K) -> K::Output {
        self.call(kernel)
    }
    /// Shifts 16-bit halves right: the caller masks what crosses from one byte to the next.
    fn shift_right_16<const N: i32>(self, a: Self::I32) -> Self::I32;
    /// The first `n <= 4 * LANES` bytes, zeros after them.
    ///
    /// # Safety
    /// `p` is readable for `n` bytes.
    #[inline(always)]
    unsafe fn load_bytes_first(self, p: *const u8, n: usize) -> Self::I32 {
        let mut buffer = [0u8; 4 * MAX_LANES];
        // SAFETY: the caller vouches for n bytes, and the buffer holds that many of any instruction set.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            self.load_bytes(buffer.as_ptr())
        }
    }
    /// Transposes words of four bytes: vector t of `to` has word t of the bytes from `at` on of each of the first `LANES` rows. There
    /// are `n <= 4 * LANES` bytes, zeros after them.
    ///
    /// # Safety
    /// The rows are readable for `n` bytes from `at` on, `to` is writable for `LANES` vectors.
    #[inline(always)]
    unsafe fn transpose_words(self, rows: &LaneRows, at: usize, n: usize, to: *mut u8) {
        for (lane, row) in rows.all().into_iter().enumerate().take(Self::LANES) {
            for t in 0..Self::LANES {
                let mut word = [0; 4];
                let bytes = n.saturating_sub(4 * t).min(4);
                // SAFETY: the caller's promise; `bytes` are inside the row.
                unsafe {
                    std::ptr::copy_nonoverlapping(row.wrapping_add(at + 4 * t), word.as_mut_ptr(), bytes);
                    to.add(4 * (t * Self::LANES + lane)).cast::<[u8; 4]>().write(word);
                }
            }
        }
    }
    /// The two floats at byte `at` of each of the first `LANES` rows: all first ones, all second ones.
    ///
    /// # Safety
    /// The rows are readable for 8 bytes from `at` on.
    #[inline(always)]
    unsafe fn load_pairs(self, rows: &LaneRows, at: usize) -> [Self::F32; 2] {
        let (mut a, mut b) = ([0f32; MAX_LANES], [0f32; MAX_LANES]);
        for (lane, row) in rows.all().into_iter().enumerate().take(Self::LANES) {
            // SAFETY: the caller's promise.
            [a[lane], b[lane]] = unsafe { row.wrapping_add(at).cast::<[f32; 2]>().read_unaligned() };
        }
        // SAFETY: both have MAX_LANES floats.
        unsafe { [self.load(a.as_ptr()), self.load(b.as_ptr())] }
    }
    /// The low halves of the first `n <= 2 * LANES` bytes and, in the second half of the vector, their high halves: a byte each, zeros
    /// after them.
    ///
    /// # Safety
    /// `p` is readable for `n` bytes.
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8, n: usize) -> Self::I32 {
        let mut bytes = [0u8; 4 * MAX_LANES];
        for i in 0..n {
            // SAFETY: the caller vouches for n bytes.
            let byte = unsafe { *p.add(i) };
            (bytes[i], bytes[2 * Self::LANES + i]) = (byte & 15, byte >> 4);
        }
        // SAFETY: the buffer holds a vector of any instruction set.
        unsafe { self.load_bytes(bytes.as_ptr()) }
    }
    /// A byte of each of the four vectors in every lane. The order of the lanes is that of the instruction set;
    /// [`Self::in_order`] turns it into the order of the bytes.
    #[inline(always)]
    fn interleave(self, x: [Self::I32; 4]) -> [Self::I32; 4] {
        let mut rows = [[0u8; 4 * MAX_LANES]; 4];
        let mut bytes = [0u8; 16 * MAX_LANES];
        // SAFETY: a buffer holds a vector of any instruction set, the last one four of them.
        unsafe {
            for (row, x) in rows.iter_mut().zip(x) {
                self.store_bytes(row.as_mut_ptr(), x);
            }
            for (i, four) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate().take(4 * Self::LANES) {
                *four = [rows[0][i], rows[1][i], rows[2][i], rows[3][i]];
            }
            let mut all = x;
            for (t, v) in all.iter_mut().enumerate() {
                *v = self.load_bytes(bytes.as_ptr().add(4 * t * Self::LANES));
            }
            all
        }
    }
    /// What came of [`Self::interleave`] lane by lane, in the order of the bytes.
    #[inline(always)]
    fn in_order(self, v: [Self::F32; 4]) -> [Self::F32; 4] {
        v
    }
    /// The nearest integers of numbers from 0 to below `127.5 * 2^16` as signed bytes, `2^16 a + 2^8 b + c`: of four lanes beside each other
    /// the four `c`, then the four `b`, the four `a`, and four bytes without meaning. Any bytes for NaN.
    #[inline(always)]
    fn digits(self, x: Self::F32) -> Self::I32 {
        // Adding 2^23 leaves the nearest integer in the low bits of a float.
        let (mut floats, mut bytes) = ([0f32; MAX_LANES], [0u8; 4 * MAX_LANES]);
        // SAFETY: there is room for a vector in either, and then a vector of bytes.
        unsafe {
            self.store(floats.as_mut_ptr(), self.add(x, self.splat(8_388_608.0)));
            for (x, bytes) in floats.chunks_exact(4).zip(bytes.chunks_exact_mut(16)) {
                for (lane, x) in x.iter().enumerate() {
                    let last = x.to_bits();
                    // What is left of a byte of 128 or more is negative, and the next has one more.
                    let middle = last.wrapping_add(128) >> 8;
                    let first = (middle + 128) >> 8;
                    (bytes[lane], bytes[4 + lane], bytes[8 + lane]) = (last as u8, middle as u8, first as u8);
                }
            }
            self.load_bytes(bytes.as_ptr())
        }
    }
    /// Whether [`Self::dot4`] takes any unsigned bytes, in kernels that run by [`Self::call_bytes`].
    const DOT_BYTES: bool = false;
    /// As [`Self::call`], with products of bytes.
    #[inline(always)]
    fn call_bytes<K: Kernel>(self, kernel: K) -> K::Output {
        self.call(kernel)
    }
    /// `acc + sum of the four products` in each lane; `a` unsigned bytes, of at most 15 unless [`Self::DOT_BYTES`], `b` signed bytes.
    fn dot4(self, acc: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Whether [`Self::dot4_short`] adds up in halves of 16 bits, which takes two instructions where [`Self::dot4`] takes three.
    const SHORT_SUMS: bool = false;
    /// As [`Self::dot4`], of sums that [`Self::lengthen`] turns into 32-bit ones. Where [`Self::SHORT_SUMS`] says so, each adds two
    /// products to either half, which must hold the sum of all.
    #[inline(always)]
    fn dot4_short(self, acc: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32 {
        self.dot4(acc, a, b)
    }
    /// See [`Self::dot4_short`].
    #[inline(always)]
    fn lengthen(self, sums: Self::I32) -> Self::I32 {
        sums
    }
    /// Whether there is a [`Self::code_dots`]: where compilers run short of registers.
    const CODE_DOTS: bool = false;
    /// Adds products of 16 keys' codes of `BITS` bits with `G` queries, one, two or four, to sums of 16 bits as those of
    /// [`Self::dot4_short`], a vector of the first keys and one of the others for each query. Of `groups` groups of 64 bytes, four of
    /// each key, the fields meet one quadruple of each query after the other, from the lowest bits on. Asks for what is `ahead` bytes
    /// behind each group.
    ///
    /// # Safety
    /// `codes` are readable for the groups, `quads` for `[groups, 8 / BITS, G]`.
    #[inline(always)]
    unsafe fn code_dots<const BITS: usize, const G: usize>(
        self,
        sums: [[Self::I32; 2]; G],
        groups: usize,
        codes: *const u8,
        ahead: usize,
        second_cache: bool,
        quads: *const RepeatedQuad,
    ) -> [[Self::I32; 2]; G] {
        let _ = (groups, codes, ahead, second_cache, quads);
        sums
    }
    fn to_f32(self, a: Self::I32) -> Self::F32;

    /// As [`Self::call`], with products of pairs of bf16.
    #[inline(always)]
    fn call_pairs<K: Kernel>(self, kernel: K) -> K::Output {
        self.call(kernel)
    }
    /// Whether there is a [`Self::multiply`].
    const MULTIPLIES: bool = false;
    /// `sums[r][v] += sum_i a[r * lda + i] b[i * ldb + v * LANES ..]` for `i < k`, one product after the other, of [`Self::ROWS`] rows.
    /// Only where [`Self::MULTIPLIES`] says so: where compilers run short of registers.
    ///
    /// # Safety
    /// `a` is readable for `R` rows of `k` floats, `b` for `k` rows of `PANEL_VECTORS` vectors.
    #[inline(always)]
    unsafe fn multiply<const R: usize>(
        self,
        sums: &mut [[Self::F32; PANEL_VECTORS]; R],
        k: usize,
        a: *const f32,
        lda: usize,
        b: *const f32,
        ldb: usize,
    ) {
        let _ = (sums, k, a, lda, b, ldb);
    }
    /// Whether there are [`Self::stored_dots`] and [`Self::add_stored`]: where compilers run short of registers.
    const MULTIPLIES_STORED: bool = false;
    /// Sums of products of the first `steps` times [`STORED_STEP`] numbers of each query row with as many elements of each key, over
    /// the lanes of vectors `[query row][key]`: of four rows, two or one, with [`stored_keys`]. Elements are numbers of `storage`, or
    /// codes. Each step asks for as many lines of what comes `next` as it reads of keys.
    ///
    /// # Safety
    /// The query rows and the keys are readable for so many elements.
    #[inline(always)]
    unsafe fn stored_dots<const R: usize, const C: usize>(
        self,
        storage: Storage,
        keys: [*const u8; C],
        next: Option<Next>,
        queries: [*const f32; R],
        steps: usize,
    ) -> [[Self::F32; C]; R] {
        let _ = (storage, keys, next, queries, steps);
        [[self.zero(); C]; R]
    }
    /// `outputs[r][d..] += sum_j weights[r][j] rows[j][d..]`, one product after the other, for [`stored_columns`] of four rows, two or
    /// one. `d` is a multiple of half a [`STORED_STEP`], and numbers two halves of a step for all of its columns. Strides are floats from
    /// row to row. Each row asks for as many lines of what comes `next` as the columns have. Row `last` of weights and outputs, of four
    /// the third at least unless the stride is 0, stands for those after it.
    ///
    /// # Safety
    /// The rows are readable for the elements of the steps that the columns are in, each row of weights for as many floats as there are
    /// rows; those steps of the rows of outputs are writable.
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
        let _ = (storage, rows, next, d, last, weights, stride, outputs, output_stride);
    }
    /// Whether [`Self::dot2_bf16`] is an instruction, in kernels that run by [`Self::call_pairs`].
    const DOT2_BF16: bool = false;
    /// `acc + a0 b0 + a1 b1` in each lane, `a` and `b` pairs of bf16: exact products, accumulated in f32. Only where
    /// [`Self::DOT2_BF16`] says so.
    fn dot2_bf16(self, acc: Self::F32, a: Self::I32, b: Self::I32) -> Self::F32 {
        let _ = (a, b);
        acc
    }
    /// Pairs of a bf16 of either vector. The order of the lanes is that of the instruction set; [`Self::in_order_pairs`] turns it into
    /// the order of the numbers. Only where [`Self::DOT2_BF16`] says so, as the next three.
    #[inline(always)]
    fn interleave_pairs(self, x: [Self::I32; 2]) -> [Self::I32; 2] {
        x
    }
    /// What came of [`Self::interleave_pairs`] lane by lane, in the order of the numbers.
    #[inline(always)]
    fn in_order_pairs(self, v: [Self::F32; 2]) -> [Self::F32; 2] {
        v
    }
    /// Pairs of a bf16 of either vector, in the order of the numbers.
    #[inline(always)]
    fn weave_pairs(self, x: [Self::I32; 2]) -> [Self::I32; 2] {
        x
    }
    /// Rounds to bf16, to nearest even.
    ///
    /// # Safety
    /// `p` is writable for `LANES` numbers.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::F32) {
        let _ = (p, v);
    }
    /// The first eight bits of each lane, a bf16, as a float, and what is left: NaN of an infinite number. Only where
    /// [`Self::DOT2_BF16`] says so, as the next two.
    #[inline(always)]
    fn split_bf16(self, v: Self::F32) -> [Self::F32; 2] {
        [v, v]
    }
    /// Numbers whose first eight bits are those of `v` rounded, halves up. Only where [`Self::DOT2_BF16`] says so.
    #[inline(always)]
    fn half_up_bf16(self, v: Self::F32) -> Self::F32 {
        v
    }
    /// Pairs of a bf16 of either vector, the first eight bits of each lane: those of `a` first.
    #[inline(always)]
    fn pair_bf16(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        let _ = b;
        a
    }
    /// Rounds both to bf16, to nearest even: those of `a` first.
    #[inline(always)]
    fn narrow_bf16(self, a: Self::F32, b: Self::F32) -> Self::I32 {
        let _ = (a, b);
        self.splat_i32(0)
    }

    /// Widening load of `LANES` elements.
    ///
    /// # Safety
    /// `p` is readable for `LANES` elements.
    #[inline(always)]
    unsafe fn load_as<T: Element>(self, p: *const T) -> Self::F32 {
        // SAFETY: T is the type that its DTYPE names, and the caller vouches for the memory.
        unsafe {
            match T::DTYPE {
                DType::F32 => self.load(p.cast()),
                DType::F16 => self.load_f16(p.cast()),
                DType::BF16 => self.load_bf16(p.cast()),
            }
        }
    }

    /// Widening load of the first `n < LANES` elements, zeros after them.
    ///
    /// # Safety
    /// `p` is readable for `n` elements.
    #[inline(always)]
    unsafe fn load_first<T: Element>(self, p: *const T, n: usize) -> Self::F32 {
        let mut buffer = [0f32; MAX_LANES];
        for (i, slot) in buffer.iter_mut().enumerate().take(n) {
            // SAFETY: i < n, and the caller vouches for n elements.
            *slot = unsafe { p.add(i).read_unaligned() }.to_f32();
        }
        // SAFETY: the buffer holds MAX_LANES >= LANES floats.
        unsafe { self.load(buffer.as_ptr()) }
    }

    /// `e^x`, relative error below 2 ulp for -86.9 <= x <= 88.7; 0 below -87.4, infinity above 88.8, NaN for NaN.
    #[inline(always)]
    fn exp(self, x: Self::F32) -> Self::F32 {
        // NaN stays. At the lower end n is -126, at the upper 128 and the power of the rest above 1.
        let x = self.max(self.splat(-87.4), self.min(self.splat(89.0), x));
        let rounded = self.fma(x, self.splat(std::f32::consts::LOG2_E), self.splat(ROUND));
        let n = self.sub(rounded, self.splat(ROUND));
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(2.0 * 1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(2.0 * c));
        }
        self.mul(p, self.power2(rounded))
    }

    /// `2^x`, relative error below 3e-7 for -125.4 <= x < 128; 0 below -126, infinity from 128 on, NaN for NaN. In fewer steps than
    /// [`Self::exp`]: for exponents that were scaled already.
    #[inline(always)]
    fn exp2(self, x: Self::F32) -> Self::F32 {
        let x = self.max(self.splat(-126.0), self.min(self.splat(128.0), x));
        let rounded = self.add(x, self.splat(ROUND));
        let r = self.sub(x, self.sub(rounded, self.splat(ROUND)));
        let mut p = self.splat(2.0 * 1.327_647_1e-3);
        for c in [9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0] {
            p = self.fma(p, r, self.splat(2.0 * c));
        }
        self.mul(p, self.power2(rounded))
    }

    /// [`Self::exp2`] for terms of sums: where it has fewer steps for it, errors just below 0 have one sign, which a product of
    /// many would gather.
    #[inline(always)]
    fn exp2_rough(self, x: Self::F32) -> Self::F32 {
        self.exp2(x)
    }

    /// `tanh(x)`, relative error below 3e-7.
    #[inline(always)]
    fn tanh(self, x: Self::F32) -> Self::F32 {
        let one = self.splat(1.0);
        // Small arguments: five steps of the continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))).
        let x2 = self.mul(x, x);
        let p = self.fma(self.add(x2, self.splat(105.0)), x2, self.splat(945.0));
        let q = self.fma(self.fma(x2, self.splat(15.0), self.splat(420.0)), x2, self.splat(945.0));
        let small = self.div(self.mul(x, p), q);
        // Others: 1 - 2 / (e^2x + 1).
        let clamped = self.min(self.splat(10.0), self.max(self.splat(-10.0), x));
        let e = self.exp(self.add(clamped, clamped));
        let large = self.sub(one, self.div(self.splat(2.0), self.add(e, one)));
        self.select_less(x2, self.splat(0.36), small, large)
    }
}

/// The widest vector of any instruction set, in floats.
pub(crate) const MAX_LANES: usize = 16;

/// A quadruple of a query's bytes for each of eight keys.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
#[allow(dead_code, reason = "assembly reads it")]
pub(crate) struct RepeatedQuad(pub(crate) [i32; 8]);

/// Rows of bytes that go together, one for each lane: the first and how far from it each is. Rows that are evenly spaced keep their
/// distances from one set of rows to the next.
pub(crate) struct LaneRows {
    pub(crate) first: *const u8,
    pub(crate) distances: [isize; MAX_LANES],
}

impl LaneRows {
    pub(crate) const NONE: Self = Self { first: std::ptr::null(), distances: [0; MAX_LANES] };

    /// Where the row of a lane starts.
    #[inline(always)]
    pub(crate) fn row(&self, lane: usize) -> *const u8 {
        self.first.wrapping_offset(self.distances[lane])
    }

    #[inline(always)]
    fn all(&self) -> [*const u8; MAX_LANES] {
        let mut rows = [self.first; MAX_LANES];
        for (lane, row) in rows.iter_mut().enumerate() {
            *row = self.row(lane);
        }
        rows
    }
}

/// What rounds a number when it is added, and then holds it in its lowest bits, 126 above.
const ROUND: f32 = 12_582_912.0 + 126.0;

/// Vectors in one column panel of the matrix micro-kernel.
pub(crate) const PANEL_VECTORS: usize = 2;

/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// What memory is asked for while something else is computed with: from where on, and how much further from one time to the next.
#[derive(Clone, Copy)]
pub(crate) struct Next {
    pub(crate) start: *const u8,
    pub(crate) pace: usize,
}

impl Next {
    pub(crate) const NONE: Self = Self { start: std::ptr::null(), pace: 0 };
}

/// The most rows of floats that [`Simd::stored_dots`] and [`Simd::add_stored`] multiply.
pub(crate) const STORED_ROWS: usize = 4;

/// Keys of [`Simd::stored_dots`] with so many query rows.
pub(crate) const fn stored_keys(rows: usize) -> usize {
    if rows == STORED_ROWS { 3 } else { 6 }
}

/// Columns of [`Simd::add_stored`] with so many rows.
pub(crate) const fn stored_columns(rows: usize) -> usize {
    STORED_STEP / 2 * STORED_ROWS / rows
}

/// Elements of stored rows that a step of [`Simd::stored_dots`] takes, a multiple of what any storage has together.
pub(crate) const STORED_STEP: usize = 32;

/// The most rows of any instruction set's micro-kernel.
pub(crate) const MAX_ROWS: usize = 12;

/// A computation that runs on any instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs a kernel on an instruction set that [`current`] or [`Isa::available`] gave.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        Isa::Scalar => scalar::run(kernel),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::run(kernel),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: callers pass an Isa that is_available() saw on this CPU: `current` and `available` give no other.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { avx512::run_vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::run_bf16(kernel) },
        #[allow(unreachable_patterns, reason = "the arms above depend on the architecture")]
        _ => unreachable!("{} is not of this architecture", isa.name()),
    }
}

#[cfg(test)]
mod tests;
