//! The ways in which the kernel's file systems are made, mounted and used.
//!
//! The plain sides have the defaults of mkfs and mount. The tuned ones have what experts set for a
//! write-ahead log, and nothing that weakens a sync or can show old content after power loss: no
//! `nobarrier`, no `data=writeback`, and a journal.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use serde::Serialize;

use super::disk::system;
use super::side::Side;

/// The flags of db_bench on the tuned sides. Logs that are overwritten instead of appended to need
/// no change of metadata in a sync. Tables that are written past the page cache leave it to the
/// reader. Preallocation is RocksDB's default and has no flag.
const TUNED_FLAGS: &[&str] = &[
    "--recycle_log_file_num=4",
    "--use_direct_io_for_flush_and_compaction",
];

/// The directory of the features that the kernel's ext4 knows.
const EXT4_FEATURES: &str = "/sys/fs/ext4/features";

/// The smallest and the largest log, in MiB, that XFS is given instead of mkfs.xfs's own, which is
/// as large as the smaller of them up to 128 GiB and as the larger at 2 TiB. Between them it gets a
/// sixteenth of the device, which fits into one of its four allocation groups.
const XFS_LOG_MIB: (u64, u64) = (64, 1024);

/// Settings of one file system of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    program: &'static str,
    mkfs: Vec<String>,
    /// Options for mount; empty for its defaults.
    pub mount: &'static str,
    /// Flags for db_bench. They win over those of the command line.
    pub db_bench: &'static [&'static str],
    left_out: Vec<String>,
}

/// The settings of a side in words, for the notes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// The command that made the file system, without the device.
    pub mkfs: String,
    /// The mount options that were asked for.
    pub mount: String,
    /// The mount options in effect, as the kernel lists them.
    pub mounted_with: Option<String>,
    /// The flags that db_bench got on this side alone.
    pub db_bench_flags: Vec<String>,
    /// Settings that this machine does not take, each with the reason.
    pub left_out: Vec<String>,
}

impl Recipe {
    /// Returns the settings of a side on this device. What mkfs refuses in a rehearsal, which writes
    /// nothing, or the kernel does not know is left out.
    ///
    /// # Errors
    /// Fails for a side that is not a file system made for the comparison, and if the size of the
    /// device cannot be read.
    pub fn of(side: Side, device: &Path) -> Result<Self, String> {
        let mut recipe = match side {
            Side::Ext4 | Side::Ext4Tuned => Self::ext4(),
            Side::Xfs | Side::XfsTuned => Self::xfs(),
            _ => return Err("no file system is made for this side".to_owned()),
        };
        match side {
            Side::Ext4Tuned => recipe.tune_ext4(device, Path::new(EXT4_FEATURES)),
            Side::XfsTuned => recipe.tune_xfs(device, size_of(device)?),
            _ => {}
        }
        Ok(recipe)
    }

    /// Nothing is discarded, because that would punch holes into an image file, which the next side
    /// would pay for. Nothing is left to a thread of the kernel that would run beside the benchmark.
    fn ext4() -> Self {
        let lazy = "nodiscard,lazy_itable_init=0,lazy_journal_init=0";
        Self::plain("mkfs.ext4", &["-q", "-F", "-E", lazy])
    }

    fn xfs() -> Self {
        Self::plain("mkfs.xfs", &["-q", "-f", "-K"])
    }

    fn plain(program: &'static str, mkfs: &[&str]) -> Self {
        Self {
            program,
            mkfs: mkfs.iter().map(|o| (*o).to_owned()).collect(),
            mount: "",
            db_bench: &[],
            left_out: Vec::new(),
        }
    }

    fn tune_ext4(&mut self, device: &Path, features: &Path) {
        self.mount = "noatime,lazytime";
        self.db_bench = TUNED_FLAGS;
        // A kernel that does not know the feature mounts the file system all the same.
        if features.join("fast_commit").exists() {
            self.add_if_taken("-n", &["-O", "fast_commit"], device);
        } else {
            self.left_out
                .push("fast_commit: the kernel does not know it".to_owned());
        }
    }

    fn tune_xfs(&mut self, device: &Path, bytes: u64) {
        self.mount = "noatime,lazytime,logbsize=256k";
        self.db_bench = TUNED_FLAGS;
        if let Some(mib) = xfs_log_mib(bytes) {
            self.add_if_taken("-N", &["-l", &format!("size={mib}m")], device);
        } else {
            self.left_out.push(
                "a larger log than mkfs.xfs makes by itself: it is for devices from 1 GiB to 2 TiB"
                    .to_owned(),
            );
        }
    }

    /// Adds options if mkfs takes them in a rehearsal.
    fn add_if_taken(&mut self, rehearse: &str, options: &[&str], device: &Path) {
        let dev = device.display().to_string();
        let mkfs: Vec<&str> = self.mkfs.iter().map(String::as_str).collect();
        match system(
            self.program,
            &[&mkfs, options, &[rehearse, &dev][..]].concat(),
        ) {
            Ok(_) => self.mkfs.extend(options.iter().map(|o| (*o).to_owned())),
            // mkfs.xfs answers with its whole usage, in many lines.
            Err(e) => self.left_out.push(format!(
                "{}: {}",
                options.join(" "),
                e.lines().next().unwrap_or_default()
            )),
        }
    }

    /// Makes the file system.
    ///
    /// # Errors
    /// Returns mkfs's error.
    pub fn make(&self, device: &Path) -> Result<(), String> {
        let dev = device.display().to_string();
        let mkfs = self.mkfs.iter().map(String::as_str);
        let arguments: Vec<&str> = mkfs.chain([dev.as_str()]).collect();
        system(self.program, &arguments).map(|_| ())
    }

