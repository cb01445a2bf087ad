//! What all files of a mount share: device, blobstore, shared channels, cache, counters; and how
//! byte ranges of a file become operations on the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pumice_bdev::process::Birth;
use pumice_bdev::{BlockDevice, DmaSlice, Op, OpKind};

use super::cache::Cache;
use super::durable::{Durability, lost};
use super::error::{FsError, Result, SpaceKind};
use super::exit::Ended;
use super::inode::Inode;
use super::metered::Metered;
use super::names::Namespace;
use super::options::MountOptions;
use super::pool::{IoPool, Outcome};
use crate::blobstore::{Blobstore, Error as StoreError, ExtentMap};

/// A mounted file system.
pub(crate) struct Core {
    pub store: Blobstore,
    pub metered: Arc<Metered>,
    pub dev: Arc<dyn BlockDevice>,
    pub pool: IoPool,
    pub cache: Arc<Cache>,
    pub writes: Arc<Durability>,
    pub names: Namespace,
    pub opts: MountOptions,
    /// Cleared by the unmount.
    pub mounted: AtomicBool,
    /// The files are finished and the blobstore is not unloaded yet: an unmount that failed at the
    /// last step goes on there.
    pub unloading: AtomicBool,
    /// In which process it was mounted: in a forked child it is the parent's.
    pub born: Birth,
    /// Told when the mount has come to its end.
    pub ended: Arc<Ended>,
    /// Bytes of a write to the device are a multiple of this.
    pub block: usize,
    pub block_size: u64,
    pub cluster: u64,
    pub max_io: usize,
    pub write_cache: bool,
    pub fua: bool,
    /// What the mount found wrong and left alone.
    pub problems: Vec<String>,
}

/// A range of a file met a cluster that is not allocated (a thin blob of a foreign image).
pub(crate) struct Unallocated;

/// One device operation's worth of a file: where, and which bytes.
pub(crate) struct Run {
    pub lba: u64,
    pub off: u64,
    pub len: usize,
}

impl Core {
    /// The error of a closed mount, or of a read-only one.
    pub fn check_writable(&self, path: impl Fn() -> String) -> Result<()> {
        self.check_mounted(&path)?;
        if self.opts.read_only {
            Err(FsError::ReadOnly { path: path() })
        } else {
            Ok(())
        }
    }

    /// The error of a mount that was made by the process that this one was forked from. Asked before
    /// any lock is taken: in a forked child its holder may not be there.
    #[inline]
    pub fn check_fork(&self) -> Result<()> {
        if !self.born.is_here() {
            return Err(self.forked());
        }
        Ok(())
    }

