//! The matrix micro-kernel, generic over how it multiplies: floats, pairs of bf16, bytes (`bytes.rs`).

use crate::simd::{PANEL_VECTORS, Simd};

/// Columns of a packed panel.
#[inline(always)]
pub(crate) const fn panel<S: Simd>() -> usize {
    PANEL_VECTORS * S::LANES
}

/// How the micro-kernel multiplies and adds. A row's part is one float of `a` (or what its four bytes hold), a column's a vector of `b`.
pub(super) trait Product<S: Simd>: Copy {
    type Sum: Copy;
    type Part: Copy;
    /// A sum to begin with, for the columns from `column` on of the row at `c`.
    ///
    /// # Safety
    /// `c` is the row's place in the result.
    unsafe fn start(self, s: S, c: *const f32, column: usize) -> Self::Sum;
    /// # Safety
    /// `a` is readable for a float.
    unsafe fn row(self, s: S, a: *const f32) -> Self::Part;
    /// # Safety
    /// `b` is readable for `LANES` floats.
    unsafe fn column(self, s: S, b: *const f32) -> Self::Part;
    fn add(self, s: S, sum: Self::Sum, row: Self::Part, column: Self::Part) -> Self::Sum;
    /// Adds the products of `k` steps to the sums of `R` rows.
    ///
    /// # Safety
    /// As [`micro`].
    #[inline(always)]
    unsafe fn add_steps<const R: usize>(
        self,
        s: S,
        sums: &mut [[Self::Sum; PANEL_VECTORS]; R],
        k: usize,
        a: *const f32,
        lda: usize,
        b: *const f32,
        ldb: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe { add_steps(s, self, sums, k, a, lda, b, ldb) }
    }
    /// The result for the columns from `column` on of row `r`.
    fn finish(self, s: S, sum: Self::Sum, r: usize, column: usize) -> S::F32;
}

/// Sums of products of floats; added to what is there, or in its place.
#[derive(Clone, Copy)]
pub(super) struct Floats {
    pub(super) add: bool,
}

impl<S: Simd> Product<S> for Floats {
    type Sum = S::F32;
    type Part = S::F32;

    #[inline(always)]
    unsafe fn start(self, s: S, c: *const f32, column: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        if self.add { unsafe { s.load(c.add(column)) } } else { s.zero() }
    }
    #[inline(always)]
    unsafe fn row(self, s: S, a: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        s.splat(unsafe { *a })
    }
    #[inline(always)]
    unsafe fn column(self, s: S, b: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { s.load(b) }
    }
    #[inline(always)]
    fn add(self, s: S, sum: S::F32, row: S::F32, column: S::F32) -> S::F32 {
        s.fma(row, column, sum)
    }
    #[inline(always)]
    unsafe fn add_steps<const R: usize>(
        self,
        s: S,
        sums: &mut [[S::F32; PANEL_VECTORS]; R],
        k: usize,
        a: *const f32,
        lda: usize,
        b: *const f32,
        ldb: usize,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if S::MULTIPLIES && R == S::ROWS {
                s.multiply(sums, k, a, lda, b, ldb);
            } else {
                add_steps(s, self, sums, k, a, lda, b, ldb);
            }
        }
    }
    #[inline(always)]
    fn finish(self, _: S, sum: S::F32, _r: usize, _column: usize) -> S::F32 {
        sum
    }
}

/// Scaled sums of products of pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Pairs {
    pub(super) scale: f32,
}

impl<S: Simd> Product<S> for Pairs {
    type Sum = S::F32;
    type Part = S::I32;

    #[inline(always)]
    unsafe fn start(self, s: S, _c: *const f32, _column: usize) -> S::F32 {
        s.zero()
    }
    #[inline(always)]
    unsafe fn row(self, s: S, a: *const f32) -> S::I32 {
        // SAFETY: the caller's promise; a pair of bf16 is four plain bytes.
        s.splat_i32(unsafe { *a.cast::<i32>() })
    }
    #[inline(always)]
    unsafe fn column(self, s: S, b: *const f32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe { s.load_bytes(b.cast()) }
    }
    #[inline(always)]
    fn add(self, s: S, sum: S::F32, row: S::I32, column: S::I32) -> S::F32 {
        s.dot2_bf16(sum, row, column)
    }
    #[inline(always)]
    fn finish(self, s: S, sum: S::F32, _r: usize, _column: usize) -> S::F32 {
        s.mul(sum, s.splat(self.scale))
    }
}

/// [`Product::add_steps`], step by step.
///
/// # Safety
/// As [`micro`].
#[inline(always)]
unsafe fn add_steps<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    product: P,
    sums: &mut [[P::Sum; PANEL_VECTORS]; R],
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
) {
    for i in 0..k {
        // SAFETY: the caller's promise.
        unsafe {
            let row = b.add(i * ldb);
            let columns: [P::Part; PANEL_VECTORS] = [product.column(s, row), product.column(s, row.add(S::LANES))];
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = product.row(s, a.add(r * lda + i));
                for (sum, &column) in sums.iter_mut().zip(&columns) {
                    *sum = product.add(s, *sum, x, column);
                }
            }
        }
    }
}