    /// Returns the settings in words; `mounted_with` is what the kernel says.
    #[must_use]
    pub fn applied(&self, mounted_with: Option<String>) -> Applied {
        Applied {
            mkfs: format!("{} {}", self.program, self.mkfs.join(" ")),
            mount: self.mount.to_owned(),
            mounted_with,
            db_bench_flags: self.db_bench.iter().map(|f| (*f).to_owned()).collect(),
            left_out: self.left_out.clone(),
        }
    }
}

impl Applied {
    /// Returns the settings as sentences.
    #[must_use]
    pub fn words(&self) -> String {
        let asked = match self.mount.as_str() {
            "" => "mounted by default".to_owned(),
            options => format!("mounted with -o {options}"),
        };
        let mut out = format!("Made by {}; {asked}", self.mkfs);
        if let Some(kernels) = &self.mounted_with {
            let _ = write!(out, " (in effect: {kernels})");
        }
        if !self.db_bench_flags.is_empty() {
            let _ = write!(
                out,
                "; db_bench with {}, and with preallocation, RocksDB's default",
                self.db_bench_flags.join(" ")
            );
        }
        out.push('.');
        for reason in &self.left_out {
            let _ = write!(out, " Left out: {reason}.");
        }
        out
    }
}

/// Returns the size of a larger log than mkfs.xfs's own, if there is one that fits.
fn xfs_log_mib(device_bytes: u64) -> Option<u64> {
    let (small, large) = XFS_LOG_MIB;
    let wanted = (device_bytes >> 20) / 16;
    (wanted > small && device_bytes < 2 << 40).then(|| wanted.min(large))
}

fn size_of(device: &Path) -> Result<u64, String> {
    let fail = |e: std::io::Error| format!("{}: {e}", device.display());
    let mut file = File::open(device).map_err(fail)?;
    file.seek(SeekFrom::End(0)).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a sparse file that mkfs takes for a device.
    fn sparse(dir: &Path, bytes: u64) -> std::path::PathBuf {
        let path = dir.join("device");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    #[test]
    fn a_larger_log_is_chosen_where_it_fits() {
        assert_eq!(xfs_log_mib(512 << 20), None);
        assert_eq!(xfs_log_mib(1 << 30), None);
        assert_eq!(xfs_log_mib(4 << 30), Some(256));
        assert_eq!(xfs_log_mib(1 << 40), Some(1024));
        assert_eq!(xfs_log_mib(4 << 40), None, "mkfs's own is larger");
    }

    #[test]
    fn plain_sides_have_the_defaults() {
        for side in [Side::Ext4, Side::Xfs] {
            let recipe = Recipe::of(side, Path::new("/nowhere")).unwrap();
            assert!(recipe.mount.is_empty() && recipe.db_bench.is_empty());
            let words = recipe.applied(Some("rw,relatime".to_owned())).words();
            assert!(
                words.ends_with("mounted by default (in effect: rw,relatime)."),
                "{words}"
            );
        }
        assert!(Recipe::of(Side::Mem, Path::new("/nowhere")).is_err());
    }

    #[test]
    fn tuned_ext4_has_fast_commit_where_the_kernel_and_mkfs_take_it() {
        if let Some(why) = Side::Ext4Tuned.missing_program() {
            println!(
                "skipped: tuned_ext4_has_fast_commit_where_the_kernel_and_mkfs_take_it: {why}"
            );
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let device = sparse(dir.path(), 64 << 20);
        let mut unknown = Recipe::ext4();
        unknown.tune_ext4(&device, dir.path());
        assert_eq!(unknown.mkfs, Recipe::ext4().mkfs);
        let words = unknown.applied(None).words();
        assert!(
            words.contains("Left out: fast_commit: the kernel"),
            "{words}"
        );

        std::fs::write(dir.path().join("fast_commit"), "supported\n").unwrap();
        let mut tuned = Recipe::ext4();
        tuned.tune_ext4(&device, dir.path());
        // An old mke2fs refuses the feature, and then the reason is kept.
        let words = tuned.applied(None).words();
        assert!(words.contains("-O fast_commit"), "{words}");
        assert!(words.contains("--recycle_log_file_num=4"), "{words}");
        assert!(words.contains("-o noatime,lazytime;"), "{words}");
        let blank = std::fs::read(&device).unwrap();
        assert!(blank.iter().all(|byte| *byte == 0), "a rehearsal writes");
        tuned.make(&device).unwrap();
    }

    #[test]
    fn what_mkfs_refuses_is_left_out_with_its_words() {
        let mut recipe = Recipe::plain("ls", &["-d"]);
        recipe.add_if_taken("--", &["--no-such-option"], Path::new("/"));
        assert_eq!(recipe.mkfs, ["-d"]);
        let words = recipe.applied(None).words();
        assert!(words.contains("Left out: --no-such-option: ls"), "{words}");
        recipe.add_if_taken("--", &["-l"], Path::new("/"));
        assert_eq!(recipe.mkfs, ["-d", "-l"]);
    }

    #[test]
    fn a_tuned_xfs_on_a_small_device_keeps_its_log() {
        let mut recipe = Recipe::xfs();
        recipe.tune_xfs(Path::new("/nowhere"), 1 << 30);
        assert_eq!(recipe.mkfs, Recipe::xfs().mkfs);
        assert!(recipe.applied(None).words().contains("from 1 GiB"));
    }
}
