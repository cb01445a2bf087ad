//! Tests of images on a file system whose sectors have 4096 bytes.

use std::path::PathBuf;
use std::process::Command;

use pumice_bdev::file::{File, FileOptions, Prealloc};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};

/// A mounted ext4 of 4096-byte sectors, on a loop device.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Returns `None` where no such file system can be mounted.
    fn new() -> Option<Mounted> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let script = r#"
            cd "$0" && mkdir mount && truncate -s 64M disk || exit
            loop=$(losetup -f --show -b 4096 disk) || exit
            mkfs.ext4 -q -b 4096 "$loop" && mount "$loop" mount
            status=$?
            # The mount keeps the device until it ends.
            losetup -d "$loop"
            exit $status"#;
        let mut made = Command::new("sh");
        match made.args(["-c", script]).arg(dir.path()).status() {
            Ok(status) if status.success() => Some(Mounted { dir }),
            _ => None,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("mount").join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mount = self.dir.path().join("mount");
        let _ = Command::new("umount").arg("-l").arg(mount).status();
    }
}

/// The last piece of an image may be smaller than a sector. The image has its length all the same.
#[test]
fn a_full_image_may_end_within_a_sector() {
    let Some(disk) = Mounted::new() else {
        println!("skipped: a_full_image_may_end_within_a_sector: no loop device can be mounted");
        return;
    };
    for (block_size, size) in [
        (512, 4096 + 512),
        (512, (2 << 20) - 512),
        (4096, 8192),
        (4096, (1 << 20) + 4096),
    ] {
        for prealloc in [Prealloc::Off, Prealloc::Falloc, Prealloc::Full] {
            let name = format!("{block_size}-{size}-{prealloc:?}");
            let options = FileOptions::new(disk.path(&name))
                .size(Some(size))
                .create(true)
                .block_size(Some(block_size))
                .prealloc(prealloc);
            let dev = File::open(&options).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(dev.info().len_bytes(), size, "{name}");
            assert_eq!(options.path.metadata().unwrap().len(), size, "{name}");
            let ch = AsyncChannel::new(dev.open_channel().unwrap());
            let last = dev.info().num_blocks - 1;
            let block = || DmaBuf::new(block_size as usize).unwrap();
            let back = ch.block_on(ch.read(last, block())).unwrap();
            assert!(back.iter().all(|byte| *byte == 0), "{name}");
            let mut data = block();
            data.fill(7);
            ch.block_on(ch.write(last, data.freeze(), true)).unwrap();
            let back = ch.block_on(ch.read(last, block())).unwrap();
            assert!(back.iter().all(|byte| *byte == 7), "{name}");
            assert_eq!(options.path.metadata().unwrap().len(), size, "{name}");
        }
    }
}
