//! Products of four rows of floats with stored rows with AVX2, in assembly: dot products with three stored rows, as decode's `Q K^T`,
//! and sums of stored rows under weights, as its `P V`. The sums and what is multiplied are all of the registers there are, or nearly;
//! compilers keep sums in memory where such a loop is unrolled and spend a quarter of the instructions on addresses where not.
//!
//! Twelve sums let two products begin in every cycle, each of which takes four; of columns there are rarely three vectors, so the
//! other kind has eight. What memory is asked for goes along, a line at a time.

use super::{Next, STORED_KEYS, STORED_ROWS, STORED_STEP};
use crate::tensor::{DType, Storage};
use std::arch::asm;
use std::arch::x86_64::*;

const _: () = assert!(STORED_ROWS == 4 && STORED_KEYS == 3 && STORED_STEP == 32);

/// An instruction that reads from each of the three keys.
#[rustfmt::skip]
macro_rules! load {
    ($instruction:literal, $at:expr) => {
        concat!(
            $instruction, " {x0}, [{k0} + ", $at, "]\n",
            $instruction, " {x1}, [{k1} + ", $at, "]\n",
            $instruction, " {x2}, [{k2} + ", $at, "]\n",
        )
    };
}

/// An instruction for what was read of each.
#[rustfmt::skip]
macro_rules! each {
    ($instruction:literal, $rest:literal) => {
        concat!(
            $instruction, " {x0}, {x0}", $rest, "\n",
            $instruction, " {x1}, {x1}", $rest, "\n",
            $instruction, " {x2}, {x2}", $rest, "\n",
        )
    };
}

/// Elements `8 * $eight` and on of the keys' step of 32. `i` counts 16 a step.
#[rustfmt::skip]
macro_rules! eight {
    (f32, $eight:tt) => { load!("vmovups", concat!("8*{i} + 32*", $eight)) };
    (f16, $eight:tt) => { load!("vcvtph2ps", concat!("4*{i} + 16*", $eight)) };
    (bf16, $eight:tt) => { concat!(load!("vpmovzxwd", concat!("4*{i} + 16*", $eight)), each!("vpslld", ", 16")) };
    (u8, $eight:tt) => { concat!(load!("vpmovzxbd", concat!("2*{i} + 8*", $eight)), each!("vcvtdq2ps", "")) };
    // The low halves of 16 bytes, then the high ones.
    (u4, 0) => { eight!(low, "{i}") };
    (u4, 1) => { eight!(low, "{i} + 8") };
    (u4, 2) => { eight!(high, "{i}") };
    (u4, 3) => { eight!(high, "{i} + 8") };
    (low, $at:literal) => {
        concat!(load!("vpmovzxbd", $at), each!("vpslld", ", 28"), each!("vpsrld", ", 28"), each!("vcvtdq2ps", ""))
    };
    (high, $at:literal) => { concat!(load!("vpmovzxbd", $at), each!("vpsrld", ", 4"), each!("vcvtdq2ps", "")) };
}

/// Products of eight elements of each key with the numbers of the four query rows that they meet.
#[rustfmt::skip]
macro_rules! dots_of_eight {
    ($format:ident, $eight:tt) => {
        concat!(
            eight!($format, $eight),
            "vmovups {q}, [{q0} + 8*{i} + 32*", $eight, "]\n",
            "vfmadd231ps {r0}, {q}, {x0}\nvfmadd231ps {r1}, {q}, {x1}\nvfmadd231ps {r2}, {q}, {x2}\n",
            "vmovups {q}, [{q1} + 8*{i} + 32*", $eight, "]\n",
            "vfmadd231ps {s0}, {q}, {x0}\nvfmadd231ps {s1}, {q}, {x1}\nvfmadd231ps {s2}, {q}, {x2}\n",
            "vmovups {q}, [{q2} + 8*{i} + 32*", $eight, "]\n",
            "vfmadd231ps {t0}, {q}, {x0}\nvfmadd231ps {t1}, {q}, {x1}\nvfmadd231ps {t2}, {q}, {x2}\n",
            "vmovups {q}, [{q3} + 8*{i} + 32*", $eight, "]\n",
            "vfmadd231ps {u0}, {q}, {x0}\nvfmadd231ps {u1}, {q}, {x1}\nvfmadd231ps {u2}, {q}, {x2}\n",
        )
    };
}

