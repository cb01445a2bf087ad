//! `pumice db`: a database on a device, without a program that has it.

#![forbid(unsafe_code)]

mod dump;
mod text;

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use pumice::rocksdb::{BoundColumnFamily, Direction, IteratorMode, ReadOptions};
use pumice::{Db, DbOptions, MountOptions};
use serde_json::{Map, Value, json};

use text::Form;

/// Look into a database on a device, and change, copy and check it
#[derive(Parser)]
#[command(name = "pumice-db", bin_name = "pumice db", version)]
struct DbTool {
    #[command(subcommand)]
    command: DbCommand,
}

#[derive(Subcommand)]
enum DbCommand {
    Get(Get),
    Put(Put),
    Delete(Delete),
    Scan(Scan),
    Dump(Dump),
    Load(Load),
    Stats(Look),
    Verify(Verify),
    Checkpoint(CopyTo),
    Backup(Backup),
    Restore(Restore),
    Export(Export),
}

/// The place of the database.
#[derive(Args)]
struct DbPlace {
    /// Device: an image file, a block device or a URI
    device: String,
    /// Directory of the database in the device's file system
    #[arg(long, default_value = "/")]
    path: String,
}

/// The keys, and how they are written.
#[derive(Args)]
struct Keys {
    /// Column family
    #[arg(long, default_value = "default")]
    cf: String,
    /// Keys and values are hexadecimal digits
    #[arg(long)]
    hex: bool,
}

/// Print the value of a key
#[derive(Args)]
struct Get {
    #[command(flatten)]
    place: DbPlace,
    /// Key
    key: String,
    #[command(flatten)]
    keys: Keys,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Set the value of a key, durably
#[derive(Args)]
struct Put {
    #[command(flatten)]
    place: DbPlace,
    /// Key
    key: String,
    /// Value
    value: String,
    #[command(flatten)]
    keys: Keys,
    /// Make the database if there is none
    #[arg(long)]
    create: bool,
}

/// Delete a key, durably
#[derive(Args)]
struct Delete {
    #[command(flatten)]
    place: DbPlace,
    /// Key
    key: String,
    #[command(flatten)]
    keys: Keys,
}

/// Print keys and values in order, a line each, with a tab between them and `\xNN` for bytes that cannot be printed
#[derive(Args)]
struct Scan {
    #[command(flatten)]
    place: DbPlace,
    #[command(flatten)]
    keys: Keys,
    /// First key
    #[arg(long)]
    from: Option<String>,
    /// Key before which to stop
    #[arg(long)]
    to: Option<String>,
    /// Most keys
    #[arg(long)]
    limit: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Write everything to standard output as text, which `load` reads
#[derive(Args)]
struct Dump {
    #[command(flatten)]
    place: DbPlace,
    /// Only this column family
    #[arg(long)]
    cf: Option<String>,
    /// Write hexadecimal digits
    #[arg(long)]
    hex: bool,
}

/// Put everything from standard input, which `dump` has written, into the database
#[derive(Args)]
struct Load {
    #[command(flatten)]
    place: DbPlace,
    /// Make the database, and column families, if there are none
    #[arg(long)]
    create: bool,
}

/// Show sizes and counts
#[derive(Args)]
struct Look {
    #[command(flatten)]
    place: DbPlace,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Read every record with its checksum
#[derive(Args)]
struct Verify {
    #[command(flatten)]
    look: Look,
}

/// Make a second database with the same content, which shares the tables, in the same file system
#[derive(Args)]
struct CopyTo {
    #[command(flatten)]
    place: DbPlace,
    /// Directory in the file system, which must not exist
    to: String,
}

/// Add a backup to those in a directory of the same file system
#[derive(Args)]
struct Backup {
    #[command(flatten)]
    place: DbPlace,
    /// Directory of backups in the file system
    to: String,
}

/// Restore the latest backup into --path, which must be missing or empty
#[derive(Args)]
struct Restore {
    #[command(flatten)]
    place: DbPlace,
    /// Directory of backups in the file system
    from: String,
}

/// Copy the database to a directory of the kernel's file system, where RocksDB opens it without Pumice
#[derive(Args)]
struct Export {
    #[command(flatten)]
    place: DbPlace,
    /// Directory, missing or empty
    to: PathBuf,
}

/// The reason why a command failed, as a message.
#[derive(Debug)]
struct DbFailure {
    text: String,
    /// Whether the reader of the output went away.
    is_closed_pipe: bool,
}

impl From<String> for DbFailure {
    fn from(text: String) -> DbFailure {
        DbFailure {
            text,
            is_closed_pipe: false,
        }
    }
}

impl From<pumice::Error> for DbFailure {
    fn from(e: pumice::Error) -> DbFailure {
        DbFailure::from(pumice::chain(&e))
    }
}

impl From<pumice::rocksdb::Error> for DbFailure {
    fn from(e: pumice::rocksdb::Error) -> DbFailure {
        DbFailure::from(e.to_string())
    }
}

impl From<io::Error> for DbFailure {
    fn from(e: io::Error) -> DbFailure {
        DbFailure {
            is_closed_pipe: e.kind() == io::ErrorKind::BrokenPipe,
            text: format!("standard input or output: {e}"),
        }
    }
}

type Outcome = Result<(), DbFailure>;

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(DbTool::command()) {
        return code;
    }
    let command = DbTool::parse().command;
    let (name, result) = run(command);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_closed_pipe => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pumice db {name}: {}", e.text);
            ExitCode::FAILURE
        }
    }
}

