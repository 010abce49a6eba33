//! Products of a few rows of floats with stored rows with AVX2, in assembly: dot products with several stored rows, as decode's
//! `Q K^T`, and sums of stored rows under weights, as its `P V`. The sums and what is multiplied are all of the registers there are, or
//! nearly; compilers keep sums in memory where such a loop is unrolled and spend a quarter of the instructions on addresses where not.
//!
//! Twelve sums let two products begin in every cycle, each of which takes four. Of columns there are rarely as many, and of the keys that
//! one row meets the addresses would not fit the registers. What memory is asked for goes along, a line at a time.

use super::{Next, STORED_ROWS, STORED_STEP, stored_keys};
use crate::tensor::{DType, Storage};
use std::arch::x86_64::*;

/// Elements `8 * $eight` and on of a key's step of 32. `i` counts 16 a step.
#[rustfmt::skip]
macro_rules! eight {
    (f32, $x:literal, $key:literal, $eight:tt) => {
        concat!("vmovups {", $x, "}, [{", $key, "} + 8*{i} + 32*", $eight, "]\n")
    };
    (f16, $x:literal, $key:literal, $eight:tt) => {
        concat!("vcvtph2ps {", $x, "}, [{", $key, "} + 4*{i} + 16*", $eight, "]\n")
    };
    (bf16, $x:literal, $key:literal, $eight:tt) => {
        concat!("vpmovzxwd {", $x, "}, [{", $key, "} + 4*{i} + 16*", $eight, "]\nvpslld {", $x, "}, {", $x, "}, 16\n")
    };
    (u8, $x:literal, $key:literal, $eight:tt) => {
        concat!("vpmovzxbd {", $x, "}, [{", $key, "} + 2*{i} + 8*", $eight, "]\nvcvtdq2ps {", $x, "}, {", $x, "}\n")
    };
    // The low halves of 16 bytes, then the high ones.
    (u4, $x:literal, $key:literal, 0) => { eight!(low, $x, $key, 0) };
    (u4, $x:literal, $key:literal, 1) => { eight!(low, $x, $key, 8) };
    (u4, $x:literal, $key:literal, 2) => { eight!(high, $x, $key, 0) };
    (u4, $x:literal, $key:literal, 3) => { eight!(high, $x, $key, 8) };
    (low, $x:literal, $key:literal, $at:literal) => {
        concat!(
            "vpmovzxbd {", $x, "}, [{", $key, "} + {i} + ", $at, "]\nvpslld {", $x, "}, {", $x, "}, 28\n",
            "vpsrld {", $x, "}, {", $x, "}, 28\nvcvtdq2ps {", $x, "}, {", $x, "}\n",
        )
    };
    (high, $x:literal, $key:literal, $at:literal) => {
        concat!(
            "vpmovzxbd {", $x, "}, [{", $key, "} + {i} + ", $at, "]\n",
            "vpsrld {", $x, "}, {", $x, "}, 4\nvcvtdq2ps {", $x, "}, {", $x, "}\n",
        )
    };
}

/// Eight numbers of a query row.
macro_rules! query {
    ($q:literal, $row:literal, $eight:tt) => {
        concat!("vmovups {", $q, "}, [{", $row, "} + 8*{i} + 32*", $eight, "]\n")
    };
}

