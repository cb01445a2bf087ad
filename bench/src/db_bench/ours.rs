//! Pumice's own file system below RocksDB.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::contents::{self, Contents};
use pumice_bdev_control::config::App;
use pumice_blobfs::fs::{FileSystem, FormatOptions, MountOptions, OpenOptions};

use super::flags::Flags;
use super::report::IoCount;
use super::target::Durability;
use super::workload::Workload;

/// Path in our file system of the `--report_file`, which is copied to the kernel's at the end.
const REPORT: &str = "/.db_bench-report.csv";

/// A mounted file system of Pumice.
#[derive(Debug)]
pub struct Ours {
    fs: FileSystem,
    device: Arc<dyn BlockDevice>,
    name: String,
    cache_bytes: u64,
    cache_most_bytes: Option<u64>,
    // The image file made for this run. It has no name, so that it is removed with the process,
    // however that ends.
    _image: Option<File>,
}

impl std::fmt::Display for Ours {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let info = self.device.info();
        write!(
            out,
            "Pumice's BlobFS on {} ({}, blocks of {} bytes, {} MiB), page cache of {} MiB",
            self.name,
            info.product,
            info.block_size,
            (info.num_blocks * u64::from(info.block_size)) >> 20,
            self.cache_bytes >> 20
        )?;
        match self.cache_most_bytes {
            Some(most) => write!(out, ", up to {} MiB of free memory", most >> 20),
            None => Ok(()),
        }
    }
}

impl Ours {
    /// Opens the device, formats it if necessary, and mounts it.
    ///
    /// # Errors
    /// Returns a text for the user.
    pub fn open(f: &Flags, workload: &Workload) -> Result<Self, String> {
        let mut image = None;
        let (device, name) = if !f.spdk.is_empty() {
            (configured(f)?, format!("{} of {}", f.spdk_bdev, f.spdk))
        } else if f.device.is_empty() {
            if workload.use_existing_db {
                return Err("--use_existing_db: name the --device that holds the database; without it an empty image file is made".to_owned());
            }
            let (file, uri, name) = make_image(f, workload)?;
            image = Some(file);
            (open_device(&uri)?, name)
        } else {
            (open_device(&f.device)?, f.device.clone())
        };
        let fail = |e: &dyn std::fmt::Display| format!("{name}: {e}");
        let there = contents::recognise(&*device).map_err(|e| fail(&e))?;
        let is_ours = there == Some(Contents::Ours(contents::Ours::BlobFs));
        if f.force_format || (f.format && !is_ours) {
            if workload.use_existing_db && !is_ours {
                let what = there.map_or("nothing known".to_owned(), |t| t.to_string());
                return Err(format!(
                    "{name} holds {what}: --use_existing_db needs a file system of Pumice there"
                ));
            }
            let mut how = FormatOptions::default();
            if f.cluster_size > 0 {
                how.cluster_size = u32::try_from(f.cluster_size)
                    .map_err(|_| format!("--cluster_size={}: at most 4 GiB", f.cluster_size))?;
            }
            how.force = f.force_format;
            FileSystem::format(Arc::clone(&device), &how).map_err(|e| {
                let hint = if f.force_format {
                    ""
                } else {
                    "; --force_format overwrites it"
                };
                format!("{name}: {e}{hint}")
            })?;
        }
        let mut how = MountOptions::default();
        how.cache_bytes = f.page_cache_bytes();
        how.cache_most_bytes = (f.fs_cache_most > 0).then_some(f.fs_cache_most);
        how.huge_pages = f.fs_huge_pages;
        how.volatile = f.volatile;
        let fs = FileSystem::mount(Arc::clone(&device), &how).map_err(|e| fail(&e))?;
        Ok(Self {
            fs,
            device,
            name,
            cache_bytes: how.cache_bytes,
            cache_most_bytes: how.cache_most_bytes,
            _image: image,
        })
    }

    /// Returns the file system.
    #[must_use]
    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    /// Returns the path for the report of `--report_interval_seconds`, which RocksDB writes through
    /// the database's environment into our file system.
    #[must_use]
    pub fn report_path() -> &'static str {
        REPORT
    }

    /// Copies that report to `path` in the kernel's file system.
    ///
    /// # Errors
    /// Returns a text for the user.
    pub fn copy_report(&self, path: &str) -> Result<(), String> {
        let fail = |e: &dyn std::fmt::Display| format!("--report_file={path}: {e}");
        let file = self
            .fs
            .open(REPORT, OpenOptions::READ)
            .map_err(|e| fail(&e))?;
        let mut bytes = vec![0; usize::try_from(file.len()).unwrap_or(0)];
        file.read_at(0, &mut bytes).map_err(|e| fail(&e))?;
        drop(file);
        std::fs::write(path, bytes).map_err(|e| fail(&e))?;
        self.fs.unlink(REPORT).map_err(|e| fail(&e))
    }

    /// Returns the guarantee of a completed write.
    #[must_use]
    pub fn durability(&self) -> Durability {
        let info = self.device.info();
        let memory = !info.outlives_process;
        let cache = if info.write_cache {
            "the device has a volatile write cache: FUA or a flush"
        } else {
            "the device has no volatile write cache: a completed write"
        };
        let words = if memory {
            "nothing survives the end of the process: the device is its memory".to_owned()
        } else {
            format!(
                "a synced write when the device says so ({cache}); other writes when the file system writes them behind"
            )
        };
        Durability {
            words,
            sync_is_durable: !memory,
            write_cache: Some(info.write_cache),
        }
    }

    /// Returns the number of device operations so far.
    #[must_use]
    pub fn io(&self) -> IoCount {
        let s = self.fs.io_stats();
        IoCount {
            reads: s.reads,
            read_bytes: s.read_bytes,
            writes: s.writes + s.write_zeroes,
            write_bytes: s.written_bytes,
            flushes: s.flushes,
            whole_device: false,
        }
    }

    /// Unmounts.
    ///
    /// # Errors
    /// Returns a text for the user.
    pub fn close(self) -> Result<(), String> {
        let Self { fs, name, .. } = self;
        fs.unmount().map_err(|e| format!("{name}: unmount: {e}"))
    }
}

