//! Rows of one head as kernels read them: numbers or codes, one after another or picked by an index list.

use crate::simd::{LINE_BYTES, Simd, asks_second_cache, prefetch_into};
use crate::tensor::{CODE_STEP, CodeFormat, DType, Element, KvView, Storage};

/// One stored row, whose elements are floats once loaded.
pub(crate) trait Row: Copy {
    /// Elements `d..d + LANES`; `d` is a multiple of `LANES`.
    ///
    /// # Safety
    /// The row has those elements.
    unsafe fn load<S: Simd>(self, s: S, d: usize) -> S::F32;

    /// Elements `d..d + n`, `n < LANES`. Beyond them are zeros (numbers) or what the padding of the row decodes to (codes), which is
    /// finite where the row is.
    ///
    /// # Safety
    /// The row has those elements.
    unsafe fn load_first<S: Simd>(self, s: S, d: usize, n: usize) -> S::F32;

    /// Asks for every cache line of the row, which has `dim` elements.
    fn prefetch(self, dim: usize);
}

impl<T: Element> Row for *const T {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, d: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { s.load_as(self.add(d)) }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(self, s: S, d: usize, n: usize) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { s.load_first(self.add(d), n) }
    }

    #[inline(always)]
    fn prefetch(self, dim: usize) {
        prefetch_bytes(self.cast(), dim * size_of::<T>());
    }
}

/// Asks for every cache line of `bytes` bytes.
#[inline(always)]
pub(crate) fn prefetch_bytes(start: *const u8, bytes: usize) {
    // A loop each, so that neither asks again.
    if asks_second_cache() {
        for offset in (0..bytes).step_by(LINE_BYTES) {
            prefetch_into(true, start.wrapping_add(offset));
        }
    } else {
        for offset in (0..bytes).step_by(LINE_BYTES) {
            prefetch_into(false, start.wrapping_add(offset));
        }
    }
}

/// Rows of one head.
pub(crate) trait Rows: Copy {
    type Row: Row;
    /// Row `j`. Any `j` is fine as long as the row is not loaded from.
    fn row(self, j: usize) -> Self::Row;
    /// Bytes that a row takes in memory.
    fn row_bytes(self, dim: usize) -> usize;

    /// What a row's elements are in memory, where they lie there as they are: numbers, codes without their scales.
    const STORED: Option<Storage> = None;
    /// Whether they are numbers of bf16.
    const BF16: bool = matches!(Self::STORED, Some(Storage::Numbers(DType::BF16)));
    /// Whether rows that follow one another may lie anywhere, so that memory has to be asked for them.
    const SCATTERED: bool = false;
    /// First byte of row `j`.
    fn start(self, j: usize) -> *const u8;
    /// First bytes of the `N` rows from `j` on.
    #[inline(always)]
    fn starts<const N: usize>(self, j: usize) -> [*const u8; N] {
        let mut starts = [self.start(j); N];
        for (i, start) in starts.iter_mut().enumerate().skip(1) {
            *start = self.start(j + i);
        }
        starts
    }

    /// These rows of codes without their scales; numbers have none.
    type Bare: BareRows;
    /// The rows without their scales, if they are codes with one scale and one offset each.
    #[inline(always)]
    fn bare(self) -> Option<Self::Bare> {
        None
    }
}

/// Rows whose elements are bare codes: what they stand for is `offset + scale * code`.
pub(crate) trait BareRows: Rows {
    /// Bits of a code.
    const BITS: usize;
    /// Bytes of a row's codes, with which it starts; its scale and its offset, an `f32` each, follow them.
    fn code_bytes(self) -> usize;
}

/// Addresses that are `bytes` apart.
#[inline(always)]
fn spaced<const N: usize>(first: *const u8, bytes: isize) -> [*const u8; N] {
    let (mut starts, mut next) = ([first; N], first);
    for start in &mut starts {
        *start = next;
        next = next.wrapping_offset(bytes);
    }
    starts
}

/// Rows of numbers, a fixed number of elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Strided<T> {
    pub(crate) base: *const T,
    pub(crate) stride: isize,
}

