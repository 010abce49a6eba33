//! Products and transposes as parts of a kernel: compiled once, however many places call them.
//!
//! Vectors multiply rows of floats as they lie. Matrix registers multiply what was packed before, in blocks of 32 x 32: numbers as sums
//! of bf16 (`dense/parts.rs`), those of arrays of as many as hold them, others of two, which err by 2^-17 of a number at most.

use super::scores::product;
use crate::dense::micro::panel;
use crate::dense::parts::{LEFT, RIGHT, left, pairs, right, store_row, with_parts};
use crate::simd::tiles::{BLOCK, Factors, Product, Queue, STEP, Sums, TILE, Tiles};
use crate::simd::{Kernel, Simd};

/// In how many parts registers multiply what is not as it came.
pub(super) const COMPUTED: usize = 2;

/// Which sums of a product there are.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Part {
    /// All.
    Whole,
    /// The left side is 0 right of its diagonal.
    Lower,
    /// The left side is 0 left of its diagonal.
    Upper,
    /// Of the result, only tiles that reach the diagonal or lie below it.
    Below,
}

/// A matrix by its first number and the distance of its rows.
pub(super) type Rows<'a> = (&'a [f32], usize);

/// A side of a product: its rows, and what registers multiply of them, in so many parts.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    rows: Rows<'a>,
    packed: &'a [f32],
    parts: usize,
}

impl<'a> Factor<'a> {
    /// What [`Multiplier::left`] or [`Multiplier::right`] packed before.
    #[inline(always)]
    pub(super) fn packed(rows: Rows<'a>, packed: &'a [f32], parts: usize) -> Self {
        Self { rows, packed, parts }
    }
}

/// What multiplies.
pub(super) struct Multiplier {
    /// Matrix registers; none: vectors.
    queue: Option<Queue>,
}

impl Multiplier {
    /// Vectors; or matrix registers, in kernels that run by [`Simd::call_pairs`].
    #[inline(always)]
    pub(super) fn new(tiles: Option<Tiles>) -> Self {
        Self { queue: tiles.map(|tiles| Queue::new(tiles.registers())) }
    }

    /// Rows of a product that are computed at once: those of the left side of a [`Part::Lower`] are 0 from the diagonal to the end of the
    /// rows that belong together.
    #[inline(always)]
    pub(super) fn tile<S: Simd>(&self) -> usize {
        if self.queue.is_some() { BLOCK } else { S::ROWS }
    }

    /// Floats of a left side of `rows` rows and sums over `depth` numbers.
    #[inline(always)]
    pub(super) fn left_room(&self, rows: usize, depth: usize, parts: usize) -> usize {
        self.room(rows.next_multiple_of(BLOCK) / TILE * depth.div_ceil(STEP) * parts * LEFT)
    }

    /// Floats of a right side.
    #[inline(always)]
    pub(super) fn right_room(&self, depth: usize, columns: usize, parts: usize) -> usize {
        self.room(columns.div_ceil(BLOCK) * depth.div_ceil(STEP) * parts * RIGHT)
    }

    #[inline(always)]
    fn room(&self, floats: usize) -> usize {
        if self.queue.is_some() { floats } else { 0 }
    }

