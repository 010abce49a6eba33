//! Systems where calls run on threads of our own alone.

/// Changes nothing on this system.
pub fn share_openmp(_: bool) {}

/// Whether a call of this thread would run on torch's threads: not on this system.
pub fn shares_openmp() -> bool {
    false
}

/// None on this system.
pub(super) enum Team {}

pub(super) fn team(_: Option<usize>) -> Option<Team> {
    None
}

impl Team {
    pub(super) fn run(self, _: &(dyn Fn() + Sync)) {
        match self {}
    }
}
