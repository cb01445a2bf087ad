//! A database as lines of text.
//!
//! ```text
//! pumice-db-dump 1
//! family default
//! KEY<tab>VALUE
//! end 1
//! ```
//!
//! The first line may end with ` hex`. A record has a tab, and no other line has one. The last line tells how many records
//! there are, so that a dump that was cut short is recognised.

use std::io::{BufRead, Write};

use pumice::Db;
use pumice::rocksdb::{IteratorMode, Options, ReadOptions, WriteBatch};

use crate::text::Form;
use crate::{DbFailure, family};

/// The first line of a dump, without the form.
const HEADER: &str = "pumice-db-dump 1";
/// Bytes that are written to the database at a time.
const BATCH: usize = 1 << 20;

/// Writes the families to `out`, and returns the number of records.
pub fn dump(
    db: &Db,
    families: &[String],
    form: Form,
    out: &mut impl Write,
) -> Result<u64, DbFailure> {
    let hex = if form == Form::Hex { " hex" } else { "" };
    writeln!(out, "{HEADER}{hex}")?;
    let mut records = 0;
    for name in families {
        writeln!(out, "family {}", form.write(name.as_bytes()))?;
        let handle = family(db, name)?;
        let mut how = ReadOptions::default();
        how.fill_cache(false);
        for record in db.iterator_cf_opt(&handle, how, IteratorMode::Start) {
            let (key, value) = record?;
            writeln!(out, "{}\t{}", form.write(&key), form.write(&value))?;
            records += 1;
        }
    }
    writeln!(out, "end {records}")?;
    out.flush()?;
    Ok(records)
}

/// A dump that is being read.
struct Reader<R> {
    lines: R,
    number: u64,
    form: Form,
}

impl<R: BufRead> Reader<R> {
    fn wrong(&self, why: impl std::fmt::Display) -> DbFailure {
        DbFailure::from(format!("standard input, line {}: {why}", self.number))
    }

    /// Returns the next line without its end.
    fn line(&mut self) -> Result<Option<Vec<u8>>, DbFailure> {
        let mut line = Vec::new();
        let n = self.lines.read_until(b'\n', &mut line)?;
        self.number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        Ok((n > 0).then_some(line))
    }

    fn header(&mut self) -> Result<(), DbFailure> {
        let line = self.line()?.unwrap_or_default();
        let rest = line.strip_prefix(HEADER.as_bytes());
        self.form = match rest {
            Some(b"") => Form::Escaped,
            Some(b" hex") => Form::Hex,
            _ => {
                return Err(self.wrong(format!(
                    "not a dump of `pumice db dump`, whose first line is `{HEADER}`"
                )));
            }
        };
        Ok(())
    }

    fn bytes(&self, text: &[u8]) -> Result<Vec<u8>, DbFailure> {
        self.form.read(text).map_err(|e| self.wrong(e))
    }
}

/// Puts every record of a dump into the database, and returns their number. Families that are missing are made with `create`.
pub fn load(db: &Db, input: impl BufRead, create: bool) -> Result<u64, DbFailure> {
    let mut reader = Reader {
        lines: input,
        number: 0,
        form: Form::Escaped,
    };
    reader.header()?;
    let mut records = 0;
    let mut current = None;
    let mut batch = WriteBatch::default();
    while let Some(line) = reader.line()? {
        let tab = line.iter().position(|b| *b == b'\t');
        if let Some(tab) = tab {
            let key = reader.bytes(&line[..tab])?;
            let value = reader.bytes(&line[tab + 1..])?;
            match &current {
                Some(handle) => batch.put_cf(handle, key, value),
                None => return Err(reader.wrong("a record before the first family")),
            }
            records += 1;
            if batch.size_in_bytes() >= BATCH {
                db.write(std::mem::take(&mut batch))?;
            }
        } else if let Some(name) = line.strip_prefix(b"family ") {
            let name = String::from_utf8(reader.bytes(name)?)
                .map_err(|_| reader.wrong("the name of a column family is not text"))?;
            if create && db.cf_handle(&name).is_none() {
                db.create_cf(&name, &Options::default())?;
            }
            current = Some(family(db, &name)?);
        } else if let Some(count) = line.strip_prefix(b"end ") {
            if count != records.to_string().as_bytes() {
                return Err(reader.wrong(format!(
                    "{} records were dumped, and {records} are here",
                    String::from_utf8_lossy(count).escape_debug()
                )));
            }
            db.write(batch)?;
            return Ok(records);
        } else {
            return Err(reader.wrong("neither a record, whose key ends with a tab, nor a family"));
        }
    }
    db.write(batch)?;
    Err(reader.wrong(format!(
        "the dump has no last line: it was cut short; {records} records of it are in the database"
    )))
}