/// Products of eight elements of each key with the numbers of the query rows that they meet: of four rows and three keys, of two and
/// six, of one and six.
#[rustfmt::skip]
macro_rules! dots_of_eight {
    (four, $format:ident, $eight:tt) => {
        concat!(
            eight!($format, "x", "k0", $eight),
            eight!($format, "y", "k1", $eight),
            eight!($format, "z", "k2", $eight),
            query!("p", "q0", $eight),
            "vfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {s1}, {p}, {y}\nvfmadd231ps {s2}, {p}, {z}\n",
            query!("p", "q1", $eight),
            "vfmadd231ps {s3}, {p}, {x}\nvfmadd231ps {s4}, {p}, {y}\nvfmadd231ps {s5}, {p}, {z}\n",
            query!("p", "q2", $eight),
            "vfmadd231ps {s6}, {p}, {x}\nvfmadd231ps {s7}, {p}, {y}\nvfmadd231ps {s8}, {p}, {z}\n",
            query!("p", "q3", $eight),
            "vfmadd231ps {s9}, {p}, {x}\nvfmadd231ps {s10}, {p}, {y}\nvfmadd231ps {s11}, {p}, {z}\n",
        )
    };
    (two, $format:ident, $eight:tt) => {
        concat!(
            query!("p", "q0", $eight),
            query!("q", "q1", $eight),
            eight!($format, "x", "k0", $eight), "vfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {s6}, {q}, {x}\n",
            eight!($format, "y", "k1", $eight), "vfmadd231ps {s1}, {p}, {y}\nvfmadd231ps {s7}, {q}, {y}\n",
            eight!($format, "x", "k2", $eight), "vfmadd231ps {s2}, {p}, {x}\nvfmadd231ps {s8}, {q}, {x}\n",
            eight!($format, "y", "k3", $eight), "vfmadd231ps {s3}, {p}, {y}\nvfmadd231ps {s9}, {q}, {y}\n",
            eight!($format, "x", "k4", $eight), "vfmadd231ps {s4}, {p}, {x}\nvfmadd231ps {s10}, {q}, {x}\n",
            eight!($format, "y", "k5", $eight), "vfmadd231ps {s5}, {p}, {y}\nvfmadd231ps {s11}, {q}, {y}\n",
        )
    };
    (one, $format:ident, $eight:tt) => {
        concat!(
            query!("p", "q0", $eight),
            eight!($format, "x", "k0", $eight), "vfmadd231ps {s0}, {p}, {x}\n",
            eight!($format, "y", "k1", $eight), "vfmadd231ps {s1}, {p}, {y}\n",
            eight!($format, "x", "k2", $eight), "vfmadd231ps {s2}, {p}, {x}\n",
            eight!($format, "y", "k3", $eight), "vfmadd231ps {s3}, {p}, {y}\n",
            eight!($format, "x", "k4", $eight), "vfmadd231ps {s4}, {p}, {x}\n",
            eight!($format, "y", "k5", $eight), "vfmadd231ps {s5}, {p}, {y}\n",
        )
    };
}

/// Asks for as many lines of what comes next as a step reads of three or six keys.
#[rustfmt::skip]
macro_rules! ask_keys {
    (three, f32) => { lines!(" " " + 64" " + 128" " + 192" " + 256" " + 320") };
    (three, f16) => { lines!(" " " + 64" " + 128") };
    (three, bf16) => { ask_keys!(three, f16) };
    (three, u8) => { lines!(" " " + 64") };
    (three, u4) => { lines!(" ") };
    (six, f32) => {
        concat!(ask_keys!(three, f32), lines!(" + 384" " + 448" " + 512" " + 576" " + 640" " + 704"))
    };
    (six, f16) => { ask_keys!(three, f32) };
    (six, bf16) => { ask_keys!(three, f32) };
    (six, u8) => { ask_keys!(three, f16) };
    (six, u4) => { ask_keys!(three, u8) };
}

macro_rules! lines {
    ($($at:literal)+) => { concat!($("prefetcht0 [{next}", $at, "]\n"),+) };
}

