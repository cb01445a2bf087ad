//! `pumice db`: a database on a device, without a program that has it.

#![forbid(unsafe_code)]

mod args;
mod dump;
mod failure;
mod place;
mod text;

use std::fs::OpenOptions;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use pumice::rocksdb::{Direction, IteratorMode, ReadOptions};
use pumice::{DbOptions, RecordedOptions};
use pumice_bdev_control::config::NamedDevices;
use serde_json::{Map, Value, json};

use args::{DbCommand, DbTool, Delete, Dump, Export, Get, Load, Look, Put, Restore, Scan};
use failure::{DbFailure, Outcome, complain};
use place::{Missing, Unopened, changing, family, on_device, reading, reading_all};
use text::Form;

fn main() -> ExitCode {
    if let Some(code) = pumice_describe::asked(DbTool::command) {
        return code;
    }
    let DbTool { config, command } = DbTool::parse();
    let _named = config.as_deref().map(NamedDevices::new);
    // A reader of the first records of a scan, such as `head`, may close the pipe.
    let may_be_cut = matches!(command, DbCommand::Scan(_));
    let (name, result) = run(command);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is_closed_pipe && may_be_cut => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("pumice db {name}: {}", e.text));
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
        DbCommand::Checkpoint(args) => {
            let check = |found: &Unopened<'_>| found.require_nothing_at(&args.to);
            let make = |db: &pumice::Db| Ok(db.checkpoint(&args.to)?);
            (
                "checkpoint",
                changing(&args.place, Missing::Refuse, check, make),
            )
        }
        DbCommand::Backup(args) => {
            let check = |found: &Unopened<'_>| found.require_no_file_at(&args.to);
            let make = |db: &pumice::Db| Ok(db.backup(&args.to)?);
            (
                "backup",
                changing(&args.place, Missing::Refuse, check, make),
            )
        }
        DbCommand::Restore(args) => ("restore", restore(&args)),
        DbCommand::Export(args) => ("export", export(&args)),
    }
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
    let cf = &args.keys.cf;
    let check = |found: &Unopened<'_>| {
        found.require_family(cf)?;
        let recorded = RecordedOptions::of(found.fs, found.path)?;
        let options = recorded.and_then(|recorded| recorded.family(cf));
        if options.is_some_and(|options| options.contains("TtlCompactionFilter")) {
            return Err(DbFailure::from(
                "the values of this database end with the time of their put (a TTL), and this command writes none; \
                 `pumice ldb put --ttl` does"
                    .to_owned(),
            ));
        }
        Ok(())
    };
    changing(&args.place, Missing::of(args.create), check, |db| {
        Ok(db.put_cf(&family(db, cf)?, key, value)?)
    })
}

fn delete(args: &Delete) -> Outcome {
    let key = text::argument(&args.key, args.keys.hex)?;
    let cf = &args.keys.cf;
    let check = |found: &Unopened<'_>| found.require_family(cf);
    changing(&args.place, Missing::Refuse, check, |db| {
        Ok(db.delete_cf(&family(db, cf)?, key)?)
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
        let records = records.take(args.limit.unwrap_or(usize::MAX));
        if args.json {
            write_array(records, hex, &mut out)?;
        } else {
            for record in records {
                let (key, value) = record?;
                let form = Form::of(hex);
                writeln!(out, "{}\t{}", form.write(&key), form.write(&value))?;
            }
        }
        Ok(out.flush()?)
    })
}

/// Writes records as a JSON array, an element a line, without keeping them.
fn write_array<E>(
    records: impl Iterator<Item = Result<(Box<[u8]>, Box<[u8]>), E>>,
    hex: bool,
    out: &mut impl Write,
) -> Outcome
where
    DbFailure: From<E>,
{
    let mut before = "[\n";
    for record in records {
        let (key, value) = record?;
        let mut object = Map::new();
        text::insert(&mut object, "key", &key, hex);
        text::insert(&mut object, "value", &value, hex);
        write!(out, "{before}  {}", Value::Object(object))?;
        before = ",\n";
    }
    if before == "[\n" {
        return Ok(writeln!(out, "[]")?);
    }
    Ok(writeln!(out, "\n]")?)
}