impl<T: Element> Rows for Strided<T> {
    type Row = *const T;
    type Bare = NoRows;
    const STORED: Option<Storage> = Some(Storage::Numbers(T::DTYPE));

    #[inline(always)]
    fn start(self, j: usize) -> *const u8 {
        self.row(j).cast()
    }

    #[inline(always)]
    fn starts<const N: usize>(self, j: usize) -> [*const u8; N] {
        spaced(self.start(j), self.stride * size_of::<T>() as isize)
    }

    #[inline(always)]
    fn row(self, j: usize) -> *const T {
        self.base.wrapping_offset(j as isize * self.stride)
    }

    #[inline(always)]
    fn row_bytes(self, dim: usize) -> usize {
        dim * size_of::<T>()
    }
}

/// Row `j` is row `index[j]` of `rows`.
#[derive(Clone, Copy)]
pub(crate) struct Indexed<'a, R> {
    pub(crate) rows: R,
    pub(crate) index: &'a [u32],
}

impl<R: Rows> Rows for Indexed<'_, R> {
    type Row = R::Row;
    type Bare = NoRows;
    const STORED: Option<Storage> = R::STORED;
    const SCATTERED: bool = true;

    #[inline(always)]
    fn start(self, j: usize) -> *const u8 {
        self.rows.start(self.index.get(j).copied().unwrap_or(0) as usize)
    }

    #[inline(always)]
    fn row(self, j: usize) -> R::Row {
        // Prefetches run past the end of the list; the first row stands in for what is not there.
        self.rows.row(self.index.get(j).copied().unwrap_or(0) as usize)
    }

    #[inline(always)]
    fn row_bytes(self, dim: usize) -> usize {
        self.rows.row_bytes(dim)
    }
}

/// The bare rows of numbers: there are none.
#[derive(Clone, Copy)]
pub(crate) enum NoRows {}

impl Row for NoRows {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, _: S, _d: usize) -> S::F32 {
        match self {}
    }
    #[inline(always)]
    unsafe fn load_first<S: Simd>(self, _: S, _d: usize, _n: usize) -> S::F32 {
        match self {}
    }
    fn prefetch(self, _dim: usize) {
        match self {}
    }
}

impl Rows for NoRows {
    type Row = Self;
    type Bare = Self;
    fn start(self, _j: usize) -> *const u8 {
        match self {}
    }
    fn row(self, _j: usize) -> Self {
        match self {}
    }
    fn row_bytes(self, _dim: usize) -> usize {
        match self {}
    }
}

impl BareRows for NoRows {
    const BITS: usize = 8;
    fn code_bytes(self) -> usize {
        match self {}
    }
}

/// Loads a row's `dim` elements into `to`, padding numbers with zeros up to `padded` floats.
///
/// # Safety
/// The row has `dim` elements and `to` is writable for `padded >= dim` floats, `padded` a multiple of `LANES`.
#[inline(always)]
pub(crate) unsafe fn widen_row<S: Simd, R: Row>(s: S, from: R, dim: usize, to: *mut f32, padded: usize) {
    // SAFETY: the caller's promise.
    unsafe { widen_part(s, from, 0, dim, to, padded) }
}

/// [`widen_row`] of the elements from `first` on, a multiple of `LANES`.
///
/// # Safety
/// The row has elements up to `dim`, and `to` is writable for `padded >= dim - first` floats, a multiple of `LANES`.
#[inline(always)]
pub(crate) unsafe fn widen_part<S: Simd, R: Row>(s: S, from: R, first: usize, dim: usize, to: *mut f32, padded: usize) {
    let n = dim - first;
    let mut d = 0;
    // SAFETY: every access is at d + LANES <= n, or to the ragged rest by its length, or to the padding of `to`.
    unsafe {
        while d + S::LANES <= n {
            s.store(to.add(d), from.load(s, first + d));
            d += S::LANES;
        }
        if d < n {
            s.store(to.add(d), from.load_first(s, first + d, n - d));
            d += S::LANES;
        }
        while d < padded {
            s.store(to.add(d), s.zero());
            d += S::LANES;
        }
    }
}

