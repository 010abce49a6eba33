//! Windows over a grid of keys: a query row sees a box of the grid, and rows that go together pack the box around their boxes.

use super::scores::RowId;
use crate::tensor::{Error, Result};
use std::ops::Range;

/// What a query sees along one axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Interval {
    /// Its keys are `group`, `group + dilation`, `group + 2 dilation`, ...
    pub group: u32,
    /// The first that it sees, counted among these.
    pub start: u32,
    /// The first beyond.
    pub end: u32,
    /// Where the query is itself, counted likewise: distances are to here.
    pub position: u32,
}

/// One axis of the grids of queries and keys.
#[derive(Clone, Copy, Debug)]
pub struct Axis<'a> {
    /// Keys along the axis.
    pub keys: usize,
    /// Distance between neighbouring keys of a group.
    pub dilation: usize,
    /// Queries go together best by multiples of this, because they share intervals.
    pub step: usize,
    /// One per query along the axis.
    pub queries: &'a [Interval],
}

impl Axis<'_> {
    /// An axis that is not there.
    pub const NONE: Self =
        Self { keys: 1, dilation: 1, step: 1, queries: &[Interval { group: 0, start: 0, end: 1, position: 0 }] };
}

/// Biases by the distance between key and query along each axis: entry `key - position + zero`.
#[derive(Clone, Copy, Debug)]
pub struct GridBias<'a> {
    /// Entries along each axis.
    pub sizes: [usize; 3],
    /// The entry of distance 0.
    pub zeros: [usize; 3],
    /// One number per head and entry of all axes together, `[query heads, sizes]`.
    pub table: Option<&'a [f32]>,
    /// One number per query row and entry of one axis, `[batch, query heads, queries, size]`, added up over the axes.
    pub by_axis: Option<[&'a [f32]; 3]>,
}

/// Queries on a grid, and what each sees of a grid of keys; rows of both are numbered with the last axis fastest.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a> {
    /// Outermost first.
    pub axes: [Axis<'a>; 3],
    /// Added to the logits.
    pub bias: Option<GridBias<'a>>,
}

impl<'a> Grid<'a> {
    /// Whether the grid fits a problem of that many queries and keys, `scores` being `[batch, query heads, queries, keys]`.
    pub(crate) fn check(&self, scores: [usize; 4]) -> Result<()> {
        let [batch, heads, queries, keys] = scores;
        let own: [usize; 2] =
            [self.axes.map(|a| a.queries.len()).iter().product(), self.axes.map(|a| a.keys).iter().product()];
        if own != [queries, keys] {
            return Err(Error::value("grid", format!("{own:?} queries and keys"), format!("{queries} and {keys}")));
        }
        for axis in &self.axes {
            let in_group = |group: u32| axis.keys.saturating_sub(group as usize).div_ceil(axis.dilation.max(1));
            let fits = |x: &Interval| {
                (x.group as usize) < axis.dilation && x.start <= x.end && x.end as usize <= in_group(x.group)
            };
            if axis.dilation == 0 || axis.step == 0 || !axis.queries.iter().all(fits) {
                return Err(Error::value("grid", "an interval beyond the axis", "intervals of its keys"));
            }
        }
        let Some(GridBias { sizes, zeros, table, by_axis }) = self.bias else { return Ok(()) };
        for ((axis, size), zero) in self.axes.iter().zip(sizes).zip(zeros) {
            let entry = |j: u32, x: &Interval| i64::from(j) - i64::from(x.position) + zero as i64;
            let inside = |x: &Interval| x.start == x.end || entry(x.start, x) >= 0 && entry(x.end - 1, x) < size as i64;
            if !axis.queries.iter().all(inside) {
                return Err(Error::value("bias", format!("{size} entries with distance 0 at {zero}"), "all distances"));
            }
        }
        let expect = |got: usize, expected: usize| match got == expected {
            true => Ok(()),
            false => Err(Error::value("bias", format!("{got} numbers"), expected)),
        };
        if let Some(table) = table {
            expect(table.len(), heads * sizes.iter().product::<usize>())?;
        }
        for (bias, size) in by_axis.iter().flatten().zip(sizes) {
            expect(bias.len(), batch * heads * queries * size)?;
        }
        Ok(())
    }

