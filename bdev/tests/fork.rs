//! Tests of a forked child: its parent's devices are refused and dropped without harm, and its own
//! work.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{
    AsyncChannel, BlockDevice, DmaBuf, IoChannel, IoErrorKind, Op, OpKind, SharedChannels, open,
};

/// Runs `child` in a forked process and returns its process identifier.
#[allow(unsafe_code)]
fn spawn(child: &mut dyn FnMut() -> bool) -> i32 {
    // SAFETY: the child ends without unwinding into the test.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        // SAFETY: the call ends the child if it hangs.
        unsafe { libc::alarm(60) };
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
        // SAFETY: the call ends the process at once.
        unsafe { libc::_exit(i32::from(!good.unwrap_or(false))) }
    }
    pid
}

/// Waits for a child. Returns 0 if it returned true.
#[allow(unsafe_code)]
fn join(pid: i32) -> i32 {
    let mut status = -1;
    // SAFETY: the call waits for the child.
    unsafe { libc::waitpid(pid, &raw mut status, 0) };
    status
}

fn block(byte: u8) -> DmaBuf {
    let mut buf = DmaBuf::new(4096).unwrap();
    buf.fill(byte);
    buf
}

fn reads_back(dev: &Arc<dyn BlockDevice>, lba: u64, byte: u8) -> bool {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let lba = lba * (4096 / u64::from(dev.info().block_size));
    let read = ch.block_on(ch.read(lba, DmaBuf::new(4096).unwrap()));
    read.is_ok_and(|buf| buf.iter().all(|b| *b == byte))
}

fn write(dev: &Arc<dyn BlockDevice>, lba: u64, byte: u8) {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let lba = lba * (4096 / u64::from(dev.info().block_size));
    ch.block_on(ch.write(lba, block(byte).freeze(), true))
        .unwrap();
}

#[test]
fn an_inherited_device_refuses_and_is_dropped_without_harm() {
    // This is not in /tmp, which is memory without direct I/O on many machines.
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let path = |name: &str| format!("{}/{name}", dir.path().display());
    for (n, uri) in [
        format!("file://{}?size=4M&create=1", path("ring")),
        format!("file://{}?size=4M&create=1&no_io_uring=1", path("threads")),
        "malloc://4M".to_owned(),
        "soft://memory?size=4M".to_owned(),
        "soft://memory?size=4M&queues=1".to_owned(),
    ]
    .into_iter()
    .enumerate()
    {
        let dev = open(&uri).unwrap();
        write(&dev, 3, 7);
        let mut busy: Box<dyn IoChannel> = dev.open_channel().unwrap();
        let op = Op::Read {
            lba: 0,
            buf: DmaBuf::new(4096).unwrap(),
        };
        busy.submit(1, op).unwrap();
        let mut inherited = Some((
            busy,
            dev.clone(),
            AsyncChannel::new(dev.open_channel().unwrap()),
        ));
        let own = path(&format!("own{n}"));
        let child = spawn(&mut || {
            let (mut busy, dev, ch) = inherited.take().unwrap();
            let refused = ch
                .block_on(ch.read(0, DmaBuf::new(4096).unwrap()))
                .unwrap_err();
            assert_eq!(refused.kind, IoErrorKind::Removed, "{refused}");
            assert!(refused.to_string().contains("fork"), "{refused}");
            assert!(ch.block_on(ch.write(0, block(9).freeze(), false)).is_err());
            ch.drain();
            assert_eq!((busy.poll(&mut Vec::new()), busy.in_flight()), (0, 0));
            // A controller gives the child no queue, and other devices give it a channel that refuses.
            match dev.open_channel() {
                Ok(_) => assert!(!uri.starts_with("soft"), "{uri}"),
                Err(e) => assert!(e.to_string().contains("fork"), "{e}"),
            }
            drop((busy, ch, dev));
            // A device that the child opens itself works.
            let dev = open(&format!("file://{own}?size=4M&create=1")).unwrap();
            write(&dev, 1, 0xc1);
            reads_back(&dev, 1, 0xc1)
        });
        assert_eq!(join(child), 0, "{uri}");
        // The parent's device is unchanged.
        assert!(reads_back(&dev, 3, 7), "{uri}");
        write(&dev, 4, 8);
        assert!(reads_back(&dev, 4, 8), "{uri}");
    }
}

/// A child has the open file of its parent's image too, and does not keep the lock when the parent closes the image.
#[test]
fn a_child_does_not_keep_the_lock_of_its_parents_image() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let uri = format!("file://{}/image?size=4M&create=1", dir.path().display());
    let dev = open(&uri).unwrap();
    let (stays, mut ends) = std::io::pipe().unwrap();
    let mut stays = Some(stays);
    let child = spawn(&mut || {
        let mut end = [0];
        stays.take().unwrap().read_exact(&mut end).is_ok()
    });
    drop(dev);
    open(&uri).expect("the child has the lock");
    ends.write_all(&[1]).unwrap();
    assert_eq!(join(child), 0);
}

/// A batch that the parent has in flight never ends in the child, which does not wait for it.
#[test]
fn a_child_drops_shared_channels_with_a_batch_in_flight() {
    let base = open("malloc://4M").unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    dev.inject(Injection::new(Failure::Hang).op(Some(OpKind::Read)));
    let shared = SharedChannels::new(&(Arc::clone(&dev) as Arc<dyn BlockDevice>), 2).unwrap();
    let buf = DmaBuf::new(4096).unwrap();
    let ticket = shared.submit(vec![Op::Read { lba: 0, buf }], |_| {});
    let mut inherited = Some(shared);
    let child = spawn(&mut || {
        drop(inherited.take());
        true
    });
    assert_eq!(join(child), 0);
    assert!(!ticket.is_done());
    dev.resume();
    drop(inherited);
    assert!(ticket.is_done());
}

/// Two workers, each with its own image, are forked from a process that has used the library.
#[test]
fn workers_have_buffers_of_their_own() {
    let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let image = |n: u8| format!("file://{}/w{n}?size=8M&create=1", dir.path().display());
    let work = |n: u8| {
        let dev = open(&image(n)).unwrap();
        for lba in 0..200 {
            write(&dev, lba, n);
        }
        (0..200).all(|lba| reads_back(&dev, lba, n))
    };
    assert!(work(1));
    let children = [2, 3].map(|n| spawn(&mut || work(n)));
    assert_eq!(children.map(join), [0, 0]);
    let dev = open(&image(1)).unwrap();
    assert!((0..200).all(|lba| reads_back(&dev, lba, 1)));
}