fn run(command: DbCommand) -> (&'static str, Outcome) {
    match command {
        DbCommand::Get(args) => ("get", get(&args)),
        DbCommand::Put(args) => ("put", put(&args)),
        DbCommand::Delete(args) => ("delete", delete(&args)),
        DbCommand::Scan(args) => ("scan", scan(&args)),
        DbCommand::Dump(args) => ("dump", dump(&args)),
        DbCommand::Load(args) => ("load", load(&args)),
        DbCommand::Stats(args) => ("stats", stats(&args)),
        DbCommand::Verify(args) => ("verify", verify(&args.look)),
        DbCommand::Checkpoint(args) => (
            "checkpoint",
            changing(&args.place, false, |db| Ok(db.checkpoint(&args.to)?)),
        ),
        DbCommand::Backup(args) => (
            "backup",
            changing(&args.place, false, |db| Ok(db.backup(&args.to)?)),
        ),
        DbCommand::Restore(args) => ("restore", restore(&args)),
        DbCommand::Export(args) => (
            "export",
            changing(&args.place, false, |db| Ok(db.export(&args.to)?)),
        ),
    }
}

/// Opens the database for reading only, which several programs may do at a time.
fn reading<R>(
    place: &DbPlace,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let options = DbOptions::new().read_only(true);
    with(place, &options, f)
}

/// Opens the database, which is made if there is none and `create` says so.
fn changing<R>(
    place: &DbPlace,
    create: bool,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let options = DbOptions::new().configure(|options| options.create_if_missing(create));
    with(place, &options, f)
}

fn with<R>(
    place: &DbPlace,
    options: &DbOptions,
    f: impl FnOnce(&Db) -> Result<R, DbFailure>,
) -> Result<R, DbFailure> {
    let options = options.clone().path(&place.path).mount(unformatted());
    let db = options.open(&place.device)?;
    let result = f(&db);
    let closed = db.close();
    let value = result?;
    closed?;
    Ok(value)
}

fn unformatted() -> MountOptions {
    MountOptions::new().format_empty(None)
}

/// Returns a column family.
fn family<'a>(db: &'a Db, name: &str) -> Result<Arc<BoundColumnFamily<'a>>, DbFailure> {
    if let Some(family) = db.cf_handle(name) {
        return Ok(family);
    }
    Err(DbFailure::from(format!(
        "there is no column family \"{}\"; there are: {}",
        name.escape_debug(),
        db.column_families()?.join(", ")
    )))
}

