//! Threads of the OpenMP runtime that torch uses, where a process has loaded torch.
//!
//! Between two of torch's operations they look for work on every processor, for milliseconds. Threads of our own would wait until they
//! give up, so that a call after an operation of torch takes as long as on one thread. As a part of their team it has all of them
//! within microseconds. Such a call ends when every thread of the team has seen that it is over.
//!
//! Every thread that calls the runtime has a team of its own, and where there are more threads in all than processors, they sleep at
//! once: so only the main thread's is asked, and other threads' calls do better without.

use super::FirstPanic;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The library of torch that calls the runtime.
const TORCH: &[u8] = b"/libtorch_cpu.so";

/// The process that may run calls on torch's threads, 0 for none. A forked child has the library, but no threads behind it, and would
/// wait for them.
static SHARED_BY: AtomicU32 = AtomicU32::new(0);

/// Whether calls of the main thread may run on the threads of the OpenMP runtime that torch uses, where this process has loaded torch:
/// on as many as torch does, if nobody named another number for longattn. Off unless a program says otherwise; it makes no difference
/// but on Linux with the GNU C library.
pub fn share_openmp(shared: bool) {
    SHARED_BY.store(if shared { process::id() } else { 0 }, Ordering::Relaxed);
}

/// Whether a call of this thread would run on torch's threads.
pub fn shares_openmp() -> bool {
    team(super::asked()).is_some()
}

/// What a call needs of the runtime: the functions of GNU OpenMP, which LLVM's and Intel's have too.
struct Runtime {
    parallel: Parallel,
    max_threads: Number,
    in_parallel: Number,
}

type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
type Number = unsafe extern "C" fn() -> c_int;

/// The runtime's threads for one call.
pub(super) struct Team {
    runtime: &'static Runtime,
    threads: c_uint,
}

/// The team of torch on the calling thread, if it has more than one thread, and `asked`, if given.
pub(super) fn team(asked: Option<usize>) -> Option<Team> {
    let runtime = runtime()?;
    thread_local!(static MAIN: bool = {
        // SAFETY: it asks for the number of this thread.
        let thread = unsafe { libc::gettid() };
        u32::try_from(thread) == Ok(process::id())
    });
    if !MAIN.with(|main| *main) {
        return None;
    }
    // SAFETY: functions of the runtime that anybody may call; they change nothing.
    let (threads, inside) = unsafe { ((runtime.max_threads)(), (runtime.in_parallel)() != 0) };
    // Another number than torch's would start and end threads whenever the two take turns.
    let fits = threads > 1 && asked.is_none_or(|asked| usize::try_from(threads) == Ok(asked));
    (fits && !inside).then_some(Team { runtime, threads: threads as c_uint })
}

/// Work of a team.
struct Call<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: FirstPanic,
}

impl Team {
    /// Runs `work` on every thread of the team, the calling one among them.
    pub(super) fn run(self, work: &(dyn Fn() + Sync)) {
        /// # Safety
        /// `call` points to a [`Call`] that outlives this function.
        unsafe extern "C" fn join(call: *mut c_void) {
            // SAFETY: the caller's promise.
            let call = unsafe { &*call.cast_const().cast::<Call>() };
            call.panic.catch(call.work);
        }
        let call = Call { work, panic: FirstPanic::default() };
        // SAFETY: the function has the runtime's type and lets no panic out; the call is there until it returns, which it does when
        // every thread has left `join`.
        unsafe { (self.runtime.parallel)(join, (&raw const call).cast_mut().cast(), self.threads, 0) };
        call.panic.resume();
    }
}

/// The runtime, once torch is there.
fn runtime() -> Option<&'static Runtime> {
    static FOUND: OnceLock<Runtime> = OnceLock::new();
    /// How many libraries had been loaded when they were looked through, plus 1.
    static SEEN: AtomicU64 = AtomicU64::new(0);
    if SHARED_BY.load(Ordering::Relaxed) != process::id() {
        return None;
    }
    if let Some(found) = FOUND.get() {
        return Some(found);
    }
    let mut look = Look { seen: SEEN.load(Ordering::Relaxed), loaded: 0, torch: None };
    // SAFETY: `visit` has the type that is asked for, and `look` is what it expects.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut look).cast()) };
    SEEN.store(look.loaded, Ordering::Relaxed);
    let opened = open(&look.torch?)?;
    Some(FOUND.get_or_init(|| opened))
}

struct Look {
    seen: u64,
    loaded: u64,
    torch: Option<CString>,
}

/// Looks at a library; anything but 0 ends the visits.
///
/// # Safety
/// `info` describes a library, `look` points to a [`Look`] that nothing else uses.
unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, look: *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    let (info, look) = unsafe { (&*info, &mut *look.cast::<Look>()) };
    look.loaded = info.dlpi_adds + 1;
    if look.loaded == look.seen {
        return 1;
    }
    if info.dlpi_name.is_null() {
        return 0;
    }
    // SAFETY: the loader's names end with a zero.
    let name = unsafe { CStr::from_ptr(info.dlpi_name) };
    if name.to_bytes().ends_with(TORCH) {
        look.torch = Some(name.to_owned());
    }
    c_int::from(look.torch.is_some())
}

/// The functions of the runtime that a library uses, which is kept from being unloaded.
fn open(library: &CStr) -> Option<Runtime> {
    // SAFETY: the path ends with a zero; a library that is loaded already runs no code by it.
    let library = unsafe { libc::dlopen(library.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if library.is_null() {
        return None;
    }
    let find = |name: &CStr| {
        // SAFETY: the library is open, the name ends with a zero. What the library depends on is searched too.
        let address = unsafe { libc::dlsym(library, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    };
    let (parallel, max_threads, in_parallel) =
        (find(c"GOMP_parallel")?, find(c"omp_get_max_threads")?, find(c"omp_in_parallel")?);
    // SAFETY: functions of these types by the interface of GNU OpenMP, which is fixed.
    unsafe {
        Some(Runtime {
            parallel: std::mem::transmute::<*mut c_void, Parallel>(parallel),
            max_threads: std::mem::transmute::<*mut c_void, Number>(max_threads),
            in_parallel: std::mem::transmute::<*mut c_void, Number>(in_parallel),
        })
    }
}
