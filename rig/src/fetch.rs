//! The Debian packages that the rig needs: the kernel package and busybox-static, downloaded and
//! unpacked (never installed) below a cache directory that outlives the clone.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// Paths of the fetched parts.
pub struct Parts {
    /// Unpacked linux-image package.
    pub kernel: PathBuf,
    /// Static busybox of the guest (and of the host, for unpacking).
    pub busybox: PathBuf,
    /// Name of the kernel package.
    pub kernel_name: String,
}

/// Returns `$PUMICE_RIG_CACHE`, else `$XDG_CACHE_HOME/pumice/rig`, else `~/.cache/pumice/rig`.
pub fn cache_dir() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    if let Some(dir) = var("PUMICE_RIG_CACHE") {
        return dir.into();
    }
    let base = var("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(var("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
        PathBuf::from,
    );
    base.join("pumice/rig")
}

/// Returns the reason why the rig cannot run on this machine, if there is one, with the command that
/// helps.
pub fn missing_tools() -> Option<String> {
    for (tool, package) in [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("apt-get", "apt (the rig takes its kernel from Debian)"),
        ("dpkg", "dpkg"),
    ] {
        if which(tool).is_none() {
            return Some(format!(
                "{tool} is not here: scripts/setup --vm installs it (apt-get install --no-install-recommends {package})"
            ));
        }
    }
    None
}

fn which(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(tool))
        .find(|p| p.is_file())
}

/// Fetches and unpacks the parts that are not in the cache yet.
pub fn parts(cache: &Path) -> Result<Parts, Error> {
    let kernel_name = kernel_package(cache)?;
    let kernel = package(cache, &kernel_name)?;
    let busybox = package(cache, "busybox-static")?.join("bin/busybox");
    Ok(Parts {
        kernel,
        busybox,
        kernel_name,
    })
}

/// Returns the package that `linux-image-amd64` depends on or, without package lists, one in the
/// cache.
fn kernel_package(cache: &Path) -> Result<String, Error> {
    if let Some(name) = newest_kernel()? {
        return Ok(name);
    }
    let kept = std::fs::read_dir(cache.join("unpacked"))
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with("linux-image-"));
    if let Some(name) = kept {
        return Ok(name);
    }
    // A new container has no lists. Fetching them needs root, which such a container has.
    let updated = quiet(Command::new("apt-get").args(["-qq", "update"]));
    if let Some(name) = newest_kernel()? {
        return Ok(name);
    }
    Err(Error::Other(format!(
        "apt knows no linux-image-amd64: the rig wants Debian 12 or later and its package lists ({})",
        match updated {
            Ok(()) => "apt-get update did not help".to_owned(),
            Err(e) => e.to_string(),
        }
    )))
}

fn newest_kernel() -> Result<Option<String>, Error> {
    let output = Command::new("apt-cache")
        .args(["depends", "linux-image-amd64"])
        .output()
        .map_err(|e| Error::Other(format!("apt-cache: {e}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let named = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(named.map(|name| name.trim().to_owned()))
}

fn package(cache: &Path, name: &str) -> Result<PathBuf, Error> {
    let unpacked = cache.join("unpacked").join(name);
    if unpacked.is_dir() {
        return Ok(unpacked);
    }
    let downloads = cache.join("packages");
    for dir in [&downloads, &cache.join("unpacked")] {
        std::fs::create_dir_all(dir).map_err(|e| Error::at(dir, e))?;
    }
    let find = || {
        let prefix = format!("{name}_");
        std::fs::read_dir(&downloads)
            .into_iter()
            .flatten()
            .filter_map(|e| Some(e.ok()?.path()))
            .find(|p| {
                p.file_name()
                    .and_then(|n| n.to_str())
                    .is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb"))
            })
    };
    if find().is_none() {
        let mut apt = Command::new("apt-get");
        // The user of apt's sandbox may not write into the cache directory of another user.
        apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", name])
            .current_dir(&downloads);
        quiet(&mut apt)?;
    }
    let deb =
        find().ok_or_else(|| Error::Other(format!("apt-get download {name} left no package")))?;
    // Unpacked elsewhere and then renamed, so that an interrupted run leaves nothing incomplete
    // behind.
    let aside = cache.join(format!("unpacked/.{name}.{}", std::process::id()));
    quiet(Command::new("dpkg").arg("-x").arg(&deb).arg(&aside))?;
    match std::fs::rename(&aside, &unpacked) {
        Ok(()) => Ok(unpacked),
        Err(_) if unpacked.is_dir() => {
            let _ = std::fs::remove_dir_all(&aside);
            Ok(unpacked)
        }
        Err(e) => Err(Error::at(&unpacked, e)),
    }
}

/// Runs a command, whose output is shown only when it fails.
pub fn quiet(command: &mut Command) -> Result<(), Error> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|e| Error::Other(format!("{name}: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Other(format!(
        "{name} failed ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )))
}
