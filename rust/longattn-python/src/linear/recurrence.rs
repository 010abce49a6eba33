//! Recurrences of matrix states.
