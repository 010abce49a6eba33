//! How queries on a grid are cut into tiles, whose windows overlap enough for one box of keys to serve them all.

use crate::dense::Grid;
use crate::dense::grid::Patch;
use crate::dense::tile::QUERY_ROWS;
use std::ops::Range;

/// Queries along an axis that go together: of one group, in order.
type Piece = Vec<u32>;

/// Tiles of a grid: every product of a piece of each axis.
pub(crate) struct Tiles {
    pieces: [Vec<Piece>; 3],
}

impl Tiles {
    /// Tiles of at most `most` queries, each of which is `heads` rows of numbers of `dims` (keys' and values' together).
    pub(crate) fn new(grid: &Grid, heads: usize, most: usize, dims: usize) -> Self {
        let extents = best_extents(grid, heads, most.max(1), dims);
        Self { pieces: std::array::from_fn(|a| pieces(grid, a, extents[a])) }
    }

    pub(crate) fn len(&self) -> usize {
        self.pieces.iter().map(Vec::len).product()
    }

    /// The pieces of tile `i`; tiles that follow one another are neighbours where that can be.
    fn tile(&self, i: usize) -> [&[u32]; 3] {
        let [z, y, x] = &self.pieces;
        [&z[i / (y.len() * x.len())], &y[i / x.len() % y.len()], &x[i % x.len()]]
    }

    /// The query rows of tile `i`, and the box of keys around what they see.
    pub(crate) fn rows<'a>(&self, grid: &'a Grid<'a>, i: usize) -> (Vec<u32>, Patch<'a>) {
        let queries = self.tile(i);
        let [_, ny, nx] = grid.axes.map(|axis| axis.queries.len() as u32);
        let mut rows = Vec::with_capacity(queries.iter().map(|piece| piece.len()).product());
        for z in queries[0] {
            for y in queries[1] {
                rows.extend(queries[2].iter().map(|x| (z * ny + y) * nx + x));
            }
        }
        (rows, Patch::new(grid, queries))
    }
}

/// Cuts each group of an axis' queries into pieces of about `extent`, whole multiples of the axis' step but for the last.
fn pieces(grid: &Grid, axis: usize, extent: usize) -> Vec<Piece> {
    let axis = &grid.axes[axis];
    let mut groups: Vec<Piece> = vec![Vec::new(); axis.dilation];
    for (i, x) in axis.queries.iter().enumerate() {
        groups[x.group as usize].push(i as u32);
    }
    let mut pieces = Vec::new();
    for group in groups.iter().filter(|group| !group.is_empty()) {
        let fair = group.len().div_ceil(group.len().div_ceil(extent));
        let step = if extent >= axis.step { axis.step } else { 1 };
        let fair = fair.next_multiple_of(step).min(extent.next_multiple_of(step));
        pieces.extend(group.chunks(fair).map(<[u32]>::to_vec));
    }
    pieces
}

/// The extents that cost least, by a model of the kernel's time on the tile in the middle.
fn best_extents(grid: &Grid, heads: usize, most: usize, dims: usize) -> [usize; 3] {
    // The longest group along each axis, which stands for all.
    let middle: [Piece; 3] = std::array::from_fn(|a| {
        let axis = &grid.axes[a];
        let of = |g: u32| axis.queries.iter().filter(move |x| x.group == g).count();
        let longest = (0..axis.dilation as u32).max_by_key(|&g| (of(g), std::cmp::Reverse(g))).unwrap_or(0);
        (0..axis.queries.len() as u32).filter(|&i| axis.queries[i as usize].group == longest).collect()
    });
    let lengths: [usize; 3] = std::array::from_fn(|a| middle[a].len().max(1));
    let candidates = |a: usize| {
        let step = grid.axes[a].step;
        let sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, QUERY_ROWS].into_iter();
        let mut sizes: Vec<usize> = sizes.map(|n| n.next_multiple_of(if n >= step { step } else { 1 })).collect();
        sizes.push(step);
        sizes.retain(|&n| n <= most);
        sizes.iter_mut().for_each(|n| *n = (*n).min(lengths[a]));
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    };
    let mut best = (f64::INFINITY, [1; 3]);
    for x in candidates(2) {
        for y in candidates(1).into_iter().filter(|y| x * y <= most) {
            let room = most / (x * y);
            let step = grid.axes[0].step;
            let z = (if room >= step { room / step * step } else { room }).min(lengths[0]);
            let cost = cost_per_query(grid, &middle, [z, y, x], heads, dims);
            if cost < best.0 {
                best = (cost, [z, y, x]);
            }
        }
    }
    best.1
}

/// Time of a tile in the middle of the grid, divided by its queries; in cycles of a CPU with wide vectors, roughly.
fn cost_per_query(grid: &Grid, middle: &[Piece; 3], extents: [usize; 3], heads: usize, dims: usize) -> f64 {
    /// Rows and columns that the micro-kernel takes at once.
    const ROWS: usize = 12;
    const COLUMNS: usize = 32;
    let queries: [&[u32]; 3] = std::array::from_fn(|a| {
        let (length, extent) = (middle[a].len(), extents[a]);
        let first = length.saturating_sub(extent) / 2 / extent * extent;
        &middle[a][first..(first + extent).min(length)]
    });
    let bounds: [Vec<Range<usize>>; 3] = std::array::from_fn(|a| {
        let of = |&i: &u32| grid.axes[a].queries[i as usize];
        let origin = queries[a].iter().map(|i| of(i).start).min().unwrap_or(0);
        queries[a].iter().map(|i| (of(i).start - origin) as usize..(of(i).end - origin) as usize).collect()
    });
    let size = bounds.each_ref().map(|b| b.iter().map(|x| x.end).max().unwrap_or(0));
    let [nz, ny, nx] = queries.map(<[u32]>::len);
    let count = nz * ny * nx;
    let mut columns = 0;
    for first in (0..count * heads).step_by(ROWS) {
        let (mut low, mut high) = (usize::MAX, 0);
        for i in first / heads..((first + ROWS - 1) / heads + 1).min(count) {
            let [z, y, x] = [&bounds[0][i / (ny * nx)], &bounds[1][i / nx % ny], &bounds[2][i % nx]];
            let at = |z: usize, y: usize, x: usize| (z * size[1] + y) * size[2] + x;
            if !z.is_empty() && !y.is_empty() && !x.is_empty() {
                low = low.min(at(z.start, y.start, x.start));
                high = high.max(at(z.end - 1, y.end - 1, x.end - 1) + 1);
            }
        }
        // A range rarely begins where a panel does.
        columns += high.saturating_sub(low.min(high)) + COLUMNS / 2;
    }
    let products = (columns * ROWS) as f64 * (dims as f64 / 24.0 + 1.5);
    let packing = size.iter().product::<usize>() as f64 * (0.6 * dims as f64 + 20.0);
    (products + packing) / count as f64
}