/// Asks for as many lines of what comes next as a step reads of three keys.
#[rustfmt::skip]
macro_rules! ask_lines {
    (f32) => { concat!(ask_lines!(f16), "prefetcht0 [{next} + 192]\nprefetcht0 [{next} + 256]\nprefetcht0 [{next} + 320]\n") };
    (f16) => { "prefetcht0 [{next}]\nprefetcht0 [{next} + 64]\nprefetcht0 [{next} + 128]\n" };
    (bf16) => { ask_lines!(f16) };
    (u8) => { "prefetcht0 [{next}]\nprefetcht0 [{next} + 64]\n" };
    (u4) => { "prefetcht0 [{next}]\n" };
}

/// A function of keys and query rows that adds the products of `steps` steps of 32 elements, and another that asks for what comes next.
macro_rules! dots {
    ($name:ident, $asking:ident, $format:ident) => {
        dots!(function $name, $format, "/* {next} {pace} */");
        dots!(function $asking, $format, concat!(ask_lines!($format), "add {next}, {pace}"));
    };
    (function $name:ident, $format:ident, $ask:expr) => {
        /// # Safety
        /// The keys and the query rows are readable for `steps` steps, which is at least one.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        unsafe fn $name(
            sums: &mut Dots,
            [k0, k1, k2]: [*const u8; STORED_KEYS],
            next: Next,
            [q0, q1, q2, q3]: [*const f32; STORED_ROWS],
            steps: usize,
        ) {
            let [[r0, r1, r2], [s0, s1, s2], [t0, t1, t2], [u0, u1, u2]] = sums;
            // SAFETY: reads what the caller vouches for, writes nothing.
            unsafe {
                asm!(
                    ".p2align 4",
                    "2:",
                    $ask,
                    dots_of_eight!($format, 0),
                    dots_of_eight!($format, 1),
                    dots_of_eight!($format, 2),
                    dots_of_eight!($format, 3),
                    "add {i}, 16",
                    "cmp {i}, {end}",
                    "jne 2b",
                    k0 = in(reg) k0,
                    k1 = in(reg) k1,
                    k2 = in(reg) k2,
                    next = inout(reg) next.start => _,
                    pace = in(reg) next.pace,
                    q0 = in(reg) q0,
                    q1 = in(reg) q1,
                    q2 = in(reg) q2,
                    q3 = in(reg) q3,
                    i = inout(reg) 0usize => _,
                    end = in(reg) steps * 16,
                    r0 = inout(ymm_reg) *r0,
                    r1 = inout(ymm_reg) *r1,
                    r2 = inout(ymm_reg) *r2,
                    s0 = inout(ymm_reg) *s0,
                    s1 = inout(ymm_reg) *s1,
                    s2 = inout(ymm_reg) *s2,
                    t0 = inout(ymm_reg) *t0,
                    t1 = inout(ymm_reg) *t1,
                    t2 = inout(ymm_reg) *t2,
                    u0 = inout(ymm_reg) *u0,
                    u1 = inout(ymm_reg) *u1,
                    u2 = inout(ymm_reg) *u2,
                    x0 = out(ymm_reg) _,
                    x1 = out(ymm_reg) _,
                    x2 = out(ymm_reg) _,
                    q = out(ymm_reg) _,
                    options(readonly, nostack),
                );
            }
        }
    };
}

type Dots = [[__m256; STORED_KEYS]; STORED_ROWS];

dots!(dots_f32, dots_f32_asking, f32);
dots!(dots_f16, dots_f16_asking, f16);
dots!(dots_bf16, dots_bf16_asking, bf16);
dots!(dots_u8, dots_u8_asking, u8);
dots!(dots_u4, dots_u4_asking, u4);