/// The functions [`dots`] chooses from, for one kind of elements: they add the products of `steps` steps of 32 elements of keys with query
/// rows; those that ask, for what comes next as well.
macro_rules! dots {
    ($format:ident) => {
        dots!(four, $format, "/* {next} {pace} */", four);
        dots!(four_asking, $format, concat!(ask_keys!(three, $format), "add {next}, {pace}"), four);
        dots!(two, $format, "/* {next} {pace} */", two);
        dots!(two_asking, $format, concat!(ask_keys!(six, $format), "add {next}, {pace}"), two);
        dots!(one, $format, "/* {next} {pace} */", one);
        dots!(one_asking, $format, concat!(ask_keys!(six, $format), "add {next}, {pace}"), one);
    };
    ($name:ident, $format:ident, $ask:expr, four) => {
        dots!(
            $name, $format, four, $ask, [k0 k1 k2], [q0 q1 q2 q3], [s0 s1 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11], [x y z p]
        );
    };
    ($name:ident, $format:ident, $ask:expr, two) => {
        dots!(
            $name, $format, two, $ask, [k0 k1 k2 k3 k4 k5], [q0 q1], [s0 s1 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11], [x y p q]
        );
    };
    ($name:ident, $format:ident, $ask:expr, one) => {
        dots!($name, $format, one, $ask, [k0 k1 k2 k3 k4 k5], [q0], [s0 s1 s2 s3 s4 s5], [x y p]);
    };
    (
        $name:ident, $format:ident, $rows:ident, $ask:expr, [$($key:ident)+], [$($query:ident)+], [$($sum:ident)+],
        [$($temporary:ident)+]
    ) => {
        /// # Safety
        /// The keys and the query rows are readable for `steps` steps, which is at least one.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(in super::super) unsafe fn $name(
            [$($sum,)+ ..]: &mut [__m256; MOST_SUMS],
            [$($key,)+ ..]: &[*const u8; MOST_KEYS],
            next: Next,
            [$($query,)+ ..]: &[*const f32; MOST_ROWS],
            steps: usize,
        ) {
            // SAFETY: reads what the caller vouches for, writes nothing.
            unsafe {
                asm!(
                    ".p2align 4",
                    "2:",
                    $ask,
                    dots_of_eight!($rows, $format, 0),
                    dots_of_eight!($rows, $format, 1),
                    dots_of_eight!($rows, $format, 2),
                    dots_of_eight!($rows, $format, 3),
                    "add {i}, 16",
                    "cmp {i}, {end}",
                    "jne 2b",
                    $($key = in(reg) *$key,)+
                    $($query = in(reg) *$query,)+
                    next = inout(reg) next.start => _,
                    pace = in(reg) next.pace,
                    i = inout(reg) 0usize => _,
                    end = in(reg) steps * 16,
                    $($sum = inout(ymm_reg) *$sum,)+
                    $($temporary = out(ymm_reg) _,)+
                    options(readonly, nostack),
                );
            }
        }
    };
}

/// Two vectors of a row, `x` and `y`, number `$pair` from byte `at` on: the first and the second eight elements of 16; those of even and
/// of odd places of bf16, which takes three instructions and not four; the low and the high halves of eight bytes of codes of 4 bits.
#[rustfmt::skip]
macro_rules! pair {
    (f32, $pair:literal) => {
        concat!("vmovups {x}, [{row} + {at} + 64*", $pair, "]\nvmovups {y}, [{row} + {at} + 64*", $pair, " + 32]\n")
    };
    (f16, $pair:literal) => {
        concat!("vcvtph2ps {x}, [{row} + {at} + 32*", $pair, "]\nvcvtph2ps {y}, [{row} + {at} + 32*", $pair, " + 16]\n")
    };
    (bf16, $pair:literal) => {
        concat!("vmovups {y}, [{row} + {at} + 32*", $pair, "]\nvpslld {x}, {y}, 16\nvandps {y}, {y}, {mask}\n")
    };
    (u8, $pair:literal) => {
        concat!(
            "vpmovzxbd {x}, [{row} + {at} + 16*", $pair, "]\nvpmovzxbd {y}, [{row} + {at} + 16*", $pair, " + 8]\n",
            "vcvtdq2ps {x}, {x}\nvcvtdq2ps {y}, {y}\n",
        )
    };
    (u4, $pair:literal) => {
        concat!(
            "vpmovzxbd {y}, [{row} + {at} + 8*", $pair, "]\nvandps {x}, {y}, {mask}\nvpsrld {y}, {y}, 4\n",
            "vcvtdq2ps {x}, {x}\nvcvtdq2ps {y}, {y}\n",
        )
    };
}

