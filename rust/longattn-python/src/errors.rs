//! Errors of the core as Python exceptions.

use longattn::tensor::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError, PyTypeError, PyValueError};

/// The exception that a Python caller expects for an error of the core.
pub(crate) fn to_py(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Value { .. } | Error::Corrupt { .. } => PyValueError::new_err(text),
        Error::Type { .. } => PyTypeError::new_err(text),
        Error::Memory { .. } => PyMemoryError::new_err(text),
        Error::Io { path, source } => match source.raw_os_error() {
            // Given a number, Python makes the subclass: FileNotFoundError and its like.
            Some(number) => {
                let reason = source.to_string();
                let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
                PyOSError::new_err((number, reason, path))
            }
            None => PyOSError::new_err(text),
        },
        Error::Cancelled => PyKeyboardInterrupt::new_err(text),
    }
}
