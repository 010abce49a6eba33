//! The keys that a block of query rows attends to: a range of them, blocks of them, or rows picked one by one.

use super::Problem;
use super::grid::Patch;
use std::borrow::Cow;
use std::ops::Range;

/// Keys picked by a list: key `j` of it is row `index[j]` of the problem.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List<'a> {
    pub(crate) index: &'a [u32],
    /// Added to the logits, one number per key of the list.
    pub(crate) bias: Option<&'a [f32]>,
    /// What each of the query rows sees, counted along the list.
    pub(crate) visible: &'a [Range<usize>],
    /// The box that the keys fill, of whose keys each row sees a smaller box.
    pub(crate) patch: Option<&'a Patch<'a>>,
}

impl List<'_> {
    /// Whether it changes logits, options aside.
    pub(crate) fn changes_scores(&self) -> bool {
        self.bias.is_some() || self.patch.is_some()
    }
}

/// Keys of a block of query rows.
#[derive(Clone, Debug)]
pub(crate) enum Keys<'a> {
    /// One after another.
    Range(Range<usize>),
    /// Blocks, ascending; block b is the keys from `bounds[b]` to `bounds[b + 1]`.
    Blocks { blocks: &'a [u32], bounds: &'a [usize] },
    /// Rows, ascending, and what is added to their logits.
    Rows { index: &'a [u32], bias: Option<&'a [f32]> },
    /// A box of a grid.
    Patch(&'a Patch<'a>),
}

impl<'a> Keys<'a> {
    /// Number of keys.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Range(keys) => keys.len(),
            Self::Blocks { blocks, bounds } => {
                blocks.iter().map(|&b| bounds[b as usize + 1] - bounds[b as usize]).sum()
            }
            Self::Rows { index, .. } => index.len(),
            Self::Patch(patch) => patch.index().len(),
        }
    }

    /// These keys without those outside `span`; of blocks, whole ones.
    pub(crate) fn within(&self, span: Range<usize>) -> Self {
        match self {
            Self::Range(keys) => {
                let start = keys.start.max(span.start);
                Self::Range(start..keys.end.min(span.end).max(start))
            }
            Self::Blocks { blocks, bounds } => {
                let start = blocks.partition_point(|&b| bounds[b as usize + 1] <= span.start);
                let end = blocks.partition_point(|&b| bounds[b as usize] < span.end);
                Self::Blocks { blocks: &blocks[start..end.max(start)], bounds }
            }
            Self::Rows { index, bias } => {
                let part = along(index, &span);
                Self::Rows { index: &index[part.clone()], bias: bias.map(|bias| &bias[part]) }
            }
            Self::Patch(patch) => Self::Patch(patch),
        }
    }

    /// The rows that the keys are; `None` for a range.
    pub(crate) fn index(&self) -> Option<Cow<'a, [u32]>> {
        match self {
            Self::Range(_) => None,
            Self::Blocks { blocks, bounds } => {
                let keys = |&b: &u32| bounds[b as usize] as u32..bounds[b as usize + 1] as u32;
                Some(blocks.iter().flat_map(keys).collect())
            }
            Self::Rows { index, .. } => Some(Cow::Borrowed(index)),
            Self::Patch(patch) => Some(Cow::Borrowed(patch.index())),
        }
    }

    /// The box that the keys are.
    pub(crate) fn patch(&self) -> Option<&'a Patch<'a>> {
        match self {
            Self::Patch(patch) => Some(patch),
            _ => None,
        }
    }

    /// What query row `row` sees of the keys, counted along their list `index`.
    pub(crate) fn visible(&self, problem: &Problem, index: &[u32], row: usize) -> Range<usize> {
        match self {
            Self::Patch(patch) => patch.visible(row),
            _ => visible_along(problem, index, row),
        }
    }

    /// What is added to the logits.
    pub(crate) fn bias(&self) -> Option<&'a [f32]> {
        match self {
            Self::Rows { bias, .. } => *bias,
            _ => None,
        }
    }
}

/// What causality and window leave query row `row` of the keys `index`, counted along them.
fn visible_along(problem: &Problem, index: &[u32], row: usize) -> Range<usize> {
    let visible = problem.visible(row);
    if visible == (0..problem.keys) { 0..index.len() } else { along(index, &visible) }
}

/// Which of the ascending `index` lie inside `span`.
fn along(index: &[u32], span: &Range<usize>) -> Range<usize> {
    let start = index.partition_point(|&j| (j as usize) < span.start);
    start..index.partition_point(|&j| (j as usize) < span.end).max(start)
}