    /// A left side of `rows` rows; `part` says of which numbers.
    #[inline(always)]
    pub(super) fn left<'a, S: Simd>(
        &self,
        s: S,
        part: Part,
        [rows, depth]: [usize; 2],
        from: Rows<'a>,
        parts: usize,
        to: &'a mut [f32],
    ) -> Factor<'a> {
        if S::DOT2_BF16 && self.queue.is_some() {
            s.call_pairs(PackLeft { part, rows, depth, from, parts, to: &mut *to });
        }
        Factor { rows: from, packed: to, parts }
    }

    /// A right side of `columns` columns.
    #[inline(always)]
    pub(super) fn right<'a, S: Simd>(
        &self,
        s: S,
        [depth, columns]: [usize; 2],
        from: Rows<'a>,
        parts: usize,
        to: &'a mut [f32],
    ) -> Factor<'a> {
        if S::DOT2_BF16 && self.queue.is_some() {
            s.call_pairs(PackRight { depth, columns, from, parts, to: &mut *to });
        }
        Factor { rows: from, packed: to, parts }
    }

    /// `c (+)= a b` as [`Multiply`] says.
    #[inline(always)]
    pub(super) fn multiply<S: Simd>(
        &mut self,
        s: S,
        part: Part,
        [rows, columns, depth]: [usize; 3],
        a: Factor,
        b: Factor,
        c: (&mut [f32], usize),
        add: bool,
    ) {
        if S::DOT2_BF16 && self.queue.is_some() {
            return self.by_registers(part, [rows, columns, depth], a, b, c, add);
        }
        s.call(Multiply { part, rows, columns, depth, a: a.rows, b: b.rows, c, add });
    }

    /// [`Multiply`] in blocks of 32 rows and columns.
    #[inline(never)]
    fn by_registers(
        &mut self,
        part: Part,
        [rows, columns, depth]: [usize; 3],
        a: Factor,
        b: Factor,
        (c, ldc): (&mut [f32], usize),
        add: bool,
    ) {
        let Some(queue) = &mut self.queue else { return };
        let steps = depth.div_ceil(STEP);
        let pairs = pairs(a.parts, b.parts, a.parts.max(b.parts) - 1);
        let (width, panel) = (steps * a.parts * LEFT, steps * b.parts * RIGHT);
        assert!(part != Part::Upper && a.packed.len() >= rows.div_ceil(TILE) * width);
        assert!(b.packed.len() >= columns.div_ceil(BLOCK) * panel);
        assert!(c.len() + ldc >= rows.next_multiple_of(TILE) * ldc + columns.next_multiple_of(BLOCK));
        for column in (0..columns).step_by(BLOCK) {
            let right = right(b.packed[column / BLOCK * panel..].as_ptr(), b.parts);
            let first = if part == Part::Below { column } else { 0 };
            for row in (first..rows).step_by(BLOCK) {
                let left = left(&a.packed[row / TILE * width..], steps, a.parts);
                let steps = if part == Part::Lower { steps.min(row / BLOCK + 1) } else { steps };
                let sums = Sums { start: c[row * ldc + column..].as_mut_ptr(), row: ldc, add };
                let rows = rows - row;
                // SAFETY: rows and columns are packed in whole blocks of sixteen and 32 and of steps, and as many sums are inside `c`, by
                // the assertions; the queue is finished below.
                unsafe { queue.push(Product { factors: Factors::Bf16, pairs, steps, rows, left, right, sums }) };
            }
        }
        queue.finish();
    }
}

/// `c (+)= a b`, `c` of `rows` rows and `columns` columns, sums over `depth` numbers. Rows of `c` up to a whole tile and columns up to a
/// whole panel are written.
pub(super) struct Multiply<'a> {
    pub(super) part: Part,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) a: Rows<'a>,
    pub(super) b: Rows<'a>,
    pub(super) c: (&'a mut [f32], usize),
    pub(super) add: bool,
}

impl Kernel for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { part, rows, columns, depth, a: (a, lda), b: (b, ldb), c: (c, ldc), add } = self;
        for column in (0..columns).step_by(panel::<S>()) {
            let (b, c) = (&b[column..], &mut c[column..]);
            if part == Part::Upper {
                for row in (0..rows).step_by(S::ROWS) {
                    let (a, b, c) = (&a[row * lda + row..], &b[row * ldb..], &mut c[row * ldc..]);
                    let tile = S::ROWS.min(rows - row);
                    product(s, [0, tile], depth - row, false, a, lda, b, ldb, c, ldc, add);
                }
            } else {
                let first = if part == Part::Below { column / S::ROWS } else { 0 };
                product(s, [first, rows], depth, part == Part::Lower, a, lda, b, ldb, c, ldc, add);
            }
        }
    }
}

/// Packs rows as [`Multiplier::left`] says.
struct PackLeft<'a> {
    part: Part,
    rows: usize,
    depth: usize,
    from: Rows<'a>,
    parts: usize,
    to: &'a mut [f32],
}

