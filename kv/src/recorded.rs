//! The options that RocksDB has recorded in a database's directory.

use pumice_blobfs::fs::{FileSystem, FsError, OpenOptions};
use pumice_rocksdb_fs::normal;
use rocksdb::{Cache, ColumnFamilyDescriptor, Options};

use crate::{Error, MountOptions, env, mount};

/// The option that a tool switches off, as the file names it.
const DISABLED: &str = "disable_auto_compactions";
/// The most bytes that an `OPTIONS` file has. RocksDB's have some KiB for each column family.
const MOST_BYTES: u64 = 16 << 20;
/// Bytes of the block cache of a database that is opened with recorded options.
const CACHE_BYTES: usize = 32 << 20;

/// The options of a database as its newest `OPTIONS` file has them.
#[derive(Debug)]
pub struct RecordedOptions {
    path: String,
    text: String,
}

impl RecordedOptions {
    /// Returns those of the database in the directory `path`, or `None` if it has no such file.
    ///
    /// # Errors
    /// [`Error::FileSystem`], and [`Error::Directory`] if the file is not text or has more than 16 MiB.
    pub fn of(fs: &FileSystem, path: &str) -> Result<Option<RecordedOptions>, Error> {
        let dir = normal(path)?;
        let number = |name: &str| name.strip_prefix("OPTIONS-")?.parse::<u64>().ok();
        let entries = match fs.list(&dir) {
            Ok(entries) => entries,
            Err(FsError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let files = entries.into_iter().map(|entry| entry.name);
        let numbered = files.filter_map(|name| Some((number(&name)?, name)));
        let Some((_, name)) = numbered.max() else {
            return Ok(None);
        };
        let path = format!("{}/{name}", dir.trim_end_matches('/'));
        let file = fs.open(&path, OpenOptions::READ)?;
        let damaged = |what: &str| Error::Directory {
            path: path.clone(),
            reason: format!("RocksDB's options are {what}: the file is damaged"),
        };
        // The length is what the image says, and a hole takes no room there.
        let len = file.len();
        if len > MOST_BYTES {
            return Err(damaged(&format!("{len} bytes long")));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        let read = file.read_at(0, &mut bytes)?;
        bytes.truncate(read);
        let text = String::from_utf8(bytes).map_err(|_| damaged("not text"))?;
        Ok(Some(RecordedOptions { path, text }))
    }

    /// Returns the whole text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the lines below `[CFOptions "NAME"]`, the options of the column family `name`.
    #[must_use]
    pub fn family(&self, name: &str) -> Option<String> {
        let mut sections = sections(&self.text);
        let found = sections.find(|section| section.family_options() == Some(name));
        found.map(|section| section.lines.concat())
    }

    /// Returns the directory of the database's log if it is not the database's own.
    pub(crate) fn wal_dir(&self) -> Option<&str> {
        let mut lines = self.text.lines().filter_map(|line| line.split_once('='));
        let (_, dir) = lines.find(|(name, _)| name.trim() == "wal_dir")?;
        Some(dir.trim()).filter(|dir| !dir.trim_matches('/').is_empty())
    }

    /// Returns RocksDB's options that stand for the recorded ones, but with no automatic compaction.
    pub(crate) fn quiet(&self) -> Result<(Options, Vec<ColumnFamilyDescriptor>), Error> {
        let text: String = sections(&self.text)
            .map(|section| section.with_disabled("true"))
            .collect();
        // RocksDB reads them from a file, which is made in memory.
        let fs = mount("malloc://64M", &MountOptions::new().volatile(true))?;
        let file = fs.open("/OPTIONS-000001", OpenOptions::CREATE)?;
        file.append(text.as_bytes())?;
        file.sync()?;
        drop(file);
        let cache = Cache::new_lru_cache(CACHE_BYTES);
        Ok(Options::load_latest("/", env(&fs), true, cache)?)
    }
}

/// The content that a database's newest `OPTIONS` file keeps although a tool has opened the database with other options.
#[derive(Debug)]
pub(crate) struct Kept {
    /// The text that was there before.
    before: Option<String>,
}

impl Kept {
    pub(crate) fn new(before: Option<RecordedOptions>) -> Kept {
        Kept {
            before: before.map(|recorded| recorded.text),
        }
    }

    /// Brings the content back if RocksDB has written a newer file.
    pub(crate) fn restore(&self, fs: &FileSystem, dir: &str) -> Result<(), Error> {
        let Some(now) = RecordedOptions::of(fs, dir)? else {
            return Ok(());
        };
        let text = self.text(&now.text);
        if text == now.text {
            return Ok(());
        }
        // RocksDB removes a file of this name when it opens the database.
        let unfinished = format!("{}.dbtmp", now.path);
        let replace = || {
            let how = OpenOptions::FRESH.essential(true);
            let file = fs.open(&unfinished, how)?;
            file.append(text.as_bytes())?;
            file.sync()?;
            drop(file);
            fs.rename(&unfinished, &now.path)
        };
        replace().map_err(|e: FsError| {
            let _ = fs.unlink(&unfinished);
            e.into()
        })
    }

    /// Returns the text from before, with the options of the column families that are new in `now`.
    fn text(&self, now: &str) -> String {
        let before = self.before.as_deref().unwrap_or_default();
        let known = |name: &str| sections(before).any(|s| s.family_options() == Some(name));
        let new = sections(now).filter(|section| match section.family() {
            Some(name) => !known(name),
            None => before.is_empty(),
        });
        let mut text = before.to_owned();
        text.extend(new.map(|section| section.with_disabled("false")));
        text
    }
}

/// A heading in brackets with the lines below it, or the lines before the first heading.
struct Section<'a> {
    heading: &'a str,
    lines: Vec<&'a str>,
}

impl Section<'_> {
    /// Returns the name of the column family that it is about, if it is about one.
    fn family(&self) -> Option<&str> {
        let (_, name) = self.heading.split_once('"')?;
        Some(name.rsplit_once('"')?.0)
    }

    /// Returns the name of the column family whose options it has, if it has some.
    fn family_options(&self) -> Option<&str> {
        let is = self.heading.trim_start().starts_with("[CFOptions ");
        self.family().filter(|_| is)
    }

    /// Returns its text. The options of a column family get this value of the switch.
    fn with_disabled(&self, value: &str) -> String {
        let mut text = self.heading.to_owned();
        if self.family_options().is_none() {
            text.push_str(&self.lines.concat());
            return text;
        }
        let is_switch = |line: &str| {
            let name = line.split_once('=').map(|(name, _)| name.trim());
            name == Some(DISABLED)
        };
        let mut found = false;
        for line in &self.lines {
            if is_switch(line) {
                found = true;
                text.push_str(&format!("  {DISABLED}={value}\n"));
            } else {
                text.push_str(line);
            }
        }
        if !found {
            text.push_str(&format!("  {DISABLED}={value}\n"));
        }
        text
    }
}

fn sections(text: &str) -> impl Iterator<Item = Section<'_>> {
    let mut lines = text.split_inclusive('\n').peekable();
    std::iter::from_fn(move || {
        let is_heading = |line: &&str| line.trim_start().starts_with('[');
        let heading = lines.next_if(is_heading);
        let mut section = Section {
            heading: heading.unwrap_or_default(),
            lines: Vec::new(),
        };
        while let Some(line) = lines.next_if(|line| !is_heading(line)) {
            section.lines.push(line);
        }
        (heading.is_some() || !section.lines.is_empty()).then_some(section)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "# comment\n[Version]\n  a=1\n[DBOptions]\n  b=2\n[CFOptions \"default\"]\n  num_levels=4\n  \
        disable_auto_compactions=false\n[TableOptions/BlockBasedTable \"default\"]\n  c=3\n[CFOptions \"old\"]\n  d=4\n";
    const NOW: &str = "[Version]\n  a=9\n[CFOptions \"default\"]\n  disable_auto_compactions=true\n\
        [CFOptions \"new \"]\n  disable_auto_compactions=true\n  e=5\n[TableOptions/BlockBasedTable \"new \"]\n  f=6\n";

    /// No image makes a process take as much memory as a file of it is long.
    #[test]
    fn a_file_too_long_for_options_is_damaged() {
        let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
        let file = fs.open("/OPTIONS-000007", OpenOptions::CREATE).unwrap();
        file.append(OWN.as_bytes()).unwrap();
        assert!(RecordedOptions::of(&fs, "/").unwrap().is_some());
        file.truncate(MOST_BYTES + 1).unwrap();
        let error = RecordedOptions::of(&fs, "/").unwrap_err();
        assert_eq!(
            error.to_string(),
            "/OPTIONS-000007: RocksDB's options are 16777217 bytes long: the file is damaged"
        );
    }

    #[test]
    fn options_are_kept_and_new_families_are_added() {
        let recorded = RecordedOptions {
            path: String::new(),
            text: OWN.to_owned(),
        };
        assert!(recorded.family("default").unwrap().contains("num_levels=4"));
        assert_eq!(recorded.family("old").unwrap(), "  d=4\n");
        assert_eq!(recorded.family("new"), None);
        let quiet: String = sections(OWN).map(|s| s.with_disabled("true")).collect();
        assert_eq!(quiet.matches("disable_auto_compactions=true").count(), 2);
        assert_eq!(quiet.replace("  disable_auto_compactions=true\n", ""), {
            OWN.replace("  disable_auto_compactions=false\n", "")
        });
        let kept = Kept::new(Some(recorded));
        let added = "[CFOptions \"new \"]\n  disable_auto_compactions=false\n  e=5\n\
            [TableOptions/BlockBasedTable \"new \"]\n  f=6\n";
        assert_eq!(kept.text(NOW), format!("{OWN}{added}"));
        assert_eq!(kept.text(OWN), OWN);
        let none = Kept::new(None);
        assert_eq!(none.text(NOW), NOW.replace("=true", "=false"));
    }
}
