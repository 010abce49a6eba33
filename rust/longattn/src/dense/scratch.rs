//! Cache-line-aligned working memory, kept per thread and grown as needed.

use std::cell::RefCell;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer of floats that starts on a cache line.
#[derive(Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// The first `n` floats (rounded up to a cache line) with whatever they held before.
    pub(crate) fn take(&mut self, n: usize) -> &mut [f32] {
        let lines = n.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0.0; 16]));
        }
        // SAFETY: a Line is exactly 16 floats without padding, and `lines` of them are initialised.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), lines * 16) }
    }

    /// Pieces of at least the sizes asked for, each on a cache line of its own, with whatever they held before.
    pub(crate) fn carve<const N: usize>(&mut self, sizes: [usize; N]) -> [&mut [f32]; N] {
        let sizes = sizes.map(|n| n.next_multiple_of(16));
        let mut rest = self.take(sizes.iter().sum());
        sizes.map(|n| {
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(n);
            rest = after;
            piece
        })
    }

    /// What was taken so far.
    pub(crate) fn filled(&self) -> &[f32] {
        // SAFETY: as in `take`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.lines.len() * 16) }
    }
}

/// Working memory of one thread.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) queries: Buffer,
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    pub(crate) scores: Buffer,
    pub(crate) outputs: Buffer,
    pub(crate) extra: Buffer,
}

/// Runs `work` with this thread's working memory.
pub(crate) fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
        Ok(mut scratch) => work(&mut scratch),
        // A kernel inside a kernel on one thread: rare, gets memory of its own.
        Err(_) => work(&mut Scratch::default()),
    })
}
