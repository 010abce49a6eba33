//! Threads: a pool of our own, or torch's.
//!
//! A pool survives `fork` (torch's DataLoader forks): it is keyed by the process id and built anew in a child. Work is split by the
//! caller into items whose number does not depend on the number of threads, so results do not either, nor on whose threads they are.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod openmp;
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
#[path = "no_openmp.rs"]
mod openmp;
mod workers;

use crate::tensor::{Error, Result};
pub use openmp::{share_openmp, shares_openmp};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use workers::Workers;

struct Pool {
    pid: u32,
    workers: Arc<Workers>,
}

/// What was asked for, and what there is.
struct Threads {
    /// By [`set_num_threads`].
    asked: Option<usize>,
    pool: Option<Pool>,
}

static THREADS: Mutex<Threads> = Mutex::new(Threads { asked: None, pool: None });

/// What threads that work together leave for the one that called: the first panic of any of them.
#[derive(Default)]
struct FirstPanic(Mutex<Option<Box<dyn Any + Send>>>);

impl FirstPanic {
    /// Runs `work` and lets no panic out.
    fn catch(&self, work: &(dyn Fn() + Sync)) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            locked(&self.0).get_or_insert(panic);
        }
    }

    /// Goes on with the panic, if there was one.
    fn resume(&self) {
        let panic = locked(&self.0).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Threads that calls use when nothing else was said: `LONGATTN_NUM_THREADS`, else `OMP_NUM_THREADS`, else the processors this process
/// may run on.
pub fn default_num_threads() -> usize {
    static DEFAULT: OnceLock<usize> = OnceLock::new();
    *DEFAULT.get_or_init(|| {
        let available = std::thread::available_parallelism().map_or(1, |n| n.get());
        let openmp = || in_environment("OMP_NUM_THREADS").map(|n| n.min(available));
        asked_of_environment().or_else(openmp).unwrap_or(available)
    })
}

fn in_environment(name: &str) -> Option<usize> {
    threads_of(&std::env::var(name).ok()?)
}

fn asked_of_environment() -> Option<usize> {
    static ASKED: OnceLock<Option<usize>> = OnceLock::new();
    *ASKED.get_or_init(|| in_environment(VARIABLE))
}

/// The environment variable that says how many threads there shall be.
const VARIABLE: &str = "LONGATTN_NUM_THREADS";

/// The most threads of a pool.
const MOST: usize = 4096;

/// A number of threads as variables of the environment write it.
fn threads_of(text: &str) -> Option<usize> {
    text.trim().parse().ok().filter(|n| (1..=MOST).contains(n))
}

/// An error when `LONGATTN_NUM_THREADS` is no number of threads, which [`default_num_threads`] passes over.
pub fn check_environment() -> Result<()> {
    let Some(given) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let given = given.to_string_lossy();
    if given.trim().is_empty() || threads_of(&given).is_some() {
        return Ok(());
    }
    Err(Error::value(VARIABLE, format!("{given:?}"), format!("a number of threads, 1 to {MOST}")))
}

/// Sets the number of threads of later calls of this process.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if threads == 0 || threads > MOST {
        return Err(Error::value("num_threads", threads, format!("1 to {MOST}")));
    }
    let pool = Pool { pid: std::process::id(), workers: Arc::new(Workers::start(threads)?) };
    *locked(&THREADS) = Threads { asked: Some(threads), pool: Some(pool) };
    Ok(())
}

/// The pool and its number of threads.
fn pool() -> Result<(Arc<Workers>, usize)> {
    let mut all = locked(&THREADS);
    let (pid, threads) = (std::process::id(), all.asked.unwrap_or_else(default_num_threads));
    if let Some(pool) = all.pool.as_ref().filter(|pool| pool.pid == pid) {
        return Ok((Arc::clone(&pool.workers), threads));
    }
    // A pool inherited through fork has no threads behind it, and its locks may be held by those that are not there.
    std::mem::forget(all.pool.take());
    let workers = Arc::new(Workers::start(threads)?);
    all.pool = Some(Pool { pid, workers: Arc::clone(&workers) });
    Ok((workers, threads))
}

/// Number of threads that calls use; those that take part in torch's team may use as many as that has, see [`share_openmp`].
pub fn num_threads() -> usize {
    locked(&THREADS).asked.unwrap_or_else(default_num_threads)
}

/// A number of threads that somebody named, for these calls in particular.
fn asked() -> Option<usize> {
    let asked = locked(&THREADS).asked;
    asked.or_else(asked_of_environment)
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
    /// Whether only threads of our own work on the call, whatever [`share_openmp`] says: where the calling thread is none that torch
    /// is called from, a team for it alone would start.
    pub own_threads: bool,
}

/// Runs `work` on items `0..n`, each once, on the calling thread and others (on the calling thread alone where there is just one item
/// or thread).
/// Items start in order, so callers put the heavy ones first.
pub(crate) fn for_each<F: Fn(usize) + Sync>(execution: &Execution, n: usize, work: F) -> Result<()> {
    let run = |i: usize| {
        if !execution.cancel.is_cancelled() {
            work(i);
        }
    };
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            run(i);
        }
    };
    if n <= 1 {
        take();
    } else if !execution.own_threads
        && let Some(team) = openmp::team(asked())
    {
        team.run(&take);
    } else {
        let (workers, threads) = pool()?;
        if threads == 1 {
            take();
        } else {
            workers.run(threads.min(n) - 1, &take);
        }
    }
    if execution.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
}

/// As [`for_each`], keeping what each item returns, in the order of the items.
pub(crate) fn map<T: Send, F: Fn(usize) -> T + Sync>(execution: &Execution, n: usize, work: F) -> Result<Vec<T>> {
    let slots: Vec<Mutex<Option<T>>> = (0..n).map(|_| Mutex::new(None)).collect();
    for_each(execution, n, |i| *locked(&slots[i]) = Some(work(i)))?;
    Ok(slots
        .into_iter()
        .map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner).expect("every item ran"))
        .collect())
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

    #[test]
    fn numbers_of_threads_as_the_environment_writes_them() {
        for (text, expected) in
            [("3", Some(3)), (" 4096\n", Some(4096)), ("0", None), ("-1", None), ("4097", None), ("abc", None)]
        {
            assert_eq!(threads_of(text), expected, "{text}");
        }
    }
}
