//! The guest's root: one archive of busybox, modules and `/init`, kept for each kernel package, and
//! a small one for each boot with the steps and the programs under test. The kernel unpacks both.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::fetch::Parts;
use crate::modules::Modules;
use crate::{Error, kernel};

/// Modules that a scenario may `load`. Built-in ones are skipped.
const MODULES: [&str; 9] = [
    "vfio",
    "vfio_iommu_type1",
    "vfio_pci",
    "uio_pci_generic",
    "nvme",
    "ext4",
    "loop",
    "crc32c_generic",
    "crc32c_intel",
];

const INIT: &str = include_str!("../guest/init");

/// The parts that all boots share.
pub struct Base {
    /// Path of vmlinux, or of bzImage where that could not be unpacked.
    pub kernel: PathBuf,
    root: PathBuf,
}

impl Base {
    /// Makes the kernel and the base archive, or finds them in the cache.
    pub fn prepare(parts: &Parts, cache: &Path) -> Result<Base, Error> {
        let kernel = cache.join(format!("vmlinux-{}", parts.kernel_name));
        if !kernel.exists() {
            let bzimage = bzimage(&parts.kernel)?;
            let packed = std::fs::read(&bzimage).map_err(|e| Error::at(&bzimage, e))?;
            let image = kernel::vmlinux(&packed, &parts.busybox)?.unwrap_or(packed);
            write_whole(&kernel, &image)?;
        }
        // The name contains a hash of the archive's sources, so an old archive is never used.
        let stamp = fingerprint(INIT.as_bytes()) ^ fingerprint(MODULES.join(" ").as_bytes());
        let root = cache.join(format!("root-{}-{stamp:016x}.cpio", parts.kernel_name));
        if !root.exists() {
            let mut bytes = Vec::new();
            base_archive(parts)?
                .write(&mut bytes)
                .map_err(|e| Error::at(&root, e))?;
            write_whole(&root, &bytes)?;
        }
        Ok(Base { kernel, root })
    }

    /// Makes the initramfs of one boot: the base, `steps` as `/steps.sh`, and programs in `/bin`.
    /// `db_bench` goes there with the libraries that it names.
    pub fn initramfs(
        &self,
        steps: &str,
        programs: &[PathBuf],
        db_bench: Option<&Path>,
        out: &Path,
    ) -> Result<(), Error> {
        let mut bytes = std::fs::read(&self.root).map_err(|e| Error::at(&self.root, e))?;
        let mut archive = Archive::default();
        archive.file("steps.sh", 0o644, steps.as_bytes().to_vec());
        for program in programs {
            let data = std::fs::read(program).map_err(|e| Error::at(program, e))?;
            if is_dynamic(&data) {
                return Err(Error::Other(format!(
                    "{} is linked dynamically and would not start in the guest; build it with \
                     RUSTFLAGS='-C target-feature=+crt-static' and --target x86_64-unknown-linux-gnu",
                    program.display()
                )));
            }
            let name = program
                .file_name()
                .map_or_else(String::new, |n| n.to_string_lossy().into_owned());
            archive.file(&format!("bin/{name}"), 0o755, data);
        }
        if let Some(program) = db_bench.filter(|p| p.is_file()) {
            archive.file("bin/db_bench", 0o755, stripped(program)?);
            for library in libraries(program)? {
                let data = std::fs::read(&library).map_err(|e| Error::at(&library, e))?;
                archive.file(&library.to_string_lossy(), 0o755, data);
            }
        }
        archive.write(&mut bytes).map_err(|e| Error::at(out, e))?;
        std::fs::write(out, bytes).map_err(|e| Error::at(out, e))
    }
}

/// Returns the program without debugging information, where binutils is installed: the guest keeps
/// it in memory.
fn stripped(program: &Path) -> Result<Vec<u8>, Error> {
    let done = tempfile::NamedTempFile::new()
        .ok()
        .filter(|file| {
            Command::new("strip")
                .arg("-o")
                .arg(file.path())
                .arg(program)
                .status()
                .is_ok_and(|status| status.success())
        })
        .and_then(|file| std::fs::read(file.path()).ok())
        .filter(|bytes| !bytes.is_empty());
    match done {
        Some(bytes) => Ok(bytes),
        None => std::fs::read(program).map_err(|e| Error::at(program, e)),
    }
}

/// Returns the shared libraries that a program is loaded with, its loader included, from ldd(1).
fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .map_err(|e| Error::at(Path::new("ldd"), e))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if let Some(line) = text.lines().find(|line| line.contains("not found")) {
        let line = line.trim();
        return Err(Error::Other(format!("{}: {line}", program.display())));
    }
    Ok(loaded(&text))
}

/// Returns the paths in ldd's lines: `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)`, and for
/// the loader `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn loaded(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

fn is_dynamic(elf: &[u8]) -> bool {
    const INTERPRETER: &[u8] = b"/ld-linux-x86-64.so.2\0";
    let head = &elf[..elf.len().min(4096)];
    head.windows(INTERPRETER.len()).any(|w| w == INTERPRETER)
}

fn base_archive(parts: &Parts) -> Result<Archive, Error> {
    let mut archive = Archive::default();
    for dir in [
        "bin", "sbin", "dev", "proc", "sys", "tmp", "mnt", "etc", "run", "root", "modules",
    ] {
        archive.dir(dir);
    }
    archive.chardev("dev/console", 5, 1);
    archive.file("init", 0o755, INIT.as_bytes().to_vec());
    let busybox = std::fs::read(&parts.busybox).map_err(|e| Error::at(&parts.busybox, e))?;
    archive.file("bin/busybox", 0o755, busybox);
    let list = Command::new(&parts.busybox)
        .arg("--list")
        .output()
        .map_err(|e| Error::at(&parts.busybox, e))?;
    for applet in String::from_utf8_lossy(&list.stdout).split_whitespace() {
        if applet != "busybox" {
            archive.symlink(&format!("bin/{applet}"), "busybox");
        }
    }
    let modules = Modules::scan(&parts.kernel.join("lib/modules"), &parts.busybox)?;
    let mut order = String::new();
    for name in MODULES {
        let chain = modules.chain(name)?;
        let names: Vec<_> = chain.iter().map(|(n, _)| n.as_str()).collect();
        let _ = writeln!(order, "{name}: {}", names.join(" "));
        for (name, data) in chain {
            archive.file(&format!("modules/{name}.ko"), 0o644, data);
        }
    }
    archive.file("modules/order", 0o644, order.into_bytes());
    Ok(archive)
}

fn bzimage(package: &Path) -> Result<PathBuf, Error> {
    let boot = package.join("boot");
    std::fs::read_dir(&boot)
        .map_err(|e| Error::at(&boot, e))?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| {
            p.file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| n.starts_with("vmlinuz-"))
        })
        .ok_or_else(|| Error::Other(format!("{} has no vmlinuz", boot.display())))
}

/// Writes a file under another name and renames it, so that a concurrent run sees all of it or
/// nothing.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let aside = path.with_extension(format!("part{}", std::process::id()));
    std::fs::write(&aside, bytes).map_err(|e| Error::at(&aside, e))?;
    std::fs::rename(&aside, path).map_err(|e| Error::at(path, e))
}

/// Computes an FNV-1a hash.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::loaded;
    use std::path::Path;

    #[test]
    fn what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd5)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f1)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f2)\n";
        let want = [
            "/lib/x86_64-linux-gnu/libm.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(loaded(text), want.map(Path::new));
        assert!(loaded("\tstatically linked\n").is_empty());
    }
}
