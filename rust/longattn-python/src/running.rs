//! Long calls that Ctrl-C can stop.

use crate::errors::to_py;
use longattn::parallel::Execution;
use longattn::tensor::Result;
use pyo3::prelude::*;
use std::sync::{Mutex, mpsc};
use std::time::Duration;

/// Multiply-adds from which on a call is worth watching: about a tenth of a second.
const LONG: f64 = 5e9;

/// Runs `work` without the GIL. A long call runs on a thread of its own while this one looks for signals every 50 ms and, when one
/// raises, asks the work to stop and waits for it.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    operations: f64,
    work: impl FnOnce(&Execution) -> Result<T> + Send,
) -> PyResult<T> {
    let execution = Execution { own_threads: operations >= LONG, ..Execution::default() };
    if operations < LONG {
        return py.detach(|| work(&execution)).map_err(to_py);
    }
    let cancel = execution.cancel.clone();
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(1);
        scope.spawn(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&execution)));
            // The receiver waits for this value and nothing else.
            let _ = sender.send(result);
        });
        // A mutex only because waiting happens in a closure that must be Sync.
        let receiver = Mutex::new(receiver);
        let wait = || receiver.lock().unwrap_or_else(|e| e.into_inner()).recv_timeout(Duration::from_millis(50));
        let mut interrupted = None;
        loop {
            match py.detach(wait) {
                Ok(Ok(result)) => return interrupted.map_or_else(|| result.map_err(to_py), Err),
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(mpsc::RecvTimeoutError::Disconnected) => unreachable!("the worker sends before it ends"),
                Err(mpsc::RecvTimeoutError::Timeout) if interrupted.is_none() => {
                    if let Err(error) = py.check_signals() {
                        cancel.cancel();
                        interrupted = Some(error);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    })
}
