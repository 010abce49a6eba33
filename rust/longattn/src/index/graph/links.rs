//! The lists of a graph: which rows to look at after a row.

/// Marks the end of a list that is not full.
const NONE: u32 = u32::MAX;

/// Places of each list that stay free for bridges, the links that keep every row within reach.
pub(super) const SPARE: usize = 4;

/// A list of at most `width` rows for every row.
///
/// The first rows of a list are *fixed*: links that training queries asked for, and bridges. Pruning keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Links {
    width: usize,
    /// `[rows, width]`.
    ids: Vec<u32>,
    /// How many links of each list are fixed.
    fixed: Vec<u8>,
}

impl Links {
    /// No rows. `width` is at most 128.
    pub(super) fn new(width: usize) -> Self {
        assert!(width > SPARE && width <= 128);
        Self { width, ids: Vec::new(), fixed: Vec::new() }
    }

    /// From what [`Self::parts`] gave; `None` if these are no lists of `rows` rows.
    pub(super) fn from_parts(width: usize, ids: Vec<u32>, fixed: Vec<u8>) -> Option<Self> {
        let links = Self { width, ids, fixed };
        let rows = links.len();
        let whole = width > SPARE && width <= 128 && links.ids.len() == rows * width;
        let good = |row: usize| {
            let list = &links.ids[row * width..(row + 1) * width];
            let count = list.iter().position(|&id| id == NONE).unwrap_or(width);
            usize::from(links.fixed[row]) <= count
                && list[..count].iter().all(|&id| (id as usize) < rows && id as usize != row)
                && list[count..].iter().all(|&id| id == NONE)
        };
        (whole && (0..rows).all(good)).then_some(links)
    }

    /// `[rows, width]` links, ends marked by the largest number, and the number of fixed ones of each row.
    pub(super) fn parts(&self) -> (&[u32], &[u8]) {
        (&self.ids, &self.fixed)
    }

    pub(super) fn len(&self) -> usize {
        self.fixed.len()
    }

    pub(super) fn nbytes(&self) -> usize {
        4 * self.ids.len() + self.fixed.len()
    }

    /// Adds rows with empty lists, up to `rows`.
    pub(super) fn grow(&mut self, rows: usize) {
        // By an eighth, not by doubling: lists are most of an index's memory.
        let needed = rows * self.width;
        if needed > self.ids.capacity() {
            let room = if self.ids.is_empty() { needed } else { needed + needed / 8 };
            self.ids.reserve_exact(room - self.ids.len());
        }
        self.ids.resize(needed, NONE);
        self.fixed.resize(rows, 0);
    }

    /// The rows that `row` leads to.
    #[inline(always)]
    pub(super) fn of(&self, row: u32) -> &[u32] {
        let list = &self.ids[row as usize * self.width..][..self.width];
        let mut count = self.width;
        // Lists end in a run of marks.
        while count > 0 && list[count - 1] == NONE {
            count -= 1;
        }
        &list[..count]
    }

    /// The first links of `row`, which pruning keeps.
    pub(super) fn fixed(&self, row: u32) -> &[u32] {
        &self.of(row)[..usize::from(self.fixed[row as usize])]
    }

    /// Where the list of `row` lies, to be asked for ahead of its use.
    #[inline(always)]
    pub(super) fn start(&self, row: u32) -> *const u8 {
        self.ids.as_ptr().wrapping_add(row as usize * self.width).cast()
    }

    /// Links that a list takes before it is pruned.
    pub(super) fn room(&self) -> usize {
        self.width - SPARE
    }

    /// Replaces a list; the first `fixed` links are fixed.
    pub(super) fn set(&mut self, row: u32, list: &[u32], fixed: usize) {
        assert!(list.len() <= self.width && fixed <= list.len());
        let to = &mut self.ids[row as usize * self.width..][..self.width];
        to[..list.len()].copy_from_slice(list);
        to[list.len()..].fill(NONE);
        self.fixed[row as usize] = fixed as u8;
    }

    /// Adds a link that is kept: false where the list is full.
    pub(super) fn bridge(&mut self, from: u32, to: u32) -> bool {
        let count = self.of(from).len();
        if count == self.width {
            return false;
        }
        let fixed = usize::from(self.fixed[from as usize]);
        let list = &mut self.ids[from as usize * self.width..][..self.width];
        // The first link that is not fixed moves to the end.
        list[count] = list[fixed];
        list[fixed] = to;
        if count == fixed {
            list[count] = to;
        }
        self.fixed[from as usize] += 1;
        true
    }

    /// Forgets the rows from `rows` on, and every link to them.
    pub(super) fn cut(&mut self, rows: usize) {
        self.ids.truncate(rows * self.width);
        self.fixed.truncate(rows);
        for (list, fixed) in self.ids.chunks_exact_mut(self.width).zip(&mut self.fixed) {
            let (mut kept, mut kept_fixed) = (0, 0);
            for i in 0..self.width {
                if list[i] != NONE && (list[i] as usize) < rows {
                    kept_fixed += u8::from(i < usize::from(*fixed));
                    list[kept] = list[i];
                    kept += 1;
                }
            }
            list[kept..].fill(NONE);
            *fixed = kept_fixed;
        }
    }

    /// Which rows can be reached from those marked, following links; marks them.
    pub(super) fn reach(&self, marked: &mut [bool], mut open: Vec<u32>) {
        while let Some(row) = open.pop() {
            for &next in self.of(row) {
                if !std::mem::replace(&mut marked[next as usize], true) {
                    open.push(next);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_bridges_and_cuts() {
        let mut links = Links::new(8);
        links.grow(5);
        assert!(links.of(3).is_empty());
        links.set(3, &[1, 2, 4], 1);
        assert!(links.bridge(3, 0));
        assert_eq!((links.of(3), links.fixed(3)), (&[1, 0, 4, 2][..], &[1, 0][..]));
        assert!(links.bridge(2, 4));
        assert_eq!((links.of(2), links.fixed(2)), (&[4][..], &[4][..]));
        let copy = Links::from_parts(8, links.ids.clone(), links.fixed.clone());
        assert_eq!(copy.as_ref(), Some(&links));
        links.cut(4);
        assert_eq!((links.of(3), links.fixed(3)), (&[1, 0, 2][..], &[1, 0][..]));
        assert!(links.of(2).is_empty() && links.fixed(2).is_empty());
        let mut wrong = links.ids.clone();
        wrong[0] = 9;
        assert_eq!(Links::from_parts(8, wrong, links.fixed.clone()), None);
    }

    #[test]
    fn a_full_list_takes_no_bridge() {
        let mut links = Links::new(5);
        links.grow(7);
        links.set(0, &[1, 2, 3, 4, 5], 0);
        assert!(!links.bridge(0, 6));
        assert_eq!(links.of(0), [1, 2, 3, 4, 5]);
    }
}
