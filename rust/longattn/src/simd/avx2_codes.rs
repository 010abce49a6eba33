//! Products of packed codes with a group's queries with AVX2, in assembly: compilers run short of registers. A query's bytes lie where
//! the instruction that multiplies them reads them.

use super::RepeatedQuad;
use std::arch::asm;
use std::arch::x86_64::*;

/// The levels of 16 keys that are in the bits from `$shift` on.
#[rustfmt::skip]
macro_rules! levels {
    (0) => { "vpand {a}, {x}, {mask}\nvpand {b}, {y}, {mask}\n" };
    ($shift:literal) => {
        concat!(
            "vpsrlw {a}, {x}, ", $shift, "\nvpsrlw {b}, {y}, ", $shift, "\n",
            "vpand {a}, {a}, {mask}\nvpand {b}, {b}, {mask}\n",
        )
    };
}

/// Their products with a query, by quadruple number `$field * $queries + $query`.
#[rustfmt::skip]
macro_rules! products {
    ($sums:literal, $more:literal, $field:literal, $queries:literal, $query:literal) => {
        concat!(
            "vpmaddubsw {t}, {a}, [{quads} + 32*", $queries, "*", $field, " + 32*", $query, "]\n",
            "vpmaddubsw {u}, {b}, [{quads} + 32*", $queries, "*", $field, " + 32*", $query, "]\n",
            "vpaddw {", $sums, "}, {", $sums, "}, {t}\nvpaddw {", $more, "}, {", $more, "}, {u}\n",
        )
    };
}

/// Those with all queries.
#[rustfmt::skip]
macro_rules! with_queries {
    (1, $field:literal) => { products!("s0", "t0", $field, 1, 0) };
    (2, $field:literal) => { concat!(products!("s0", "t0", $field, 2, 0), products!("s1", "t1", $field, 2, 1)) };
    (4, $field:literal) => {
        concat!(
            products!("s0", "t0", $field, 4, 0), products!("s1", "t1", $field, 4, 1),
            products!("s2", "t2", $field, 4, 2), products!("s3", "t3", $field, 4, 3),
        )
    };
}

/// A group of 64 bytes, of codes of so many bits.
#[rustfmt::skip]
macro_rules! group {
    (4, $queries:tt) => { group!($queries; 0 0, 1 4) };
    (2, $queries:tt) => { group!($queries; 0 0, 1 2, 2 4, 3 6) };
    (1, $queries:tt) => { group!($queries; 0 0, 1 1, 2 2, 3 3, 4 4, 5 5, 6 6, 7 7) };
    ($queries:tt; $($field:literal $shift:tt),+) => { concat!($(levels!($shift), with_queries!($queries, $field)),+) };
}

/// A function for codes of `$bits` bits and `$queries` queries: adds the products of `groups` groups of 64 bytes; see
/// [`super::Simd::code_dots`]. `$ask` is how memory is asked for.
macro_rules! dots {
    ($name:ident, $bits:tt, $queries:tt, $ask:literal) => {
        /// # Safety
        /// The CPU has AVX2; `codes` are readable for `groups` groups, `quads` for the quadruples that they meet.
        #[target_feature(enable = "avx2")]
        #[inline]
        unsafe fn $name(
            [[s0, t0], [s1, t1], [s2, t2], [s3, t3]]: &mut [[__m256i; 2]; 4],
            groups: usize,
            codes: *const u8,
            ahead: usize,
            quads: *const RepeatedQuad,
        ) {
            // SAFETY: reads what the caller vouches for; asking for memory never faults.
            unsafe {
                asm!(
                    "/* {s1} {s2} {s3} {t1} {t2} {t3} */",
                    ".p2align 4",
                    "2:",
                    concat!($ask, " [{codes} + {ahead}]"),
                    "vmovdqu {x}, [{codes}]",
                    "vmovdqu {y}, [{codes} + 32]",
                    group!($bits, $queries),
                    "add {codes}, 64",
                    concat!("add {quads}, 8*32*", $queries, "/", $bits),
                    "dec {groups}",
                    "jnz 2b",
                    codes = inout(reg) codes => _,
                    quads = inout(reg) quads => _,
                    groups = inout(reg) groups => _,
                    ahead = in(reg) ahead,
                    s0 = inout(ymm_reg) *s0,
                    s1 = inout(ymm_reg) *s1,
                    s2 = inout(ymm_reg) *s2,
                    s3 = inout(ymm_reg) *s3,
                    t0 = inout(ymm_reg) *t0,
                    t1 = inout(ymm_reg) *t1,
                    t2 = inout(ymm_reg) *t2,
                    t3 = inout(ymm_reg) *t3,
                    x = out(ymm_reg) _,
                    y = out(ymm_reg) _,
                    a = out(ymm_reg) _,
                    b = out(ymm_reg) _,
                    t = out(ymm_reg) _,
                    u = out(ymm_reg) _,
                    mask = in(ymm_reg) _mm256_set1_epi8((1 << $bits) - 1),
                    options(readonly, nostack),
                );
            }
        }
    };
}

