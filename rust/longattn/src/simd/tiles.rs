//! Matrix registers (AMX): sixteen rows of 64 bytes each, multiplied with one another in one instruction.
//!
//! ```text
//! left   16 rows of 32 bf16 (64 bytes)                  numbers that are summed over go along the row
//! right  16 rows of 16 pairs of bf16 (fours of bytes)   row i holds pair i of sixteen columns
//! sums   16 rows of 16 floats (integers)
//! ```
//! Registers 0 to 3 hold sums of 32 x 32 results, 4 and 5 two blocks of rows, 6 and 7 two blocks of columns.

#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "other machines have no such registers")
)]

#[cfg(test)]
mod emulated;

use std::marker::PhantomData;

/// Rows, and columns, of one register's results.
pub(crate) const TILE: usize = 16;

/// Bytes of a register's row: what one step sums over.
pub(crate) const TILE_BYTES: usize = 64;

/// Rows, and columns, of the results of one [`Registers::multiply`].
pub(crate) const BLOCK: usize = 2 * TILE;

/// Registers that [`Registers::multiply_rows`] sums in.
pub(crate) const SUMS: usize = 4;

/// Numbers of bf16 that one step sums over.
pub(crate) const STEP: usize = TILE_BYTES / 2;

/// Proof that the CPU has matrix registers and that the operating system lets this process use them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    /// Plain code in place of the instructions, so that the kernels around them are tested on any machine.
    #[cfg(test)]
    emulated: bool,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Factors {
    /// Pairs of bf16, summed in f32.
    Bf16,
    /// Unsigned bytes on the left, signed ones on the right, summed in i32.
    Bytes,
}

/// The rows of a product: numbers, each the sum of some parts.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) start: *const u8,
    /// Bytes from one row to the next, from sixteen rows to the next sixteen, from step to step and from part to part.
    pub(crate) row: usize,
    pub(crate) tile: usize,
    pub(crate) step: usize,
    pub(crate) part: usize,
}

/// The 32 columns of a product, in rows of 128 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Right {
    pub(crate) start: *const u8,
    /// Bytes from one block of columns to the next and from part to part.
    pub(crate) step: usize,
    pub(crate) part: usize,
    /// Which block each step takes; null: one after another.
    pub(crate) blocks: *const u32,
}

impl Right {
    /// With these blocks, one for each step.
    #[inline(always)]
    pub(crate) fn at(self, blocks: &[u32]) -> Self {
        Self { blocks: blocks.as_ptr(), ..self }
    }

    /// Where a step's columns are.
    ///
    /// # Safety
    /// `blocks`, if there are such, are readable for the step.
    #[inline(always)]
    unsafe fn of(&self, step: usize) -> *const u8 {
        let block = match self.blocks.is_null() {
            true => step,
            // SAFETY: the caller's promise.
            false => unsafe { *self.blocks.add(step) as usize },
        };
        self.start.wrapping_add(block * self.step)
    }
}

/// Where 32 columns of results go.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    pub(crate) start: *mut f32,
    /// Floats from row to row.
    pub(crate) row: usize,
    /// Whether products are added to what is there.
    pub(crate) add: bool,
}

impl Tiles {
    /// If this machine has them.
    pub(super) fn detect() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
            if *FOUND.get_or_init(instructions::are_allowed) {
                return Some(Self {
                    #[cfg(test)]
                    emulated: false,
                });
            }
        }
        #[cfg(test)]
        return Some(Self { emulated: true });
        #[cfg(not(test))]
        None
    }

    /// The same results by plain code.
    #[cfg(test)]
    pub(crate) const EMULATED: Self = Self { emulated: true };

    /// Gets this thread's registers ready. They cost the operating system time at every switch between threads until they are
    /// dropped. There is one such value in a thread at a time.
    #[inline(always)]
    pub(crate) fn registers(self) -> Registers {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if !self.is_emulated() {
            // SAFETY: this value proves that the registers are there.
            unsafe { instructions::configure() };
        }
        Registers { tiles: self, of_this_thread: PhantomData }
    }

    #[inline(always)]
    fn is_emulated(self) -> bool {
        #[cfg(test)]
        return self.emulated;
        #[cfg(not(test))]
        false
    }
}

/// The matrix registers of this thread, ready for use.
pub(crate) struct Registers {
    tiles: Tiles,
    of_this_thread: PhantomData<*mut ()>,
}

impl Drop for Registers {
    #[inline(always)]
    fn drop(&mut self) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if !self.tiles.is_emulated() {
            // SAFETY: as in `registers`.
            unsafe { instructions::release() };
        }
    }
}

