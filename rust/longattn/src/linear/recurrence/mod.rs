//! Recurrences of matrix states, computed chunk by chunk.
