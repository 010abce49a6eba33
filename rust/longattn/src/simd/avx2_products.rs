//! Sums of products of floats with AVX2, in assembly: twelve sums, two columns and two rows are all the registers there are, and
//! compilers, which begin a step before the last one is done, keep sums in memory.

use super::PANEL_VECTORS;
use std::arch::asm;
use std::arch::x86_64::__m256;

/// Rows of sums.
pub(super) const ROWS: usize = 6;

/// A step: a number of each of the rows, `$row` bytes on, times two vectors of columns, `$column` bytes on.
macro_rules! step {
    ($row:literal, $column:literal) => {
        concat!(
            "vmovups {x}, [{b}",
            $column,
            "]\nvmovups {y}, [{b}",
            $column,
            " + 32]\nvbroadcastss {p}, [{a}",
            $row,
            "]\nvbroadcastss {q}, [{a} + {lda}",
            $row,
            "]\nvfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {t0}, {p}, {y}\nvbroadcastss {p}, [{a} + 2*{lda}",
            $row,
            "]\nvfmadd231ps {s1}, {q}, {x}\nvfmadd231ps {t1}, {q}, {y}\nvbroadcastss {q}, [{a3}",
            $row,
            "]\nvfmadd231ps {s2}, {p}, {x}\nvfmadd231ps {t2}, {p}, {y}\nvbroadcastss {p}, [{a3} + {lda}",
            $row,
            "]\nvfmadd231ps {s3}, {q}, {x}\nvfmadd231ps {t3}, {q}, {y}\nvbroadcastss {q}, [{a3} + 2*{lda}",
            $row,
            "]\nvfmadd231ps {s4}, {p}, {x}\nvfmadd231ps {t4}, {p}, {y}\nvfmadd231ps {s5}, {q}, {x}\nvfmadd231ps {t5}, {q}, {y}",
        )
    };
}

/// `sums[r][v] + sum_i a[r * lda + i] b[i * ldb + 8 v ..]` for `i < k`, one product after the other. Four steps share the addresses:
/// 21 instructions a step, where a compiler makes 28, more than a core issues in the time of 12 products while another thread has
/// half of it.
///
/// # Safety
/// `a` is readable for [`ROWS`] rows of `k` floats, `b` for `k` rows of 16.
#[target_feature(enable = "avx2,fma")]
#[inline]
pub(super) unsafe fn multiply(
    sums: [[__m256; PANEL_VECTORS]; ROWS],
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
) -> [[__m256; PANEL_VECTORS]; ROWS] {
    let [[mut s0, mut t0], [mut s1, mut t1], [mut s2, mut t2], [mut s3, mut t3], [mut s4, mut t4], [mut s5, mut t5]] =
        sums;
    // SAFETY: every address is in a row of `a` before its `k`th float, or in one of the first `k` rows of `b`, which the caller
    // vouches for; nothing is written.
    unsafe {
        asm!(
            "test {fours}, {fours}",
            "jz 3f",
            ".p2align 4",
            "2:",
            step!("", ""),
            step!(" + 4", " + {ldb}"),
            step!(" + 8", " + 2*{ldb}"),
            step!(" + 12", " + {ldb3}"),
            "add {a}, 16",
            "add {a3}, 16",
            "lea {b}, [{b} + 4*{ldb}]",
            "dec {fours}",
            "jnz 2b",
            "3:",
            "test {ones}, {ones}",
            "jz 5f",
            "4:",
            step!("", ""),
            "add {a}, 4",
            "add {a3}, 4",
            "add {b}, {ldb}",
            "dec {ones}",
            "jnz 4b",
            "5:",
            fours = inout(reg) k / 4 => _,
            ones = inout(reg) k % 4 => _,
            a = inout(reg) a => _,
            a3 = inout(reg) a.wrapping_add(3 * lda) => _,
            lda = in(reg) lda * size_of::<f32>(),
            b = inout(reg) b => _,
            ldb = in(reg) ldb * size_of::<f32>(),
            ldb3 = in(reg) 3 * ldb * size_of::<f32>(),
            s0 = inout(ymm_reg) s0,
            s1 = inout(ymm_reg) s1,
            s2 = inout(ymm_reg) s2,
            s3 = inout(ymm_reg) s3,
            s4 = inout(ymm_reg) s4,
            s5 = inout(ymm_reg) s5,
            t0 = inout(ymm_reg) t0,
            t1 = inout(ymm_reg) t1,
            t2 = inout(ymm_reg) t2,
            t3 = inout(ymm_reg) t3,
            t4 = inout(ymm_reg) t4,
            t5 = inout(ymm_reg) t5,
            x = out(ymm_reg) _,
            y = out(ymm_reg) _,
            p = out(ymm_reg) _,
            q = out(ymm_reg) _,
            options(readonly, nostack),
        );
    }
    [[s0, t0], [s1, t1], [s2, t2], [s3, t3], [s4, t4], [s5, t5]]
}
