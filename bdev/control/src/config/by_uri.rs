//! Devices opened by URI, and the calls that would make them.

use std::sync::Arc;

use pumice_bdev::{BdevError, BlockDevice, OpenOptions, call_for};

use super::app::{App, Created};

impl App {
    /// Opens the device of this name, alias, UUID or URI as [`Registry::open`] does. A device that
    /// a URI makes becomes part of the [configuration](App::config).
    ///
    /// # Errors
    /// Fails as [`Registry::open`] does.
    ///
    /// [`Registry::open`]: pumice_bdev::registry::Registry::open
    pub fn open(&self, name: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
        self.open_with(name, OpenOptions::new())
    }

    /// Opens a device as [`App::open`] does. The options override those of a URI.
    ///
    /// # Errors
    /// Fails as [`App::open`] does.
    pub fn open_with(
        &self,
        name: &str,
        options: OpenOptions,
    ) -> Result<Arc<dyn BlockDevice>, BdevError> {
        let is_new = self.registry.get(name).is_none();
        let dev = self.registry.open_with(name, options)?;
        if is_new && let Some((method, params)) = call_for(name, dev.info()) {
            let bdevs = vec![dev.info().name.clone()];
            self.record(Created {
                method,
                params,
                bdevs,
            });
        }
        Ok(dev)
    }
}

#[cfg(test)]
mod tests {
    use pumice_bdev::DeviceInfo;

    use super::*;
    use crate::config;

    #[test]
    fn what_uris_made_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("an image");
        let uris = [
            "malloc://1M?block_size=4096".to_owned(),
            "null://1T".to_owned(),
            format!(
                "file://{}?size=1M&create=1&block_size=4096",
                image.display().to_string().replace(' ', "%20")
            ),
            "soft://memory?size=2M".to_owned(),
        ];
        let seen = |app: &App| -> Vec<(String, &'static str, u64, u32)> {
            let of = |info: &DeviceInfo| {
                let name = info.name.clone();
                (name, info.module, info.num_blocks, info.block_size)
            };
            app.registry.list().iter().map(|b| of(b.info())).collect()
        };
        let app = App::new();
        for uri in &uris {
            app.open(uri).unwrap();
        }
        let (config, first) = (app.config(), seen(&app));
        assert_eq!(first.len(), uris.len());
        // A name that exists already is not a new device.
        app.open(&first[0].0).unwrap();
        assert_eq!(app.config(), config);
        let null = first.iter().find(|one| one.1 == "null").unwrap();
        app.registry.remove(&null.0).unwrap();
        assert!(!app.config().to_string().contains("bdev_null_create"));
        drop(app);

        let again = App::new();
        config::load(&again, "saved", &config.to_string()).unwrap();
        assert_eq!(seen(&again), first);
        assert_eq!(again.config(), config);
    }
}
