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

use std::io::{BufRead, Read as _, Write};

use pumice::Db;
use pumice::rocksdb::{IteratorMode, Options, ReadOptions, WriteBatch};

use crate::failure::{DbFailure, Outcome};
use crate::place::{Missing, family};
use crate::text::Form;

/// The first line of a dump, without the form.
const HEADER: &str = "pumice-db-dump 1";
/// Bytes that are written to the database at a time.
const BATCH: usize = 1 << 20;
/// Most bytes of a line that is read.
const LINE_MAX: u64 = 1 << 30;

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
pub struct Reader<R> {
    lines: R,
    number: u64,
    form: Form,
}

impl<R: BufRead> Reader<R> {
    pub fn new(lines: R) -> Reader<R> {
        Reader {
            lines,
            number: 0,
            form: Form::Escaped,
        }
    }

    fn wrong(&self, why: impl std::fmt::Display) -> DbFailure {
        DbFailure::from(format!("standard input, line {}: {why}", self.number))
    }

    /// Returns the next line without its end, if it has at most `max` bytes.
    fn line_of(&mut self, max: u64) -> Result<Option<Vec<u8>>, DbFailure> {
        let mut line = Vec::new();
        let n = (&mut self.lines)
            .take(max + 1)
            .read_until(b'\n', &mut line)?;
        self.number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        if line.len() as u64 > max {
            return Err(self.wrong(format!("longer than {max} bytes")));
        }
        Ok((n > 0).then_some(line))
    }

    fn line(&mut self) -> Result<Option<Vec<u8>>, DbFailure> {
        self.line_of(LINE_MAX)
    }

    /// Reads to the first family, and returns its name. `None`: the dump has none.
    pub fn begin(&mut self) -> Result<Option<String>, DbFailure> {
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
        match self.next(0)? {
            Some(DumpLine::Family(name)) => Ok(Some(name)),
            Some(DumpLine::Record(..)) => Err(self.wrong("a record before the first family")),
            None => Ok(None),
        }
    }

    fn bytes(&self, text: &[u8]) -> Result<Vec<u8>, DbFailure> {
        self.form.read(text).map_err(|e| self.wrong(e))
    }

    /// Returns what the next line is, or `None` after the last line, which has the number `records`.
    fn next(&mut self, records: u64) -> Result<Option<DumpLine>, DbFailure> {
        let Some(line) = self.line()? else {
            return Err(self.wrong("the dump has no last line: it was cut short"));
        };
        if let Some(tab) = line.iter().position(|b| *b == b'\t') {
            let key = self.bytes(&line[..tab])?;
            let value = self.bytes(&line[tab + 1..])?;
            return Ok(Some(DumpLine::Record(key, value)));
        }
        if let Some(name) = line.strip_prefix(b"family ") {
            let name = String::from_utf8(self.bytes(name)?)
                .map_err(|_| self.wrong("the name of a column family is not text"))?;
            return Ok(Some(DumpLine::Family(name)));
        }
        let Some(count) = line.strip_prefix(b"end ") else {
            return Err(self.wrong("neither a record, whose key ends with a tab, nor a family"));
        };
        if count != records.to_string().as_bytes() {
            return Err(self.wrong(format!(
                "{} records were dumped, and {records} are here",
                String::from_utf8_lossy(count).escape_debug()
            )));
        }
        match self.line()? {
            None => Ok(None),
            Some(_) => Err(self.wrong("something follows the last line of the dump")),
        }
    }

    /// Puts every record into the database, beginning in the family `first`, and returns their number.
    ///
    /// # Errors
    /// The error says how many records are in the database nevertheless.
    pub fn load(
        &mut self,
        db: &Db,
        first: Option<&str>,
        missing: Missing,
    ) -> Result<u64, DbFailure> {
        let mut loading = Loading::default();
        let read = self.fill(db, first, missing, &mut loading);
        // What was read before an error is put, as it is of a dump that was cut short.
        let put = loading.put(db);
        let (what, verb) = match loading.put {
            1 => ("record", "is"),
            _ => ("records", "are"),
        };
        read.and(put).map_err(|e| {
            let count = loading.put;
            e.with(&format!(
                "{count} {what} of it {verb} in the database already"
            ))
        })?;
        Ok(loading.read)
    }

    fn fill(
        &mut self,
        db: &Db,
        first: Option<&str>,
        missing: Missing,
        loading: &mut Loading,
    ) -> Outcome {
        let Some(first) = first else {
            return Ok(());
        };
        let enter = |name: &str| {
            if missing == Missing::Create && db.cf_handle(name).is_none() {
                db.create_cf(name, &Options::default())?;
            }
            family(db, name)
        };
        let mut current = enter(first)?;
        while let Some(line) = self.next(loading.read)? {
            match line {
                DumpLine::Family(name) => current = enter(&name)?,
                DumpLine::Record(key, value) => {
                    loading.batch.put_cf(&current, key, value);
                    loading.read += 1;
                }
            }
            if loading.batch.size_in_bytes() >= BATCH {
                loading.put(db)?;
            }
        }
        Ok(())
    }
}

/// The records of a dump that are being put into a database.
#[derive(Default)]
struct Loading {
    batch: WriteBatch,
    /// Number of records that were read.
    read: u64,
    /// Number of those that the database has.
    put: u64,
}

impl Loading {
    fn put(&mut self, db: &Db) -> Outcome {
        db.write(std::mem::take(&mut self.batch))?;
        self.put = self.read;
        Ok(())
    }
}

/// A line of a dump.
enum DumpLine {
    Family(String),
    /// A key and its value.
    Record(Vec<u8>, Vec<u8>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_bound() {
        let mut reader = Reader::new(&b"12345\n123456\n"[..]);
        assert_eq!(reader.line_of(5).unwrap().as_deref(), Some(&b"12345"[..]));
        let long = reader.line_of(5).unwrap_err();
        assert!(
            long.text.contains("line 2: longer than 5 bytes"),
            "{}",
            long.text
        );
    }
}
