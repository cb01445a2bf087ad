//! The states of a database's close, and where its last puts may be.

use pumice_blobfs::fs::FileSystem;

use crate::recorded::RecordedOptions;

/// The states that a database passes while it is closed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closing {
    /// It is open.
    Open,
    /// Everything is in logs and tables, and RocksDB has stopped writing tables. The device has not
    /// been released.
    Stopped,
    /// The file system has written everything, and refuses puts. It could not be unmounted.
    Unmounting,
    /// It is closed.
    Closed,
}

/// Whether puts may be in a buffer of RocksDB's instead of the log's file (`manual_wal_flush`).
/// `root` is the database's directory. The options are RocksDB's own and cannot be read, but it
/// writes them to a file.
pub(crate) fn buffers_its_log(fs: &FileSystem, root: &str) -> bool {
    match RecordedOptions::of(fs, root) {
        Ok(Some(recorded)) => !recorded.text().contains("manual_wal_flush=false"),
        Ok(None) | Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    use pumice_bdev::{BlockDevice, OpKind};
    use pumice_rocksdb_fs::Use;
    use rocksdb::WriteOptions;

    use crate::{DbOptions, Error, MountOptions, mount_device};

    /// A close whose unmount has failed can be repeated: it does not flush a second time, which
    /// RocksDB would refuse.
    #[test]
    fn a_close_is_repeated_after_a_failed_unmount() {
        let base = pumice_bdev::open("malloc://64M").unwrap();
        let faulty = Arc::new(ErrorDevice::new(None, base));
        let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
        let open = move || Ok::<_, Error>(Arc::clone(&device));
        let one = Use::of("malloc://64M", false, open, |device, _| {
            mount_device(&device, &MountOptions::new())
        })
        .unwrap();
        let db = DbOptions::new().open_shared(one).unwrap();
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        db.put_opt("a", "1", &unlogged).unwrap();
        db.flush().unwrap();
        // The super block, which the unmount writes last.
        faulty.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Write))
                .count(u64::MAX)
                .range(Some((0, 1))),
        );
        db.close().unwrap_err();
        faulty.clear();
        db.put("b", "2").unwrap_err();
        let started = Instant::now();
        while let Err(error) = db.close() {
            assert!(started.elapsed().as_secs() < 60, "{error}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