/// A row under the weights of the rows of sums, number `$j` from where the pointers are: a pair of its vectors in four rows of sums, two
/// in two, four in one.
#[rustfmt::skip]
macro_rules! weighted {
    ($rows:ident, $format:ident, $ask:expr, $j:literal) => {
        concat!("mov {row}, [{rows} + 8*", $j, "]\n", $ask, weighted!($rows, $format, $j))
    };
    (four, $format:ident, $j:literal) => {
        concat!(
            pair!($format, 0),
            "vbroadcastss {p}, [{w} + 4*", $j, "]\nvbroadcastss {q}, [{w} + {stride} + 4*", $j, "]\n",
            "vfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {s1}, {p}, {y}\n",
            "vbroadcastss {p}, [{w} + 2*{stride} + 4*", $j, "]\n",
            "vfmadd231ps {s2}, {q}, {x}\nvfmadd231ps {s3}, {q}, {y}\n",
            "vbroadcastss {q}, [{w3} + 4*", $j, "]\n",
            "vfmadd231ps {s4}, {p}, {x}\nvfmadd231ps {s5}, {p}, {y}\n",
            "vfmadd231ps {s6}, {q}, {x}\nvfmadd231ps {s7}, {q}, {y}\n",
        )
    };
    (two, $format:ident, $j:literal) => {
        concat!(
            "vbroadcastss {p}, [{w} + 4*", $j, "]\nvbroadcastss {q}, [{w} + {stride} + 4*", $j, "]\n",
            pair!($format, 0),
            "vfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {s1}, {p}, {y}\n",
            "vfmadd231ps {s4}, {q}, {x}\nvfmadd231ps {s5}, {q}, {y}\n",
            pair!($format, 1),
            "vfmadd231ps {s2}, {p}, {x}\nvfmadd231ps {s3}, {p}, {y}\n",
            "vfmadd231ps {s6}, {q}, {x}\nvfmadd231ps {s7}, {q}, {y}\n",
        )
    };
    (one, $format:ident, $j:literal) => {
        concat!(
            "vbroadcastss {p}, [{w} + 4*", $j, "]\n",
            pair!($format, 0), "vfmadd231ps {s0}, {p}, {x}\nvfmadd231ps {s1}, {p}, {y}\n",
            pair!($format, 1), "vfmadd231ps {s2}, {p}, {x}\nvfmadd231ps {s3}, {p}, {y}\n",
            pair!($format, 2), "vfmadd231ps {s4}, {p}, {x}\nvfmadd231ps {s5}, {p}, {y}\n",
            pair!($format, 3), "vfmadd231ps {s6}, {p}, {x}\nvfmadd231ps {s7}, {p}, {y}\n",
        )
    };
}

/// Asks for as many lines of what comes next as a row has in 16 columns, 32 or 64.
#[rustfmt::skip]
macro_rules! ask_columns {
    (16, $format:ident) => { lines!(" ") };
    (32, f32) => { lines!(" " " + 64") };
    (32, $format:ident) => { lines!(" ") };
    (64, f32) => { lines!(" " " + 64" " + 128" " + 192") };
    (64, f16) => { lines!(" " " + 64") };
    (64, bf16) => { lines!(" " " + 64") };
    (64, $format:ident) => { lines!(" ") };
}