/// The functions for one way to ask for memory.
macro_rules! asking {
    ($name:ident, $ask:literal) => {
        mod $name {
            use super::*;
            dots!(four_of_4, 4, 4, $ask);
            dots!(two_of_4, 4, 2, $ask);
            dots!(one_of_4, 4, 1, $ask);
            dots!(four_of_2, 2, 4, $ask);
            dots!(two_of_2, 2, 2, $ask);
            dots!(one_of_2, 2, 1, $ask);
            dots!(four_of_1, 1, 4, $ask);
            dots!(two_of_1, 1, 2, $ask);
            dots!(one_of_1, 1, 1, $ask);

            /// As [`super::dots`].
            ///
            /// # Safety
            /// As there.
            #[inline(always)]
            pub(super) unsafe fn dots<const BITS: usize, const G: usize>(
                sums: &mut [[__m256i; 2]; 4],
                groups: usize,
                codes: *const u8,
                ahead: usize,
                quads: *const RepeatedQuad,
            ) {
                // SAFETY: the caller's promise.
                unsafe {
                    match (BITS, G) {
                        (4, 4) => four_of_4(sums, groups, codes, ahead, quads),
                        (4, 2) => two_of_4(sums, groups, codes, ahead, quads),
                        (4, _) => one_of_4(sums, groups, codes, ahead, quads),
                        (2, 4) => four_of_2(sums, groups, codes, ahead, quads),
                        (2, 2) => two_of_2(sums, groups, codes, ahead, quads),
                        (2, _) => one_of_2(sums, groups, codes, ahead, quads),
                        (_, 4) => four_of_1(sums, groups, codes, ahead, quads),
                        (_, 2) => two_of_1(sums, groups, codes, ahead, quads),
                        (_, _) => one_of_1(sums, groups, codes, ahead, quads),
                    }
                }
            }
        }
    };
}

asking!(into_first, "prefetcht0");
asking!(into_second, "prefetcht1");

/// See [`super::Simd::code_dots`].
///
/// # Safety
/// As there; the CPU has AVX2.
#[inline(always)]
pub(super) unsafe fn dots<const BITS: usize, const G: usize>(
    mut sums: [[__m256i; 2]; G],
    groups: usize,
    codes: *const u8,
    ahead: usize,
    second_cache: bool,
    quads: *const RepeatedQuad,
) -> [[__m256i; 2]; G] {
    const { assert!(matches!(BITS, 1 | 2 | 4) && matches!(G, 1 | 2 | 4) && size_of::<RepeatedQuad>() == 32) };
    let mut all = [sums[0]; 4];
    all[..G].copy_from_slice(&sums);
    if groups > 0 {
        // SAFETY: the caller's promise.
        unsafe {
            if second_cache {
                into_second::dots::<BITS, G>(&mut all, groups, codes, ahead, quads);
            } else {
                into_first::dots::<BITS, G>(&mut all, groups, codes, ahead, quads);
            }
        }
    }
    sums.copy_from_slice(&all[..G]);
    sums
}
