//! A file as the traits of `std::io` see it.

use std::io::{self, Read, Seek, SeekFrom, Write};

use super::error::FsError;
use super::file::File;

/// A place in a file, for code that reads and writes through the traits of [`std::io`]: see [`File::cursor`].
///
/// Several cursors of a file, also of several threads, have places of their own. Every call may block on the device.
/// Errors carry the [`FsError`], and the [`io::ErrorKind`] of its [`errno`](FsError::errno).
#[derive(Debug)]
pub struct Cursor<'a> {
    file: &'a File,
    at: u64,
}

impl File {
    /// Returns a cursor at the beginning of the file.
    ///
    /// ```
    /// use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
    ///
    /// use pumice_blobfs::fs::{FileSystem, FormatOptions, MountOptions, OpenOptions};
    ///
    /// let dev = pumice_bdev::open("malloc://64M")?;
    /// FileSystem::format(dev.clone(), &FormatOptions::default())?;
    /// let fs = FileSystem::mount(dev, &MountOptions::default())?;
    /// let file = fs.open("/fruit", OpenOptions::FRESH)?;
    /// let mut cursor = file.cursor();
    /// writeln!(cursor, "apple")?;
    /// writeln!(cursor, "pear")?;
    /// file.sync()?; // until here nothing need be on the device
    /// cursor.seek(SeekFrom::Start(6))?;
    /// assert_eq!(BufReader::new(cursor).lines().next().unwrap()?, "pear");
    /// # drop(file);
    /// # fs.unmount()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn cursor(&self) -> Cursor<'_> {
        Cursor { file: self, at: 0 }
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(self.at, buf)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Write for Cursor<'_> {
    /// Writes all of it, as [`File::write_at`] does: what lies between the end of the file and the place reads as zeroes.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.at, buf)?;
        self.at += buf.len() as u64;
        Ok(buf.len())
    }

    /// Does nothing, since a cursor keeps nothing back. [`File::sync`] makes the file durable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Cursor<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.len().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        let before = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "a place before the beginning of the file, or beyond any file",
            )
        };
        self.at = place.ok_or_else(before)?;
        Ok(self.at)
    }
}

impl From<FsError> for io::Error {
    fn from(error: FsError) -> io::Error {
        let kind = io::Error::from_raw_os_error(error.errno()).kind();
        io::Error::new(kind, error)
    }
}
