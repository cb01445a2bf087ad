//! A mount: its parts, and how it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::append::Appender;
use super::buffers::Buffers;
use super::cache::Cache;
use super::durable::Durability;
use super::error::{FsError, Result};
use super::exit::Ended;
use super::inode::{Inode, LOOK_TIMEOUT};
use super::life::Lives;
use super::names::Names;
use super::namespace::Namespace;
use super::overwrite::Overwriter;
use super::read::Reader;
use super::recorder::Recorder;
use super::shm_log::ShmLog;
use super::space::Space;
use super::sync::Syncer;
use super::truncate::Truncater;
use super::volume::{Phase, Volume};
use super::writeback::Writeback;
use crate::blobstore::Error as StoreError;

/// A mounted file system. Each part owns its state, and the later ones use the earlier ones.
pub(crate) struct Core {
    pub vol: Arc<Volume>,
    pub cache: Arc<Cache>,
    pub names: Arc<Names>,
    pub reader: Arc<Reader>,
    pub space: Arc<Space>,
    pub buffers: Arc<Buffers>,
    pub appender: Arc<Appender>,
    pub overwriter: Overwriter,
    pub truncater: Truncater,
    pub syncer: Arc<Syncer>,
    pub lives: Arc<Lives>,
    pub namespace: Namespace,
    pub log: Arc<ShmLog>,
    /// Notified when the mount has ended.
    pub ended: Arc<Ended>,
    /// See [`super::mount::FileSystem::hides_writes`].
    pub hides_writes: bool,
    /// Problems that the mount found and left alone.
    pub problems: Vec<String>,
}

impl Core {
    /// Makes the parts.
    pub fn new(
        vol: Arc<Volume>,
        cache: Arc<Cache>,
        writes: Arc<Durability>,
        names: Names,
        log: Arc<ShmLog>,
        problems: Vec<String>,
    ) -> Core {
        let names = Arc::new(names);
        let reader = Arc::new(Reader {
            vol: Arc::clone(&vol),
            cache: Arc::clone(&cache),
        });
        let writeback = Arc::new(Writeback {
            vol: Arc::clone(&vol),
            writes,
        });
        let space = Arc::new(Space {
            vol: Arc::clone(&vol),
            writeback: Arc::clone(&writeback),
            names: Arc::clone(&names),
            carried: AtomicU64::new(0),
            may_carry: AtomicBool::new(true),
        });
        let buffers = Arc::new(Buffers {
            vol: Arc::clone(&vol),
            reader: Arc::clone(&reader),
            writeback: Arc::clone(&writeback),
            space: Arc::clone(&space),
        });
        let lives = Arc::new(Lives {
            vol: Arc::clone(&vol),
            names: Arc::clone(&names),
            writeback: Arc::clone(&writeback),
            buffers: Arc::clone(&buffers),
            log: Arc::clone(&log),
        });
        let syncer = Arc::new(Syncer {
            vol: Arc::clone(&vol),
            writeback: Arc::clone(&writeback),
            space: Arc::clone(&space),
            buffers: Arc::clone(&buffers),
            log: Arc::clone(&log),
        });
        let recorder = Arc::new(Recorder {
            log: Arc::clone(&log),
            syncer: Arc::clone(&syncer),
            names: Arc::clone(&names),
            lives: Arc::clone(&lives),
            turn: Mutex::default(),
        });
        let appender = Arc::new(Appender {
            vol: Arc::clone(&vol),
            writeback: Arc::clone(&writeback),
            space: Arc::clone(&space),
            buffers: Arc::clone(&buffers),
            recorder,
        });
        Core {
            overwriter: Overwriter {
                vol: Arc::clone(&vol),
                reader: Arc::clone(&reader),
                writeback: Arc::clone(&writeback),
                space: Arc::clone(&space),
                buffers: Arc::clone(&buffers),
                appender: Arc::clone(&appender),
            },
            truncater: Truncater {
                vol: Arc::clone(&vol),
                reader: Arc::clone(&reader),
                writeback,
                space: Arc::clone(&space),
                buffers: Arc::clone(&buffers),
                appender: Arc::clone(&appender),
            },
            syncer,
            namespace: Namespace {
                vol: Arc::clone(&vol),
                names: Arc::clone(&names),
                lives: Arc::clone(&lives),
                cache: Arc::clone(&cache),
            },
            vol,
            cache,
            names,
            reader,
            space,
            buffers,
            appender,
            lives,
            log,
            ended: Arc::default(),
            hides_writes: false,
            problems,
        }
    }

