//! The memory of a virtual store: reserved planes, committed slot by slot.

use super::VirtualOptions;
use crate::kv::region::{Region, STEP};
use crate::tensor::{Error, Result};
use std::ops::Range;

/// Reserved address space of one kind of rows in one layer.
pub(super) struct Plane {
    region: Region,
    /// Bytes of one token.
    pub(super) row: usize,
    /// Bytes from one slot to the next.
    pub(super) slot: usize,
}

/// The memory itself; lives as long as somebody looks at it.
pub struct Planes {
    /// Keys and values of layer 0, of layer 1, ...
    pub(super) planes: Vec<Plane>,
    granule: usize,
}

const WHAT: &str = "keys and values of a request";

impl Planes {
    pub(super) fn reserve(options: &VirtualOptions) -> Result<Self> {
        let absurd = || {
            let VirtualOptions { max_requests, max_tokens, kv_heads, head_dim, value_dim, .. } = options;
            let got =
                format!("{max_requests} requests x {max_tokens} tokens of {kv_heads} heads x {head_dim} + {value_dim}");
            Error::value("max_tokens", got, "a store that fits an address space")
        };
        let mut planes = Vec::new();
        for _ in 0..options.layers {
            for dim in [options.head_dim, options.value_dim] {
                let row = dim.checked_mul(options.dtype.size()).and_then(|n| n.checked_mul(options.kv_heads));
                let row = row.ok_or_else(absurd)?;
                let slot =
                    options.max_tokens.checked_mul(row).and_then(|n| n.checked_next_multiple_of(options.granule));
                let slot = slot.ok_or_else(absurd)?;
                let bytes = slot.checked_mul(options.max_requests).filter(|&n| n <= isize::MAX as usize);
                let region = Region::reserve(bytes.ok_or_else(absurd)?, "the address space of a virtual store")?;
                if options.granule < STEP {
                    region.avoid_huge_pages();
                }
                planes.push(Plane { region, row, slot });
            }
        }
        Ok(Self { planes, granule: options.granule })
    }

    /// Bytes that `tokens` rows of a slot need, in whole granules.
    pub(super) fn needed(&self, plane: usize, tokens: usize) -> usize {
        (tokens * self.planes[plane].row).next_multiple_of(self.granule)
    }

    /// Commits bytes `range` of a slot, which hold nothing yet.
    pub(super) fn commit(&self, plane: usize, slot: usize, range: Range<usize>) -> Result<()> {
        let Plane { region, slot: bytes, .. } = &self.planes[plane];
        region.commit_now(slot * bytes + range.start..slot * bytes + range.end, WHAT)
    }

    /// Gives the memory of bytes `range` of a slot back. Where the system cannot, zeroes it and returns false.
    pub(super) fn decommit(&self, plane: usize, slot: usize, range: Range<usize>) -> bool {
        let Plane { region, slot: bytes, .. } = &self.planes[plane];
        let given_back = region.decommit(slot * bytes + range.start..slot * bytes + range.end);
        if !given_back {
            // SAFETY: the range is committed, and its owner is done with it.
            unsafe { self.at(plane, slot).wrapping_add(range.start).write_bytes(0, range.len()) };
        }
        given_back
    }

    /// Reserved bytes of address space.
    pub(super) fn bytes(&self) -> usize {
        self.planes.iter().map(|plane| plane.region.bytes()).sum()
    }

    /// Address of a slot.
    pub(super) fn at(&self, plane: usize, slot: usize) -> *mut u8 {
        let Plane { region, slot: bytes, .. } = &self.planes[plane];
        assert!((slot + 1) * bytes <= region.bytes());
        region.base().wrapping_add(slot * bytes)
    }
}
