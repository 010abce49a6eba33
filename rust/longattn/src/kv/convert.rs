//! Conversion of stored numbers between the element types: exact where it widens, to nearest even where it narrows.

use crate::tensor::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements converted at once through `f32`; small enough for the first-level cache.
const CHUNK: usize = 1024;

/// Converts `n` elements.
///
/// # Safety
/// `source` is readable and `target` writable for `n` elements of their dtypes and aligned for them, and the two do not overlap.
pub(super) unsafe fn convert(source: *const u8, from: DType, target: *mut u8, to: DType, n: usize) {
    if from == to {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(source, target, n * from.size()) };
        return;
    }
    let mut buffer = [0f32; CHUNK];
    for first in (0..n).step_by(CHUNK) {
        let values = &mut buffer[..CHUNK.min(n - first)];
        // SAFETY: elements first..first + values.len() are below n, and the caller promised n of them on both sides.
        unsafe {
            widen(source.add(first * from.size()), from, values);
            narrow(values, target.add(first * to.size()), to);
        }
    }
}

/// # Safety
/// `source` is readable for `out.len()` elements of `dtype` and aligned for it.
pub(super) unsafe fn widen(source: *const u8, dtype: DType, out: &mut [f32]) {
    let n = out.len();
    // SAFETY: the caller's promise, for each of the three element types.
    unsafe {
        match dtype {
            DType::F32 => out.copy_from_slice(std::slice::from_raw_parts(source.cast::<f32>(), n)),
            DType::F16 => std::slice::from_raw_parts(source.cast::<f16>(), n).convert_to_f32_slice(out),
            DType::BF16 => {
                for (out, x) in out.iter_mut().zip(std::slice::from_raw_parts(source.cast::<bf16>(), n)) {
                    *out = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
        }
    }
}

/// # Safety
/// `target` is writable for `values.len()` elements of `dtype` and aligned for it.
#[inline(always)]
pub(crate) unsafe fn narrow(values: &[f32], target: *mut u8, dtype: DType) {
    let n = values.len();
    // SAFETY: the caller's promise, for each of the three element types; committed memory is initialised (zero at first).
    unsafe {
        match dtype {
            DType::F32 => std::slice::from_raw_parts_mut(target.cast::<f32>(), n).copy_from_slice(values),
            DType::F16 => std::slice::from_raw_parts_mut(target.cast::<f16>(), n).convert_from_f32_slice(values),
            DType::BF16 => {
                for (out, &x) in std::slice::from_raw_parts_mut(target.cast::<bf16>(), n).iter_mut().zip(values) {
                    *out = bf16::from_bits(bf16_bits(x));
                }
            }
        }
    }
}

/// Nearest even without a branch, so that the loop above vectorises; a NaN stays one, quiet.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let nan = bits | 0x0040_0000;
    ((if x.is_nan() { nan } else { rounded }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_half_does() {
        let edges =
            [0u32, 1, 0x7f80_0000, 0x7f80_0001, 0xffc0_0000, 0xff80_0000, 0x7f7f_ffff, 0xff7f_ffff, 0x0000_8000];
        let grid = (0..=u32::MAX).step_by(65_521);
        for bits in edges.into_iter().chain(grid) {
            let x = f32::from_bits(bits);
            assert_eq!(bf16_bits(x), bf16::from_f32(x).to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn all_pairs_of_types() {
        let values: Vec<f32> = (0..2500).map(|i| (i as f32 - 1250.0) * 0.5).collect();
        let bytes = |dtype| -> Vec<u32> {
            let mut out = vec![0u32; values.len()];
            // SAFETY: four bytes for each element, aligned for each type.
            unsafe { narrow(&values, out.as_mut_ptr().cast(), dtype) };
            out
        };
        let types = [DType::F32, DType::F16, DType::BF16];
        for from in types {
            for to in types {
                let (source, mut target, mut back) = (bytes(from), vec![0u32; values.len()], vec![0f32; values.len()]);
                // SAFETY: as above; three separate vectors.
                unsafe {
                    convert(source.as_ptr().cast(), from, target.as_mut_ptr().cast(), to, values.len());
                    widen(target.as_ptr().cast(), to, &mut back);
                }
                let round = |x: f32, dtype| match dtype {
                    DType::F32 => x,
                    DType::F16 => f16::from_f32(x).to_f32(),
                    DType::BF16 => bf16::from_f32(x).to_f32(),
                };
                for (x, y) in values.iter().zip(&back) {
                    assert_eq!(round(round(*x, from), to), *y, "{from} to {to}");
                }
            }
        }
    }
}