fn dump(args: &Dump) -> Outcome {
    reading_all(&args.place, |db| {
        let families = match &args.cf {
            Some(name) => vec![name.clone()],
            None => db.column_families()?,
        };
        let mut out = BufWriter::new(io::stdout().lock());
        dump::dump(db, &families, Form::of(args.hex), &mut out).map(drop)
    })
}

fn load(args: &Load) -> Outcome {
    let mut reader = dump::Reader::new(io::stdin().lock());
    let first = reader.begin()?;
    let missing = Missing::of(args.create);
    let check = |found: &Unopened<'_>| match &first {
        Some(name) if !args.create => found.require_family(name),
        _ => Ok(()),
    };
    let records = changing(&args.place, missing, check, |db| {
        reader.load(db, first.as_deref(), missing)
    })?;
    complain(&format!("{records} records"));
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
    let found = reading_all(&args.place, |db| {
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
    let number = on_device(&args.device, |fs| {
        let options = DbOptions::new().path(&args.path);
        Ok(options.restore_backup_in(fs, &args.from, args.backup)?)
    })?;
    Ok(writeln!(io::stdout(), "backup {number} is restored")?)
}

fn export(args: &Export) -> Outcome {
    let check = |_: &Unopened<'_>| require_empty(&args.to);
    let make = |db: &pumice::Db| Ok(db.export(&args.to)?);
    changing(&args.place, Missing::Refuse, check, make)
}

/// Refuses a directory of the kernel's file system that is not empty, or cannot be made.
fn require_empty(dir: &Path) -> Outcome {
    let shown = dir.display().to_string();
    let refuse = |why: String| Err(DbFailure::from(format!("{}: {why}", shown.escape_debug())));
    match dir.read_dir() {
        Ok(entries) => match entries.count() {
            0 => require_writable(dir),
            _ => refuse("is not empty; give a missing or empty directory".to_owned()),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => match dir.parent() {
            Some(above) if !above.as_os_str().is_empty() && !above.is_dir() => {
                refuse("the directory above it does not exist".to_owned())
            }
            Some(above) if !above.as_os_str().is_empty() => require_writable(above),
            _ => require_writable(Path::new(".")),
        },
        Err(e) => refuse(e.to_string()),
    }
}

/// Refuses a directory in which no file can be made, which only trying tells.
fn require_writable(dir: &Path) -> Outcome {
    let probe = dir.join(format!(".pumice-export-{}", std::process::id()));
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&probe)
        .and_then(|_| std::fs::remove_file(&probe));
    made.map_err(|e| {
        let shown = dir.display().to_string();
        DbFailure::from(format!(
            "{}: no file can be made there: {e}",
            shown.escape_debug()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_written_while_it_is_read() {
        let record = |key: &[u8]| Ok((Box::from(key), Box::from(&b"\xff"[..])));
        let mut out = Vec::new();
        let records = [record(b"a"), Err("stops".to_owned()), record(b"b")];
        let stopped = write_array(records.into_iter(), false, &mut out);
        assert_eq!(stopped.unwrap_err().text, "stops");
        let written = String::from_utf8(out).unwrap();
        assert_eq!(written, "[\n  {\"key\":\"a\",\"value_hex\":\"ff\"}");
        for keys in [&[][..], &[&b"a"[..]], &[b"a", b"b"]] {
            let mut out = Vec::new();
            let records = keys.iter().map(|key| record(key));
            write_array::<String>(records, true, &mut out).unwrap();
            let all: Value = serde_json::from_slice(&out).unwrap();
            assert_eq!(all.as_array().unwrap().len(), keys.len());
        }
    }
}
