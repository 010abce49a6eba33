//! Address space that is reserved at once and backed by memory bit by bit. The only file here that talks to the operating system.

use crate::tensor::{Error, Result};
use std::ops::Range;
use std::ptr::NonNull;

#[cfg(not(unix))]
compile_error!("longattn::kv reserves address space with mmap and so needs a unix system");

/// Memory is committed in steps of this many bytes: one huge page of x86-64 and of aarch64 with 4 KiB pages.
pub(super) const STEP: usize = 2 << 20;

/// Bytes of one page of this system.
pub(super) fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// Asks for huge pages behind the whole ones inside some memory, which a scan then reads with fewer address translations.
pub(crate) fn prefer_huge_pages<T>(memory: &mut [std::mem::MaybeUninit<T>]) {
    let (start, bytes) = (memory.as_mut_ptr().cast::<u8>(), size_of_val(memory));
    let shift = start.align_offset(STEP);
    let whole = bytes.saturating_sub(shift) / STEP * STEP;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // SAFETY: advice on pages that lie inside memory of the caller's; contents stay. A kernel without huge pages refuses it.
        unsafe {
            libc::madvise(start.add(shift).cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = whole;
}

/// A reserved range of addresses. Bytes are readable and writable, and zero, once committed; never before.
pub(super) struct Region {
    map: NonNull<u8>,
    map_bytes: usize,
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a region is an address range; all access to its bytes goes through raw pointers whose users state their own rules.
unsafe impl Send for Region {}
// SAFETY: as above; commit and decommit are system calls that may run on any thread.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `bytes` (more than 0) of address space. The base is aligned to [`STEP`] if the region is that large, else to a page.
    pub(super) fn reserve(bytes: usize, what: &'static str) -> Result<Self> {
        let refused = Error::Memory { bytes, what };
        let align = if bytes >= STEP { STEP } else { 1 };
        let Some(map_bytes) = bytes.checked_add(align - 1) else { return Err(refused) };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no memory that is in use.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), map_bytes, libc::PROT_NONE, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return Err(refused);
        }
        let Some(map) = NonNull::new(map.cast::<u8>()) else { return Err(refused) };
        let shift = map.as_ptr().align_offset(align);
        // SAFETY: shift < align, and the mapping has align - 1 bytes more than the region.
        let base = unsafe { map.add(shift) };
        let region = Self { map, map_bytes, base, bytes };
        #[cfg(target_os = "linux")]
        // SAFETY: advice on a mapping that is ours. A kernel without huge pages refuses it, which changes nothing.
        unsafe {
            libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
        }
        Ok(region)
    }

    /// Takes back the wish for huge pages, for an owner whose commits are smaller than one.
    pub(super) fn avoid_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        // SAFETY: advice on a mapping that is ours. A kernel without huge pages refuses it, which changes nothing.
        unsafe {
            libc::madvise(self.base.as_ptr().cast(), self.bytes, libc::MADV_NOHUGEPAGE);
        }
    }

    /// First address.
    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length of the address range.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes a range of whole pages readable and writable. What was committed before keeps its contents.
    pub(super) fn commit(&self, range: Range<usize>, what: &'static str) -> Result<()> {
        let bytes = range.len();
        let refused = Error::Memory { bytes, what };
        // SAFETY: the pages lie in our mapping; giving them more rights invalidates no pointer.
        let status =
            unsafe { libc::mprotect(self.page(&range).as_ptr().cast(), bytes, libc::PROT_READ | libc::PROT_WRITE) };
        if status == 0 { Ok(()) } else { Err(refused) }
    }

    /// As [`commit`](Self::commit), and has the system put memory behind the pages now, not when they are first written. The range
    /// holds nothing yet: it was never committed, or was decommitted.
    pub(super) fn commit_now(&self, range: Range<usize>, what: &'static str) -> Result<()> {
        self.commit(range.clone(), what)?;
        let first = self.page(&range).as_ptr();
        for offset in (0..range.len()).step_by(page_size()) {
            // SAFETY: the page was committed just now; it is zero, and stays so.
            unsafe { first.add(offset).write_volatile(0) };
        }
        Ok(())
    }

    /// Gives the memory of whole committed pages back; they stay readable and writable and read as zero. Returns whether this
    /// system did so.
    pub(super) fn decommit(&self, range: Range<usize>) -> bool {
        let first = self.page(&range);
        if cfg!(target_os = "linux") {
            // SAFETY: the pages lie in our mapping and stay mapped; the caller owns their contents and no longer needs them.
            unsafe { libc::madvise(first.as_ptr().cast(), range.len(), libc::MADV_DONTNEED) == 0 }
        } else {
            // Elsewhere MADV_DONTNEED may keep both the memory and its contents.
            false
        }
    }

    fn page(&self, range: &Range<usize>) -> NonNull<u8> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} outside {} bytes", self.bytes);
        // SAFETY: inside the mapping, by the assertion.
        unsafe { self.base.add(range.start) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `reserve` made; the owner's borrow rules say nobody uses it any more.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_pages_are_zero_and_keep_what_is_written() {
        let region = Region::reserve(16 * STEP, "test").unwrap();
        assert_eq!(region.base().align_offset(STEP), 0);
        region.commit(STEP..2 * STEP, "test").unwrap();
        // SAFETY: the step was committed just now and nobody else uses it.
        let step = unsafe { std::slice::from_raw_parts_mut(region.base().add(STEP), STEP) };
        assert!(step.iter().all(|&b| b == 0));
        step[STEP - 1] = 7;
        region.commit(0..3 * STEP, "test").unwrap();
        assert_eq!(step[STEP - 1], 7);
        if region.decommit(STEP..2 * STEP) {
            assert_eq!(step[STEP - 1], 0);
        }
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(matches!(Region::reserve(usize::MAX - STEP, "test"), Err(Error::Memory { .. })));
        assert!(matches!(Region::reserve(usize::MAX, "test"), Err(Error::Memory { .. })));
    }
}