/// Whether a row holds finite numbers only.
#[inline(always)]
pub(crate) fn is_finite<S: Simd>(s: S, row: &[f32]) -> bool {
    // Four sums, so that none waits for the one before it.
    let mut sums = [s.zero(); 4];
    let fours = row.chunks_exact(4 * S::LANES);
    let chunks = fours.remainder().chunks_exact(S::LANES);
    let rest = chunks.remainder();
    for four in fours {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: there are four times LANES floats.
            *sum = s.fma(unsafe { s.load(four.as_ptr().add(i * S::LANES)) }, s.zero(), *sum);
        }
    }
    for chunk in chunks {
        // SAFETY: the chunk has LANES floats.
        sums[0] = s.fma(unsafe { s.load(chunk.as_ptr()) }, s.zero(), sums[0]);
    }
    let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
    s.sum(sum) == 0.0 && rest.iter().all(|x| x.is_finite())
}

/// Rows of codes of `BITS` bits (`tensor/coded.rs` has the layout), one after another.
#[derive(Clone, Copy)]
pub(crate) struct Coded<const BITS: usize> {
    base: *const u8,
    row_bytes: usize,
    code_bytes: usize,
    group_shift: u32,
    one_group: bool,
}

impl<const BITS: usize> Coded<BITS> {
    /// The rows of one head; `format` has codes of `BITS` bits.
    pub(crate) fn new(base: *const u8, format: CodeFormat) -> Self {
        assert!(format.bits() == BITS);
        let (row_bytes, code_bytes) = (format.row_bytes(), format.code_bytes());
        Self { base, row_bytes, code_bytes, group_shift: format.group_shift(), one_group: format.groups() == 1 }
    }

    /// The rows from number `n` on.
    #[inline(always)]
    pub(crate) fn from(self, n: usize) -> Self {
        Self { base: self.start(n), ..self }
    }
}

impl<const BITS: usize> Rows for Coded<BITS> {
    type Row = CodedRow<BITS>;
    type Bare = BareCodes<BITS>;

    #[inline(always)]
    fn start(self, j: usize) -> *const u8 {
        self.base.wrapping_add(j * self.row_bytes)
    }

    #[inline(always)]
    fn bare(self) -> Option<BareCodes<BITS>> {
        self.one_group.then_some(BareCodes(self))
    }

    #[inline(always)]
    fn row(self, j: usize) -> CodedRow<BITS> {
        let codes = self.start(j);
        CodedRow { codes, parameters: codes.wrapping_add(self.code_bytes).cast(), group_shift: self.group_shift }
    }

    #[inline(always)]
    fn row_bytes(self, _dim: usize) -> usize {
        self.row_bytes
    }
}

/// One row of codes.
#[derive(Clone, Copy)]
pub(crate) struct CodedRow<const BITS: usize> {
    codes: *const u8,
    /// Scale and offset of each group.
    parameters: *const [f32; 2],
    group_shift: u32,
}

impl<const BITS: usize> Row for CodedRow<BITS> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, d: usize) -> S::F32 {
        const { assert!((BITS == 4 || BITS == 8) && CODE_STEP == 32) };
        // SAFETY: codes are padded to CODE_STEP channels, a multiple of LANES, so that LANES codes from a multiple of LANES exist;
        // each group has its pair, and a group is a multiple of CODE_STEP.
        unsafe {
            let [scale, offset] = self.parameters.add(d >> self.group_shift).read_unaligned();
            if BITS == 8 {
                s.fma(s.load_u8(self.codes.add(d)), s.splat(scale), s.splat(offset))
            } else {
                let at = self.codes.add(d / 32 * 16 + d % 16);
                // Two calls, so that each has a constant.
                if d % 32 < 16 { s.decode4(at, false, scale, offset) } else { s.decode4(at, true, scale, offset) }
            }
        }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(self, s: S, d: usize, _n: usize) -> S::F32 {
        // SAFETY: the padding can be loaded as well.
        unsafe { self.load(s, d) }
    }

