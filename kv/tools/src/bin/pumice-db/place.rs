//! Opening the database, after everything that can be checked before.

use std::sync::Arc;

use pumice::rocksdb::{BoundColumnFamily, DBRecoveryMode, Options};
use pumice::{Db, DbOptions, EnvOptions, FileSystem, MountOptions, Rocks};

use crate::args::DbPlace;
use crate::failure::{DbFailure, Outcome, complain};

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
        if self.exists(path)? {
            let shown = path.escape_debug();
            return Err(DbFailure::from(format!(
                "{shown}: there is something; give a path at which nothing is"
            )));
        }
        Ok(())
    }

    /// Refuses a path of the file system at which a file is.
    pub fn require_no_file_at(&self, path: &str) -> Outcome {
        if self.exists(path)? && !self.fs.stat(path).map_err(pumice::Error::from)?.is_dir {
            let shown = path.escape_debug();
            return Err(DbFailure::from(format!(
                "{shown}: is a file; give a directory"
            )));
        }
        Ok(())
    }

    fn exists(&self, path: &str) -> Result<bool, DbFailure> {
        Ok(self.fs.exists(path).map_err(pumice::Error::from)?)
    }
}

/// Opens the database for reading only, which several programs may do at a time, and calls `f`.
pub fn reading<R>(
    place: &DbPlace,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    read_with(place, DbOptions::new(), f)
}

/// Opens the database as [`reading`] does, unless a record of its log is damaged. The last one may be incomplete.
pub fn reading_all<R>(
    place: &DbPlace,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let strict = DBRecoveryMode::TolerateCorruptedTailRecords;
    read_with(place, DbOptions::new().wal_recovery_mode(strict), f)
}

fn read_with<R>(
    place: &DbPlace,
    options: DbOptions,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let options = options.try_load_options().read_only(true);
    let options = options.path(&place.path).mount(unformatted());
    let db = options.open(&place.device)?;
    if db.file_system().hides_writes() {
        complain(
            "pumice db: what a killed process had not synced is in shared memory and cannot be shown; \
             the next mount for writing puts it in place, or says why not",
        );
    }
    closed(&db, f)
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
        closed(&options.open_in(fs)?, f)
    })
}

/// Mounts the file system, calls `f` and unmounts.
pub fn on_device<R>(
    device: &str,
    f: impl FnOnce(&FileSystem) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let fs = pumice::mount(device, &unformatted())?;
    let result = f(&fs);
    let unmounted = fs.unmount();
    let value = result?;
    unmounted.map_err(pumice::Error::from)?;
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

fn closed<R>(db: &Db, f: impl FnOnce(&Db) -> Result<R, DbFailure>) -> Result<R, DbFailure> {
    let result = f(db);
    let closed = db.close();
    let value = result?;
    closed?;
    Ok(value)
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
