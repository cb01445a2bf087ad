//! The file systems that were mounted by a URI: one for each device, whatever the number of its users.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pumice_bdev::registry::Registry;
use pumice_bdev::{BlockDevice, file};
use pumice_blobfs::fs::{FileSystem, FsError};
use pumice_io::process::{Birth, PerProcess};
use pumice_io::uri::Uri;

/// The property by which devices are told apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// A file, by its UUID, which does not depend on the path.
    File([u8; 16]),
    /// A file that does not exist yet, by its path.
    Missing(PathBuf),
    /// Another device, by the identity that it has while it is open.
    Open(usize),
}

impl Key {
    /// Returns the key of the file that has this path now.
    fn of_path(path: PathBuf) -> Key {
        match path.metadata() {
            Ok(meta) => Key::File(file::uuid_of(&meta)),
            Err(_) => Key::Missing(std::path::absolute(&path).unwrap_or(path)),
        }
    }
}

/// A key of the table: a device, and whether it is mounted for reading only.
type Place = (Key, bool);

/// A device's file system and the number of its users.
#[derive(Debug)]
struct SharedMount {
    fs: Arc<FileSystem>,
    /// The device with its counters, if the user that mounted it wants them.
    counted: Registry,
    key: Key,
    users: usize,
}

impl SharedMount {
    fn is_usable(&self) -> bool {
        !matches!(self.fs.exists("/"), Err(FsError::Unmounted { .. }))
    }

    /// Whether it is the device that was meant. A missing file became the one that was made at its
    /// path.
    fn is_of(&self, key: &Key) -> bool {
        self.key == *key || matches!(key, Key::Missing(_))
    }
}

type Entry = Arc<Mutex<Option<SharedMount>>>;

/// A mount is not inherited by a forked child, nor is a lock that another thread had at the fork.
static DEVICES: PerProcess<Mutex<BTreeMap<Place, Entry>>> = PerProcess::new(Mutex::default);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the entry of a device, which is made if there is none.
fn entry_of(place: &Place) -> Entry {
    let mut devices = locked(DEVICES.get());
    // An entry without another reference belongs to a device that is no longer used, and is empty.
    devices.retain(|_, entry| Arc::strong_count(entry) > 1);
    Arc::clone(devices.entry(place.clone()).or_default())
}

/// One user's share of a mounted file system. The end of the last one unmounts it.
#[derive(Debug)]
pub struct Use {
    fs: Arc<FileSystem>,
    entry: Entry,
    birth: Birth,
    over: Mutex<bool>,
}

impl Use {
    /// Opens the device that `uri` names by `open` and mounts it by `mount`, which puts it into the
    /// registry if it is to be counted, or shares its file system if this process has mounted it this
    /// way.
    ///
    /// # Errors
    /// Fails as `open` and `mount` do.
    pub fn of<E>(
        uri: &str,
        read_only: bool,
        open: impl Fn() -> Result<Arc<dyn BlockDevice>, E>,
        mount: impl FnOnce(Arc<dyn BlockDevice>, &Registry) -> Result<FileSystem, E>,
    ) -> Result<Use, E> {
        let file = Uri::parse(uri, &[]).ok().filter(|u| u.scheme() == "file");
        // A file is locked by its opening, so it is told by its path. Other devices can be opened
        // more than once.
        let (key, device) = match file {
            Some(file) => (Key::of_path(file.path()), None),
            None => {
                let device = open()?;
                (Key::Open(device.identity()), Some(device))
            }
        };
        let place = (key, read_only);
        let mut entry = entry_of(&place);
        // Others who want this device, and only these, wait here while it is being mounted.
        let mut slot = locked(&entry);
        if let Some(mounted) = slot.as_mut().filter(|mounted| mounted.is_usable()) {
            if mounted.is_of(&place.0) {
                mounted.users += 1;
                let fs = Arc::clone(&mounted.fs);
                drop(slot);
                return Ok(Use::new(fs, entry));
            }
            // The path has another file since the key was made. That is not shared.
            drop(slot);
            entry = Entry::default();
            slot = locked(&entry);
        }
        let device = device.map_or_else(open, Ok)?;
        let key = match &place.0 {
            Key::Open(identity) => Key::Open(*identity),
            Key::File(_) | Key::Missing(_) => Key::File(device.info().uuid),
        };
        let counted = Registry::new();
        let fs = Arc::new(mount(device, &counted)?);
        let earlier = slot.replace(SharedMount {
            fs: Arc::clone(&fs),
            counted,
            key: key.clone(),
            users: 1,
        });
        let mut devices = locked(DEVICES.get());
        if key != place.0
            && devices
                .get(&place)
                .is_some_and(|known| Arc::ptr_eq(known, &entry))
        {
            devices.remove(&place);
        }
        devices
            .entry((key, read_only))
            .or_insert_with(|| Arc::clone(&entry));
        drop(devices);
        drop(slot);
        drop(earlier);
        Ok(Use::new(fs, entry))
    }

