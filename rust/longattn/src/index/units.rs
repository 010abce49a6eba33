//! What an index of units (pages, clusters) keeps of each: a vector whose product with a query is the unit's score, and the mean of its
//! values.
//!
//! Every score is one dot product, of a vector and a query that are made longer to match:
//!
//! ```text
//! score           vector of a unit      query             is
//! mean            mean key              q                 the mean logit
//! mean_variance   mean, variances       q, q^2 / 4        half of the way to the log of the mean weight of a Gaussian unit
//! bounds          largest, smallest     q+, q-            at least any logit of the unit                     (Quest)
//! radius          mean, radius          q, |q|            at least any logit of the unit
//! landmark        one of the keys       q                 the logit of that key
//! ```

use crate::dense::rows::{Coded, Rows, Strided};
use crate::index::head_rows::HeadRows;
use crate::index::{Saved, not_finite};
use crate::simd::{Isa, Kernel, MAX_LANES, Simd, dispatch};
use crate::tensor::{CODE_STEP, CodeFormat, DType, Element, Error, KvView, Result, Storage, with_element};
use half::{bf16, f16};
use std::fmt::Display;
use std::ops::Range;

/// How a unit is scored against a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitScore {
    /// By its mean key.
    Mean,
    /// By its mean key and a quarter of the variance that its logits would have if its channels were independent.
    MeanVariance,
    /// By the largest and the smallest number of each channel: an upper bound of its logits.
    Bounds,
    /// By its mean key and the distance of the farthest key from it: an upper bound of its logits.
    Radius,
    /// By the key at this place.
    Landmark(usize),
}

/// Part of the logits' variance that [`UnitScore::MeanVariance`] adds. A half would be right for Gaussian logits and is too much for
/// real ones, nothing is too little.
const VARIANCE: f32 = 0.25;

impl UnitScore {
    /// Whether the scores stand for logits, so that units can be weighed by them.
    pub fn estimates(self) -> bool {
        matches!(self, Self::Mean | Self::MeanVariance)
    }

    /// Whether no logit of a unit lies above its score.
    pub fn bounds(self) -> bool {
        matches!(self, Self::Bounds | Self::Radius)
    }

    /// Its name and, for a landmark, its place, as in files.
    pub(crate) fn to_parts(self) -> (&'static str, usize) {
        match self {
            Self::Mean => ("mean", 0),
            Self::MeanVariance => ("mean_variance", 0),
            Self::Bounds => ("bounds", 0),
            Self::Radius => ("radius", 0),
            Self::Landmark(place) => ("landmark", place),
        }
    }

    /// The score of that name.
    pub fn from_parts(name: &str, place: usize) -> Result<Self> {
        Ok(match name {
            "mean" => Self::Mean,
            "mean_variance" => Self::MeanVariance,
            "bounds" => Self::Bounds,
            "radius" => Self::Radius,
            "landmark" => Self::Landmark(place),
            _ => {
                let expected = "mean, mean_variance, bounds, radius or landmark";
                return Err(Error::value("score", format!("{name:?}"), expected));
            }
        })
    }

    /// Numbers of a unit's vector, padded to whole vectors.
    pub(crate) fn width(self, dim: usize) -> usize {
        match self {
            Self::Mean | Self::Landmark(_) => padded(dim),
            Self::MeanVariance | Self::Bounds => 2 * padded(dim),
            Self::Radius => padded(dim + 1),
        }
    }

    /// A query, made as long as the vectors.
    pub(crate) fn query(self, q: &[f32], to: &mut [f32]) {
        to.fill(0.0);
        let (first, second) = to.split_at_mut(padded(q.len()).min(to.len()));
        match self {
            Self::Mean | Self::Landmark(_) => first[..q.len()].copy_from_slice(q),
            Self::MeanVariance => {
                first[..q.len()].copy_from_slice(q);
                second.iter_mut().zip(q).for_each(|(to, q)| *to = VARIANCE * q * q);
            }
            Self::Bounds => {
                first.iter_mut().zip(q).for_each(|(to, q)| *to = q.max(0.0));
                second.iter_mut().zip(q).for_each(|(to, q)| *to = q.min(0.0));
            }
            Self::Radius => {
                to[..q.len()].copy_from_slice(q);
                to[q.len()] = q.iter().map(|q| q * q).sum::<f32>().sqrt();
            }
        }
    }
}

pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(MAX_LANES)
}

/// Rows of a unit, ascending.
#[derive(Clone, Debug)]
pub(crate) enum Members<'a> {
    Range(Range<usize>),
    List(&'a [u32]),
}

impl Members<'_> {
    #[inline(always)]
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Range(range) => range.len(),
            Self::List(rows) => rows.len(),
        }
    }

    #[inline(always)]
    pub(crate) fn row(&self, place: usize) -> usize {
        match self {
            Self::Range(range) => range.start + place,
            Self::List(rows) => rows[place] as usize,
        }
    }

    /// Places of the members among `rows`.
    pub(crate) fn inside(&self, rows: &Range<usize>) -> Range<usize> {
        match self {
            Self::Range(own) => {
                let clamp = |row: usize| row.clamp(own.start, own.end) - own.start;
                clamp(rows.start)..clamp(rows.end)
            }
            Self::List(own) => {
                own.partition_point(|&row| (row as usize) < rows.start)
                    ..own.partition_point(|&row| (row as usize) < rows.end)
            }
        }
    }
}

/// A matrix that rows are appended to, as numbers or as codes of 8 bits.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    storage: Storage,
    width: usize,
    lines: Vec<[u32; LINE / 4]>,
    /// Rows that are codes.
    codes: Vec<u8>,
}

/// The rows of a table, one way or the other.
macro_rules! with_table {
    ($table:expr, |$rows:ident| $body:expr) => {{
        let table = $table;
        match table.storage() {
            $crate::tensor::Storage::Numbers(dtype) => $crate::tensor::with_element!(dtype, T => {
                let $rows = table.rows::<T>();
                $body
            }),
            $crate::tensor::Storage::Codes(_) => {
                let $rows = table.codes();
                $body
            }
        }
    }};
}
pub(crate) use with_table;

/// Bytes that rows of numbers are made of.
const LINE: usize = 32;

/// The most channels of a row of codes that share a scale.
const MOST_PER_SCALE: usize = 64;

impl Table {
    /// No rows of `width` numbers, a multiple of [`MAX_LANES`].
    pub(crate) fn new(storage: Storage, width: usize) -> Self {
        assert!(width.is_multiple_of(MAX_LANES) && storage != Storage::Codes(4));
        Self { storage, width, lines: Vec::new(), codes: Vec::new() }
    }

