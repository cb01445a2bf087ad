//! The disk of a comparison: an image file with a loop device, or a device. Everything created here
//! is removed when its value is dropped.

use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pumice_bdev_control::complain;

use super::args::Plan;
use super::interrupt::Interrupt;
use super::side::{Side, search_path};

/// Runs a system program. Its error output becomes the error.
///
/// # Errors
/// Fails when the program is missing or fails.
pub fn system(program: &str, args: &[&str]) -> Result<String, String> {
    let line = format!("{program} {}", args.join(" "));
    let out = Command::new(program)
        .args(args)
        .env("PATH", search_path())
        .output()
        .map_err(|e| format!("{line}: {e}"))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned());
    }
    let words = String::from_utf8_lossy(&out.stderr).trim().to_owned();
    Err(format!("{line}: {} {words}", out.status))
}

/// The disk on which the sides are.
#[derive(Debug)]
pub struct Disk {
    image: Option<Image>,
    device: Option<PathBuf>,
}

/// A device in use: the given one, or a loop device on the image file, which is detached at the
/// end. It is attached for one side at a time, since ours does not open an image file behind a loop
/// device.
#[derive(Debug)]
pub enum InUse {
    /// The device of `--device`.
    Given(PathBuf),
    /// A loop device on the image file.
    Loop(LoopDevice),
}

impl InUse {
    /// Path of the device.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Given(p) => p,
            Self::Loop(l) => &l.device,
        }
    }
}

impl Disk {
    /// Makes the image file and the loop device, or checks the device.
    ///
    /// # Errors
    /// Returns a message for the user.
    pub fn prepare(plan: &Plan, stop: &Interrupt) -> Result<Self, String> {
        if let Some(device) = &plan.device {
            let kind = std::fs::metadata(device)
                .map_err(|e| format!("--device={}: {e}", device.display()))?
                .file_type();
            if !kind.is_block_device() {
                return Err(format!(
                    "--device={} is not a block device; give a file by --image",
                    device.display()
                ));
            }
            refuse_used(device)?;
            return Ok(Self {
                image: None,
                device: Some(device.clone()),
            });
        }
        let wanted = |s: &Side| s.needs_device() || *s == Side::Pumice;
        let image = match &plan.image {
            _ if !plan.sides.iter().any(wanted) => None,
            Some(path) => Some(Image::make(path, plan.size, plan.force, stop)?),
            None => Some(Image::temporary(plan.size, stop)?),
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

    /// Returns the device, or a loop device on the image file.
    ///
    /// # Errors
    /// Returns losetup's error.
    pub fn device(&self) -> Result<InUse, String> {
        match (&self.device, &self.image) {
            (Some(d), _) => Ok(InUse::Given(d.clone())),
            (None, Some(i)) => LoopDevice::on(&i.path).map(InUse::Loop),
            (None, None) => Err("neither an image file nor a device".to_owned()),
        }
    }
}

/// Refuses a device that is claimed, or a partition of which is: by a mount in any namespace, swap
/// space or a volume (open(2), `O_EXCL` of a block device).
fn refuse_used(device: &Path) -> Result<(), String> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(device);
    match opened {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => Err(format!(
            "--device={} is in use (mounted, swap space, or part of a volume); end that first",
            device.display()
        )),
        Err(e) => Err(format!("--device={}: {e}", device.display())),
    }
}

/// An image file, removed at the end if it was created here.
#[derive(Debug)]
struct Image {
    path: PathBuf,
    made: bool,
    // Removed after the file.
    _dir: Option<tempfile::TempDir>,
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.made
            && let Err(e) = std::fs::remove_file(&self.path)
        {
            complain!("fscompare: {} is left: {e}", self.path.display());
        }
    }
}