/// See [`super::Simd::stored_dots`].
///
/// # Safety
/// As there; the CPU has AVX2, FMA and F16C.
#[inline(always)]
pub(super) unsafe fn dots(
    storage: Storage,
    keys: [*const u8; STORED_KEYS],
    next: Option<Next>,
    queries: [*const f32; STORED_ROWS],
    steps: usize,
) -> Dots {
    macro_rules! dots {
        ($sums:ident, $silent:ident, $asking:ident) => {
            match next {
                Some(next) => $asking(&mut $sums, keys, next, queries, steps),
                None => $silent(&mut $sums, keys, Next::NONE, queries, steps),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); STORED_KEYS]; STORED_ROWS];
        if steps > 0 {
            match storage {
                Storage::Numbers(DType::F32) => dots!(sums, dots_f32, dots_f32_asking),
                Storage::Numbers(DType::F16) => dots!(sums, dots_f16, dots_f16_asking),
                Storage::Numbers(DType::BF16) => dots!(sums, dots_bf16, dots_bf16_asking),
                Storage::Codes(4) => dots!(sums, dots_u4, dots_u4_asking),
                Storage::Codes(_) => dots!(sums, dots_u8, dots_u8_asking),
            }
        }
        sums
    }
}

/// Two vectors of a row, `x` and `y`: the first and the second eight elements of 16; those of even and of odd places of bf16, which
/// takes three instructions and not four; the low and the high halves of eight bytes of codes of 4 bits.
#[rustfmt::skip]
macro_rules! pair {
    (f32) => { "vmovups {x}, [{row} + {at}]\nvmovups {y}, [{row} + {at} + 32]\n" };
    (f16) => { "vcvtph2ps {x}, [{row} + {at}]\nvcvtph2ps {y}, [{row} + {at} + 16]\n" };
    (bf16) => { "vmovups {y}, [{row} + {at}]\nvpslld {x}, {y}, 16\nvandps {y}, {y}, {mask}\n" };
    (u8) => { concat!("vpmovzxbd {x}, [{row} + {at}]\nvpmovzxbd {y}, [{row} + {at} + 8]\n", pair!(floats)) };
    (u4) => { concat!("vpmovzxbd {y}, [{row} + {at}]\nvandps {x}, {y}, {mask}\nvpsrld {y}, {y}, 4\n", pair!(floats)) };
    (floats) => { "vcvtdq2ps {x}, {x}\nvcvtdq2ps {y}, {y}\n" };
}

/// A row under the weights of the four rows of sums: number `$j` from where the pointers are.
#[rustfmt::skip]
macro_rules! weighted {
    ($format:ident, $ask:expr, $j:literal) => {
        concat!(
            "mov {row}, [{rows} + 8*", $j, "]\n",
            pair!($format),
            $ask,
            "vbroadcastss {p}, [{w} + 4*", $j, "]\nvbroadcastss {q}, [{w} + {stride} + 4*", $j, "]\n",
            "vfmadd231ps {r0}, {p}, {x}\nvfmadd231ps {r1}, {p}, {y}\n",
            "vbroadcastss {p}, [{w} + 2*{stride} + 4*", $j, "]\n",
            "vfmadd231ps {s0}, {q}, {x}\nvfmadd231ps {s1}, {q}, {y}\n",
            "vbroadcastss {q}, [{w3} + 4*", $j, "]\n",
            "vfmadd231ps {t0}, {p}, {x}\nvfmadd231ps {t1}, {p}, {y}\n",
            "vfmadd231ps {u0}, {q}, {x}\nvfmadd231ps {u1}, {q}, {y}\n",
        )
    };
}