/// The functions [`add`] chooses from, for one kind of elements: they add pairs of vectors, from byte `at` on in each of `rows`, under the
/// row's weights to as many rows of sums as their names say; those that ask, ask for what comes next as well.
macro_rules! add {
    ($format:ident $(, $mask:expr)?) => {
        add!(four, $format, "", four $(, $mask)?);
        add!(four_asking, $format, concat!(ask_columns!(16, $format), "add {next}, {pace}\n"), four $(, $mask)?);
        add!(two, $format, "", two $(, $mask)?);
        add!(two_asking, $format, concat!(ask_columns!(32, $format), "add {next}, {pace}\n"), two $(, $mask)?);
        add!(one, $format, "", one $(, $mask)?);
        add!(one_asking, $format, concat!(ask_columns!(64, $format), "add {next}, {pace}\n"), one $(, $mask)?);
    };
    ($name:ident, $format:ident, $ask:expr, $rows:ident $(, $mask:expr)?) => {
        /// # Safety
        /// The rows are readable from byte `at` on for the pairs, `weights` for a number for each of them in as many rows as are added
        /// to but the fourth, `fourth` for as many.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        pub(in super::super) unsafe fn $name(
            [s0, s1, s2, s3, s4, s5, s6, s7]: &mut [__m256; COLUMN_SUMS],
            rows: &[*const u8],
            next: Next,
            at: usize,
            weights: *const f32,
            stride: usize,
            fourth: *const f32,
        ) {
            // SAFETY: reads the list of rows, and of memory what the caller vouches for; writes nothing.
            unsafe {
                asm!(
                    "/* {next} {pace} {w3} {stride} {q} */",
                    "test {fours}, {fours}",
                    "jz 3f",
                    ".p2align 4",
                    "2:",
                    weighted!($rows, $format, $ask, 0),
                    weighted!($rows, $format, $ask, 1),
                    weighted!($rows, $format, $ask, 2),
                    weighted!($rows, $format, $ask, 3),
                    "add {rows}, 32",
                    "add {w}, 16",
                    "add {w3}, 16",
                    "dec {fours}",
                    "jnz 2b",
                    "3:",
                    "test {ones}, {ones}",
                    "jz 5f",
                    "4:",
                    weighted!($rows, $format, $ask, 0),
                    "add {rows}, 8",
                    "add {w}, 4",
                    "add {w3}, 4",
                    "dec {ones}",
                    "jnz 4b",
                    "5:",
                    rows = inout(reg) rows.as_ptr() => _,
                    fours = inout(reg) rows.len() / 4 => _,
                    ones = inout(reg) rows.len() % 4 => _,
                    row = out(reg) _,
                    at = in(reg) at,
                    next = inout(reg) next.start => _,
                    pace = in(reg) next.pace,
                    w = inout(reg) weights => _,
                    w3 = inout(reg) fourth => _,
                    stride = in(reg) stride * size_of::<f32>(),
                    s0 = inout(ymm_reg) *s0,
                    s1 = inout(ymm_reg) *s1,
                    s2 = inout(ymm_reg) *s2,
                    s3 = inout(ymm_reg) *s3,
                    s4 = inout(ymm_reg) *s4,
                    s5 = inout(ymm_reg) *s5,
                    s6 = inout(ymm_reg) *s6,
                    s7 = inout(ymm_reg) *s7,
                    x = out(ymm_reg) _,
                    y = out(ymm_reg) _,
                    p = out(ymm_reg) _,
                    q = out(ymm_reg) _,
                    $(mask = in(ymm_reg) $mask,)?
                    options(readonly, nostack),
                );
            }
        }
    };
}

/// [`dots`] and [`add`] for one kind of elements.
macro_rules! kind {
    ($name:ident, $format:ident $(, $mask:expr)?) => {
        mod $name {
            pub(super) mod dots {
                use super::super::{MOST_KEYS, MOST_ROWS, MOST_SUMS, Next};
                use std::arch::{asm, x86_64::__m256};
                dots!($format);
            }
            pub(super) mod add {
                use super::super::{COLUMN_SUMS, Next};
                use std::arch::{asm, x86_64::*};
                add!($format $(, $mask)?);
            }
        }
    };
}

kind!(of_f32, f32);
kind!(of_f16, f16);
kind!(of_bf16, bf16, _mm256_set1_epi32(!0xffff));
kind!(of_u8, u8);
kind!(of_u4, u4, _mm256_set1_epi32(15));

/// Calls a macro with the [`kind`] of elements that a storage has.
macro_rules! of_storage {
    ($storage:expr, $call:ident) => {
        match $storage {
            Storage::Numbers(DType::F32) => $call!(of_f32),
            Storage::Numbers(DType::F16) => $call!(of_f16),
            Storage::Numbers(DType::BF16) => $call!(of_bf16),
            Storage::Codes(4) => $call!(of_u4),
            Storage::Codes(_) => $call!(of_u8),
        }
    };
}

const MOST_ROWS: usize = STORED_ROWS;
const MOST_KEYS: usize = stored_keys(1);
const MOST_SUMS: usize = 12;

/// Vectors of columns times rows of sums.
const COLUMN_SUMS: usize = 8;

const _: () = assert!(STORED_ROWS == 4 && stored_keys(4) == 3 && stored_keys(2) == 6 && STORED_STEP == 32);

