//! Tests of forked children: they have memory and controllers of their own, and never touch the
//! parent's.

use std::time::Duration;

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::FeatureId;
use pumice_nvme::{IoErrorKind, NvmeError, QueueOptions, SubmitError};

use common::*;

mod common;

/// Runs `child` in a forked process and returns its exit code, which is 2 when it panicked or hung.
#[allow(unsafe_code)]
fn fork(child: &mut dyn FnMut() -> bool) -> Child {
    // SAFETY: the child uses memory and locks of the C library only, which is made for that, and
    // ends without unwinding.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: the call ends the child if it hangs.
        unsafe { libc::alarm(60) };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        let code = match result {
            Ok(true) => 0,
            Ok(false) => 1,
            Err(_) => 2,
        };
        // SAFETY: the call ends the process at once.
        unsafe { libc::_exit(code) }
    }
    Child(pid)
}

struct Child(i32);

impl Child {
    /// Waits for the child to end, and returns its exit status.
    #[allow(unsafe_code)]
    fn wait(self) -> i32 {
        let mut status = -1;
        // SAFETY: the call waits for the child.
        unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        status
    }
}

fn fill(byte: u8, count: usize, len: usize) -> Vec<DmaBuf> {
    let make = |_| {
        let mut buf = DmaBuf::new(len).unwrap();
        buf.fill(byte);
        buf
    };
    (0..count).map(make).collect()
}

fn all(bufs: &[DmaBuf], byte: u8) -> bool {
    bufs.iter().all(|buf| buf.iter().all(|b| *b == byte))
}

/// The parent has used buffers and freed them, so its free lists name blocks that a child must not
/// take for its own.
#[test]
fn parent_and_children_share_no_buffer() {
    let _watchdog = watchdog();
    for (len, count) in [(512, 60), (4096, 60), (1 << 20, 8)] {
        drop(fill(1, count, len));
        let mut kept = Some(fill(2, 4, len));
        let mut children = Vec::new();
        for byte in [0xaa, 0xbb] {
            children.push(fork(&mut || {
                let mine = fill(byte, count, len);
                std::thread::sleep(Duration::from_millis(100));
                // The child must not free the parent's blocks.
                drop(kept.take());
                let mut more = Some(fill(byte, count, len));
                let grandchild = fork(&mut || {
                    drop(more.take());
                    all(&fill(0xcc, count, len), 0xcc)
                });
                let good = all(&mine, byte) && more.is_some_and(|more| all(&more, byte));
                good && grandchild.wait() == 0
            }));
        }
        let mine = fill(3, count, len);
        for child in children {
            assert_eq!(
                child.wait(),
                0,
                "a child of the parent with {len} byte buffers"
            );
        }
        assert!(all(&mine, 3) && kept.is_some_and(|kept| all(&kept, 2)));
    }
}

#[test]
fn an_inherited_controller_refuses_and_can_be_dropped() {
    let _watchdog = watchdog();
    let rig = rig();
    let mut q = queue(&rig, |_| {});
    let other = queue(&rig, |_| {});
    assert!(one(&rig, &mut q, write(3, 7)).result.is_ok());
    // The I/O is in flight at the fork: it belongs to the parent.
    q.submit(&rig.ns, 9, read(3)).unwrap();
    let controller = rig.controller.clone();
    let mut inherited = Some((rig, q, other));
    let child = fork(&mut || {
        let (rig, mut q, other) = inherited.take().unwrap();
        let refused = q.submit(&rig.ns, 1, read(3)).unwrap_err();
        assert!(
            matches!(&refused, SubmitError::Refused(_, e) if e.kind == IoErrorKind::Removed),
            "{refused}"
        );
        assert!(refused.to_string().contains("fork"));
        assert_eq!(q.poll(&mut Vec::new()), 0);
        let forked = |e| matches!(e, NvmeError::OtherProcess { .. });
        assert!(forked(q.wait(Duration::from_secs(9)).unwrap_err()));
        assert!(!q.abort(9));
        assert!(forked(rig.controller.reset().unwrap_err()));
        assert!(forked(rig.controller.rescan().unwrap_err()));
        assert!(forked(
            rig.controller
                .feature(FeatureId::ARBITRATION, 0)
                .unwrap_err()
        ));
        assert!(forked(
            rig.controller
                .queue_pair(&QueueOptions::default().depth(8))
                .unwrap_err()
        ));
        assert!(forked(rig.controller.shutdown().unwrap_err()));
        drop((q, other));
        drop(rig);
        // A controller that the child opens itself works as usual.
        let own = rig_with(|_, _| {});
        let mut q = queue(&own, |_| {});
        one(&own, &mut q, write(1, 9)).result.is_ok()
    });
    assert_eq!(child.wait(), 0);
    // The parent's controller is unchanged.
    controller.reset().unwrap();
    assert!(controller.feature(FeatureId::ARBITRATION, 0).is_ok());
}