/// A function that adds a pair of vectors, `at` bytes on in each of `rows`, under its weights to four rows of sums, and another that
/// asks for what comes next.
macro_rules! add {
    ($name:ident, $asking:ident, $format:ident $(, $mask:expr)?) => {
        add!(function $name, $format, "", "/* {next} {pace} */" $(, $mask)?);
        add!(function $asking, $format, "prefetcht0 [{next}]\nadd {next}, {pace}\n", "" $(, $mask)?);
    };
    (function $name:ident, $format:ident, $ask:expr, $unused:literal $(, $mask:expr)?) => {
        /// # Safety
        /// The rows are readable for a pair from byte `at` on, `weights` for a number for each of them in three
        /// rows, `fourth` for as many.
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline]
        unsafe fn $name(
            sums: &mut Sums,
            rows: &[*const u8],
            next: Next,
            at: usize,
            weights: *const f32,
            stride: usize,
            fourth: *const f32,
        ) {
            let [[r0, r1], [s0, s1], [t0, t1], [u0, u1]] = sums;
            // SAFETY: reads the list of rows, and of memory what the caller vouches for; writes nothing.
            unsafe {
                asm!(
                    $unused,
                    "test {fours}, {fours}",
                    "jz 3f",
                    ".p2align 4",
                    "2:",
                    weighted!($format, $ask, 0),
                    weighted!($format, $ask, 1),
                    weighted!($format, $ask, 2),
                    weighted!($format, $ask, 3),
                    "add {rows}, 32",
                    "add {w}, 16",
                    "add {w3}, 16",
                    "dec {fours}",
                    "jnz 2b",
                    "3:",
                    "test {ones}, {ones}",
                    "jz 5f",
                    "4:",
                    weighted!($format, $ask, 0),
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
                    r0 = inout(ymm_reg) *r0,
                    r1 = inout(ymm_reg) *r1,
                    s0 = inout(ymm_reg) *s0,
                    s1 = inout(ymm_reg) *s1,
                    t0 = inout(ymm_reg) *t0,
                    t1 = inout(ymm_reg) *t1,
                    u0 = inout(ymm_reg) *u0,
                    u1 = inout(ymm_reg) *u1,
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

type Sums = [[__m256; 2]; STORED_ROWS];

add!(add_f32, add_f32_asking, f32);
add!(add_f16, add_f16_asking, f16);
add!(add_bf16, add_bf16_asking, bf16, _mm256_set1_epi32(!0xffff));
add!(add_u8, add_u8_asking, u8);
add!(add_u4, add_u4_asking, u4, _mm256_set1_epi32(15));

/// See [`super::Simd::add_stored`].
///
/// # Safety
/// As there; the CPU has AVX2, FMA and F16C.
#[inline(always)]
pub(super) unsafe fn add(
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
    // Columns of `x` and `y`.
    let (first, second) = match storage {
        Storage::Codes(4) => (d / STORED_STEP * STORED_STEP + d % STORED_STEP / 2, STORED_STEP / 2),
        _ => (d, 8),
    };
    let by_turns = storage == Storage::Numbers(DType::BF16);
    let (at, last) = (storage.bytes(d), last.min(STORED_ROWS - 1));
    let fourth = weights.wrapping_add(last * stride);
    macro_rules! add {
        ($sums:ident, $silent:ident, $asking:ident) => {
            match next {
                Some(next) => $asking(&mut $sums, rows, next, at, weights, stride, fourth),
                None => $silent(&mut $sums, rows, Next::NONE, at, weights, stride, fourth),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 2]; STORED_ROWS];
        for (r, sums) in sums.iter_mut().enumerate() {
            let from = outputs.add(r.min(last) * output_stride + first);
            *sums = [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(second))];
            if by_turns {
                *sums = take_turns(*sums);
            }
        }
        match storage {
            Storage::Numbers(DType::F32) => add!(sums, add_f32, add_f32_asking),
            Storage::Numbers(DType::F16) => add!(sums, add_f16, add_f16_asking),
            Storage::Numbers(DType::BF16) => add!(sums, add_bf16, add_bf16_asking),
            Storage::Codes(4) => add!(sums, add_u4, add_u4_asking),
            Storage::Codes(_) => add!(sums, add_u8, add_u8_asking),
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let to = outputs.add(r.min(last) * output_stride + first);
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
