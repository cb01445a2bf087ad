//! Counts the flushes that reach the disk below, a loop device.

use std::fs;
use std::path::Path;
use std::process::Command;

use pumice_bdev::file::{File, FileOptions};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, Op};

struct Loop {
    device: String,
    _dir: tempfile::TempDir,
}

impl Loop {
    fn new() -> Option<Loop> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = dir.path().join("image");
        fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
        let out = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(&image)
            .output();
        let Ok(out) = out else {
            eprintln!("skipped: no losetup here");
            return None;
        };
        if !out.status.success() {
            eprintln!("skipped: no loop devices here");
            return None;
        }
        let device = String::from_utf8(out.stdout).unwrap().trim().to_owned();
        Some(Loop { device, _dir: dir })
    }

    /// Returns the number of completed flush requests: field 16 of the block layer's `stat`.
    fn flushes(&self) -> u64 {
        let name = self.device.strip_prefix("/dev/").unwrap();
        let stat = fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
        stat.split_whitespace().nth(15).unwrap().parse().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

#[test]
fn flush_and_fua_reach_the_disk() {
    let Some(disk) = Loop::new() else {
        return;
    };
    assert!(Path::new(&disk.device).exists());
    for (no_io_uring, buffered) in [(false, false), (false, true), (true, false), (true, true)] {
        let dev = File::open(
            &FileOptions::new(disk.device.clone())
                .no_io_uring(no_io_uring)
                .buffered(buffered),
        )
        .unwrap();
        if !dev.info().write_cache {
            return eprintln!("skipped: the loop device has no cache to flush");
        }
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let write = |fua| Op::Write {
            lba: 8,
            data: DmaBuf::zeroed(4096).unwrap().freeze(),
            fua,
        };
        let count = |op: Op, wanted: bool| {
            let before = disk.flushes();
            let what = format!("{op:?}, threads {no_io_uring}, buffered {buffered}");
            ch.block_on(ch.io(op)).1.unwrap();
            let flushes = disk.flushes() - before;
            assert_eq!(flushes > 0, wanted, "{flushes} flushes for {what}");
        };
        for _ in 0..3 {
            count(write(false), false);
            count(write(true), true);
            count(write(false), false);
            count(Op::Flush, true);
            // One that a thread waits for alone takes another way than several together.
            let before = disk.flushes();
            for (_, result) in ch.block_on(ch.io_all(vec![write(true), write(true)])) {
                result.unwrap();
            }
            assert!(
                disk.flushes() > before,
                "threads {no_io_uring}, buffered {buffered}"
            );
        }
    }
}
