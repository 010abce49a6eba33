//! Asking memory for cache lines ahead of their use.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether cache lines are asked for into the second cache. On Intel's CPUs the first one waits for sixteen lines at a time, which
/// memory delivers in less time than it takes to answer; the second one waits for 48.
static SECOND_CACHE: AtomicBool = AtomicBool::new(false);

/// Decides it for this CPU.
pub(super) fn choose_cache() {
    SECOND_CACHE.store(is_intel(), Ordering::Relaxed);
}

/// Whether Intel made this CPU.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        #[allow(unused_unsafe, reason = "older compilers want it")]
        // SAFETY: every x86-64 CPU has the instruction and this leaf.
        let maker = unsafe { std::arch::x86_64::__cpuid(0) };
        [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether [`prefetch`] brings lines into the second cache.
#[inline(always)]
pub(crate) fn asks_second_cache() -> bool {
    SECOND_CACHE.load(Ordering::Relaxed)
}

/// Asks for a cache line ahead of its use. Any address is fine.
#[inline(always)]
pub(crate) fn prefetch<T>(p: *const T) {
    prefetch_into(asks_second_cache(), p);
}

/// [`prefetch`] into the second cache or the first, for loops that have asked [`asks_second_cache`] once.
#[inline(always)]
pub(crate) fn prefetch_into<T>(second_cache: bool, p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address; SSE is in the baseline.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        if second_cache {
            _mm_prefetch::<_MM_HINT_T1>(p.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(p.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (second_cache, p);
}