impl Image {
    /// Makes a file under a name that nobody else can take, in a directory that nobody else can
    /// enter.
    fn temporary(size: u64, stop: &Interrupt) -> Result<Self, String> {
        let dir = tempfile::Builder::new()
            .prefix("fscompare-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir()
            .map_err(|e| format!("a temporary directory: {e}"))?;
        let mut image = Self::make(&dir.path().join("disk.img"), size, false, stop)?;
        image._dir = Some(dir);
        Ok(image)
    }

    /// Makes a file of written zeroes, so that no side pays for the host's file system allocating
    /// blocks. It is created, or overwritten with `force`. A link is never followed, since another
    /// user may have made it.
    fn make(path: &Path, size: u64, force: bool, stop: &Interrupt) -> Result<Self, String> {
        let fail = |e: std::io::Error| format!("--image={}: {e}", path.display());
        let mut options = File::options();
        options
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW);
        let made = options.clone().create_new(true).open(path);
        let (mut file, made) = match made {
            Ok(file) => (file, true),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && force => {
                let file = options.open(path).map_err(fail)?;
                pumice_bdev::file::lock_unused(&file).map_err(fail)?;
                file.set_len(0).map_err(fail)?;
                (file, false)
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(format!(
                    "--image={} exists; remove it, or overwrite it with --force",
                    path.display()
                ));
            }
            Err(e) => return Err(fail(e)),
        };
        let image = Self {
            path: path.to_path_buf(),
            made,
            _dir: None,
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
pub struct LoopDevice {
    device: PathBuf,
    image: PathBuf,
}

/// Time in which a loop device that nobody needs any longer is detached.
const DETACH_PATIENCE: Duration = Duration::from_secs(10);

impl LoopDevice {
    fn is_detached_within(&self, patience: Duration) -> bool {
        let Some(name) = self.device.file_name() else {
            return true;
        };
        let file = Path::new("/sys/block").join(name).join("loop/backing_file");
        let begun = Instant::now();
        // Somebody else may have it by then, for another file.
        while std::fs::read(&file)
            .is_ok_and(|at| at.trim_ascii_end() == self.image.as_os_str().as_bytes())
        {
            if begun.elapsed() > patience {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }

    fn on(path: &Path) -> Result<Self, String> {
        let image = path
            .canonicalize()
            .map_err(|e| format!("{}: {e}", path.display()))?;
        let path = path.display().to_string();
        let dev = system("losetup", &["--direct-io=on", "--find", "--show", &path])
            .or_else(|_| system("losetup", &["--find", "--show", &path]))?;
        Ok(Self {
            device: PathBuf::from(dev),
            image,
        })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let dev = self.device.display().to_string();
        if let Err(e) = system("losetup", &["--detach", &dev]) {
            complain!("fscompare: {dev} is left: {e}");
            return;
        }
        // The kernel detaches it when the last process has closed it. Until then ours does not open the file, and another side
        // would find it in use.
        if !self.is_detached_within(DETACH_PATIENCE) {
            complain!("fscompare: {dev} is still attached: another process has it open");
        }
    }
}

/// A mounted file system, unmounted at the end. Its directory is temporary.
#[derive(Debug)]
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Mounts the device with these options of mount(8), or with its defaults if there are none.
    ///
    /// # Errors
    /// Returns mount's error.
    pub fn at(device: &Path, options: &str) -> Result<Self, String> {
        let dir = tempfile::Builder::new()
            .prefix("fscompare-")
            .tempdir()
            .map_err(|e| format!("a directory to mount on: {e}"))?;
        let (dev, at) = (
            device.display().to_string(),
            dir.path().display().to_string(),
        );
        let with = ["-o", options];
        let with = if options.is_empty() { &[] } else { &with[..] };
        system("mount", &[with, &[&dev, &at]].concat())?;
        Ok(Self { dir })
    }

    /// Returns the options that are in effect, as the kernel lists them, the defaults that it shows
    /// among them (proc(5), `/proc/self/mounts`).
    #[must_use]
    pub fn options(&self) -> Option<String> {
        let table = std::fs::read_to_string("/proc/self/mounts").ok()?;
        options_in(&table, self.dir.path())
    }

    /// Path of the mount point.
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
            // A process that was killed may still have a file open for a moment.
            std::thread::sleep(Duration::from_millis(100));
        }
        if let Err(e) = system("umount", &["--lazy", &at]) {
            complain!("fscompare: {at} could not be unmounted: {e}");
        }
    }
}

/// Returns the options of the mount point in a table such as `/proc/self/mounts`.
fn options_in(table: &str, point: &Path) -> Option<String> {
    // A later mount hides an earlier one at the same place. The name of a temporary directory of
    // ours has no character that the table escapes, but `TMPDIR` may have a space.
    let escaped = point.display().to_string().replace(' ', "\\040");
    table.lines().rev().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (*fields.get(1)? == escaped).then(|| fields.get(3).map(|o| (*o).to_owned()))?
    })
}

/// Writes everything back and drops the page cache, if this user may.
///
/// # Errors
/// Fails when writing back fails.
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
        let image = Image::make(&path, 5 << 20, false, &Interrupt::default()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 5 << 20);
        drop(image);
        assert!(!path.exists());
    }

    #[test]
    fn an_image_that_exists_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        std::fs::write(&path, "mine").unwrap();
        let e = Image::make(&path, 1 << 20, false, &Interrupt::default()).unwrap_err();
        assert!(e.contains("--force"), "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        drop(Image::make(&path, 1 << 20, true, &Interrupt::default()).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn an_image_in_use_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let user = pumice_bdev::open(path.to_str().unwrap()).unwrap();
        let e = Image::make(&path, 2 << 20, true, &Interrupt::default()).unwrap_err();
        assert!(e.contains("in use"), "{e}");
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 1 << 20]);
        drop(user);
        drop(Image::make(&path, 2 << 20, true, &Interrupt::default()).unwrap());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 << 20);
    }

    #[test]
    fn a_link_in_the_place_of_the_image_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("i.img"), dir.path().join("target"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        for force in [false, true] {
            Image::make(&link, 1 << 20, force, &Interrupt::default()).unwrap_err();
            assert!(!target.exists(), "made through the link");
        }
        std::fs::write(&target, "precious").unwrap();
        Image::make(&link, 1 << 20, true, &Interrupt::default()).unwrap_err();
        assert_eq!(std::fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn the_default_image_is_private_and_goes_with_its_directory() {
        let image = Image::temporary(1 << 20, &Interrupt::default()).unwrap();
        let dir = image.path.parent().unwrap().to_path_buf();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&image.path)), (0o700, 0o600));
        drop(image);
        assert!(!dir.exists());
    }

    #[test]
    fn the_options_of_a_mount_are_the_kernels() {
        let table = "/dev/loop1 /tmp/a\\040b ext4 rw,relatime 0 0\n\
            /dev/loop0 /tmp/x ext4 rw 0 0\n/dev/loop0 /tmp/x xfs rw,noatime,lazytime 0 0\n";
        let of = |point: &str| options_in(table, Path::new(point));
        assert_eq!(of("/tmp/x").as_deref(), Some("rw,noatime,lazytime"));
        assert_eq!(of("/tmp/a b").as_deref(), Some("rw,relatime"));
        assert_eq!(of("/tmp"), None);
    }

    #[test]
    fn an_interrupted_image_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("i.img");
        let stop = Interrupt::default();
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
