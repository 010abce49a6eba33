//! Merging partial results by their log-sum-exp.

use super::scores::exp_difference;
use crate::parallel::{Execution, for_each};
use crate::tensor::{DType, Element, Error, Result, TensorView, TensorViewMut, with_element};

/// Merges attention results over disjoint sets of keys: `out = sum_i exp(lse_i - lse) out_i`, `lse = ln sum_i exp(lse_i)`.
///
/// Each part is an output `[batch, heads, queries, dim]` and its lse `[batch, heads, queries, 1]` in f32. Associative up to
/// rounding; parts of minus infinity add nothing, whatever their output holds.
pub fn merge(
    parts: &[(TensorView, TensorView)],
    out: &mut TensorViewMut,
    lse: &mut TensorViewMut,
    execution: &Execution,
) -> Result<()> {
    let shape = out.shape();
    let rows = [shape[0], shape[1], shape[2], 1];
    if lse.shape() != rows || lse.dtype() != DType::F32 {
        return Err(Error::value("lse", format!("{} {:?}", lse.dtype(), lse.shape()), format!("float32 {rows:?}")));
    }
    for (o, l) in parts {
        if o.shape() != shape || l.shape() != rows || l.dtype() != DType::F32 {
            let got = format!("output {:?} with lse {} {:?}", o.shape(), l.dtype(), l.shape());
            return Err(Error::value("parts", got, format!("output {shape:?} with lse float32 {rows:?}")));
        }
    }
    let (out, lse) = (&*out, &*lse);
    for_each(execution, shape[0] * shape[1], |head| {
        let (b, h) = (head / shape[1], head % shape[1]);
        let mut sum = vec![0f32; shape[3]];
        for row in 0..shape[2] {
            let lses = parts.iter().map(|(_, l)| l.row::<f32>(b, h, row)[0]);
            let max = lses.clone().fold(f32::NEG_INFINITY, f32::max);
            sum.fill(0.0);
            let mut total = 0f32;
            for ((o, _), l) in parts.iter().zip(lses) {
                let weight = exp_difference(l, max);
                if weight == 0.0 {
                    continue;
                }
                total += weight;
                with_element!(o.dtype(), T => {
                    for (to, x) in sum.iter_mut().zip(o.row::<T>(b, h, row)) {
                        *to += weight * x.to_f32();
                    }
                });
            }
            let merged = if total == 0.0 { f32::NEG_INFINITY } else { max + total.ln() };
            let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
            with_element!(out.dtype(), T => {
                let to = out.row_ptr::<T>(b, h, row);
                for (d, x) in sum.iter().enumerate() {
                    // SAFETY: the row has shape[3] elements and only this worker writes it.
                    unsafe { to.add(d).write(T::from_f32(x * factor)) };
                }
            });
            // SAFETY: lse has one element per row.
            unsafe { lse.row_ptr::<f32>(b, h, row).write(merged) };
        }
    })
}
