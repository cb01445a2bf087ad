//! The file systems that `DbOptions::open` has mounted: one for each device, whatever the number of
//! its databases.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pumice_blobfs::fs::{FileSystem, FsError};

use crate::Error;

/// The identity of a mounted device: the process, since a mount is not inherited; the place; and
/// whether it is mounted for reading only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Device {
    process: u32,
    place: String,
    read_only: bool,
}

/// A device's file system and the number of databases that use it.
#[derive(Debug, Default)]
struct Mounted {
    fs: Option<FileSystem>,
    users: usize,
}

type Entry = Arc<Mutex<Mounted>>;

static DEVICES: Mutex<BTreeMap<Device, Entry>> = Mutex::new(BTreeMap::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A database's use of a mounted file system.
#[derive(Debug)]
pub(crate) struct Use {
    fs: FileSystem,
    entry: Entry,
    process: u32,
    over: Mutex<bool>,
}

impl Use {
    /// Mounts the device that `uri` names by `mount`, or shares its file system if a database of this process has
    /// mounted it.
    pub fn of(
        uri: &str,
        read_only: bool,
        mount: impl FnOnce() -> Result<FileSystem, Error>,
    ) -> Result<Use, Error> {
        let entry = match place(uri) {
            // Memory is a new device each time.
            None => Entry::default(),
            Some(place) => {
                let device = Device {
                    process: std::process::id(),
                    place,
                    read_only,
                };
                let mut devices = locked(&DEVICES);
                // An entry without another reference belongs to a device that is no longer mounted.
                devices.retain(|_, entry| Arc::strong_count(entry) > 1);
                Arc::clone(devices.entry(device).or_default())
            }
        };
        // Others who want this device, and only these, wait here while it is being mounted.
        let mut mounted = locked(&entry);
        let usable = |fs: &FileSystem| !matches!(fs.exists("/"), Err(FsError::Unmounted { .. }));
        let fs = match mounted.fs.take().filter(usable) {
            Some(fs) => fs,
            None => {
                mounted.users = 0;
                mount()?
            }
        };
        mounted.fs = Some(fs.clone());
        mounted.users += 1;
        drop(mounted);
        Ok(Use {
            fs,
            entry,
            process: std::process::id(),
            over: Mutex::new(false),
        })
    }

    /// The file system.
    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    /// Ends the use. The last one unmounts. After a success, a second call does nothing.
    pub fn end(&self) -> Result<(), FsError> {
        if self.process != std::process::id() {
            // In a forked child it belongs to the parent.
            return Ok(());
        }
        let mut over = locked(&self.over);
        if *over {
            return Ok(());
        }
        let mut mounted = locked(&self.entry);
        if mounted.users <= 1 {
            match self.fs.unmount() {
                // Another thread with a handle of it was faster.
                Ok(()) | Err(FsError::Unmounted { .. }) => {}
                Err(e) => return Err(e),
            }
            mounted.fs = None;
        }
        mounted.users = mounted.users.saturating_sub(1);
        *over = true;
        Ok(())
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            let device = format!("{:?}", self.fs);
            tracing::error!(device, %error, "the database was dropped and could not be closed in order");
        }
    }
}

/// Returns the place that a URI names, if that is the same device each time.
fn place(uri: &str) -> Option<String> {
    let base = uri.split_once('?').map_or(uri, |(base, _)| base);
    match base.split_once("://") {
        None => Some(canonical(base)),
        Some(("file", path)) => Some(canonical(path)),
        Some(("nvme" | "vfio-user", _)) => Some(base.to_owned()),
        Some(_) => None,
    }
}

/// Returns the path without links, also of a file that does not exist yet.
fn canonical(path: &str) -> String {
    let path = Path::new(path);
    let real = path.canonicalize().or_else(|e| {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(e);
        };
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        Ok::<_, std::io::Error>(dir.canonicalize()?.join(name))
    });
    real.unwrap_or_else(|_| path.to_owned())
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_device_has_one_place() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.img");
        let uri = format!("file://{}", file.display());
        let before = place(&format!("{uri}?size=1G&create=1")).unwrap();
        std::fs::write(&file, "").unwrap();
        assert_eq!(place(&uri).unwrap(), before);
        assert_eq!(place(&file.display().to_string()).unwrap(), before);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(place(&link.display().to_string()).unwrap(), before);
        assert_eq!(place("malloc://1G"), None);
        assert_ne!(
            place("nvme://0000:01:00.0/1"),
            place("nvme://0000:01:00.0/2")
        );
    }
}