    /// How rows are coded: with a scale for as many channels as are likely to be alike.
    fn format(&self) -> CodeFormat {
        let group = (self.width & self.width.wrapping_neg()).clamp(CODE_STEP, MOST_PER_SCALE);
        CodeFormat::new(8, self.width, Some(group)).expect("a power of two")
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn storage(&self) -> Storage {
        self.storage
    }

    pub(crate) fn row_bytes(&self) -> usize {
        match self.storage {
            Storage::Numbers(dtype) => self.width * dtype.size(),
            Storage::Codes(_) => self.format().row_bytes(),
        }
    }

    fn row_lines(&self) -> usize {
        self.row_bytes() / LINE
    }

    pub(crate) fn len(&self) -> usize {
        match self.storage {
            _ if self.width == 0 => 0,
            Storage::Numbers(_) => self.lines.len() / self.row_lines(),
            Storage::Codes(_) => self.codes.len() / self.row_bytes(),
        }
    }

    pub(crate) fn nbytes(&self) -> usize {
        self.lines.len() * LINE + self.codes.len()
    }

    pub(crate) fn truncate(&mut self, rows: usize) {
        match self.storage {
            Storage::Numbers(_) => self.lines.truncate(rows * self.row_lines()),
            Storage::Codes(_) => self.codes.truncate(rows * self.row_bytes()),
        }
    }

    /// Appends a row of numbers; false, and nothing happens, where one is too large for the dtype.
    fn push(&mut self, row: &[f32]) -> bool {
        let Storage::Numbers(dtype) = self.storage else { unreachable!("rows are coded as tables are appended") };
        assert!(row.len() == self.width);
        let start = self.lines.len();
        self.lines.resize(start + self.row_lines(), [0; LINE / 4]);
        let to = self.lines[start..].as_mut_ptr();
        // SAFETY: the lines just added hold `width` numbers of the dtype, and are aligned for it.
        let fits = unsafe {
            match dtype {
                DType::F32 => write(row, to.cast::<f32>()),
                DType::F16 => write(row, to.cast::<f16>()),
                DType::BF16 => write(row, to.cast::<bf16>()),
            }
        };
        if !fits {
            self.lines.truncate(start);
        }
        fits
    }

    /// Appends the rows of another table, coded where this one's are; the memory grows by an eighth, not by doubling.
    pub(crate) fn append(&mut self, other: &Self) {
        if let Storage::Codes(_) = self.storage
            && self.width > 0
        {
            let (format, bytes) = (self.format(), self.row_bytes());
            let (start, coming) = (self.codes.len(), other.len() * bytes);
            if self.codes.capacity() - start < coming {
                self.codes.reserve_exact(coming.max(start / 8));
            }
            self.codes.resize(start + coming, 0);
            for (i, to) in self.codes[start..].chunks_exact_mut(bytes).enumerate() {
                format.encode(&other.row(i), to);
            }
            return;
        }
        if self.lines.capacity() - self.lines.len() < other.lines.len() {
            self.lines.reserve_exact(other.lines.len().max(self.lines.len() / 8));
        }
        self.lines.extend_from_slice(&other.lines);
    }

    /// The rows, whose dtype `T` is.
    pub(crate) fn rows<T: Element>(&self) -> Strided<T> {
        assert!(self.storage == Storage::Numbers(T::DTYPE));
        Strided { base: self.lines.as_ptr().cast(), stride: self.width as isize }
    }

    /// The rows, which are codes.
    pub(crate) fn codes(&self) -> Coded<8> {
        assert!(self.storage == Storage::Codes(8));
        Coded::new(self.codes.as_ptr(), self.format())
    }

    /// One row as floats.
    pub(crate) fn row(&self, i: usize) -> Vec<f32> {
        assert!(i < self.len());
        let Storage::Numbers(dtype) = self.storage else {
            let (bytes, mut row) = (self.row_bytes(), vec![0.0; self.width]);
            self.format().decode(&self.codes[i * bytes..(i + 1) * bytes], &mut row);
            return row;
        };
        with_element!(dtype, T => {
            // SAFETY: the row exists, by the assertion.
            let row = unsafe { std::slice::from_raw_parts(self.rows::<T>().row(i), self.width) };
            row.iter().map(|x| x.to_f32()).collect()
        })
    }

    pub(crate) fn save(&self, saved: Saved, name: &str) -> Saved {
        if let Storage::Codes(_) = self.storage {
            return saved.tensor(name, &[self.len(), self.row_bytes()], self.codes.clone());
        }
        let words: Vec<u32> = self.lines.iter().flatten().copied().collect();
        saved.tensor(name, &[self.len(), self.row_bytes() / 4], words)
    }

    pub(crate) fn load(saved: &mut Saved, name: &str, storage: Storage, width: usize, rows: usize) -> Result<Self> {
        let mut table = Self::new(storage, width);
        if let Storage::Codes(_) = storage {
            table.codes = saved.take(name, &[rows, table.row_bytes()])?;
            return Ok(table);
        }
        let words: Vec<u32> = saved.take(name, &[rows, table.row_bytes() / 4])?;
        table.lines = words.as_chunks().0.to_vec();
        Ok(table)
    }
}

/// # Safety
/// `to` is writable for as many elements as `row` has.
unsafe fn write<T: Element>(row: &[f32], to: *mut T) -> bool {
    let mut fits = true;
    for (d, &x) in row.iter().enumerate() {
        let number = T::from_f32(x);
        fits &= number.to_f32().is_finite() || !x.is_finite();
        // SAFETY: d < row.len().
        unsafe { to.add(d).write(number) };
    }
    fits
}

/// Vectors of one head's units and, where units are weighed, the means of their values.
#[derive(Clone, Debug)]
pub(crate) struct HeadUnits {
    pub(crate) vectors: Table,
    pub(crate) values: Table,
}

/// What tables of units are stored in: the store's dtype, or float32 where it has codes.
pub(crate) fn table_storage(storage: Storage) -> Storage {
    match storage {
        Storage::Numbers(dtype) => Storage::Numbers(dtype),
        Storage::Codes(_) => Storage::Numbers(DType::F32),
    }
}

impl HeadUnits {
    /// No units.
    pub(crate) fn new(score: UnitScore, storage: Storage, dim: usize, value_dim: usize) -> Self {
        let values = if score.estimates() { padded(value_dim) } else { 0 };
        Self { vectors: Table::new(storage, score.width(dim)), values: Table::new(storage, values) }
    }