fn get(args: &Get) -> Outcome {
    let hex = args.keys.hex;
    let key = text::argument(&args.key, hex)?;
    let value = reading(&args.place, |db| {
        Ok(db.get_cf(&family(db, &args.keys.cf)?, &key)?)
    })?;
    let Some(value) = value else {
        return Err(DbFailure::from("there is no such key".to_owned()));
    };
    let mut out = io::stdout().lock();
    if args.json {
        let mut object = Map::new();
        text::insert(&mut object, "key", &key, hex);
        text::insert(&mut object, "value", &value, hex);
        writeln!(out, "{:#}", Value::Object(object))?;
    } else {
        let line = if hex {
            Form::Hex.write(&value).into_bytes()
        } else {
            value
        };
        out.write_all(&line)?;
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

fn put(args: &Put) -> Outcome {
    let key = text::argument(&args.key, args.keys.hex)?;
    let value = text::argument(&args.value, args.keys.hex)?;
    changing(&args.place, args.create, |db| {
        Ok(db.put_cf(&family(db, &args.keys.cf)?, key, value)?)
    })
}

fn delete(args: &Delete) -> Outcome {
    let key = text::argument(&args.key, args.keys.hex)?;
    changing(&args.place, false, |db| {
        Ok(db.delete_cf(&family(db, &args.keys.cf)?, key)?)
    })
}

fn scan(args: &Scan) -> Outcome {
    let hex = args.keys.hex;
    let bound = |text: &Option<String>| text.as_deref().map(|t| text::argument(t, hex)).transpose();
    let (from, to) = (bound(&args.from)?, bound(&args.to)?);
    let mut out = BufWriter::new(io::stdout().lock());
    reading(&args.place, |db| {
        let mut how = ReadOptions::default();
        if let Some(to) = to {
            how.set_iterate_upper_bound(to);
        }
        let mode = match &from {
            Some(from) => IteratorMode::From(from, Direction::Forward),
            None => IteratorMode::Start,
        };
        let records = db.iterator_cf_opt(&family(db, &args.keys.cf)?, how, mode);
        let mut all = Vec::new();
        for record in records.take(args.limit.unwrap_or(usize::MAX)) {
            let (key, value) = record?;
            if args.json {
                let mut object = Map::new();
                text::insert(&mut object, "key", &key, hex);
                text::insert(&mut object, "value", &value, hex);
                all.push(Value::Object(object));
            } else {
                let form = Form::of(hex);
                writeln!(out, "{}\t{}", form.write(&key), form.write(&value))?;
            }
        }
        if args.json {
            writeln!(out, "{:#}", Value::Array(all))?;
        }
        Ok(out.flush()?)
    })
}

fn dump(args: &Dump) -> Outcome {
    reading(&args.place, |db| {
        let families = match &args.cf {
            Some(name) => vec![name.clone()],
            None => db.column_families()?,
        };
        let mut out = BufWriter::new(io::stdout().lock());
        dump::dump(db, &families, Form::of(args.hex), &mut out).map(drop)
    })
}

fn load(args: &Load) -> Outcome {
    let records = changing(&args.place, args.create, |db| {
        dump::load(db, io::stdin().lock(), args.create)
    })?;
    eprintln!("{records} records");
    Ok(())
}

/// The figures of a column family that RocksDB has as numbers.
const FIGURES: [(&str, &str); 5] = [
    ("keys_estimate", "rocksdb.estimate-num-keys"),
    ("live_bytes_estimate", "rocksdb.estimate-live-data-size"),
    ("table_bytes", "rocksdb.total-sst-files-size"),
    ("live_table_bytes", "rocksdb.live-sst-files-size"),
    ("memtable_bytes", "rocksdb.cur-size-all-mem-tables"),
];

fn stats(args: &Look) -> Outcome {
    let all = reading(&args.place, |db| {
        let mut families = Vec::new();
        for name in db.column_families()? {
            let handle = family(db, &name)?;
            let mut object = Map::new();
            for (figure, property) in FIGURES {
                let value = db.property_int_value_cf(&handle, property)?;
                object.insert(figure.to_owned(), json!(value));
            }
            object.insert("name".to_owned(), name.into());
            families.push(Value::Object(object));
        }
        Ok(json!({
            "path": db.directory(),
            "last_sequence": db.latest_sequence_number(),
            "column_families": families,
        }))
    })?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{all:#}")?;
        return Ok(());
    }
    writeln!(out, "last sequence  {}", all["last_sequence"])?;
    for family in all["column_families"].as_array().into_iter().flatten() {
        let name = family["name"].as_str().unwrap_or_default();
        writeln!(out, "{}", Form::Escaped.write(name.as_bytes()))?;
        for (figure, _) in FIGURES {
            writeln!(out, "  {:20} {}", figure.replace('_', " "), family[figure])?;
        }
    }
    Ok(())
}

fn verify(args: &Look) -> Outcome {
    let found = reading(&args.place, |db| {
        let mut found = Vec::new();
        for name in db.column_families()? {
            let mut how = ReadOptions::default();
            how.set_verify_checksums(true);
            how.fill_cache(false);
            let mut records = 0u64;
            for record in db.iterator_cf_opt(&family(db, &name)?, how, IteratorMode::Start) {
                record.map_err(|e| {
                    let name = name.escape_debug();
                    DbFailure::from(format!("{name}: after {records} records: {e}"))
                })?;
                records += 1;
            }
            found.push((name, records));
        }
        Ok(found)
    })?;
    let mut out = io::stdout().lock();
    if args.json {
        let families: Map<String, Value> = found.into_iter().map(|(n, r)| (n, json!(r))).collect();
        writeln!(out, "{:#}", json!({ "records": families }))?;
        return Ok(());
    }
    for (name, records) in found {
        let name = Form::Escaped.write(name.as_bytes());
        writeln!(out, "{name}: {records} records are readable")?;
    }
    Ok(())
}

fn restore(args: &Restore) -> Outcome {
    let fs = pumice::mount(&args.place.device, &unformatted())?;
    let restored = DbOptions::new()
        .path(&args.place.path)
        .restore_in(&fs, &args.from);
    let unmounted = fs.unmount();
    restored?;
    unmounted.map_err(|e| DbFailure::from(e.to_string()))
}
