//! What a [`Db`](super::Db) holds: the database with its file system, and how both end.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pumice_blobfs::fs::{FileSystem, FsError};
use pumice_rocksdb_fs::{Binding, Use, chain};
use rocksdb::{DEFAULT_COLUMN_FAMILY_NAME, Env, Options};

use crate::Error;
use crate::closing::{Closing, buffers_its_log};
use crate::handle::{DbHandle, Rocks};
#[cfg(feature = "inspect")]
use crate::inspect::{Inspection, Look, Registry};
use crate::pool::{AsyncPool, PoolPhase};
use crate::recorded::Kept;
use crate::unlogged::{self, Family, Refused};

/// The time after which writes that RocksDB holds up are held up for ever.
const HELD_UP: Duration = Duration::from_secs(5);
/// The time between two looks at them.
const LOOK: Duration = Duration::from_millis(100);

/// The access that an opening has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum DbAccess {
    Write,
    /// Everything of a reader's is in a table or a log of a writer's.
    Read,
}

/// An open database of any kind. The operations of futures share it with the [`Db`](super::Db), which waits for them before it
/// lets it go.
pub(crate) struct Held<D: DbHandle> {
    /// The database, which only the drop takes.
    pub(crate) db: Option<Arc<D>>,
    /// The options of its opening, with its environment.
    pub(crate) options: Options,
    /// Options from which the options of the opening were derived. RocksDB uses their comparators and filters.
    pub(crate) _sources: Vec<Options>,
    pub(crate) env: Env,
    /// Ends the use of `env`.
    pub(crate) binding: Arc<Binding>,
    pub(crate) fs: FileSystem,
    pub(crate) root: String,
    pub(crate) access: DbAccess,
    /// The content of the newest `OPTIONS` file, if this opening must not change it.
    pub(crate) kept: Option<Kept>,
    /// The shared mount, if opening made it or found one of another database.
    pub(crate) mounted: Option<Use>,
    pub(crate) closing: Mutex<Closing>,
    pub(crate) refused: Mutex<Refused>,
    /// The threads of the futures.
    pub(crate) pool: AsyncPool,
    /// Gone when the database is closed.
    #[cfg(feature = "inspect")]
    pub(crate) inspection: Mutex<Option<Inspection>>,
}

impl<D: DbHandle> Held<D> {
    pub(crate) fn handle(&self) -> &D {
        self.db.as_ref().expect("only the drop takes it")
    }

    /// Closes the database: [`Db::close`](super::Db::close). Operations of futures that were accepted are done first.
    pub(crate) fn close(&self) -> Result<(), Error> {
        self.drain(PoolPhase::Paused);
        let closed = self.close_quiet();
        self.pool.drain(if closed.is_ok() {
            PoolPhase::Ended
        } else {
            PoolPhase::Open
        });
        closed
    }

