//! The machine: instruction sets, threads, and its limits.

use crate::errors::to_py;
use longattn::{limits, parallel, simd};
use pyo3::exceptions::PyRuntimeWarning;
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::ffi::CString;

/// What variables of the environment say: an error where no instruction set of this CPU is named, a warning about a number of threads
/// that is none, and whether calls may run on torch's threads.
pub(crate) fn check_environment(py: Python<'_>) -> PyResult<()> {
    simd::check_environment().map_err(to_py)?;
    if let Err(error) = parallel::check_environment() {
        let text = CString::new(format!("{error}; it is passed over"))?;
        PyErr::warn(py, &py.get_type::<PyRuntimeWarning>(), &text, 1)?;
    }
    parallel::share_openmp(std::env::var_os("LONGATTN_OPENMP").is_none_or(|said| said != "0"));
    Ok(())
}

#[pyfunction]
pub(crate) fn isa() -> &'static str {
    simd::current().name()
}

#[pyfunction]
pub(crate) fn available_isas() -> Vec<&'static str> {
    simd::Isa::available().into_iter().map(simd::Isa::name).collect()
}

#[pyfunction]
pub(crate) fn set_isa(name: &str) -> PyResult<()> {
    simd::Isa::from_name(name).and_then(simd::set_current).map_err(to_py)
}

#[pyfunction]
pub(crate) fn cpu_features() -> BTreeMap<&'static str, bool> {
    simd::cpu_features().into_iter().collect()
}

#[pyfunction]
pub(crate) fn num_threads() -> usize {
    parallel::num_threads()
}

/// Whether a call of this thread runs on torch's threads.
#[pyfunction]
pub(crate) fn shares_openmp() -> bool {
    parallel::shares_openmp()
}

#[pyfunction]
pub(crate) fn set_num_threads(n: usize) -> PyResult<()> {
    parallel::set_num_threads(n).map_err(to_py)
}

/// GB/s (1e9) of reading `bytes` once, each thread its own part.
#[pyfunction]
pub(crate) fn read_bandwidth(py: Python<'_>, bytes: usize, threads: usize) -> PyResult<f64> {
    py.detach(|| limits::read_bandwidth(bytes, threads)).map_err(to_py)
}

/// GFLOP/s of f32 multiply-adds in registers.
#[pyfunction]
pub(crate) fn fma_peak(py: Python<'_>, threads: usize) -> PyResult<f64> {
    py.detach(|| limits::fma_peak(threads)).map_err(to_py)
}
