//! Python bindings of longattn: arrays in, arrays out; no arithmetic of their own.

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _core {}
