//! Copying the files of a mounted file system, without the parts that cannot be read.

use std::collections::HashMap;
use std::fs::{File as KernelFile, FileTimes};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use pumice_blobfs::blobstore::BlobId;
use pumice_blobfs::fs::{Access, FileSystem, OpenOptions, Stat};

use super::Outcome;
use super::target::Target;
use crate::files::{CHUNK, join};

/// Number of bytes that are skipped when they cannot be read.
const LEAST: usize = 4096;

/// Fills a buffer from an offset on, or returns the reason why not.
pub type Read<'a> = dyn Fn(u64, &mut [u8]) -> Result<(), String> + 'a;

/// The result of a copy.
#[derive(Default)]
pub struct Copied {
    pub bytes: u64,
    pub holes: Vec<Range<u64>>,
    /// The reason why the first hole could not be read.
    pub why: String,
}

/// Copies every file and directory below `/`.
pub fn all(fs: &FileSystem, target: &Target, outcome: &mut Outcome) {
    let mut dirs = vec!["/".to_owned()];
    // Hard links are recreated.
    let mut copies: HashMap<BlobId, PathBuf> = HashMap::new();
    while let Some(dir) = dirs.pop() {
        let entries = match fs.list(&dir) {
            Ok(entries) => entries,
            Err(e) => {
                outcome.lose(&dir, e.to_string());
                continue;
            }
        };
        for entry in entries {
            let path = join(&dir, &entry.name);
            if entry.is_dir {
                match target.dir(&path) {
                    Ok(_) => {
                        outcome.dirs += 1;
                        dirs.push(path);
                    }
                    Err(e) => outcome.lose(&path, format!("the directory cannot be made: {e}")),
                }
                continue;
            }
            match one(fs, &path, target, &mut copies) {
                Ok(copied) => outcome.copied(&path, copied),
                Err(why) => outcome.lose(&path, why),
            }
        }
    }
}

fn one(
    fs: &FileSystem,
    path: &str,
    target: &Target,
    copies: &mut HashMap<BlobId, PathBuf>,
) -> Result<Copied, String> {
    let stat = fs.stat(path).map_err(|e| e.to_string())?;
    if let Some(copy) = stat.blob_id.and_then(|id| copies.get(&id))
        && target.link(copy, path).is_ok()
    {
        return Ok(Copied::default());
    }
    let source = fs
        .open(path, OpenOptions::READ)
        .map_err(|e| e.to_string())?;
    source.advise(Access::Sequential);
    let (file, at) = target
        .file(path)
        .map_err(|e| format!("the copy cannot be made: {e}"))?;
    let read = |offset: u64, buf: &mut [u8]| {
        let mut done = 0;
        while done < buf.len() {
            match source.read_at(offset + done as u64, &mut buf[done..]) {
                Ok(0) => return Err("the file ends before its length".to_owned()),
                Ok(n) => done += n,
                Err(e) => return Err(e.to_string()),
            }
        }
        Ok(())
    };
    let copied = into(&file, stat.len, &read)?;
    finish(&file, &stat)?;
    if let Some(id) = stat.blob_id.filter(|_| copied.holes.is_empty()) {
        copies.insert(id, at);
    }
    Ok(copied)
}

fn finish(file: &KernelFile, stat: &Stat) -> Result<(), String> {
    let times = FileTimes::new().set_modified(stat.mtime);
    // A time that the kernel does not accept is not a loss.
    let _ = file.set_times(times);
    file.sync_all().map_err(|e| format!("the copy: {e}"))
}

impl Copied {
    /// Records a range that is a hole in the copy.
    pub fn miss(&mut self, range: Range<u64>, why: &str) {
        if self.holes.is_empty() {
            why.clone_into(&mut self.why);
        }
        match self.holes.last_mut() {
            Some(hole) if hole.end == range.start => hole.end = range.end,
            _ => self.holes.push(range),
        }
    }
}

/// Copies `len` bytes into a new file. Ranges that `read` cannot read become holes; zeroes take no
/// space.
pub fn into(file: &KernelFile, len: u64, read: &Read<'_>) -> Result<Copied, String> {
    file.set_len(len).map_err(|e| format!("the copy: {e}"))?;
    let mut copied = Copied::default();
    into_range(file, 0..len, read, &mut copied)?;
    Ok(copied)
}

/// Copies a range of the file as [`into`] does.
pub fn into_range(
    file: &KernelFile,
    range: Range<u64>,
    read: &Read<'_>,
    copied: &mut Copied,
) -> Result<(), String> {
    let mut buf = vec![0; CHUNK];
    // The ranges to read, the next one last.
    let mut pieces: Vec<(u64, usize)> = Vec::new();
    let mut at = range.start;
    while at < range.end || !pieces.is_empty() {
        let (offset, n) = pieces.pop().unwrap_or_else(|| {
            let n = usize::try_from(range.end - at).unwrap_or(CHUNK).min(CHUNK);
            let piece = (at, n);
            at += n as u64;
            piece
        });
        match read(offset, &mut buf[..n]) {
            Ok(()) => {
                if buf[..n].iter().any(|byte| *byte != 0) {
                    file.write_all_at(&buf[..n], offset)
                        .map_err(|e| format!("the copy: {e}"))?;
                }
                copied.bytes += n as u64;
            }
            Err(_) if n > LEAST => {
                let half = (n / 2).next_multiple_of(LEAST).min(n - 1);
                pieces.push((offset + half as u64, n - half));
                pieces.push((offset, half));
            }
            Err(why) => copied.miss(offset..offset + n as u64, &why),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_a_hole_of_the_least_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        let file = KernelFile::create(&path).unwrap();
        let len = 3 * CHUNK as u64 + 777;
        // Two unreadable places, one of them across two blocks, and the end.
        let bad = [5000..5001, 1_048_570..1_060_000, len - 1..len];
        let read = |offset: u64, buf: &mut [u8]| {
            let end = offset + buf.len() as u64;
            if bad.iter().any(|b| b.start < end && offset < b.end) {
                return Err(format!("media error at {offset}"));
            }
            for (byte, at) in buf.iter_mut().zip(offset..) {
                *byte = (at % 251) as u8;
            }
            Ok(())
        };
        let copied = into(&file, len, &read).unwrap();
        let last = (len - 1) / 4096 * 4096;
        assert_eq!(
            copied.holes,
            [4096..8192, 1_044_480..1_060_864, last..len],
            "{:?}",
            copied.holes
        );
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, len);
        for (at, byte) in (0_u64..).zip(&bytes) {
            let hole = copied.holes.iter().any(|h| h.contains(&at));
            let expected = if hole { 0 } else { (at % 251) as u8 };
            assert_eq!(*byte, expected, "byte {at}");
        }
        let lost: u64 = copied.holes.iter().map(|h| h.end - h.start).sum();
        assert_eq!(copied.bytes, len - lost);
    }
}