    pub fn check_mounted(&self, path: impl Fn() -> String) -> Result<()> {
        self.check_fork()?;
        if self.mounted.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(FsError::Unmounted { path: path() })
        }
    }

    /// Turns a blobstore error into ours.
    pub fn store_error(&self, context: impl Into<String>, e: StoreError) -> FsError {
        store_error(context, e, self.store.available_clusters() * self.cluster)
    }

    /// The error of a commit; it says so if the change may have been made all the same.
    pub fn commit_error(&self, what: String, e: StoreError) -> FsError {
        let before = matches!(e, StoreError::Stopped(_));
        let error = self.store_error(what.clone(), e);
        // The store stops when it does not know what the device has.
        let stopped = || {
            let probe = self.store.transaction().commit();
            matches!(probe, Err(StoreError::Stopped(_)))
        };
        if !before && stopped() {
            let source = Arc::new(error);
            return FsError::Undecided { what, source };
        }
        error
    }

    /// Cuts `[off, off + len)` of a file where the device's blocks are not consecutive or an
    /// operation would be too long. Both must be multiples of the block size.
    pub fn runs(
        &self,
        map: &ExtentMap,
        off: u64,
        len: usize,
    ) -> std::result::Result<Vec<Run>, Unallocated> {
        let mut runs: Vec<Run> = Vec::with_capacity(1);
        let end = off + len as u64;
        let mut at = off;
        while at < end {
            let index = at / self.cluster;
            let lba = map.lba(index).ok_or(Unallocated)?;
            let inside = at % self.cluster;
            let n = (self.cluster - inside).min(end - at);
            let lba = lba + inside / self.block_size;
            let n = usize::try_from(n).unwrap_or(usize::MAX);
            match runs.last_mut() {
                Some(run)
                    if run.lba + run.len as u64 / self.block_size == lba
                        && run.len + n <= self.max_io =>
                {
                    run.len += n;
                }
                _ => runs.push(Run {
                    lba,
                    off: at,
                    len: n,
                }),
            }
            at += n as u64;
        }
        // A cluster may be longer than the device takes at once.
        if runs.iter().any(|r| r.len > self.max_io) {
            runs = runs.into_iter().flat_map(|r| self.cut(&r)).collect();
        }
        Ok(runs)
    }

    fn cut(&self, run: &Run) -> Vec<Run> {
        (0..run.len)
            .step_by(self.max_io)
            .map(|done| Run {
                lba: run.lba + done as u64 / self.block_size,
                off: run.off + done as u64,
                len: self.max_io.min(run.len - done),
            })
            .collect()
    }

    /// The operations that write `slices`, which follow one another from `off`.
    pub fn write_ops(
        &self,
        map: &ExtentMap,
        off: u64,
        slices: &[DmaSlice],
        fua: bool,
    ) -> std::result::Result<Vec<Op>, Unallocated> {
        let total = slices.iter().map(DmaSlice::len).sum();
        let runs = self.runs(map, off, total)?;
        let mut ops = Vec::with_capacity(runs.len());
        let mut rest = slices.iter().cloned();
        let mut current = rest.next();
        for run in runs {
            let mut data: Vec<DmaSlice> = Vec::with_capacity(1);
            let mut need = run.len;
            while need > 0 {
                let Some(slice) = current.take() else { break };
                let n = slice.len().min(need);
                if n < slice.len() {
                    current = Some(slice.slice(n..slice.len()));
                    data.push(slice.slice(0..n));
                } else {
                    data.push(slice);
                    current = rest.next();
                }
                need -= n;
            }
            ops.push(match data.len() {
                1 => Op::Write {
                    lba: run.lba,
                    data: data.remove(0),
                    fua,
                },
                _ => Op::WriteV {
                    lba: run.lba,
                    data,
                    fua,
                },
            });
        }
        Ok(ops)
    }

    /// Makes every completed write up to `seq` durable. Concurrent callers share flushes.
    pub fn flush_upto(&self, seq: u64) -> Result<()> {
        if !self.write_cache {
            return Ok(());
        }
        self.writes.flushes.cover(seq, || {
            self.run_ops(vec![Op::Flush]).map_err(|e| {
                // Others have been noted where they came back from the device.
                if e.is_retryable() {
                    self.writes.flush_failed(&e);
                }
                lost(&e)
            })
        })
    }

    /// Runs operations on the shared channels and waits for them.
    pub fn run_ops(&self, ops: Vec<Op>) -> std::result::Result<(), Box<pumice_bdev::IoError>> {
        let result = Arc::new(Mutex::new(Ok(())));
        let slot = Arc::clone(&result);
        let ticket = self
            .pool
            .submit(ops, Box::new(move |o: Outcome| *slot.lock() = o.result));
        self.pool.wait(&ticket);
        std::mem::replace(&mut *result.lock(), Ok(()))
    }

    /// Writes zeroes over `[off, off + len)` of a file (multiples of the block size) and waits.
    /// What was written is not durable yet; returns the sequence to flush up to.
    pub fn zero_range(&self, ino: &Inode, off: u64, len: u64) -> Result<u64> {
        let map = ino.extents.load_full();
        let mut at = off;
        let native = self.dev.info().ops.has(OpKind::WriteZeroes);
        let step = 64u64 << 20;
        let mut zeroes: Option<DmaSlice> = None;
        let begun = self.writes.begin();
        while at < off + len {
            let n = usize::try_from(step.min(off + len - at)).unwrap_or(usize::MAX);
            let runs = self.runs(&map, at, n).map_err(|Unallocated| {
                FsError::invalid(
                    &ino.path(),
                    "a thin file of a foreign image cannot be extended over a gap",
                )
            })?;
            let mut ops = Vec::new();
            for run in runs {
                if native {
                    let len_blocks = run.len as u64 / self.block_size;
                    ops.push(Op::WriteZeroes {
                        lba: run.lba,
                        len_blocks,
                        fua: false,
                    });
                    continue;
                }
                for done in (0..run.len).step_by(1 << 20) {
                    let data = match &zeroes {
                        Some(z) => z.clone(),
                        None => zeroes
                            .insert(pumice_bdev::DmaBuf::zeroed(1 << 20)?.freeze())
                            .clone(),
                    };
                    let lba = run.lba + done as u64 / self.block_size;
                    let data = data.slice(0..(run.len - done).min(1 << 20));
                    ops.push(Op::Write {
                        lba,
                        data,
                        fua: false,
                    });
                }
            }
            self.run_ops(ops)
                .map_err(|e| FsError::io(format!("{}: zeroing a gap", ino.path()), e))?;
            at += n as u64;
        }
        Ok(self.writes.completed(begun))
    }
}

/// Turns a blobstore error into ours; `free_bytes` is for the text.
pub(crate) fn store_error(context: impl Into<String>, e: StoreError, free_bytes: u64) -> FsError {
    let context = context.into();
    match e {
        StoreError::NoSpace { .. } => FsError::NoSpace {
            what: context,
            kind: SpaceKind::Clusters,
            free_bytes,
        },
        StoreError::NoMdPages { .. } => FsError::NoSpace {
            what: context,
            kind: SpaceKind::MetadataPages,
            free_bytes,
        },
        StoreError::Io(e) => FsError::io(context, e),
        StoreError::Lost(e) => FsError::Io {
            context,
            source: Arc::from(e),
            data_loss: true,
        },
        StoreError::Device(e) => FsError::from(e),
        StoreError::Dma(e) => FsError::from(e),
        StoreError::Damaged { blob, source } => FsError::Corrupt {
            blob: blob.0,
            reason: format!("{context}: {source}"),
        },
        StoreError::ReadOnly(blob) => FsError::ReadOnly {
            path: format!("{context}: blob {blob}"),
        },
        e => FsError::Store {
            context,
            source: Arc::new(e),
        },
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileSystem({})", self.dev.info().name)
    }
}
