//! The disk that is compared on: an image file with a loop device, or a device. What is made here is
//! removed when its value goes.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Stop;
use super::args::Plan;
use super::side::Side;

/// Runs a system program; its words are the error.
///
/// # Errors
/// The program is missing or failed.
pub fn system(program: &str, args: &[&str]) -> Result<String, String> {
    let line = format!("{program} {}", args.join(" "));
    // Debian keeps mkfs, losetup and the like out of a user's PATH.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let out = Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .map_err(|e| format!("{line}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    }
    let words = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    Err(format!("{line}: {} {words}", out.status))
}

/// Where the sides live.
#[derive(Debug)]
pub struct Disk {
    image: Option<Image>,
    device: Option<PathBuf>,
}

/// A device in use: the given one, or a loop device on the image file, detached at the end. It is
/// attached for one side at a time: ours does not open an image file that is behind a loop device.
#[derive(Debug)]
pub enum InUse {
    /// Given by `--device`.
    Given(PathBuf),
    /// On the image file.
    Loop(LoopDevice),
}

impl InUse {
    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Given(p) => p,
            Self::Loop(l) => &l.0,
        }
    }
}

impl Disk {
    /// Makes the image file and the loop device, or checks the device.
    ///
    /// # Errors
    /// In words for the user.
    pub fn prepare(plan: &Plan, stop: &Stop) -> Result<Self, String> {
        if let Some(device) = &plan.device {
            let kind = std::fs::metadata(device)
                .map_err(|e| format!("--device={}: {e}", device.display()))?
                .file_type();
            if !kind.is_block_device() {
                return Err(format!(
                    "--device={} is no block device; give a file by --image",
                    device.display()
                ));
            }
            refuse_mounted(device)?;
            return Ok(Self {
                image: None,
                device: Some(device.clone()),
            });
        }
        let wanted = |s: &Side| s.needs_device() || *s == Side::Pumice;
        let image = match &plan.image {
            Some(path) if plan.sides.iter().any(wanted) => {
                Some(Image::make(path, plan.size, plan.force, stop)?)
            }
            _ => None,
        };
        Ok(Self {
            image,
            device: None,
        })
    }

    /// The image file.
    #[must_use]
    pub fn image(&self) -> Option<&Path> {
        self.image.as_ref().map(|i| i.path.as_path())
    }

    /// The device, or a loop device on the image file.
    ///
    /// # Errors
    /// What losetup said.
    pub fn device(&self) -> Result<InUse, String> {
        match (&self.device, &self.image) {
            (Some(d), _) => Ok(InUse::Given(d.clone())),
            (None, Some(i)) => LoopDevice::on(&i.path).map(InUse::Loop),
            (None, None) => Err("neither an image file nor a device".to_owned()),
        }
    }
}

fn refuse_mounted(device: &Path) -> Result<(), String> {
    let real = device
        .canonicalize()
        .map_err(|e| format!("--device={}: {e}", device.display()))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let name = real.display().to_string();
    // A partition of it counts too.
    let hit = mounts
        .lines()
        .filter_map(|l| l.split_once(' '))
        .find(|(source, _)| source.starts_with(&name));
    match hit {
        None => Ok(()),
        Some((source, rest)) => Err(format!(
            "--device={}: {source} is mounted at {}; unmount it first",
            device.display(),
            rest.split(' ').next().unwrap_or("?")
        )),
    }
}

/// An image file, removed at the end when it was made here.
#[derive(Debug)]
struct Image {
    path: PathBuf,
    made: bool,
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.made
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            eprintln!("fscompare: {} is left: {e}", self.path.display());
        }
    }
}

