//! BlobFS behind the plugin.

use pumice_blobfs::fs::{
    self, File, FileLock, FileSystem, FsError, OpenOptions, Pinned, ReadHandle, ReadRequest,
};

use super::{
    Abilities, Access, Entry, Fault, How, PendingRead, PluginFile, PluginFs, Read, Result, Started,
    Stat,
};

impl From<FsError> for Fault {
    fn from(e: FsError) -> Fault {
        Fault {
            errno: e.errno(),
            retryable: e.is_retryable(),
            data_loss: e.is_data_loss(),
            text: e.to_string(),
        }
    }
}

/// Cached bytes of a file.
#[derive(Debug)]
pub struct Lent(Pinned);

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The files that RocksDB makes, or begins, whenever it opens a database. On a full file system they may
/// come from what is kept back, so that the database can be opened, read and emptied.
fn is_essential(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    matches!(name, "LOG" | "CURRENT" | "IDENTITY" | "LOCK")
        || name.starts_with("MANIFEST-")
        || name.starts_with("OPTIONS-")
        || matches!(extension, Some("dbtmp" | "log"))
}

impl PluginFs for FileSystem {
    type File = File;
    type Lock = FileLock;

    fn abilities(&self) -> Abilities {
        Abilities {
            async_reads: true,
            pins: true,
            prefetch: true,
            rereads: true,
        }
    }

    fn alignment(&self) -> usize {
        4096
    }

    fn open(&self, path: &str, how: How) -> Result<File> {
        let options = OpenOptions {
            create: how.create,
            fresh: how.fresh,
            essential: is_essential(path),
            ..OpenOptions::READ
        };
        let file = FileSystem::open(self, path, options)?;
        if how.direct {
            file.set_direct(true);
        }
        if how.fresh && path.ends_with(".log") {
            // A write-ahead log is read again only by recovery.
            File::advise(&file, pumice_blobfs::fs::Access::NoReuse);
        }
        Ok(file)
    }

    fn remove(&self, path: &str) -> Result<()> {
        Ok(self.unlink(path)?)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        Ok(FileSystem::rename(self, from, to)?)
    }

    fn link(&self, from: &str, to: &str) -> Result<()> {
        Ok(FileSystem::link(self, from, to)?)
    }

    fn stat(&self, path: &str) -> Result<Stat> {
        let stat = FileSystem::stat(self, path)?;
        Ok(Stat {
            len: stat.len,
            modified: stat.mtime,
            file_id: stat.blob_id.map_or(0, |id| id.0),
            links: u32::try_from(stat.links).unwrap_or(u32::MAX),
            is_dir: stat.is_dir,
        })
    }

    fn mkdir(&self, path: &str) -> Result<()> {
        Ok(FileSystem::mkdir(self, path)?)
    }

    fn rmdir(&self, path: &str) -> Result<()> {
        Ok(FileSystem::rmdir(self, path)?)
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        let entries = FileSystem::list(self, dir)?;
        Ok(entries
            .into_iter()
            .map(|entry| Entry {
                name: entry.name,
                len: entry.len,
                is_dir: entry.is_dir,
            })
            .collect())
    }

    fn sync_dir(&self, dir: &str) -> Result<()> {
        Ok(FileSystem::sync_dir(self, dir)?)
    }

    fn lock(&self, path: &str) -> Result<FileLock> {
        Ok(FileSystem::lock(self, path)?)
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(FileSystem::free_bytes(self))
    }
}

impl PluginFile for File {
    type Pin = Lent;
    type Pending = ReadHandle;

    #[inline]
    fn size(&self) -> u64 {
        self.len()
    }

    fn file_id(&self) -> u64 {
        self.blob_id().0
    }

    #[inline]
    fn append(&self, data: &[u8]) -> Result<()> {
        Ok(File::append(self, data)?)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        Ok(File::write_at(self, offset, data)?)
    }

    #[inline]
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        Ok(File::read_at(self, offset, buf)?)
    }

    fn read_many(&self, reads: &mut [Read<'_>]) {
        let mut requests: Vec<ReadRequest<'_>> = reads
            .iter_mut()
            .map(|read| ReadRequest::new(read.offset, &mut *read.buf))
            .collect();
        File::read_many(self, &mut requests);
        let results: Vec<_> = requests.into_iter().map(|request| request.result).collect();
        for (read, result) in reads.iter_mut().zip(results) {
            read.result = result.map_err(Fault::from);
        }
    }

    fn pin(&self, offset: u64, len: usize) -> Option<Lent> {
        self.read_pinned(offset, len).map(Lent)
    }

    fn read_start(&self, offset: u64, len: usize) -> Result<Started<ReadHandle>> {
        let read = self.read_async(offset, len)?;
        Ok(if read.poll() {
            Started::Ready(read)
        } else {
            Started::Pending(read)
        })
    }

    fn truncate(&self, len: u64) -> Result<()> {
        Ok(File::truncate(self, len)?)
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        Ok(File::allocate(self, offset, len)?)
    }

    fn finish(&self) -> Result<()> {
        File::flush(self)?;
        self.finish_writing();
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(File::sync(self)?)
    }

    fn range_sync(&self, offset: u64, len: u64) -> Result<()> {
        Ok(File::range_sync(self, offset, len)?)
    }

    fn prefetch(&self, offset: u64, len: u64) -> Result<()> {
        Ok(File::prefetch(self, offset, len)?)
    }

    fn invalidate(&self, offset: u64, len: u64) -> Result<()> {
        File::invalidate(self, offset, len);
        Ok(())
    }

    fn advise(&self, access: Access) {
        File::advise(
            self,
            match access {
                Access::Normal => fs::Access::Normal,
                Access::Random => fs::Access::Random,
                Access::Sequential => fs::Access::Sequential,
                Access::WillNeed => fs::Access::WillNeed,
                Access::WontNeed => fs::Access::DontNeed,
            },
        );
    }
}

impl PendingRead for ReadHandle {
    fn finish(self, buf: &mut [u8]) -> Result<usize> {
        Ok(self.read_into(buf)?)
    }
}