    /// Has the pool do what it has accepted. RocksDB may hold up a put among it until the database is closed: its recovery
    /// from a flush that found no room waits for the put, which waits for the flush. The close would wait for both, so
    /// RocksDB is stopped first then, which ends the put, and what follows it, with an error.
    pub(crate) fn drain(&self, phase: PoolPhase) {
        if self.access == DbAccess::Read || !self.pool.is_busy() {
            return self.pool.drain(phase);
        }
        let (done, drained) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let watch = move || {
                let mut since = None;
                while drained.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    if !self.holds_writes_up() {
                        since = None;
                    } else if since.get_or_insert_with(Instant::now).elapsed() >= HELD_UP {
                        return self.handle().stop();
                    }
                }
            };
            let name = "pumice-drain".to_owned();
            if let Err(error) = thread::Builder::new().name(name).spawn_scoped(scope, watch) {
                tracing::warn!(%error, "nobody looks whether RocksDB holds up what the close waits for");
            }
            self.pool.drain(phase);
            drop(done);
        });
    }

    /// Whether writes wait, and nothing runs that they could wait for, after a flush or a compaction has failed.
    fn holds_writes_up(&self) -> bool {
        let figure = |name| self.handle().number(name).ok().flatten();
        figure(c"rocksdb.is-write-stopped") == Some(1)
            && figure(c"rocksdb.background-errors") > Some(0)
            && figure(c"rocksdb.num-running-flushes") == Some(0)
            && figure(c"rocksdb.num-running-compactions") == Some(0)
    }

    fn close_quiet(&self) -> Result<(), Error> {
        let mut closing = self.closing();
        if *closing == Closing::Closed {
            return Ok(());
        }
        if self.access == DbAccess::Read {
            self.handle().stop();
        } else {
            if *closing == Closing::Open {
                self.keep_recorded_options()?;
                self.settle()?;
                self.write_unlogged()?;
                self.handle().stop();
                *closing = Closing::Stopped;
            }
            if *closing != Closing::Unmounting {
                // Puts that came meanwhile. RocksDB writes no table of those without a log any longer, so this fails.
                self.settle()?;
                self.write_unlogged()?;
            }
        }
        // The next user that opens the device finds it free: the inspection has it too. While the device
        // cannot be released, there is something to be asked about.
        let stop = || {
            #[cfg(feature = "inspect")]
            self.stop_inspection();
        };
        match &self.mounted {
            Some(mounted) => mounted.end(stop).inspect_err(|_| {
                if self.is_being_unmounted() {
                    *closing = Closing::Unmounting;
                }
            })?,
            None => stop(),
        }
        self.binding.close();
        *closing = Closing::Closed;
        Ok(())
    }

    /// Brings back what `DbOptions::try_load_options` promises to keep.
    pub(crate) fn keep_recorded_options(&self) -> Result<(), Error> {
        match &self.kept {
            Some(kept) => kept.restore(&self.fs, &self.root),
            None => Ok(()),
        }
    }

    fn closing(&self) -> MutexGuard<'_, Closing> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(feature = "inspect")]
    pub(crate) fn inspect(&self, look: &Look, counted: Registry) -> Result<(), Error> {
        let db = self.db.as_ref().map(Arc::downgrade).unwrap_or_default();
        let inspection = look.start(&self.fs, db, counted)?;
        *self
            .inspection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = inspection;
        Ok(())
    }

    /// Nobody asks any longer, and the device's last user beside the file system is gone.
    #[cfg(feature = "inspect")]
    fn stop_inspection(&self) {
        let mut inspection = self
            .inspection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        drop(inspection.take());
    }

    /// Makes all puts durable. RocksDB stops using a log when a write or sync of it has failed. Its
    /// puts are in the log's file nevertheless, so the file system can make them durable when the
    /// fault has passed. If they are still in RocksDB's own buffer, tables with the same contents
    /// are as good.
    fn settle(&self) -> Result<(), Error> {
        let db = self.handle();
        let Err(failed) = db.flush_log() else {
            return Ok(());
        };
        if !buffers_its_log(&self.fs, &self.root) && self.fs.sync().is_ok() {
            return Ok(());
        }
        let families = self.families().map_err(|_| failed.clone())?;
        let families: Vec<_> = families.iter().map(|(_, family)| family).collect();
        db.flush_families(&families).map_err(|_| failed.into())
    }

    /// Whether the file system has refused everything since an unmount began.
    fn is_being_unmounted(&self) -> bool {
        matches!(self.fs.sync_dir("/"), Err(FsError::Unmounted { .. }))
    }

    /// Writes what was put without a log.
    fn write_unlogged(&self) -> Result<(), Error> {
        // The default family answers for all of them if it has something in memory. The list of
        // them is in the MANIFEST, which need not be readable.
        let name = DEFAULT_COLUMN_FAMILY_NAME;
        if let Some(default) = self.handle().family(name)
            && unlogged::all_logged(self.handle(), name, &default)
        {
            return Ok(());
        }
        let families = self.families()?;
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let written = unlogged::write(self.handle(), &families, &mut refused);
        written.map_err(|source| Error::Unlogged {
            path: self.root.clone(),
            source,
        })
    }

    /// Returns the column families that exist, with their names.
    pub(crate) fn families(&self) -> Result<Vec<Family<'_>>, rocksdb::Error> {
        let names = Rocks::list_cf(&self.options, "/")?;
        let handles = names
            .into_iter()
            .filter_map(|name| Some((self.handle().family(&name)?, name)));
        Ok(handles.map(|(family, name)| (name, family)).collect())
    }
}

impl<D: DbHandle> Drop for Held<D> {
    fn drop(&mut self) {
        let inherited = self.fs.is_inherited();
        // There is no later time to wait for.
        *self
            .refused
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = None;
        if !inherited
            && self.access == DbAccess::Write
            && *self.closing() == Closing::Open
            && let Err(error) = self.write_unlogged()
        {
            tracing::error!(error = %chain(&error), "the database was dropped and may lose what was put without a log");
        }
        let db = self.db.take();
        if inherited {
            // RocksDB would wait for threads that only the parent has.
            std::mem::forget(db);
            return;
        }
        #[cfg(feature = "inspect")]
        self.stop_inspection();
        drop(db);
        self.binding.close();
    }
}