impl Image {
    /// A file of written zeros: no side then pays for the host's file system allocating blocks.
    fn make(path: &Path, size: u64, force: bool, stop: &Stop) -> Result<Self, String> {
        let fail = |e: std::io::Error| format!("--image={}: {e}", path.display());
        let existed = path.exists();
        if existed && !force {
            return Err(format!(
                "--image={} exists; remove it, or overwrite it with --force",
                path.display()
            ));
        }
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(fail)?;
        let image = Self {
            path: path.to_path_buf(),
            made: !existed,
        };
        let chunk = vec![0_u8; 4 << 20];
        let mut left = size;
        while left > 0 {
            stop.check()?;
            let n = usize::try_from(left).map_or(chunk.len(), |l| l.min(chunk.len()));
            file.write_all(&chunk[..n]).map_err(fail)?;
            left -= n as u64;
        }
        file.sync_all().map_err(fail)?;
        Ok(image)
    }
}

/// A loop device on a file, with direct I/O so that nothing is cached twice.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    fn on(path: &Path) -> Result<Self, String> {
        let path = path.display().to_string();
        let dev = system("losetup", &["--direct-io=on", "--find", "--show", &path])
            .or_else(|_| system("losetup", &["--find", "--show", &path]))?;
        Ok(Self(PathBuf::from(dev)))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let dev = self.0.display().to_string();
        if let Err(e) = system("losetup", &["--detach", &dev]) {
            eprintln!("fscompare: {dev} is left: {e}");
        }
    }
}

/// A mounted file system, unmounted at the end; its directory is temporary.
#[derive(Debug)]
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Mounts the device.
    ///
    /// # Errors
    /// What mount said.
    pub fn at(device: &Path) -> Result<Self, String> {
        let dir = tempfile::Builder::new()
            .prefix("fscompare-")
            .tempdir()
            .map_err(|e| format!("a directory to mount on: {e}"))?;
        let (dev, at) = (
            device.display().to_string(),
            dir.path().display().to_string(),
        );
        system("mount", &[&dev, &at])?;
        Ok(Self { dir })
    }

    /// Where.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at = self.dir.path().display().to_string();
        for _ in 0..20 {
            if system("umount", &[&at]).is_ok() {
                return;
            }
            // A process that was killed may still hold a file for a moment.
            std::thread::sleep(Duration::from_millis(100));
        }
        if let Err(e) = system("umount", &["--lazy", &at]) {
            eprintln!("fscompare: {at} is left mounted: {e}");
        }
    }
}

/// Makes a file system. Nothing is discarded: that would punch holes into an image file, which the
/// next side would pay for.
///
/// # Errors
/// What mkfs said.
pub fn mkfs(kind: &str, device: &Path) -> Result<(), String> {
    let dev = device.display().to_string();
    match kind {
        "ext4" => system(
            "mkfs.ext4",
            &[
                "-q",
                "-F",
                "-E",
                "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
                &dev,
            ],
        ),
        _ => system("mkfs.xfs", &["-q", "-f", "-K", &dev]),
    }
    .map(|_| ())
}

/// Writes everything back and forgets the page cache, where this user may.
///
/// # Errors
/// Writing back failed.
pub fn drop_caches() -> Result<bool, String> {
    system("sync", &[])?;
    Ok(std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_zeros_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        let image = Image::make(&path, 5 << 20, false, &Stop::default()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 5 << 20);
        drop(image);
        assert!(!path.exists());
    }

    #[test]
    fn an_image_that_exists_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        std::fs::write(&path, "mine").unwrap();
        let e = Image::make(&path, 1 << 20, false, &Stop::default()).unwrap_err();
        assert!(e.contains("--force"), "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        drop(Image::make(&path, 1 << 20, true, &Stop::default()).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn an_interrupted_image_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        let stop = Stop::default();
        stop.0.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(Image::make(&path, 1 << 20, false, &stop).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_program_that_fails_says_why() {
        assert!(
            system("ls", &["/nowhere/at/all"])
                .unwrap_err()
                .contains("/nowhere/at/all")
        );
        assert!(
            system("no-such-program-here", &[])
                .unwrap_err()
                .starts_with("no-such-program")
        );
    }
}
