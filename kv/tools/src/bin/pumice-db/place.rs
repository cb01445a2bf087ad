//! Opening the database, after everything that can be checked before.

use std::sync::Arc;

use pumice::rocksdb::{BoundColumnFamily, DBRecoveryMode, ErrorKind as RocksKind, Options};
use pumice::{Db, DbOptions, EnvOptions, Error, FileSystem, MountOptions, Rocks};

use crate::args::DbPlace;
use crate::failure::{DbFailure, Outcome, complain};

/// The outcome of a change after which closing failed.
const MAY_BE_KEPT: &str = "what the command has changed may be there; look before you repeat it";

/// The choice that a command has where there is no database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    Refuse,
    Create,
}

impl Missing {
    /// The choice that `--create` makes.
    pub fn of(create: bool) -> Missing {
        if create {
            Missing::Create
        } else {
            Missing::Refuse
        }
    }
}

/// A database before it is opened. Opening makes files, so what a command refuses is refused here.
pub struct Unopened<'a> {
    pub fs: &'a FileSystem,
    pub path: &'a str,
    /// The names of the column families.
    pub families: Vec<String>,
}

impl Unopened<'_> {
    /// Refuses a column family that does not exist.
    pub fn require_family(&self, name: &str) -> Outcome {
        if self.families.iter().any(|known| known == name) {
            return Ok(());
        }
        Err(no_family(name, &self.families))
    }

    /// Refuses a path of the file system at which something is.
    pub fn require_nothing_at(&self, path: &str) -> Outcome {
        pumice::check_free(path)?;
        if self.exists(path)? {
            let shown = path.escape_debug();
            return Err(DbFailure::from(format!(
                "{shown}: there is something; give a path at which nothing is"
            )));
        }
        self.require_no_file_above(path)
    }

    /// Refuses a path of the file system at which a file is.
    pub fn require_no_file_at(&self, path: &str) -> Outcome {
        pumice::check_free(path)?;
        if self.exists(path)? && !self.fs.stat(path).map_err(Error::from)?.is_dir {
            let shown = path.escape_debug();
            return Err(DbFailure::from(format!(
                "{shown}: is a file; give a directory"
            )));
        }
        self.require_no_file_above(path)
    }

    fn require_no_file_above(&self, path: &str) -> Outcome {
        let above = path
            .match_indices('/')
            .map(|(at, _)| &path[..at])
            .filter(|above| !above.is_empty());
        for above in above {
            if self.exists(above)? && !self.fs.stat(above).map_err(Error::from)?.is_dir {
                let shown = above.escape_debug();
                return Err(DbFailure::from(format!(
                    "{shown}: is a file, and cannot have other files below it; give another path"
                )));
            }
        }
        Ok(())
    }

    fn exists(&self, path: &str) -> Result<bool, DbFailure> {
        Ok(self.fs.exists(path).map_err(pumice::Error::from)?)
    }
}

/// Opens the database for reading only, which several programs may do at a time, and calls `f`. Says so if its log has what
/// cannot be read, and then shows what comes before it.
pub fn reading<R>(
    place: &DbPlace,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let db = match strict(place) {
        Err(Error::RocksDb(e)) if is_of_its_log(&e) => {
            complain(&format!(
                "pumice db: the database's log can be read in part only, and what comes after that part is not shown: {e}"
            ));
            readable(place).open(&place.device)?
        }
        opened => opened?,
    };
    read(&db, f)
}

/// Opens the database as [`reading`] does, unless its log has what cannot be read. Its last record may be incomplete.
pub fn reading_all<R>(
    place: &DbPlace,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    read(&strict(place)?, f)
}

fn readable(place: &DbPlace) -> DbOptions {
    let options = DbOptions::new().try_load_options().read_only(true);
    options.path(&place.path).mount(unformatted())
}

fn strict(place: &DbPlace) -> Result<Db, Error> {
    let strict = DBRecoveryMode::TolerateCorruptedTailRecords;
    let options = readable(place).wal_recovery_mode(strict);
    options.open(&place.device)
}