impl Kernel for PackLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { part, rows, depth, from: (from, stride), parts, to } = self;
        let width = depth.div_ceil(STEP) * parts * LEFT;
        assert!(to.len() >= rows.div_ceil(TILE) * width && (rows == 0 || from.len() >= (rows - 1) * stride + depth));
        for row in 0..rows {
            let depth = if part == Part::Lower { depth.min((row / BLOCK + 1) * BLOCK) } else { depth };
            // SAFETY: the row has `depth` numbers, and its block of sixteen rows is inside, by the assertions.
            unsafe {
                let (from, to) = (from.as_ptr().add(row * stride), to.as_mut_ptr().add(row / TILE * width));
                store_row(s, from, depth, parts, row % TILE, to);
            }
        }
    }
}

/// Packs columns as [`Multiplier::right`] says.
struct PackRight<'a> {
    depth: usize,
    columns: usize,
    from: Rows<'a>,
    parts: usize,
    to: &'a mut [f32],
}

impl Kernel for PackRight<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !S::DOT2_BF16 {
            unreachable!("asked for where there are matrix registers only");
        }
        let Self { depth, columns, from: (from, stride), parts, to } = self;
        let (panels, steps) = (columns.div_ceil(BLOCK), depth.div_ceil(STEP));
        assert!(to.len() >= panels * steps * parts * RIGHT);
        assert!(depth == 0 || from.len() >= (depth - 1) * stride + panels * BLOCK);
        with_parts!(parts, PARTS, {
            for (p, step) in (0..panels).flat_map(|p| (0..steps).map(move |step| (p, step))) {
                // SAFETY: there are `depth` rows of whole panels, and room for every step of them, by the assertions.
                unsafe {
                    let to = to.as_mut_ptr().add((p * steps + step) * PARTS * RIGHT);
                    let from = from.as_ptr().add(step * STEP * stride + p * BLOCK);
                    pack_step::<S, PARTS>(s, from, stride, STEP.min(depth - step * STEP), to);
                }
            }
        });
    }
}

/// Packs 32 columns of `rows` rows, at most 32, as a step of a right side; zeros below them. The last part of a number is
/// rounded, unless the parts hold it anyway.
///
/// # Safety
/// `from` is readable for `rows` rows of 32 numbers, `to` writable for a step.
#[inline(always)]
unsafe fn pack_step<S: Simd, const PARTS: usize>(s: S, from: *const f32, stride: usize, rows: usize, to: *mut f32) {
    for pair in 0..TILE {
        for column in (0..BLOCK).step_by(S::LANES) {
            // SAFETY: the caller's promise; rows that are not there are not read.
            unsafe {
                let (from, to) = (from.add(column), to.add(pair * BLOCK + column));
                let (mut a, mut b) = (s.zero(), s.zero());
                if 2 * pair < rows {
                    a = s.load(from.add(2 * pair * stride));
                }
                if 2 * pair + 1 < rows {
                    b = s.load(from.add((2 * pair + 1) * stride));
                }
                for part in 0..PARTS - 1 {
                    let ([x, after_a], [y, after_b]) = (s.split_bf16(a), s.split_bf16(b));
                    s.store(to.add(part * RIGHT), s.pair_bf16(x, y));
                    (a, b) = (after_a, after_b);
                }
                if PARTS == COMPUTED {
                    (a, b) = (s.half_up_bf16(a), s.half_up_bf16(b));
                }
                s.store(to.add((PARTS - 1) * RIGHT), s.pair_bf16(a, b));
            }
        }
    }
}

/// Writes rows as columns, in squares of `LANES`.
pub(super) struct Turn<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) from: Rows<'a>,
    pub(super) to: (&'a mut [f32], usize),
}

impl Kernel for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { rows, columns, from: (from, ldf), to: (to, ldt) } = self;
        let (high, wide) = (rows.next_multiple_of(S::LANES), columns.next_multiple_of(S::LANES));
        if high == 0 || wide == 0 {
            return;
        }
        assert!(ldf >= wide && ldt >= high && from.len() >= (high - 1) * ldf + wide);
        assert!(to.len() >= (wide - 1) * ldt + high);
        for r in (0..high).step_by(S::LANES) {
            for c in (0..wide).step_by(S::LANES) {
                // SAFETY: rows r.. and columns c.. of `from`, rows c.. and columns r.. of `to` are inside, by the assertions.
                unsafe { s.transpose(from.as_ptr().add(r * ldf + c), ldf, to.as_mut_ptr().add(c * ldt + r), ldt) };
            }
        }
    }
}
