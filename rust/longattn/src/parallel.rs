//! One thread pool of our own.
//!
//! rayon's global pool does not survive `fork` (torch's DataLoader forks); this one is keyed by the process id and built anew in
//! a child. Work is split by the caller into items whose number does not depend on the number of threads, so results do not either.

use crate::tensor::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

struct Pool {
    pid: u32,
    threads: usize,
    pool: Arc<rayon::ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// Threads that the pool uses when nothing else was said: `LONGATTN_NUM_THREADS`, else `OMP_NUM_THREADS`, else the processors this
/// process may run on.
pub fn default_num_threads() -> usize {
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        let asked = |name| std::env::var(name).ok()?.trim().parse::<usize>().ok().filter(|&n| n > 0);
        asked("LONGATTN_NUM_THREADS")
            .or_else(|| asked("OMP_NUM_THREADS").map(|n| n.min(available)))
            .unwrap_or(available)
    })
}

fn build(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("longattn-{i}"))
        .build()
        .map(Arc::new)
        .map_err(|e| {
            Error::value("num_threads", format!("{threads} ({e})"), "a number of threads the system can start")
        })
}

/// Sets the number of threads of this process's pool.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if threads == 0 || threads > 4096 {
        return Err(Error::value("num_threads", threads, "1 to 4096"));
    }
    let pool = build(threads)?;
    *POOL.lock().unwrap_or_else(|e| e.into_inner()) = Some(Pool { pid: std::process::id(), threads, pool });
    Ok(())
}

fn pool() -> Result<(Arc<rayon::ThreadPool>, usize)> {
    let mut slot = POOL.lock().unwrap_or_else(|e| e.into_inner());
    let pid = std::process::id();
    let threads = slot.as_ref().map_or_else(default_num_threads, |p| p.threads);
    if slot.as_ref().is_none_or(|p| p.pid != pid) {
        // A pool inherited through fork has no threads behind it; dropping it would wait for them.
        std::mem::forget(slot.take());
        *slot = Some(Pool { pid, threads, pool: build(threads)? });
    }
    let p = slot.as_ref().expect("just built");
    Ok((p.pool.clone(), p.threads))
}

/// Number of threads of the pool.
pub fn num_threads() -> usize {
    let slot = POOL.lock().unwrap_or_else(|e| e.into_inner());
    slot.as_ref().map_or_else(default_num_threads, |p| p.threads)
}

/// A flag that stops long work between two items.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Asks the work that holds this flag to stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked for a stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a call runs.
#[derive(Clone, Debug, Default)]
pub struct Execution {
    /// Stops the call with [`Error::Cancelled`].
    pub cancel: Cancel,
}

/// Runs `work` on items `0..n`, each once, on the calling thread and the pool (on the calling thread alone where there is just one item
/// or thread).
/// Items start in order, so callers put the heavy ones first.
pub(crate) fn for_each<F: Fn(usize) + Sync>(execution: &Execution, n: usize, work: F) -> Result<()> {
    let run = |i: usize| {
        if !execution.cancel.is_cancelled() {
            work(i);
        }
    };
    if n <= 1 {
        (0..n).for_each(run);
    } else {
        let (pool, threads) = pool()?;
        if threads == 1 {
            (0..n).for_each(run);
        } else {
            let next = std::sync::atomic::AtomicUsize::new(0);
            let take = || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= n {
                        break;
                    }
                    run(i);
                }
            };
            // This thread is one of them: it starts while the others wake up, and short calls are done before they all have.
            pool.in_place_scope(|scope| {
                for _ in 1..threads.min(n) {
                    scope.spawn(|_| take());
                }
                take();
            });
        }
    }
    if execution.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

/// As [`for_each`], keeping what each item returns, in the order of the items.
pub(crate) fn map<T: Send, F: Fn(usize) -> T + Sync>(execution: &Execution, n: usize, work: F) -> Result<Vec<T>> {
    let slots: Vec<Mutex<Option<T>>> = (0..n).map(|_| Mutex::new(None)).collect();
    for_each(execution, n, |i| *slots[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(work(i)))?;
    Ok(slots.into_iter().map(|s| s.into_inner().unwrap_or_else(|e| e.into_inner()).expect("every item ran")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_keeps_the_order_and_cancel_stops() {
        let execution = Execution::default();
        assert_eq!(map(&execution, 100, |i| i * i).unwrap(), (0..100).map(|i| i * i).collect::<Vec<_>>());
        execution.cancel.cancel();
        assert!(matches!(map(&execution, 100, |i| i), Err(Error::Cancelled)));
    }
}