    /// What a query row sees along each axis.
    #[inline(always)]
    pub(crate) fn intervals(&self, row: usize) -> [Interval; 3] {
        let [z, y, x] = &self.axes;
        let (row, nx, ny) = (row as u32, x.queries.len() as u32, y.queries.len() as u32);
        let line = row / nx;
        [z.queries[(line / ny) as usize], y.queries[(line % ny) as usize], x.queries[(row % nx) as usize]]
    }
}

/// The smallest box of keys around what some query rows of one group see, as a list with the last axis fastest.
#[derive(Clone, Debug)]
pub(crate) struct Patch<'a> {
    grid: &'a Grid<'a>,
    origin: [u32; 3],
    extents: [u32; 3],
    index: Vec<u32>,
}

impl<'a> Patch<'a> {
    /// The box around the intervals of the queries `queries` of each axis, all of one group.
    pub(crate) fn new(grid: &'a Grid<'a>, queries: [&[u32]; 3]) -> Self {
        let (mut origin, mut extents, mut rows) = ([0; 3], [0; 3], [const { Vec::new() }; 3]);
        let mut stride = 1;
        for a in (0..3).rev() {
            let axis = &grid.axes[a];
            let of = |&i: &u32| axis.queries[i as usize];
            let seen = queries[a].iter().map(of).filter(|x| x.start < x.end);
            let (start, end) = seen.fold((u32::MAX, 0), |(s, e), x| (s.min(x.start), e.max(x.end)));
            let group = queries[a].first().map_or(0, |i| of(i).group as usize);
            if start < end {
                (origin[a], extents[a]) = (start, end - start);
                rows[a] = (start..end).map(|u| ((group + axis.dilation * u as usize) * stride) as u32).collect();
            }
            stride *= axis.keys;
        }
        let mut index = Vec::with_capacity(rows.iter().map(Vec::len).product());
        for z in &rows[0] {
            for y in &rows[1] {
                index.extend(rows[2].iter().map(|x| z + y + x));
            }
        }
        Self { grid, origin, extents, index }
    }

    pub(crate) fn index(&self) -> &[u32] {
        &self.index
    }

    /// From the first key of the list that a row sees to the last.
    pub(crate) fn visible(&self, row: usize) -> Range<usize> {
        let seen = self.grid.intervals(row);
        if seen.iter().any(|x| x.start == x.end) {
            return 0..0;
        }
        let at = |j: [u32; 3]| {
            let [z, y, x]: [u32; 3] = std::array::from_fn(|a| j[a] - self.origin[a]);
            ((z * self.extents[1] + y) * self.extents[2] + x) as usize
        };
        at(seen.map(|x| x.start))..at(seen.map(|x| x.end - 1)) + 1
    }

