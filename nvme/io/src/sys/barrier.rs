//! An asymmetric memory barrier: nearly free for a queue pair's owner, expensive for a reset, which
//! is rare.
//!
//! The owner announces itself, calls `light()` and looks whether a reset has begun. A reset
//! announces itself, calls `heavy()` and looks whether an owner is writing. One of the two sees the
//! other (membarrier(2), MEMBARRIER_CMD_PRIVATE_EXPEDITED).
#![allow(unsafe_code)]

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

const MEMBARRIER_PRIVATE_EXPEDITED: libc::c_long = 1 << 3;
const MEMBARRIER_REGISTER_PRIVATE_EXPEDITED: libc::c_long = 1 << 4;

/// Whether both sides use full fences, because the kernel does not offer the barrier.
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

/// Registers the process with the kernel. Called before the first queue pair exists.
pub fn init() {
    LazyLock::force(&REGISTERED);
}

/// The barrier of a queue pair's owner.
#[inline(always)]
pub fn light() {
    if SYMMETRIC.load(Ordering::Relaxed) {
        fence(Ordering::SeqCst);
    } else {
        compiler_fence(Ordering::SeqCst);
    }
}

/// The barrier of a reset. Takes a few microseconds.
pub fn heavy() {
    fence(Ordering::SeqCst);
    if *REGISTERED && !membarrier(MEMBARRIER_PRIVATE_EXPEDITED) {
        tracing::warn!("membarrier failed after it was registered");
    }
    fence(Ordering::SeqCst);
}
