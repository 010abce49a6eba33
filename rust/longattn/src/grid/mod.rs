//! Operations on grids of feature rows, `[batch, t, y, x, channels]`, in one to three dimensions (the missing ones have extent 1).

mod paths;
mod sample;

pub use paths::{Paths, path_bias};
pub use sample::{Points, Sampling, sample};

use crate::tensor::{Error, Result, TensorView};

/// Whether `x`, `[batch, t * y, x, channels]`, is a grid of this extent.
fn check_grid(x: &TensorView, extent: [usize; 3]) -> Result<()> {
    let [_, rows, columns, _] = x.shape();
    if Some(rows) != extent[0].checked_mul(extent[1]) || columns != extent[2] {
        return Err(Error::value("extent", format!("{extent:?}"), format!("{rows} rows of {columns}")));
    }
    Ok(())
}
