//! RocksDB with its files in a userspace file system.
//!
//! Every file of a database (log, tables, MANIFEST, `LOCK`, info log) is in BlobFS, on a device
//! that this process drives itself: an NVMe controller that is polled without the kernel, an image
//! file, a block device, or memory. The kernel's file system never sees a database file.
//!
//! ```
//! # let dir = tempfile::tempdir()?;
//! # let image = dir.path().join("kv.img");
//! # let image = image.display();
//! // A sparse image file of 1 GiB, created and formatted if it does not exist.
//! let db = pumice::Db::open(&format!("file://{image}?size=1G&create=1"))?;
//!
//! db.put(b"fruit", b"apple")?;
//! assert_eq!(db.get(b"fruit")?.as_deref(), Some(&b"apple"[..]));
//!
//! let mut batch = pumice::rocksdb::WriteBatch::default();
//! batch.put(b"fruit", b"pear");
//! batch.put(b"root", b"carrot");
//! let mut durable = pumice::rocksdb::WriteOptions::default();
//! durable.set_sync(true);
//! db.write_opt(batch, &durable)?;
//!
//! for item in db.iterator(pumice::rocksdb::IteratorMode::Start) {
//!     let (key, value) = item?;
//!     println!("{} {}", String::from_utf8_lossy(&key), String::from_utf8_lossy(&value));
//! }
//! db.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # For users of the `rocksdb` crate
//! Only one line changes, the options' environment: [`env()`]. Everything else of the crate works
//! as before, on Pumice's files. Open the database at `/` (see [`EnvOptions::root`] for the
//! reason), and use this crate's re-export [`rocksdb`], which is the version that fits.
//!
//! ```
//! # let device = "malloc://256M";
//! let fs = pumice::mount(device, &pumice::MountOptions::new())?;
//! let mut options = pumice::rocksdb::Options::default();
//! options.create_if_missing(true);
//! options.set_env(&pumice::env(&fs));
//! let db = pumice::rocksdb::DB::open(&options, "/")?;
//! db.put(b"key", b"value")?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Threads, blocking, durability
//! Any thread may call everything, and calls block on the device's I/O. A write with
//! `WriteOptions::set_sync(true)` is durable when it returns, on any device: by FUA or a flush.
//! Without it, the data is in memory until the file system writes it. It survives an orderly end of
//! the process (`close`, a drop, `exit`, a return from `main` with the database in a `static`), and
//! its kill, by a log in shared memory that the next open puts in place, and may be lost by a power
//! cut. `kv/README.md` has the table.
//!
//! A database belongs to the process that opened it. In a forked child an inherited one returns
//! errors, and dropping it does nothing.

//!
//! # Features
//! `inspect`: a running process can be looked into, by `Inspection` and `DbOptions::rpc_socket`. Without it the crate
//! needs fewer others.

mod closing;
mod copies;
mod db;
mod env;
mod error;
mod figures;
mod handle;
#[cfg(feature = "inspect")]
mod inspect;
mod mount;
mod plugin;
mod pool;
mod recorded;
mod unlogged;
mod uri;

pub use {
    copies::check_free,
    db::{Db, DbFuture, DbOptions, OptimisticTransactionDb, TransactionDb},
    env::{EnvOptions, env},
    error::{Error, ErrorKind},
    handle::{DbHandle, Rocks},
    mount::{mount, mount_device},
    pumice_blobfs::fs::{self, FileSystem, FormatOptions, FsError, grow},
    pumice_rocksdb_fs::{MountOptions, chain},
    recorded::RecordedOptions,
    uri::{env_from_uri, register_uri},
};

#[cfg(feature = "inspect")]
pub use inspect::Inspection;

/// The block devices, for [`mount_device`] and [`Error::Device`].
pub use pumice_bdev as bdev;

/// The `rocksdb` crate in the version that this crate is built for.
pub use rocksdb;

/// The README's examples, so that they compile and run.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod kv_readme {}
