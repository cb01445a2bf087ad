//! The devices of a configuration, by name, wherever the process takes a URI.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use pumice_bdev::{BdevError, BlockDevice, Names, OpenOptions, forget_names, name_devices};

use super::{App, load_file};

/// As long as this lives, the devices of a configuration file can be opened by their names (`Malloc0`, `Nvme0n1`) wherever the
/// process takes a URI: [`pumice_bdev::open`], mounts, databases. See [`NamedDevices::new`].
#[must_use = "the names go with this"]
pub struct NamedDevices(Arc<dyn Names>);

impl std::fmt::Debug for NamedDevices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NamedDevices")
    }
}

impl NamedDevices {
    /// Names the devices of `file`. A second call replaces what the first one has named.
    ///
    /// The file is loaded when a device is first asked for. If that is for reading only, its files and block devices are opened for
    /// reading only, so that others may read them too. When one is to be written, the file is loaded again: a device that is still
    /// open for reading is in use then, and one in memory is new and empty.
    /// The errors of the file are those of opening a device.
    pub fn new(file: &Path) -> NamedDevices {
        let names: Arc<dyn Names> = Arc::new(Loaded {
            file: file.to_owned(),
            app: Mutex::new(None),
        });
        name_devices(Arc::clone(&names));
        NamedDevices(names)
    }
}

impl Drop for NamedDevices {
    /// The names go, and devices that nobody has opened are closed.
    fn drop(&mut self) {
        forget_names(&self.0);
    }
}

struct Loaded {
    file: PathBuf,
    app: Mutex<Option<App>>,
}

impl Loaded {
    /// Calls `f` with the devices. They can be written if `to_write` says so.
    fn with<R>(&self, to_write: bool, f: impl FnOnce(&App) -> R) -> Result<R, BdevError> {
        let mut app = self.app.lock();
        if to_write && app.as_ref().is_some_and(|app| app.to_read) {
            *app = None;
        }
        let app = match &mut *app {
            Some(app) => app,
            none => {
                let new = if to_write { App::new() } else { App::to_read() };
                load_file(&new, &self.file).map_err(|e| BdevError::InvalidOption {
                    name: format!("{}:{}", e.file, e.line),
                    reason: e.message,
                })?;
                none.insert(new)
            }
        };
        Ok(f(app))
    }
}

impl Names for Loaded {
    fn open(
        &self,
        name: &str,
        options: OpenOptions,
    ) -> Option<Result<Arc<dyn BlockDevice>, BdevError>> {
        let found = self.with(!options.is_read_only(), |app| {
            app.registry
                .get(name)
                .map(|_| app.registry.open_with(name, options))
        });
        found.unwrap_or_else(|e| Some(Err(e)))
    }

    fn not_found(&self, name: &str) -> BdevError {
        self.with(false, |app| app.registry.not_found(name))
            .unwrap_or_else(|e| e)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pumice_bdev::{file_uri, open, open_with};
    use serde_json::json;

    use super::*;

    /// The tests of one process share its names, so there is one.
    #[test]
    fn names_of_a_configuration_are_devices_as_uris_are() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::File::create(at("image"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let config = at("spdk.json");
        let calls = json!([
            { "method": "bdev_passthru_create", "params": { "name": "Above", "base_bdev_name": "Aio0" } },
            { "method": "bdev_aio_create", "params": { "name": "Aio0", "filename": at("image"), "block_size": 4096 } },
            { "method": "bdev_aio_create", "params": { "name": "Aio.1", "filename": at("other"), "block_size": 512 } },
        ]);
        let text =
            |calls| json!({ "subsystems": [{ "subsystem": "bdev", "config": calls }] }).to_string();
        fs::write(&config, text(calls.clone())).unwrap();
        let to_read = OpenOptions::new().read_only(true);

        assert!(open("Above").is_err());
        let named = NamedDevices::new(&config);
        let e = open("Above").unwrap_err().to_string();
        assert!(e.contains("spdk.json:1") && e.contains("other"), "{e}");
        fs::File::create(at("other"))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();

        // Others may read what is opened for reading.
        let device = open_with("Above", to_read).unwrap();
        assert_eq!(device.info().block_size, 4096);
        let beside = file_uri(at("image").to_str().unwrap());
        drop(open_with(&beside, to_read).unwrap());
        assert!(open(&beside).is_err());
        drop(device);
        let device = open("Above").unwrap();
        assert!(open_with(&beside, to_read).is_err());
        drop(device);

        // What has a slash or a dot is a name if there is one, and a path if not.
        assert_eq!(open("Aio.1").unwrap().info().block_size, 512);
        let file = at("third.img");
        fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        assert_eq!(
            open(file.to_str().unwrap()).unwrap().info().num_blocks,
            2048
        );
        assert_eq!(open("malloc://1M").unwrap().info().num_blocks, 2048);

        let e = open("Abov").unwrap_err().to_string();
        assert!(e.contains("did you mean `Above`"), "{e}");
        assert!(matches!(open("Aio0"), Err(BdevError::Claimed { .. })));
        let e = open_with("Aio.1", OpenOptions::new().grow_to(2 << 20)).unwrap_err();
        assert!(e.to_string().contains("leave the size out"), "{e}");

        // The end of the earlier names is not that of the later ones.
        let later = NamedDevices::new(&config);
        drop(named);
        assert_eq!(open("Above").unwrap().info().block_size, 4096);
        drop(later);
        assert!(open("Above").is_err());
        drop(open(&beside).unwrap());
    }
}