/// Parts of the left factor and of the right one that are multiplied with each other, in order; best so that each pair has a part in
/// common with the one before.
#[derive(Clone, Copy)]
pub(crate) struct Pairs {
    pairs: [(u8, u8); 6],
    count: usize,
}

impl Pairs {
    /// # Panics
    /// Above six pairs.
    pub(crate) const fn new(listed: &[(u8, u8)]) -> Self {
        let (mut pairs, mut i) = ([(0, 0); 6], 0);
        while i < listed.len() {
            pairs[i] = listed[i];
            i += 1;
        }
        Self { pairs, count: listed.len() }
    }

    #[inline(always)]
    pub(crate) fn listed(&self) -> &[(u8, u8)] {
        &self.pairs[..self.count]
    }
}

/// A product of 32 columns with the first `rows` rows, of which sixteen or 32 are read and written: sums over `steps` steps and the pairs
/// of parts in `pairs`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub(crate) factors: Factors,
    pub(crate) pairs: Pairs,
    pub(crate) steps: usize,
    pub(crate) rows: usize,
    pub(crate) left: Left,
    pub(crate) right: Right,
    pub(crate) sums: Sums,
}

impl Product {
    /// Steps with a pair of parts each: four (two) instructions, 64 (32) cycles.
    fn strides(&self) -> usize {
        self.steps * self.pairs.count
    }
}

/// Products that are computed in order and a little at a time. The registers work on their own, and other instructions that are not
/// too many meanwhile cost no time.
pub(crate) struct Queue {
    registers: Registers,
    products: Vec<Product>,
    /// Products that are done, and the strides of the one after them that are.
    done: usize,
    strides: usize,
    /// Strides still to do.
    left: usize,
    /// What [`Self::tick`] adds to what is due, in 256ths of a stride.
    rate: usize,
    due: usize,
}

impl Queue {
    pub(crate) fn new(registers: Registers) -> Self {
        Self { registers, products: Vec::new(), done: 0, strides: 0, left: 0, rate: 0, due: 0 }
    }

    /// Adds a product.
    ///
    /// # Safety
    /// Until [`Self::finish`], `left` is readable and `sums` readable and writable for sixteen rows, for 32 if `rows` is above sixteen;
    /// `right` is readable for sixteen rows of 128 bytes; both for every step, as are `right.blocks` if there are such, and for the
    /// parts that `pairs` lists.
    #[inline(always)]
    pub(crate) unsafe fn push(&mut self, product: Product) {
        self.left += product.strides();
        self.products.push(product);
    }

    /// Spreads what is to do evenly over so many ticks.
    #[inline(always)]
    pub(crate) fn pace(&mut self, ticks: usize) {
        (self.rate, self.due) = ((256 * self.left).div_ceil(ticks), 0);
    }

    /// Goes on. As the CPU looks some hundred instructions ahead, there should be no more than about a hundred between two ticks.
    #[inline(always)]
    pub(crate) fn tick(&mut self, ticks: usize) {
        self.due += ticks * self.rate;
        if self.due >= 2 * 256 {
            self.advance(self.due / 256);
            self.due %= 256;
        }
    }

    /// Computes so many strides more, or as many as are left.
    #[inline(never)]
    fn advance(&mut self, strides: usize) {
        let left = self.left.saturating_sub(strides);
        while self.left > left {
            let product = &self.products[self.done];
            let (from, all) = (self.strides, product.strides());
            let to = all.min(from + (self.left - left));
            // SAFETY: whoever pushed the product vouched for its memory; the strides are the next ones.
            unsafe { self.registers.multiply(product, from, to) };
            self.left -= to - from;
            (self.done, self.strides) = if to == all { (self.done + 1, 0) } else { (self.done, to) };
        }
    }

    /// Computes what is left, and forgets the memory of all products.
    #[inline(always)]
    pub(crate) fn finish(&mut self) {
        self.advance(self.left);
        self.products.clear();
        self.done = 0;
    }
}

