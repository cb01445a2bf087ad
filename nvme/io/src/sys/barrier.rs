//! An asymmetric memory barrier: nearly free for a queue pair's owner, dear for the rare reset.
//!
//! Owner: announce, `light()`, look whether a reset has begun. Reset: announce, `heavy()`, look
//! whether an owner is at it. One of the two sees the other (membarrier(2),
//! MEMBARRIER_CMD_PRIVATE_EXPEDITED).
#![allow(unsafe_code)]

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

const MEMBARRIER_PRIVATE_EXPEDITED: libc::c_long = 1 << 3;
const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: libc::c_long = 1 << 4;

/// Set when the kernel cannot do it; then both sides use full fences.
static SYMMETRIC: AtomicBool = AtomicBool::new(true);

static REGISTERED: LazyLock<bool> = LazyLock::new(|| {
    let ok = cfg!(not(miri)) && membarrier(MEMBARRIER_REGISTER_PRIVATE_EXPEDITED);
    if ok {
        SYMMETRIC.store(false, Ordering::SeqCst);
    }
    ok
});

fn membarrier(command: libc::c_long) -> bool {
    // SAFETY: membarrier takes a command, flags and a cpu number, no pointers.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
}

/// Registers the process; called before the first queue pair exists.
pub fn init() {
    LazyLock::force(&REGISTERED);
}

/// The owner's side.
#[inline(always)]
pub fn light() {
    if SYMMETRIC.load(Ordering::Relaxed) {
        fence(Ordering::SeqCst);
    } else {
        compiler_fence(Ordering::SeqCst);
    }
}

/// The rare side. A few microseconds.
pub fn heavy() {
    fence(Ordering::SeqCst);
    if *REGISTERED && !membarrier(MEMBARRIER_PRIVATE_EXPEDITED) {
        tracing::warn!("membarrier failed after it was registered");
    }
    fence(Ordering::SeqCst);
}