    /// The vectors of some units of a head.
    pub(crate) fn build(
        isa: Isa,
        score: UnitScore,
        keys: &HeadRows,
        values: &HeadRows,
        units: &[Members],
    ) -> Result<Self> {
        let head = keys.head();
        with_element!(keys.dtype(), T => {
            let work = Summarise {
                score,
                keys: keys.strided::<T>(),
                dim: keys.dim(),
                values: values.strided::<T>(),
                value_dim: values.dim(),
                rows: keys.end().min(values.end()),
                units,
            };
            dispatch(isa, work).map_err(|unfit| match unfit {
                Unfit::NotFinite(row) => not_finite(row, head),
                Unfit::TooLarge(row) => {
                    let got = format!("keys near row {row} of head {head} whose summary is beyond {}", keys.dtype());
                    Error::value("store", got, "smaller keys, or a store of float32")
                }
            })
        })
    }

    pub(crate) fn append(&mut self, other: &Self) {
        self.vectors.append(&other.vectors);
        self.values.append(&other.values);
    }

    pub(crate) fn truncate(&mut self, units: usize) {
        self.vectors.truncate(units);
        self.values.truncate(units);
    }

    pub(crate) fn nbytes(&self) -> usize {
        self.vectors.nbytes() + self.values.nbytes()
    }

    /// Adds them to an index as data, under names that end in `suffix`.
    pub(crate) fn save(&self, saved: Saved, suffix: impl Display) -> Saved {
        let saved = self.vectors.save(saved, &format!("vectors.{suffix}"));
        if self.values.width() == 0 { saved } else { self.values.save(saved, &format!("values.{suffix}")) }
    }

    /// What [`Self::save`] saved: units kept as these are.
    pub(crate) fn load(&self, saved: &mut Saved, suffix: impl Display, units: usize) -> Result<Self> {
        let load = |saved: &mut Saved, name: &str, like: &Table| {
            Table::load(saved, &format!("{name}.{suffix}"), like.storage, like.width, units)
        };
        let vectors = load(saved, "vectors", &self.vectors)?;
        let values = if self.values.width() == 0 { self.values.clone() } else { load(saved, "values", &self.values)? };
        Ok(Self { vectors, values })
    }
}

/// Why a unit has no vector.
enum Unfit {
    /// This key is not finite.
    NotFinite(usize),
    /// A number is beyond the dtype, in the unit that begins with this row.
    TooLarge(usize),
}

struct Summarise<'a, T> {
    score: UnitScore,
    keys: Strided<T>,
    dim: usize,
    values: Strided<T>,
    value_dim: usize,
    /// Rows that keys and values have.
    rows: usize,
    units: &'a [Members<'a>],
}