impl Registers {
    /// Products of four times 32 rows of bf16, `row` bytes after one another and of `steps` steps, with columns: those of sixteen rows
    /// with the first block of each step's columns plus those of the sixteen after them with the second one.
    /// `columns` are `[steps][2][16 pairs][16 columns][2]`, `sums` `[4][16 rows][16 columns]`. `meanwhile` runs eight times a step.
    ///
    /// # Safety
    /// All rows are readable for 64 bytes a step, `columns` for all steps, and `sums` is writable.
    #[inline(always)]
    pub(crate) unsafe fn multiply_rows(
        &self,
        rows: *const u8,
        row: usize,
        steps: usize,
        columns: *const u8,
        sums: *mut f32,
        meanwhile: impl FnMut(),
    ) {
        #[cfg(test)]
        if self.tiles.emulated {
            // SAFETY: the caller's promise.
            return unsafe { emulated::multiply_rows(rows, row, steps, columns, sums, meanwhile) };
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        // SAFETY: the caller's promise; this value proves that the registers are ready.
        unsafe {
            instructions::multiply_rows(rows, row, steps, columns, sums, meanwhile);
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        {
            let _ = (rows, row, steps, columns, sums, meanwhile);
            unreachable!("no such registers on this machine");
        }
    }

    /// The strides `from..to` of a product, where the registers hold what the ones before left there. Sums are read with the first
    /// one and written with the last.
    ///
    /// # Safety
    /// The memory is as [`Queue::push`] says, and the strides before `from` were the last that these registers computed.
    #[inline(always)]
    unsafe fn multiply(&self, product: &Product, from: usize, to: usize) {
        #[cfg(test)]
        if self.tiles.emulated {
            if to == product.strides() {
                // SAFETY: the caller's promise.
                unsafe { emulated::multiply(product) };
            }
            return;
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        // SAFETY: the caller's promise; this value proves that the registers are ready.
        unsafe {
            use instructions::multiply;
            match (product.factors, product.rows > TILE) {
                (Factors::Bf16, false) => multiply::<false, false>(product, from, to),
                (Factors::Bf16, true) => multiply::<false, true>(product, from, to),
                (Factors::Bytes, false) => multiply::<true, false>(product, from, to),
                (Factors::Bytes, true) => multiply::<true, true>(product, from, to),
            }
        }
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        {
            let _ = (product, from, to);
            unreachable!("no such registers on this machine");
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod instructions {
    use super::{Product, TILE, TILE_BYTES};
    use std::arch::asm;

    /// Whether the CPU has the registers with products of bytes and of bf16, and the kernel grants them to this process.
    pub(super) fn are_allowed() -> bool {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        const BYTES: u32 = 1 << 25;
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        #[allow(unused_unsafe, reason = "older compilers want it")]
        // SAFETY: every x86-64 CPU has the instruction; leaf 7 is asked for where it is there.
        let features = unsafe {
            let highest = std::arch::x86_64::__cpuid(0).eax;
            if highest < 7 { 0 } else { std::arch::x86_64::__cpuid_count(7, 0).edx }
        };
        let all = BF16 | TILES | BYTES;
        // SAFETY: the call takes two integers and changes no memory of ours.
        features & all == all
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    }

    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIGURATION: Configuration = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < 8 {
            (row_bytes[i], rows[i]) = (TILE_BYTES as u16, TILE as u8);
            i += 1;
        }
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    /// # Safety
    /// The process may use the registers.
    #[inline(always)]
    pub(super) unsafe fn configure() {
        // SAFETY: the caller's promise; the configuration has the 64 bytes that are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly, preserves_flags)) };
    }

    /// # Safety
    /// The process may use the registers.
    #[inline(always)]
    pub(super) unsafe fn release() {
        // SAFETY: the caller's promise.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }

    /// Loads a register from rows that are so many bytes apart.
    macro_rules! load {
        ($tile:literal, $from:expr, $row:expr) => {
            asm!(
                concat!("tileloadd ", $tile, ", [{from} + {row}]"),
                from = in(reg) $from, row = in(reg) $row,
                options(nostack, readonly, preserves_flags)
            )
        };
    }
    macro_rules! store {
        ($tile:literal, $to:expr, $row:expr) => {
            asm!(
                concat!("tilestored [{to} + {row}], ", $tile),
                to = in(reg) $to, row = in(reg) $row,
                options(nostack, preserves_flags)
            )
        };
    }
    macro_rules! dot {
        ($bytes:expr, $sum:literal, $left:literal, $right:literal) => {
            if $bytes {
                asm!(concat!("tdpbusd ", $sum, ", ", $left, ", ", $right), options(nostack, nomem, preserves_flags))
            } else {
                asm!(concat!("tdpbf16ps ", $sum, ", ", $left, ", ", $right), options(nostack, nomem, preserves_flags))
            }
        };
    }

    /// See [`super::Registers::multiply`]; no Rust code uses these registers, so they keep their contents from one block of assembly
    /// to the next.
    ///
    /// # Safety
    /// As there, and the registers are configured.
    #[inline(always)]
    pub(super) unsafe fn multiply<const BYTES: bool, const TALL: bool>(product: &Product, from: usize, to: usize) {
        let &Product { ref pairs, steps, left, right, sums, .. } = product;
        let pairs = pairs.listed();
        let (start, row) = (sums.start, 4 * sums.row);
        let lower = start.wrapping_add(TILE * sums.row);
        // SAFETY: the caller's promise.
        unsafe {
            if from == 0 && sums.add {
                load!("tmm0", start, row);
                load!("tmm1", start.wrapping_add(TILE), row);
                if TALL {
                    load!("tmm2", lower, row);
                    load!("tmm3", lower.wrapping_add(TILE), row);
                }
            } else if from == 0 {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem, preserves_flags)
                );
            }
            let (mut step, mut pair) = if from == 0 { (0, 0) } else { (from / pairs.len(), from % pairs.len()) };
            for _ in from..to {
                let (i, j) = pairs[pair];
                // Parts that the stride before has loaded.
                let (loaded_i, loaded_j) = if pair == 0 { (u8::MAX, u8::MAX) } else { pairs[pair - 1] };
                if i != loaded_i {
                    let a = left.start.wrapping_add(step * left.step + usize::from(i) * left.part);
                    load!("tmm4", a, left.row);
                    if TALL {
                        load!("tmm5", a.wrapping_add(left.tile), left.row);
                    }
                }
                if j != loaded_j {
                    let b = right.of(step).wrapping_add(usize::from(j) * right.part);
                    load!("tmm6", b, 2 * TILE_BYTES);
                    load!("tmm7", b.wrapping_add(TILE_BYTES), 2 * TILE_BYTES);
                }
                dot!(BYTES, "tmm0", "tmm4", "tmm6");
                dot!(BYTES, "tmm1", "tmm4", "tmm7");
                if TALL {
                    dot!(BYTES, "tmm2", "tmm5", "tmm6");
                    dot!(BYTES, "tmm3", "tmm5", "tmm7");
                }
                (step, pair) = if pair + 1 == pairs.len() { (step + 1, 0) } else { (step, pair + 1) };
            }
            if to == steps * pairs.len() {
                store!("tmm0", start, row);
                store!("tmm1", start.wrapping_add(TILE), row);
                if TALL {
                    store!("tmm2", lower, row);
                    store!("tmm3", lower.wrapping_add(TILE), row);
                }
            }
        }
    }

    /// See [`super::Registers::multiply_rows`].
    ///
    /// # Safety
    /// As there, and the registers are configured.
    #[inline(always)]
    pub(super) unsafe fn multiply_rows(
        rows: *const u8,
        row: usize,
        steps: usize,
        columns: *const u8,
        sums: *mut f32,
        mut meanwhile: impl FnMut(),
    ) {
        const TILE_SIZE: usize = TILE * TILE_BYTES;
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem, preserves_flags)
            );
            for step in 0..steps {
                let (a, b) = (rows.wrapping_add(step * TILE_BYTES), columns.wrapping_add(step * 2 * TILE_SIZE));
                load!("tmm6", b, TILE_BYTES);
                load!("tmm7", b.wrapping_add(TILE_SIZE), TILE_BYTES);
                macro_rules! sixteen {
                    ($i:literal, $sum:literal, $left:literal, $right:literal) => {
                        load!($left, a.wrapping_add(row.wrapping_mul($i * TILE)), row);
                        dot!(false, $sum, $left, $right);
                        meanwhile();
                    };
                }
                sixteen!(0, "tmm0", "tmm4", "tmm6");
                sixteen!(2, "tmm1", "tmm5", "tmm6");
                sixteen!(4, "tmm2", "tmm4", "tmm6");
                sixteen!(6, "tmm3", "tmm5", "tmm6");
                sixteen!(1, "tmm0", "tmm4", "tmm7");
                sixteen!(3, "tmm1", "tmm5", "tmm7");
                sixteen!(5, "tmm2", "tmm4", "tmm7");
                sixteen!(7, "tmm3", "tmm5", "tmm7");
            }
            store!("tmm0", sums, TILE_BYTES);
            store!("tmm1", sums.wrapping_add(TILE * TILE), TILE_BYTES);
            store!("tmm2", sums.wrapping_add(2 * TILE * TILE), TILE_BYTES);
            store!("tmm3", sums.wrapping_add(3 * TILE * TILE), TILE_BYTES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Every form of product, with gaps between rows, tiles, steps and parts, against the emulation; where there are no such
    /// registers, the emulation against itself.
    #[test]
    fn products_are_those_of_the_emulation() {
        let (steps, parts) = (3, 2);
        let left_row = TILE_BYTES + 8;
        let left_part = TILE * left_row + 24;
        let left_step = parts * left_part + 8;
        let left_tile = steps * left_step + 40;
        let right_part = TILE * 2 * TILE_BYTES + 32;
        let right_step = parts * right_part + 16;
        let noise = |n: usize, seed: usize| (0..n).map(move |i| (i * 2_654_435_761 + seed * 40_503) >> 7 & 0xff);
        let bytes = |n: usize, seed: usize| noise(n, seed).map(|x| x as u8).collect::<Vec<_>>();
        let floats = |n: usize, seed: usize| {
            noise(n / 2, seed).flat_map(|x| bf16::from_f32(x as f32 - 100.0).to_ne_bytes()).collect::<Vec<_>>()
        };
        for factors in [Factors::Bf16, Factors::Bytes] {
            let make = |n, seed| if factors == Factors::Bytes { bytes(n, seed) } else { floats(n, seed) };
            let (a, b) = (make(2 * left_tile, 1), make(steps * right_step, 2));
            for (rows, add, listed) in [
                (1, false, &[(0, 0)][..]),
                (16, true, &[(0, 1), (1, 0)]),
                (17, false, &[(1, 1)]),
                (32, true, &[(1, 0), (0, 0), (0, 1), (1, 1)]),
            ] {
                let left = Left { start: a.as_ptr(), row: left_row, tile: left_tile, step: left_step, part: left_part };
                let right = Right { start: b.as_ptr(), step: right_step, part: right_part, blocks: std::ptr::null() };
                let width = BLOCK + 5;
                let before: Vec<f32> = noise(BLOCK * width, 3)
                    .map(|x| if factors == Factors::Bytes { f32::from_bits(x as u32) } else { x as f32 })
                    .collect();
                let pairs = Pairs::new(listed);
                let run = |tiles: Tiles| {
                    let mut to = before.clone();
                    let sums = Sums { start: to.as_mut_ptr(), row: width, add };
                    let mut queue = Queue::new(tiles.registers());
                    // SAFETY: the arrays hold what the strides reach.
                    unsafe { queue.push(Product { factors, pairs, steps, rows, left, right, sums }) };
                    // Two strides, and the rest.
                    queue.pace(queue.left);
                    queue.tick(1);
                    assert_eq!(queue.strides, 0);
                    queue.tick(1);
                    assert_eq!(queue.strides, 2);
                    queue.finish();
                    to.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let found = run(Tiles::detect().expect("emulated at least"));
                // Whole numbers below 2^24: no rounding, in whatever order they are added.
                assert_eq!(found, run(Tiles::EMULATED), "{factors:?} {rows} {add}");
                let written = if rows > TILE { BLOCK } else { TILE };
                for (i, (found, before)) in found.iter().zip(&before).enumerate() {
                    let inside = i / width < written && i % width < BLOCK;
                    assert!(inside || *found == before.to_bits(), "{factors:?} {rows} {i}");
                }
            }
        }
    }
    /// Rows with gaps between them, against the emulation.
    #[test]
    fn rows_are_multiplied_where_they_lie() {
        let (steps, row) = (3, 3 * TILE_BYTES + 20);
        let numbers = |n: usize, seed: usize| -> Vec<bf16> {
            (0..n).map(|i| bf16::from_f32(((i * 2_654_435_761 + seed) >> 7 & 0xff) as f32 - 100.0)).collect()
        };
        let (a, b) = (numbers(SUMS * BLOCK * row / 2, 1), numbers(steps * 2 * TILE * BLOCK, 2));
        let run = |tiles: Tiles| {
            let (mut sums, mut turns) = (vec![f32::NAN; SUMS * TILE * TILE], 0);
            // SAFETY: the arrays hold so many rows, columns and sums.
            unsafe {
                let (a, b) = (a.as_ptr().cast(), b.as_ptr().cast());
                tiles.registers().multiply_rows(a, row, steps, b, sums.as_mut_ptr(), || turns += 1);
            }
            assert_eq!(turns, 8 * steps);
            sums
        };
        // Whole numbers below 2^24: no rounding, in whatever order they are added.
        assert_eq!(run(Tiles::detect().expect("emulated at least")), run(Tiles::EMULATED));
    }
}
