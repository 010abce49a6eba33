//! A graph over the keys of each head, searched by a beam instead of a scan.

mod build;
mod links;
mod neighbours;
mod prune;
mod search;
#[cfg(test)]
mod tests;