    fn new(fs: Arc<FileSystem>, entry: Entry) -> Use {
        Use {
            fs,
            entry,
            birth: Birth::now(),
            over: Mutex::new(false),
        }
    }

    /// The file system.
    #[must_use]
    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    /// The registry with the device, if it is counted.
    #[must_use]
    pub fn counted(&self) -> Registry {
        let mut slot = locked(&self.entry);
        let mounted = self.mine(&mut slot);
        mounted.map_or_else(Registry::new, |mounted| mounted.counted.clone())
    }

    /// Ends the use. The last one unmounts. `released` is called when it is certain that the use
    /// ends, and before anybody else can open the device. After a success, a second call does
    /// nothing.
    ///
    /// # Errors
    /// Fails as [`FileSystem::unmount`] does. Then the use goes on.
    pub fn end(&self, released: impl FnOnce()) -> Result<(), FsError> {
        if !self.birth.is_here() {
            // In a forked child it belongs to the parent.
            return Ok(());
        }
        let mut over = locked(&self.over);
        if *over {
            return Ok(());
        }
        let mut slot = locked(&self.entry);
        match self.mine(&mut slot) {
            Some(mounted) if mounted.users > 1 => {
                mounted.users -= 1;
                released();
            }
            Some(_) => {
                match self.fs.unmount() {
                    // Another thread with a handle of it was faster.
                    Ok(()) | Err(FsError::Unmounted { .. }) => {}
                    Err(e) => return Err(e),
                }
                released();
                *slot = None;
            }
            // It was unmounted by another handle, and the device has been mounted again.
            None => released(),
        }
        *over = true;
        Ok(())
    }

    /// Returns the entry's mount if that is the one of this use.
    fn mine<'a>(&self, slot: &'a mut Option<SharedMount>) -> Option<&'a mut SharedMount> {
        slot.as_mut().filter(|m| Arc::ptr_eq(&m.fs, &self.fs))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let Err(error) = self.end(|| ()) else {
            return;
        };
        let device = format!("{:?}", self.fs);
        tracing::error!(device, %error, "the last user of the file system is gone, and it could not be unmounted in order");
        // Without this the table would keep the device.
        let mut slot = locked(&self.entry);
        let left = match self.mine(&mut slot) {
            // Another user has joined meanwhile.
            Some(mounted) if mounted.users > 1 => {
                mounted.users -= 1;
                None
            }
            Some(_) => slot.take(),
            None => None,
        };
        drop(slot);
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use pumice_bdev::OpKind;
    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    use pumice_blobfs::fs::OpenOptions;

    use super::*;
    use crate::{MountError, MountOptions, mount_device};

    /// The use of a device on which there is something to write and every write fails.
    fn cannot_be_unmounted() -> (Arc<ErrorDevice>, Use) {
        let (faulty, one) = faulty();
        let file = one.fs().open("/f", OpenOptions::CREATE).unwrap();
        file.append(&[7; 5000]).unwrap();
        fail_writes(&faulty, None);
        (faulty, one)
    }

    /// The use of a device that can be given faults.
    fn faulty() -> (Arc<ErrorDevice>, Use) {
        let base = pumice_bdev::open("malloc://64M").unwrap();
        let faulty = Arc::new(ErrorDevice::new(None, base));
        let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
        let open = move || Ok::<_, MountError>(Arc::clone(&device));
        let mount = |device, _: &Registry| mount_device(&device, &MountOptions::new());
        let one = Use::of("malloc://64M", false, open, mount).unwrap();
        (faulty, one)
    }

    fn fail_writes(device: &ErrorDevice, range: Option<(u64, u64)>) {
        device.inject(
            Injection::new(Failure::Fail)
                .op(Some(OpKind::Write))
                .count(u64::MAX)
                .range(range),
        );
    }

    /// Nothing is released before the unmount, and nobody else can mount before it is.
    #[test]
    fn a_failed_unmount_releases_nothing() {
        let (device, one) = cannot_be_unmounted();
        one.end(|| panic!("released")).unwrap_err();
        assert!(one.fs().exists("/f").unwrap());
        device.clear();
        let mut released = false;
        let mounted = || one.entry.try_lock().is_ok();
        let started = std::time::Instant::now();
        while one.end(|| released = !mounted()).is_err() {
            assert!(started.elapsed().as_secs() < 60, "it is never unmounted");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(released, "while the entry was locked");
        one.end(|| panic!("twice")).unwrap();
    }

    #[test]
    fn a_drop_after_a_failed_unmount_leaves_nothing() {
        let (device, one) = cannot_be_unmounted();
        let identity = device.identity();
        one.end(|| ()).unwrap_err();
        let fs = Arc::downgrade(&one.fs);
        drop(one);
        assert!(fs.upgrade().is_none(), "the file system is still there");
        drop(entry_of(&(Key::Missing(PathBuf::from("/another")), false)));
        let devices = locked(DEVICES.get());
        assert!(!devices.keys().any(|(key, _)| *key == Key::Open(identity)));
    }
}