    #[inline(always)]
    fn prefetch(self, _dim: usize) {
        prefetch_bytes(self.codes, self.parameters.addr() - self.codes.addr() + 8);
    }
}

/// [`Coded`] rows with one scale and one offset each, without them.
#[derive(Clone, Copy)]
pub(crate) struct BareCodes<const BITS: usize>(Coded<BITS>);

impl<const BITS: usize> Rows for BareCodes<BITS> {
    type Row = BareRow<BITS>;
    type Bare = Self;
    const STORED: Option<Storage> = Some(Storage::Codes(BITS));

    #[inline(always)]
    fn start(self, j: usize) -> *const u8 {
        self.0.start(j)
    }

    #[inline(always)]
    fn starts<const N: usize>(self, j: usize) -> [*const u8; N] {
        spaced(self.start(j), self.0.row_bytes as isize)
    }

    #[inline(always)]
    fn row(self, j: usize) -> BareRow<BITS> {
        BareRow(self.start(j))
    }

    #[inline(always)]
    fn row_bytes(self, _dim: usize) -> usize {
        self.0.row_bytes
    }
}

impl<const BITS: usize> BareRows for BareCodes<BITS> {
    const BITS: usize = BITS;

    #[inline(always)]
    fn code_bytes(self) -> usize {
        self.0.code_bytes
    }
}

/// The codes of one row as floats.
#[derive(Clone, Copy)]
pub(crate) struct BareRow<const BITS: usize>(*const u8);

impl<const BITS: usize> Row for BareRow<BITS> {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, d: usize) -> S::F32 {
        // SAFETY: as in `CodedRow::load`.
        unsafe {
            if BITS == 8 {
                s.load_u8(self.0.add(d))
            } else {
                let at = self.0.add(d / 32 * 16 + d % 16);
                if d % 32 < 16 { s.decode4(at, false, 1.0, 0.0) } else { s.decode4(at, true, 1.0, 0.0) }
            }
        }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(self, s: S, d: usize, _n: usize) -> S::F32 {
        // SAFETY: the padding can be loaded as well.
        unsafe { self.load(s, d) }
    }

    #[inline(always)]
    fn prefetch(self, dim: usize) {
        prefetch_bytes(self.0, dim * BITS / 8 + 8);
    }
}

/// Runs `$body` with `$k` and `$v` bound to the rows of one KV head of a problem, in whatever form they are stored.
macro_rules! with_rows {
    ($problem:expr, $batch:expr, $head:expr, |$k:ident, $v:ident| $body:expr) => {{
        use $crate::tensor::{DType, Storage};
        let (problem, batch, head) = (&$problem, $batch, $head);
        macro_rules! with {
            ($rows:path) => {{
                let ($k, $v) = ($rows(&problem.k, batch, head), $rows(&problem.v, batch, head));
                $body
            }};
        }
        match problem.k.storage() {
            Storage::Numbers(DType::F32) => with!($crate::dense::rows::numbers::<f32>),
            Storage::Numbers(DType::F16) => with!($crate::dense::rows::numbers::<half::f16>),
            Storage::Numbers(DType::BF16) => with!($crate::dense::rows::numbers::<half::bf16>),
            Storage::Codes(4) => with!($crate::dense::rows::codes::<4>),
            Storage::Codes(_) => with!($crate::dense::rows::codes::<8>),
        }
    }};
}
pub(crate) use with_rows;

/// The rows of a head of numbers of type `T`.
#[inline(always)]
pub(crate) fn numbers<T: Element>(view: &KvView, batch: usize, head: usize) -> Strided<T> {
    match view {
        KvView::Numbers(view) => Strided { base: view.head::<T>(batch, head), stride: view.row_stride() },
        KvView::Codes(_) => unreachable!("the storage was asked before"),
    }
}

/// The rows of a head of codes.
#[inline(always)]
pub(crate) fn codes<const BITS: usize>(view: &KvView, _batch: usize, head: usize) -> Coded<BITS> {
    match view {
        KvView::Codes(view) => Coded::new(view.head(head), view.format()),
        KvView::Numbers(_) => unreachable!("the storage was asked before"),
    }
}
