use super::neighbourhood;
use super::tiles::Tiles;
use crate::dense::{Axis, Grid, GridBias, Interval, Options};
use crate::parallel::Execution;
use crate::tensor::{Result, TensorView, TensorViewMut};

/// Every query sees up to `reach` keys of its group on both sides.
fn intervals(length: usize, dilation: usize, reach: u32) -> Vec<Interval> {
    let interval = |x: usize| {
        let (group, position) = ((x % dilation) as u32, (x / dilation) as u32);
        let count = (length - x % dilation).div_ceil(dilation) as u32;
        Interval { group, start: position.saturating_sub(reach), end: (position + reach + 1).min(count), position }
    };
    (0..length).map(interval).collect()
}

fn axis(queries: &[Interval], dilation: usize) -> Axis<'_> {
    Axis { keys: queries.len(), dilation, step: 1, queries }
}

#[test]
fn tiles_hold_every_query_once_and_the_runs_of_what_it_sees() {
    let tables = [intervals(5, 2, 1), intervals(11, 3, 1), intervals(14, 1, 3)];
    let dilations = [2, 3, 1];
    let grid = Grid { axes: std::array::from_fn(|a| axis(&tables[a], dilations[a])), bias: None };
    for (heads, most) in [(1, 192), (4, 24), (3, 1)] {
        let tiles = Tiles::new(&grid, heads, most, 64);
        let mut met = vec![0; 5 * 11 * 14];
        for i in 0..tiles.len() {
            let (rows, patch) = tiles.rows(&grid, i);
            assert!(rows.len() <= most);
            for &row in &rows {
                met[row as usize] += 1;
                let mut found = Vec::new();
                for start in (0..patch.index().len()).step_by(40) {
                    let mut runs = patch.runs(row as usize, start..(start + 40).min(patch.index().len()));
                    while let Some(run) = runs.next_run() {
                        found.extend_from_slice(&patch.index()[start + run.at.start..start + run.at.end]);
                    }
                }
                let seen = |a: usize, x: u32| {
                    let Interval { group, start, end, .. } = tables[a][x as usize];
                    (start..end).map(move |u| group + dilations[a] as u32 * u)
                };
                let (z, y, x) = (row / (11 * 14), row / 14 % 11, row % 14);
                let expected: Vec<u32> = seen(0, z)
                    .flat_map(|z| seen(1, y).map(move |y| (z, y)))
                    .flat_map(|(z, y)| seen(2, x).map(move |x| (z * 11 + y) * 14 + x))
                    .collect();
                assert_eq!(found, expected);
            }
        }
        assert!(met.iter().all(|&n| n == 1));
    }
}

/// Outputs of equal keys, value j all j: means of the numbers of the keys that a query sees.
fn means(grids: &[Grid], of_heads: Option<&[u32]>, heads: usize, length: usize) -> Result<Vec<f32>> {
    let (q, k) = (vec![1f32; heads * length * 8], vec![1f32; heads * length * 8]);
    let v: Vec<f32> = (0..heads * length * 8).map(|i| (i / 8 % length) as f32).collect();
    let (mut out, mut lse) = (vec![9f32; heads * length * 8], vec![9f32; heads * length]);
    let shape = [1, heads, length, 8];
    neighbourhood(
        TensorView::new(&q, shape)?,
        TensorView::new(&k, shape)?,
        TensorView::new(&v, shape)?,
        grids,
        of_heads,
        Options::default(),
        &mut TensorViewMut::new(&mut out, shape)?,
        &mut TensorViewMut::new(&mut lse, [1, heads, length, 1])?,
        &Execution::default(),
    )?;
    Ok(out.iter().step_by(8).copied().collect())
}

#[test]
fn heads_have_grids_of_their_own() {
    let tables = [intervals(30, 1, 2), intervals(30, 1, 7)];
    let grid = |rows| Grid { axes: [Axis::NONE, Axis::NONE, axis(rows, 1)], bias: None };
    let grids = [grid(&tables[0]), grid(&tables[1])];
    let found = means(&grids, Some(&[1, 0, 1]), 3, 30).unwrap();
    for (head, of_head) in found.chunks_exact(30).enumerate() {
        for (x, mean) in of_head.iter().enumerate() {
            let Interval { start, end, .. } = tables[[1, 0, 1][head]][x];
            assert!((mean - (start + end - 1) as f32 / 2.0).abs() < 1e-4, "{head} {x} {mean}");
        }
    }
    assert!(means(&grids, Some(&[1, 0, 2]), 3, 30).is_err());
    assert!(means(&grids, Some(&[1, 0]), 3, 30).is_err());
    assert!(means(&[], None, 3, 30).is_err());
}

#[test]
fn grids_that_do_not_fit_are_refused() {
    let rows = intervals(30, 1, 2);
    let of = |axis: Axis<'_>| means(&[Grid { axes: [Axis::NONE, Axis::NONE, axis], bias: None }], None, 1, 30).is_ok();
    assert!(of(axis(&rows, 1)));
    assert!(!of(axis(&rows, 0)) && !of(axis(&rows, 2)) && !of(axis(&rows[1..], 1)));
    assert!(!of(Axis { keys: 29, ..axis(&rows, 1) }) && !of(Axis { step: 0, ..axis(&rows, 1) }));
    let biased = |size: usize, zero: usize, numbers: usize| {
        let table = vec![0f32; numbers];
        let bias = Some(GridBias { sizes: [1, 1, size], zeros: [0, 0, zero], table: Some(&table), by_axis: None });
        means(&[Grid { axes: [Axis::NONE, Axis::NONE, axis(&rows, 1)], bias }], None, 1, 30).is_ok()
    };
    assert!(biased(5, 2, 5));
    assert!(!biased(4, 2, 4) && !biased(5, 1, 5) && !biased(5, 2, 4));
}