impl<T: Element> Kernel for Summarise<'_, T> {
    type Output = std::result::Result<HeadUnits, Unfit>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { score, keys, dim, values, value_dim, rows, units } = self;
        let mut made = HeadUnits::new(score, Storage::Numbers(T::DTYPE), dim, value_dim);
        let mut vector = vec![0f32; score.width(dim)];
        let mut value = vec![0f32; made.values.width()];
        for unit in units {
            let n = unit.len();
            assert!(n > 0 && unit.row(n - 1) < rows);
            let (first, second) = vector.split_at_mut(padded(dim).min(score.width(dim)));
            // SAFETY: the unit's rows are among `rows`, by the assertion; the buffers are padded to whole vectors.
            unsafe {
                if !is_finite(s, keys, dim, unit) {
                    let finite = |j: &usize| {
                        let row = std::slice::from_raw_parts(keys.row(*j), dim);
                        row.iter().all(|x| x.to_f32().is_finite())
                    };
                    return Err(Unfit::NotFinite((0..n).map(|i| unit.row(i)).find(|j| !finite(j)).unwrap_or(0)));
                }
                match score {
                    UnitScore::Mean | UnitScore::MeanVariance => {
                        mean(s, keys, dim, unit, first);
                        if score == UnitScore::MeanVariance {
                            variance(s, keys, dim, unit, first, second);
                            let largest = largest(T::DTYPE);
                            second.iter_mut().for_each(|x| *x = x.min(largest));
                        }
                    }
                    UnitScore::Bounds => extremes(s, keys, dim, unit, first, second),
                    UnitScore::Landmark(place) => {
                        let row = std::slice::from_raw_parts(keys.row(unit.row(place.min(n - 1))), dim);
                        first.iter_mut().zip(row).for_each(|(to, x)| *to = x.to_f32());
                    }
                    UnitScore::Radius => {
                        mean(s, keys, dim, unit, first);
                        // From the mean as it will be stored; a distance that is rounded up stays a bound.
                        vector[..dim].iter_mut().for_each(|x| *x = T::from_f32(*x).to_f32());
                        let up = 1.0 + 2.0 * roundoff(T::DTYPE) + 1e-5;
                        vector[dim] = radius(keys, dim, unit, &vector) * up;
                        vector[dim + 1..].fill(0.0);
                    }
                }
                if !value.is_empty() {
                    mean(s, values, value_dim, unit, &mut value);
                }
            }
            if !made.vectors.push(&vector) || !(value.is_empty() || made.values.push(&value)) {
                return Err(Unfit::TooLarge(unit.row(0)));
            }
        }
        Ok(made)
    }
}

fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::MAX.to_f32(),
        DType::BF16 => bf16::MAX.to_f32(),
        DType::F32 => f32::MAX,
    }
}

fn roundoff(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 0.5 * f16::EPSILON.to_f32(),
        DType::BF16 => 0.5 * bf16::EPSILON.to_f32(),
        DType::F32 => 0.5 * f32::EPSILON,
    }
}

/// `LANES` numbers of a row from `d` on, zeros beyond its end.
///
/// # Safety
/// The row has `dim > d` elements.
#[inline(always)]
unsafe fn load<S: Simd, T: Element>(s: S, row: *const T, d: usize, dim: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe { if d + S::LANES <= dim { s.load_as(row.add(d)) } else { s.load_first(row.add(d), dim - d) } }
}

/// Whether all numbers of some rows are finite.
///
/// # Safety
/// The members are rows of `dim` elements.
#[inline(always)]
unsafe fn is_finite<S: Simd, T: Element>(s: S, rows: Strided<T>, dim: usize, members: &Members) -> bool {
    let mut zeros = s.zero();
    for i in 0..members.len() {
        let row = rows.row(members.row(i));
        for d in (0..dim).step_by(S::LANES) {
            // SAFETY: d < dim, and the row exists.
            zeros = s.fma(unsafe { load(s, row, d, dim) }, s.zero(), zeros);
        }
    }
    s.sum(zeros) == 0.0
}

/// The mean of some rows, zeros beyond `dim`.
///
/// # Safety
/// The members are rows of `dim` elements; `to` holds them padded to whole vectors.
#[inline(always)]
unsafe fn mean<S: Simd, T: Element>(s: S, rows: Strided<T>, dim: usize, members: &Members, to: &mut [f32]) {
    assert!(to.len() >= padded(dim));
    let inverse = s.splat(1.0 / members.len() as f32);
    for d in (0..dim).step_by(S::LANES) {
        let mut sum = s.zero();
        for i in 0..members.len() {
            // SAFETY: d < dim, and the row exists.
            sum = s.add(sum, unsafe { load(s, rows.row(members.row(i)), d, dim) });
        }
        // SAFETY: d + LANES is at most the padded length.
        unsafe { s.store(to.as_mut_ptr().add(d), s.mul(sum, inverse)) };
    }
}