    /// The runs of the keys `keys` of the list that a row sees, in order.
    #[inline(always)]
    pub(crate) fn runs(&self, row: usize, keys: Range<usize>) -> Runs<'_> {
        let seen = self.grid.intervals(row);
        let (line, plane) = (self.extents[2], self.extents[1] * self.extents[2]);
        let empty = keys.is_empty() || seen.iter().any(|x| x.start == x.end);
        let (first, last) = (keys.start as u32, keys.end as u32);
        // Planes, then lines, that the keys lie in.
        let z = match empty {
            true => 0..0,
            false => {
                seen[0].start.max(self.origin[0] + first / plane)
                    ..seen[0].end.min(self.origin[0] + (last - 1) / plane + 1)
            }
        };
        Runs { patch: self, seen, first, last, line, plane, z, y: 0..0, here: 0 }
    }

    /// Adds the biases of a row to the scores of the keys `keys` of the list, and hides what it does not see.
    #[inline(always)]
    pub(crate) fn modify(&self, heads: usize, rows: usize, id: RowId, scores: &mut [f32], keys: Range<usize>) {
        let mut done = 0;
        let mut runs = self.runs(id.row, keys);
        while let Some(run) = runs.next_run() {
            scores[done..run.at.start].fill(f32::NEG_INFINITY);
            done = run.at.end;
            if let Some(bias) = &self.grid.bias {
                let scores = &mut scores[run.at.clone()];
                let [dz, dy, dx] = run.entries(bias);
                if let Some(table) = bias.table {
                    let first = ((id.head * bias.sizes[0] + dz) * bias.sizes[1] + dy) * bias.sizes[2] + dx;
                    let of_run = &table[first..first + scores.len()];
                    scores.iter_mut().zip(of_run).for_each(|(score, bias)| *score += bias);
                }
                if let Some(by_axis) = &bias.by_axis {
                    let row = (id.batch * heads + id.head) * rows + id.row;
                    let [z, y, x] = [0, 1, 2].map(|a| &by_axis[a][row * bias.sizes[a]..(row + 1) * bias.sizes[a]]);
                    let (both, of_run) = (z[dz] + y[dy], &x[dx..dx + scores.len()]);
                    scores.iter_mut().zip(of_run).for_each(|(score, bias)| *score += both + bias);
                }
            }
        }
        scores[done..].fill(f32::NEG_INFINITY);
    }

    /// Adds the gradients of a row's logits of the keys `keys` to those of the bias table.
    #[inline(always)]
    pub(crate) fn add_to_table(&self, id: RowId, d_logits: &[f32], keys: Range<usize>, d_table: &mut [f32]) {
        let Some(bias) = &self.grid.bias else { return };
        let mut runs = self.runs(id.row, keys);
        while let Some(run) = runs.next_run() {
            let [dz, dy, dx] = run.entries(bias);
            let first = ((id.head * bias.sizes[0] + dz) * bias.sizes[1] + dy) * bias.sizes[2] + dx;
            let of_run = &mut d_table[first..first + run.at.len()];
            of_run.iter_mut().zip(&d_logits[run.at]).for_each(|(to, x)| *to += x);
        }
    }
}

/// Neighbouring keys of a line of a patch, all seen by a row.
pub(crate) struct Run {
    /// Where they are, counted from the first key asked about.
    pub(crate) at: Range<usize>,
    /// The first of them, less the query's position.
    distance: [i32; 3],
    /// The first of them, less the start of the row's window.
    pub(crate) offset: [u32; 3],
}

impl Run {
    /// Entries of the first key.
    #[inline(always)]
    fn entries(&self, bias: &GridBias) -> [usize; 3] {
        [0, 1, 2].map(|a| (self.distance[a] + bias.zeros[a] as i32) as usize)
    }
}

/// Walks over the runs of a row.
pub(crate) struct Runs<'a> {
    patch: &'a Patch<'a>,
    seen: [Interval; 3],
    first: u32,
    last: u32,
    line: u32,
    plane: u32,
    z: Range<u32>,
    y: Range<u32>,
    here: u32,
}

impl Runs<'_> {
    /// The next run that is not empty. (No iterator: what it is made of is inlined into kernels.)
    #[inline(always)]
    pub(crate) fn next_run(&mut self) -> Option<Run> {
        let [oz, oy, ox] = self.patch.origin;
        loop {
            while self.y.start < self.y.end {
                let y = self.y.start;
                self.y.start += 1;
                let line = (self.here - oz) * self.plane + (y - oy) * self.line;
                let start = line + self.seen[2].start - ox;
                let end = (line + self.seen[2].end - ox).min(self.last);
                let from = start.max(self.first);
                if from < end {
                    let key = [self.here, y, self.seen[2].start + from - start];
                    return Some(Run {
                        at: (from - self.first) as usize..(end - self.first) as usize,
                        distance: std::array::from_fn(|a| key[a] as i32 - self.seen[a].position as i32),
                        offset: std::array::from_fn(|a| key[a] - self.seen[a].start),
                    });
                }
            }
            if self.z.start >= self.z.end {
                return None;
            }
            self.here = self.z.start;
            self.z.start += 1;
            let base = (self.here - oz) * self.plane;
            let (low, high) = (self.first.saturating_sub(base) / self.line, (self.last - 1 - base) / self.line + 1);
            self.y = self.seen[1].start.max(oy + low)..self.seen[1].end.min(oy + high);
        }
    }
}