/// See [`super::Simd::stored_dots`].
///
/// # Safety
/// As there; the CPU has AVX2, FMA and F16C.
#[inline(always)]
pub(super) unsafe fn dots<const R: usize, const C: usize>(
    storage: Storage,
    keys: [*const u8; C],
    next: Option<Next>,
    queries: [*const f32; R],
    steps: usize,
) -> [[__m256; C]; R] {
    let (mut all_keys, mut all_queries) = ([std::ptr::null(); MOST_KEYS], [std::ptr::null(); MOST_ROWS]);
    all_keys[..C].copy_from_slice(&keys);
    all_queries[..R].copy_from_slice(&queries);
    let (keys, queries, no) = (&all_keys, &all_queries, Next::NONE);
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); MOST_SUMS];
        macro_rules! of {
            ($kind:ident) => {
                match (R, next) {
                    (4, Some(next)) => $kind::dots::four_asking(&mut sums, keys, next, queries, steps),
                    (4, None) => $kind::dots::four(&mut sums, keys, no, queries, steps),
                    (2, Some(next)) => $kind::dots::two_asking(&mut sums, keys, next, queries, steps),
                    (2, None) => $kind::dots::two(&mut sums, keys, no, queries, steps),
                    (_, Some(next)) => $kind::dots::one_asking(&mut sums, keys, next, queries, steps),
                    (_, None) => $kind::dots::one(&mut sums, keys, no, queries, steps),
                }
            };
        }
        if steps > 0 {
            of_storage!(storage, of);
        }
        let mut rows = [[_mm256_setzero_ps(); C]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            for (c, sum) in row.iter_mut().enumerate() {
                *sum = sums[r * C + c];
            }
        }
        rows
    }
}

/// See [`super::Simd::add_stored`].
///
/// # Safety
/// As there; the CPU has AVX2, FMA and F16C.
#[inline(always)]
pub(super) unsafe fn add<const R: usize>(
    storage: Storage,
    rows: &[*const u8],
    next: Option<Next>,
    d: usize,
    last: usize,
    weights: *const f32,
    stride: usize,
    outputs: *mut f32,
    output_stride: usize,
) {
    let vectors = COLUMN_SUMS / R;
    // Columns of a pair of vectors.
    let columns = |pair: usize| {
        let d = d + STORED_STEP / 2 * pair;
        match storage {
            Storage::Codes(4) => [d / STORED_STEP * STORED_STEP + d % STORED_STEP / 2, STORED_STEP / 2],
            _ => [d, 8],
        }
    };
    let by_turns = storage == Storage::Numbers(DType::BF16);
    let (at, last, no) = (storage.bytes(d), last.min(R - 1), Next::NONE);
    let fourth = weights.wrapping_add(last * stride);
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); COLUMN_SUMS];
        for (i, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let [first, second] = columns(2 * i % vectors / 2);
            let from = outputs.add((2 * i / vectors).min(last) * output_stride + first);
            *sums = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(second))];
            if by_turns {
                *sums = take_turns(*sums);
            }
        }
        macro_rules! of {
            ($kind:ident) => {
                match (R, next) {
                    (4, Some(next)) => $kind::add::four_asking(&mut sums, rows, next, at, weights, stride, fourth),
                    (4, None) => $kind::add::four(&mut sums, rows, no, at, weights, stride, fourth),
                    (2, Some(next)) => $kind::add::two_asking(&mut sums, rows, next, at, weights, stride, fourth),
                    (2, None) => $kind::add::two(&mut sums, rows, no, at, weights, stride, fourth),
                    (_, Some(next)) => $kind::add::one_asking(&mut sums, rows, next, at, weights, stride, fourth),
                    (_, None) => $kind::add::one(&mut sums, rows, no, at, weights, stride, fourth),
                }
            };
        }
        of_storage!(storage, of);
        for (i, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let [first, second] = columns(2 * i % vectors / 2);
            let to = outputs.add((2 * i / vectors).min(last) * output_stride + first);
            if by_turns {
                *sums = in_order(*sums);
            }
            _mm256_storeu_ps(to, sums[0]);
            _mm256_storeu_ps(to.add(second), sums[1]);
        }
    }
}

/// The numbers at even and those at odd places of 16.
#[target_feature(enable = "avx2")]
#[inline]
fn take_turns([a, b]: [__m256; 2]) -> [__m256; 2] {
    let (even, odd) = (_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
    let (even, odd) = (_mm256_castps_pd(even), _mm256_castps_pd(odd));
    let (even, odd) = (_mm256_permute4x64_pd::<0xd8>(even), _mm256_permute4x64_pd::<0xd8>(odd));
    [_mm256_castpd_ps(even), _mm256_castpd_ps(odd)]
}

/// What [`take_turns`] was given.
#[target_feature(enable = "avx2")]
#[inline]
fn in_order([even, odd]: [__m256; 2]) -> [__m256; 2] {
    let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
    [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
}