/// The variance of each channel of some rows, given their mean.
///
/// # Safety
/// As [`mean`].
#[inline(always)]
unsafe fn variance<S: Simd, T: Element>(
    s: S,
    rows: Strided<T>,
    dim: usize,
    members: &Members,
    mean: &[f32],
    to: &mut [f32],
) {
    assert!(to.len() >= padded(dim) && mean.len() >= padded(dim));
    let inverse = s.splat(1.0 / members.len() as f32);
    for d in (0..dim).step_by(S::LANES) {
        // SAFETY: d < dim, the rows exist, and both buffers are padded.
        unsafe {
            let centre = s.load(mean.as_ptr().add(d));
            let mut sum = s.zero();
            for i in 0..members.len() {
                let x = s.sub(load(s, rows.row(members.row(i)), d, dim), centre);
                sum = s.fma(x, x, sum);
            }
            s.store(to.as_mut_ptr().add(d), s.mul(sum, inverse));
        }
    }
}

/// The largest and the smallest number of each channel of some rows.
///
/// # Safety
/// As [`mean`].
#[inline(always)]
unsafe fn extremes<S: Simd, T: Element>(
    s: S,
    rows: Strided<T>,
    dim: usize,
    members: &Members,
    high: &mut [f32],
    low: &mut [f32],
) {
    assert!(high.len() >= padded(dim) && low.len() >= padded(dim));
    for d in (0..dim).step_by(S::LANES) {
        // SAFETY: d < dim, the rows exist, and both buffers are padded.
        unsafe {
            let first = load(s, rows.row(members.row(0)), d, dim);
            let (mut most, mut least) = (first, first);
            for i in 1..members.len() {
                let x = load(s, rows.row(members.row(i)), d, dim);
                most = s.max(x, most);
                least = s.min(x, least);
            }
            s.store(high.as_mut_ptr().add(d), most);
            s.store(low.as_mut_ptr().add(d), least);
        }
    }
}

/// The largest distance of some rows from `centre`.
///
/// # Safety
/// The members are rows of `dim` elements.
#[inline(always)]
unsafe fn radius<T: Element>(rows: Strided<T>, dim: usize, members: &Members, centre: &[f32]) -> f32 {
    let mut largest = 0f64;
    for i in 0..members.len() {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts(rows.row(members.row(i)), dim) };
        let distance = row.iter().zip(centre).map(|(x, c)| f64::from(x.to_f32() - c).powi(2)).sum::<f64>();
        largest = largest.max(distance);
    }
    largest.sqrt() as f32
}

/// The mean over the members at `places` of a unit, of whose rows all together it is `whole`: from those rows, or from the others where
/// these are fewer.
pub(crate) fn part_mean(
    rows: &KvView,
    head: usize,
    members: &Members,
    places: Range<usize>,
    whole: &[f32],
) -> Vec<f32> {
    let (n, part, dim) = (members.len(), places.len(), rows.shape()[3]);
    assert!(part > 0 && whole.len() >= dim);
    if part == n {
        return whole[..dim].to_vec();
    }
    let mut decoded = vec![0f32; dim];
    let mut sum = |places: Range<usize>, sums: &mut [f64]| match rows {
        KvView::Numbers(rows) => with_element!(rows.dtype(), T => {
            for place in places {
                let row = rows.row::<T>(0, head, members.row(place));
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.to_f32()));
            }
        }),
        KvView::Codes(rows) => {
            for place in places {
                rows.decode(head, members.row(place), &mut decoded);
                sums.iter_mut().zip(&decoded).for_each(|(sum, &x)| *sum += f64::from(x));
            }
        }
    };
    let mut sums = vec![0f64; dim];
    if 2 * part <= n {
        sum(places, &mut sums);
    } else {
        sum(0..places.start, &mut sums);
        sum(places.end..n, &mut sums);
        sums.iter_mut().zip(whole).for_each(|(sum, &mean)| *sum = n as f64 * f64::from(mean) - *sum);
    }
    sums.into_iter().map(|sum| (sum / part as f64) as f32).collect()
}
