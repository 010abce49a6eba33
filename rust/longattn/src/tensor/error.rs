//! The one error type of the crate.

/// Result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong. Messages name the argument, what came and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument has a value that the call cannot use.
    #[error("{argument}: got {got}, expected {expected}")]
    Value {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What came.
        got: String,
        /// What would have been right.
        expected: String,
    },
    /// An argument has an element type that the call cannot use.
    #[error("{argument}: got dtype {got}, expected {expected}")]
    Type {
        /// Name of the argument as the caller knows it.
        argument: &'static str,
        /// What came.
        got: String,
        /// What would have been right.
        expected: String,
    },
    /// The operating system refused memory.
    #[error("out of memory: {bytes} bytes for {what}")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// What they were for.
        what: &'static str,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The operating system's word on it.
        source: std::io::Error,
    },
    /// A file is not what it should be: cut off, altered, or of another kind.
    #[error("{path}: {reason}")]
    Corrupt {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The caller asked for the work to stop.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// A [`Error::Value`] from its three parts.
    pub fn value(argument: &'static str, got: impl ToString, expected: impl ToString) -> Self {
        Self::Value { argument, got: got.to_string(), expected: expected.to_string() }
    }

    /// A [`Error::Type`] from its three parts.
    pub fn dtype(argument: &'static str, got: impl ToString, expected: impl ToString) -> Self {
        Self::Type { argument, got: got.to_string(), expected: expected.to_string() }
    }
}
