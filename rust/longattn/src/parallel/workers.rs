//! Threads of our own.
//!
//! A call's thread works too and never waits for others to wake up: whoever has not joined when the items are taken does not join any
//! more. Workers look for the next call for a while before they sleep, since waking up takes as long as a short call.

use super::{FirstPanic, locked};
use crate::tensor::{Error, Result};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a worker looks for the next call before it sleeps: the time between the steps of a loop in Python.
const AWAKE: Duration = Duration::from_micros(200);

/// What threads of a pool may join.
struct Call {
    /// Shares in the work until there is none. Valid while the call is open or somebody is inside.
    work: *const (dyn Fn() + Sync),
    /// Workers inside, and [`CLOSED`].
    inside: AtomicUsize,
    /// What a worker's panic left.
    panic: FirstPanic,
    caller: Thread,
}

/// Nobody may join any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

// SAFETY: the work is Sync, and `join` and `Open` see to it that it is there while it is used.
unsafe impl Send for Call {}
// SAFETY: as above.
unsafe impl Sync for Call {}

impl Call {
    /// Takes part, if the call is still open.
    fn join(&self) {
        let enter = |n: usize| (n & CLOSED == 0).then_some(n + 1);
        if self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: the call was open when this thread went in, so its owner waits until it has left.
        let work = unsafe { &*self.work };
        self.panic.catch(work);
        // The work may be gone as soon as this is stored.
        if self.inside.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.caller.unpark();
        }
    }
}

/// A call that is closed, and waits for whoever is inside, when it is dropped: also by a panic.
struct Open<'a> {
    call: Arc<Call>,
    shared: &'a Shared,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.call.inside.fetch_or(CLOSED, Ordering::Relaxed);
        {
            let mut queue = locked(&self.shared.queue);
            queue.calls.retain(|call| !Arc::ptr_eq(call, &self.call));
            self.shared.any.store(!queue.calls.is_empty(), Ordering::Relaxed);
        }
        let done = || self.call.inside.load(Ordering::Acquire) == CLOSED;
        look(done);
        while !done() {
            thread::park();
        }
    }
}

/// Looks whether something is so for a while, lending the processor to others.
fn look(mut so: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if so() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > AWAKE {
            return false;
        }
        thread::yield_now();
    }
}

/// What a pool's threads look at.
#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Whether the queue holds something, for those who look without the lock.
    any: AtomicBool,
    wake: Condvar,
    closed: AtomicBool,
}

#[derive(Default)]
struct Queue {
    /// A call as often as threads may join it.
    calls: VecDeque<Arc<Call>>,
    /// Threads that wait to be woken.
    asleep: usize,
}

impl Shared {
    /// What a worker does until the pool is dropped.
    fn serve(&self) {
        let closed = || self.closed.load(Ordering::Acquire);
        while !closed() {
            let seen = look(|| self.any.load(Ordering::Acquire) || closed());
            let mut queue = locked(&self.queue);
            while !seen && queue.calls.is_empty() && !closed() {
                queue.asleep += 1;
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.asleep -= 1;
            }
            let call = queue.calls.pop_front();
            self.any.store(!queue.calls.is_empty(), Ordering::Relaxed);
            drop(queue);
            if let Some(call) = call {
                call.join();
            }
        }
    }

    /// Runs `work` on this thread and on up to `others` of the pool.
    fn run(&self, others: usize, work: &(dyn Fn() + Sync)) {
        // SAFETY: only the lifetime changes; `open` closes the call, and waits for those inside, before this function is left.
        let work: *const (dyn Fn() + Sync + 'static) =
            unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), _>(work) };
        let (inside, panic) = (AtomicUsize::new(0), FirstPanic::default());
        let open = Open { call: Arc::new(Call { work, inside, panic, caller: thread::current() }), shared: self };
        let asleep = {
            let mut queue = locked(&self.queue);
            queue.calls.extend((0..others).map(|_| Arc::clone(&open.call)));
            self.any.store(true, Ordering::Release);
            queue.asleep
        };
        (0..others.min(asleep)).for_each(|_| self.wake.notify_one());
        // SAFETY: it is this function's argument.
        (unsafe { &*work })();
        let call = Arc::clone(&open.call);
        drop(open);
        call.panic.resume();
    }
}

/// A pool's threads, one fewer than it is said to have: whoever calls is one.
pub(super) struct Workers(Arc<Shared>);

impl Workers {
    pub(super) fn start(threads: usize) -> Result<Self> {
        let workers = Self(Arc::default());
        for i in 1..threads {
            let shared = Arc::clone(&workers.0);
            thread::Builder::new().name(format!("longattn-{i}")).spawn(move || shared.serve()).map_err(|e| {
                Error::value("num_threads", format!("{threads} ({e})"), "a number of threads the system can start")
            })?;
        }
        Ok(workers)
    }

    /// Runs `work` on this thread and on up to `others` of the pool.
    pub(super) fn run(&self, others: usize, work: &(dyn Fn() + Sync)) {
        self.0.run(others, work);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        // Whoever is about to sleep has the lock, and sees the flag or hears the call.
        drop(locked(&self.0.queue));
        self.0.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn every_item_runs_once_whoever_joins() {
        let pool = Workers::start(4).unwrap();
        let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        for round in 0..200 {
            let next = AtomicUsize::new(0);
            let take = || {
                while let Some(count) = counts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            };
            // Several callers at a time, and calls inside calls.
            thread::scope(|scope| {
                scope.spawn(|| pool.run(3, &take));
                pool.run(2, &|| pool.run(2, &take));
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == round + 1));
            if round % 50 == 0 {
                // Workers are asleep then.
                thread::sleep(2 * AWAKE);
            }
        }
        assert!(locked(&pool.0.queue).calls.is_empty());
    }

    #[test]
    fn a_call_does_not_wait_for_workers_that_are_busy() {
        let pool = Workers::start(2).unwrap();
        let (started, free) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                pool.run(1, &|| {
                    started.store(true, Ordering::Release);
                    while !free.load(Ordering::Acquire) {
                        thread::yield_now();
                    }
                });
            });
            while !started.load(Ordering::Acquire) {
                thread::yield_now();
            }
            let done = AtomicUsize::new(0);
            pool.run(1, &|| _ = done.fetch_add(1, Ordering::Relaxed));
            assert!(done.load(Ordering::Relaxed) >= 1);
            free.store(true, Ordering::Release);
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_whole() {
        let pool = Workers::start(3).unwrap();
        for _ in 0..50 {
            let turns = AtomicUsize::new(0);
            let work = || {
                // Every thread that joins comes here once; one of them panics.
                assert!(turns.fetch_add(1, Ordering::Relaxed) != 0, "the first");
            };
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(2, &work)));
            let message = caught.unwrap_err();
            assert_eq!(message.downcast_ref::<&str>(), Some(&"the first"));
        }
        let joined = AtomicUsize::new(0);
        pool.run(2, &|| _ = joined.fetch_add(1, Ordering::Relaxed));
        assert!((1..=3).contains(&joined.load(Ordering::Relaxed)));
    }
}