    /// Ends the use of every file: data and lengths are durable, spare clusters are freed, and
    /// blobs are closed.
    pub fn unmount(&self) -> Result<()> {
        self.end(false).map(|_| ())
    }

    /// Unmounts as [`Core::unmount`] does, but drops and returns what cannot be made durable.
    pub fn unmount_anyway(&self) -> Result<Vec<FsError>> {
        self.end(true)
    }

    fn end(&self, give_up: bool) -> Result<Vec<FsError>> {
        self.vol.check_fork()?;
        let _ops = self.names.ops.lock();
        if self.vol.phase.load() == Phase::Unloading {
            return self.unload(give_up).map(|()| Vec::new());
        }
        self.vol
            .check_mounted(|| self.vol.dev.info().name.clone())?;
        let inodes = self.names.inodes();
        if !self.vol.opts.read_only {
            // If one fails, the others are made durable nevertheless.
            let mut result = Ok(());
            for ino in &inodes {
                result = result.and(self.syncer.sync(ino));
            }
            if !give_up {
                result?;
            }
        }
        // From here on nothing new begins. What was appended meanwhile is written too.
        self.vol.phase.store(Phase::Ending);
        let lost = match self.finish(&inodes, give_up) {
            Ok(lost) => lost,
            Err(e) => {
                self.vol.phase.store(Phase::Mounted);
                return Err(e);
            }
        };
        self.vol.phase.store(Phase::Unloading);
        self.unload(give_up)?;
        Ok(lost)
    }

    /// Does the last step of an unmount, which can be repeated: the device is released when it is
    /// done, or `anyway` when the device has failed.
    fn unload(&self, anyway: bool) -> Result<()> {
        self.log.end();
        let store = &self.vol.store;
        let unloaded = match anyway {
            true => store.unload_anyway(),
            false => store.unload(),
        };
        let result = match unloaded {
            Ok(()) | Err(StoreError::Unloaded) => Ok(()),
            Err(e) if anyway && e.is_of_device() => Err(self.vol.store_error("unmount", e)),
            Err(e) => return Err(self.vol.store_error("unmount", e)),
        };
        self.vol.phase.store(Phase::Unmounted);
        self.vol.metered.release();
        self.ended.set();
        result
    }

    /// Whether an unmount is incomplete.
    pub fn is_unfinished(&self) -> bool {
        self.vol.born.is_here()
            && matches!(self.vol.phase.load(), Phase::Mounted | Phase::Unloading)
    }

    fn finish(&self, inodes: &[Arc<Inode>], give_up: bool) -> Result<Vec<FsError>> {
        let mut lost = Vec::new();
        if !self.vol.opts.read_only {
            for ino in inodes {
                ino.tail.lock().stop_fast_path();
                match self.syncer.sync_inner(ino) {
                    Ok(()) => {}
                    Err(e) if give_up => {
                        tracing::error!(error = %e, "bytes that could not be made durable are dropped");
                        self.give_up_bytes(ino);
                        lost.push(e);
                    }
                    Err(e) => return Err(e),
                }
                let mut tail = ino.tail.lock();
                let needed = ino.len().div_ceil(self.vol.cluster);
                if tail.grown
                    && tail.allocated / self.vol.cluster > needed
                    && !ino.is_thin()
                    && let Err(error) = self.space.resize(ino, &mut tail, needed)
                {
                    tracing::warn!(file = ino.path(), %error, "space allocated ahead was not freed");
                }
            }
        }
        let orphans: Vec<Arc<Inode>> = self
            .names
            .orphans
            .lock()
            .values()
            .filter_map(std::sync::Weak::upgrade)
            .collect();
        for ino in &orphans {
            self.lives.reap(ino);
        }
        self.vol.shared().drain();
        // Reads that have begun end. The next ones find no blob.
        let deadline = Instant::now() + LOOK_TIMEOUT;
        for ino in inodes.iter().chain(&orphans) {
            ino.tail.lock().drop_buffer();
            ino.close_blob_by(deadline);
            ino.frames.remove_from(0);
        }
        // Reads in advance that were started meanwhile keep a blob open until they are taken.
        self.vol.shared().drain();
        Ok(lost)
    }

    /// Truncates the file in memory to its durable length.
    fn give_up_bytes(&self, ino: &Arc<Inode>) {
        self.lives.quiesce(ino);
        let durable = ino.durable_len.load(Ordering::Acquire);
        ino.len.store(durable, Ordering::Release);
        ino.epoch.fetch_add(1, Ordering::AcqRel);
        self.lives.forget_bytes(ino);
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileSystem({})", self.vol.dev.info().name)
    }
}