/// Whether the error of opening may be one that RocksDB's usual mode of recovery takes for the end of the log.
fn is_of_its_log(e: &pumice::rocksdb::Error) -> bool {
    let kinds = [
        RocksKind::Corruption,
        RocksKind::InvalidArgument,
        RocksKind::NotSupported,
    ];
    kinds.contains(&e.kind())
}

fn read<R>(db: &Db, f: impl FnOnce(&Db) -> Result<R, DbFailure>) -> Result<R, DbFailure> {
    if db.file_system().hides_writes() {
        complain(
            "pumice db: what a killed process had not synced is in shared memory and cannot be shown; \
             the next mount for writing puts it in place, or says why not",
        );
    }
    let (result, closed) = (f(db), db.close());
    let value = result?;
    closed?;
    Ok(value)
}

/// Opens the database with its own options and calls `f`, if `check` finds nothing wrong before.
pub fn changing<R>(
    place: &DbPlace,
    missing: Missing,
    check: impl FnOnce(&Unopened<'_>) -> Outcome,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    on_device(&place.device, |fs| {
        check(&found(fs, &place.path, missing)?)?;
        let create = missing == Missing::Create;
        let options = DbOptions::new()
            .path(&place.path)
            .configure(|options| options.create_if_missing(create))
            .try_load_options();
        let db = options.open_in(fs).map_err(|e| {
            let is_of_its_log = matches!(&e, Error::RocksDb(e) if is_of_its_log(e));
            let failure = DbFailure::from(e);
            if is_of_its_log {
                failure.with(
                    "nothing is changed; if only the database's program can read its log, let that program flush it to \
                     tables first; `get` and `scan` show what can be read",
                )
            } else {
                failure
            }
        })?;
        let (result, closed) = (f(&db), db.close());
        let value = result?;
        closed.map_err(|e| DbFailure::from(e).with(MAY_BE_KEPT))?;
        Ok(value)
    })
}

/// Mounts the file system, calls `f` and unmounts.
pub fn on_device<R>(
    device: &str,
    f: impl FnOnce(&FileSystem) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let fs = pumice::mount(device, &unformatted())?;
    let result = f(&fs);
    let unmounted = fs.unmount().map_err(Error::from);
    let value = result?;
    unmounted.map_err(|e| DbFailure::from(e).with(MAY_BE_KEPT))?;
    Ok(value)
}

fn found<'a>(
    fs: &'a FileSystem,
    path: &'a str,
    missing: Missing,
) -> Result<Unopened<'a>, DbFailure> {
    let current = format!("{}/CURRENT", path.trim_end_matches('/'));
    if fs.exists(&current).map_err(pumice::Error::from)? {
        let mut options = Options::default();
        options.set_env(&EnvOptions::new().root(path).build(fs)?);
        let families = Rocks::list_cf(&options, "/")?;
        return Ok(Unopened { fs, path, families });
    }
    if missing == Missing::Refuse {
        let shown = path.escape_debug();
        return Err(DbFailure::from(format!(
            "{shown}: there is no database; --path names its directory, and `put` and `load` make one with --create"
        )));
    }
    let families = vec!["default".to_owned()];
    Ok(Unopened { fs, path, families })
}

/// The options of a command's mount. What a command writes is durable when it has ended, and one that is killed leaves
/// nothing that has to be kept.
fn unformatted() -> MountOptions {
    MountOptions::new().format_empty(None).volatile(true)
}

/// Returns a column family.
pub fn family<'a>(db: &'a Db, name: &str) -> Result<Arc<BoundColumnFamily<'a>>, DbFailure> {
    match db.cf_handle(name) {
        Some(family) => Ok(family),
        None => Err(no_family(name, &db.column_families()?)),
    }
}

fn no_family(name: &str, families: &[String]) -> DbFailure {
    let shown: Vec<String> = families
        .iter()
        .map(|family| family.escape_debug().to_string())
        .collect();
    DbFailure::from(format!(
        "there is no column family \"{}\"; there are: {}; `load --create` makes missing ones",
        name.escape_debug(),
        shown.join(", ")
    ))
}
