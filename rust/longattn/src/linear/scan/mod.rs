//! Scans of states that hold a few numbers per channel, one row after another.

mod diagonal;
mod diagonal_gradient;
mod gradient;
mod selective;

pub use diagonal::{DiagonalScan, diagonal_scan};
pub use diagonal_gradient::{DiagonalOutputs, diagonal_scan_backward};
pub use gradient::{SelectiveOutputs, selective_scan_backward};
pub use selective::{SelectiveScan, selective_scan};
