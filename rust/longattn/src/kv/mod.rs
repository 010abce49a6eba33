//! Key-value stores in host memory.