fn open_device(uri: &str) -> Result<Arc<dyn BlockDevice>, String> {
    pumice_bdev::open(uri).map_err(|e| e.to_string())
}

/// Opens the device that an SPDK configuration names.
fn configured(f: &Flags) -> Result<Arc<dyn BlockDevice>, String> {
    let app = App::new();
    pumice_bdev_control::config::load_file(&app, Path::new(&f.spdk))
        .map_err(|e| format!("--spdk: {e}"))?;
    app.registry
        .open(&f.spdk_bdev)
        .map_err(|e| format!("--spdk_bdev={}: {e}", f.spdk_bdev))
}

/// Makes an image file without a name. Returns it, the URI that opens it, and a name for messages.
fn make_image(f: &Flags, workload: &Workload) -> Result<(File, String, String), String> {
    let dir = if f.image_dir.is_empty() {
        std::env::temp_dir()
    } else {
        f.image_dir.clone().into()
    };
    let size = if f.image_size > 0 {
        f.image_size
    } else {
        likely_size(workload)
    };
    let fail = |e: std::io::Error| format!("an image file in {}: {e}", dir.display());
    let file = tempfile::tempfile_in(&dir).map_err(fail)?;
    file.set_len(size).map_err(fail)?;
    let uri = format!("file:///proc/self/fd/{}", file.as_raw_fd());
    let name = format!("an image file in {}", dir.display());
    Ok((file, uri, name))
}

/// Returns the number of bytes that the benchmarks may need: three times everything that is written
/// (log, tables, and a compaction's output before its input is deleted), and room for small runs.
fn likely_size(w: &Workload) -> u64 {
    let entry = w.key_size.saturating_add(w.value_size).saturating_add(16);
    let writes = w.writes.saturating_mul(w.threads).max(w.num);
    // With a duration the number of writes is unknown. Half a million a second is more than any run
    // makes.
    let timed = w.duration.saturating_mul(500_000).min(100_000_000);
    let raw = writes.max(timed).saturating_mul(entry);
    let size = raw.saturating_mul(3).saturating_add(2 << 30);
    // The file is sparse, and never larger than a file may be.
    size.min(1 << 43).next_multiple_of(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_room_for_what_is_written() {
        let w = Workload::default();
        assert!(likely_size(&w) >= (2 << 30) + 3 * 132_000_000);
        let more = Workload { threads: 4, ..w };
        assert!(likely_size(&more) >= (2 << 30) + 12 * 132_000_000);
        assert_eq!(likely_size(&more) % (1 << 20), 0);
    }

    #[test]
    fn a_database_from_before_needs_a_device() {
        let w = Workload {
            use_existing_db: true,
            ..Workload::default()
        };
        let refused = Ours::open(&Flags::default(), &w).unwrap_err();
        assert!(refused.contains("--device"), "{refused}");
    }

    #[test]
    fn devices_come_from_an_spdk_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bdevs.json");
        let config = r#"{ "subsystems": [ { "subsystem": "bdev", "config": [
            { "method": "bdev_malloc_create",
              "params": { "name": "Malloc0", "num_blocks": 131072, "block_size": 4096 } } ] } ] }"#;
        std::fs::write(&path, config).unwrap();
        let f = Flags {
            spdk: path.display().to_string(),
            spdk_bdev: "Malloc0".into(),
            spdk_cache_size: 16,
            ..Flags::default()
        };
        let w = Workload::default();
        let ours = Ours::open(&f, &w).unwrap();
        assert!(!ours.durability().sync_is_durable, "it is memory");
        let words = ours.to_string();
        assert!(
            words.contains("Malloc0") && words.contains("page cache of 16 MiB"),
            "{words}"
        );
        ours.close().unwrap();
        let other = Flags {
            spdk_bdev: "Malloc1".into(),
            ..f.clone()
        };
        assert!(Ours::open(&other, &w).unwrap_err().contains("Malloc"));
        let none = Flags {
            spdk: "/nowhere/at/all.json".into(),
            ..f
        };
        assert!(
            Ours::open(&none, &w)
                .unwrap_err()
                .contains("/nowhere/at/all.json")
        );
    }

    #[test]
    fn what_is_on_a_device_is_safe_unless_forced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let mut bytes = vec![0_u8; 64 << 20];
        bytes[..4].copy_from_slice(b"XFSB");
        std::fs::write(&path, &bytes).unwrap();
        let f = Flags {
            device: format!("file://{}", path.display()),
            ..Flags::default()
        };
        let w = Workload::default();
        let e = Ours::open(&f, &w).unwrap_err();
        assert!(e.contains("XFS") && e.contains("--force_format"), "{e}");
        assert!(std::fs::read(&path).unwrap() == bytes, "nothing changed");
        let existing = Flags {
            format: false,
            ..f.clone()
        };
        let again = Workload {
            use_existing_db: true,
            ..Workload::default()
        };
        assert!(Ours::open(&existing, &again).is_err());
        let forced = Flags {
            force_format: true,
            ..f.clone()
        };
        Ours::open(&forced, &w).unwrap().close().unwrap();
        let ours = Ours::open(&f, &w).unwrap();
        assert!(ours.durability().sync_is_durable, "it is a file");
        ours.close().unwrap();
    }
}