/// `c[r][0..PANEL] = sum_k a[r][k] b[k][0..PANEL]` for `R` rows, as `product` says; rows of `b` are `ldb` floats apart.
///
/// # Safety
/// `a` holds `R` rows of `k` floats, `b` `k` rows of `PANEL`, `c` `R` rows of `PANEL`.
#[inline(always)]
unsafe fn micro<S: Simd, P: Product<S>, const R: usize>(
    s: S,
    product: P,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: the caller's promise on a, b and c.
    unsafe {
        let mut acc = [[product.start(s, c, 0); PANEL_VECTORS]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = product.start(s, c.add(r * ldc), v * S::LANES);
            }
        }
        product.add_steps(s, &mut acc, k, a, lda, b, ldb);
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                s.store(c.add(r * ldc + v * S::LANES), product.finish(s, acc, r, v * S::LANES));
            }
        }
    }
}

/// [`micro`] over packed panels with the instruction set's own number of rows, or with 4 of many where no more than `rows` of them
/// count.
///
/// # Safety
/// As [`micro`], with `S::ROWS` rows.
#[inline(always)]
pub(super) unsafe fn multiply_by<S: Simd, P: Product<S>>(
    s: S,
    product: P,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    rows: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { multiply_apart(s, product, k, a, lda, b, panel::<S>(), c, ldc, rows) }
}

/// [`multiply_by`] with rows of `b` that are `ldb` floats apart.
///
/// # Safety
/// As [`micro`], with `S::ROWS` rows.
#[inline(always)]
unsafe fn multiply_apart<S: Simd, P: Product<S>>(
    s: S,
    product: P,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    rows: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match S::ROWS {
            12 if rows <= 4 => micro::<S, P, 4>(s, product, k, a, lda, b, ldb, c, ldc),
            12 => micro::<S, P, 12>(s, product, k, a, lda, b, ldb, c, ldc),
            6 => micro::<S, P, 6>(s, product, k, a, lda, b, ldb, c, ldc),
            _ => micro::<S, P, 4>(s, product, k, a, lda, b, ldb, c, ldc),
        }
    }
}

/// `c[r][0..PANEL] (+)= sum_k a[r][k] b[k][0..PANEL]` of floats, for the instruction set's own number of rows.
///
/// # Safety
/// As [`micro`], with `S::ROWS` rows.
#[inline(always)]
pub(crate) unsafe fn multiply<S: Simd>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { multiply_by(s, Floats { add }, k, a, lda, b, c, ldc, S::ROWS) }
}

/// [`multiply`] with rows of `b` that are `ldb` floats apart, where `rows` of the result's rows count.
///
/// # Safety
/// As [`micro`], with `S::ROWS` rows.
#[inline(always)]
pub(crate) unsafe fn multiply_strided<S: Simd>(
    s: S,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    rows: usize,
    add: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { multiply_apart(s, Floats { add }, k, a, lda, b, ldb, c, ldc, rows) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Isa, Kernel, dispatch};

    /// [`multiply_strided`] over `k` steps, rows `apart` floats further apart than they are long, added to what is there or in its place.
    struct Sums {
        k: usize,
        apart: usize,
        add: bool,
    }

    /// A number between -1 and 1.
    fn number(i: usize) -> f32 {
        (i * 2_654_435_761 % 2001) as f32 / 1000.0 - 1.0
    }

    impl Kernel for Sums {
        /// What came out, and products added up one by one.
        type Output = [Vec<f32>; 2];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let Self { k, apart, add } = self;
            let (rows, panel) = (S::ROWS, panel::<S>());
            let (lda, ldb, ldc) = (k + apart, panel + apart, panel + 2 * apart);
            // No longer than what may be read.
            let a: Vec<f32> = (0..((rows - 1) * lda + k).max(1)).map(number).collect();
            let b: Vec<f32> = (0..(k.max(1) - 1) * ldb + panel).map(|i| number(i + 77)).collect();
            let c: Vec<f32> = (0..rows * ldc).map(|i| number(i + 555)).collect();
            let mut expected = c.clone();
            for (r, row) in expected.chunks_mut(ldc).enumerate() {
                for (j, sum) in row[..panel].iter_mut().enumerate() {
                    let start = if add { *sum } else { 0.0 };
                    *sum = (0..k).fold(start, |sum, i| a[r * lda + i].mul_add(b[i * ldb + j], sum));
                }
            }
            let mut found = c;
            // SAFETY: the arrays are as long as the strides and counts say.
            unsafe { multiply_strided(s, k, a.as_ptr(), lda, b.as_ptr(), ldb, found.as_mut_ptr(), ldc, rows, add) };
            [found, expected]
        }
    }

    #[test]
    fn products_are_added_one_by_one_on_every_isa() {
        for isa in Isa::available() {
            for k in (0..=13).chain([64, 127]) {
                for apart in [0, 5] {
                    for add in [false, true] {
                        let [found, expected] = dispatch(isa, Sums { k, apart, add });
                        let same = found.iter().zip(&expected).all(|(x, y)| match isa {
                            // Its products are rounded before they are added.
                            Isa::Scalar => (x - y).abs() < 1e-4,
                            _ => x.to_bits() == y.to_bits(),
                        });
                        assert!(
                            same,
                            "{}: k {k}, {apart} apart, added: {add}: {found:?}, expected {expected:?}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}
