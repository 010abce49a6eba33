//! The products of matrix registers number by number.

use super::{BLOCK, Factors, Product, SUMS, TILE, TILE_BYTES};
use half::bf16;

/// # Safety
/// As [`super::Queue::push`].
pub(super) unsafe fn multiply(product: &Product) {
    let &Product { factors, pairs, steps, rows, left, right, sums } = product;
    let rows = if rows > TILE { BLOCK } else { TILE };
    for r in 0..rows {
        for c in 0..BLOCK {
            // SAFETY: the caller's promise.
            unsafe {
                let to = sums.start.add(r * sums.row + c);
                let (mut float, mut integer) = (0f32, 0i32);
                if sums.add {
                    (float, integer) = (*to, to.cast::<i32>().read());
                }
                for &(i, j) in pairs.listed() {
                    for step in 0..steps {
                        let a = left.start.add(r / TILE * left.tile + r % TILE * left.row);
                        let a = a.add(step * left.step + usize::from(i) * left.part);
                        let b = right.of(step).add(usize::from(j) * right.part);
                        for word in 0..TILE {
                            let (a, b) = (a.add(4 * word), b.add(2 * TILE_BYTES * word + 4 * c));
                            match factors {
                                Factors::Bf16 => {
                                    let [a, b] = [a, b].map(|p| p.cast::<[bf16; 2]>().read_unaligned());
                                    float += a[0].to_f32() * b[0].to_f32() + a[1].to_f32() * b[1].to_f32();
                                }
                                Factors::Bytes => {
                                    let (a, b) = (a.cast::<[u8; 4]>().read(), b.cast::<[i8; 4]>().read());
                                    for (a, b) in a.into_iter().zip(b) {
                                        integer += i32::from(a) * i32::from(b);
                                    }
                                }
                            }
                        }
                    }
                }
                match factors {
                    Factors::Bf16 => *to = float,
                    Factors::Bytes => to.cast::<i32>().write(integer),
                }
            }
        }
    }
}

/// # Safety
/// As [`super::Registers::multiply_rows`].
pub(super) unsafe fn multiply_rows(
    rows: *const u8,
    row: usize,
    steps: usize,
    columns: *const u8,
    sums: *mut f32,
    mut meanwhile: impl FnMut(),
) {
    for i in 0..SUMS * TILE * TILE {
        let (block, r, c) = (i / (TILE * TILE), i / TILE % TILE, i % TILE);
        let mut sum = 0f32;
        for step in 0..steps {
            for half in 0..2 {
                for pair in 0..TILE {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let a = rows.wrapping_add(row.wrapping_mul((2 * block + half) * TILE + r));
                        let a = a.wrapping_add(step * TILE_BYTES + 4 * pair);
                        let b = columns.add((((2 * step + half) * TILE + pair) * TILE + c) * 4);
                        let [a, b] = [a, b].map(|p| p.cast::<[bf16; 2]>().read_unaligned());
                        sum += a[0].to_f32() * b[0].to_f32() + a[1].to_f32() * b[1].to_f32();
                    }
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { *sums.add(i) = sum };
    }
    (0..8 * steps).for_each(|_| meanwhile());
}
