//! Kernel modules of an unpacked linux-image package. The package has no `modules.dep` (depmod runs
//! when it is installed), so dependencies are read from each module's `.modinfo`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{Error, run_filter};

/// The modules by name, with `-` written as `_`.
pub struct Modules {
    paths: BTreeMap<String, PathBuf>,
    busybox: PathBuf,
}

impl Modules {
    /// Finds every module below `root` (`lib/modules` of the package).
    pub fn scan(root: &Path, busybox: &Path) -> Result<Modules, Error> {
        let mut paths = BTreeMap::new();
        let mut todo = vec![root.to_path_buf()];
        while let Some(dir) = todo.pop() {
            let entries = std::fs::read_dir(&dir).map_err(|e| Error::at(&dir, e))?;
            for entry in entries {
                let path = entry.map_err(|e| Error::at(&dir, e))?.path();
                if path.is_dir() {
                    todo.push(path);
                } else if let Some(name) = module_name(&path) {
                    paths.insert(name, path);
                }
            }
        }
        Ok(Modules {
            paths,
            busybox: busybox.to_path_buf(),
        })
    }

    /// Returns the modules to load for `name` with their bytes, dependencies first. Returns none
    /// when the kernel has it built in (or does not have it at all).
    pub fn chain(&self, name: &str) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let mut chain = Vec::new();
        self.collect(&canonical(name), &mut chain, 0)?;
        Ok(chain)
    }

    fn collect(
        &self,
        name: &str,
        chain: &mut Vec<(String, Vec<u8>)>,
        depth: usize,
    ) -> Result<(), Error> {
        if depth > 32 || chain.iter().any(|(have, _)| have == name) {
            return Ok(());
        }
        let Some(path) = self.paths.get(name) else {
            return Ok(());
        };
        let bytes = self.read(path)?;
        for dependency in depends(&bytes) {
            self.collect(&dependency, chain, depth + 1)?;
        }
        chain.push((name.to_owned(), bytes));
        Ok(())
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let bytes = std::fs::read(path).map_err(|e| Error::at(path, e))?;
        let applet = match path.extension().and_then(|e| e.to_str()) {
            Some("xz") => "xz",
            Some("gz") => "gzip",
            _ => return Ok(bytes),
        };
        run_filter(&self.busybox, &[applet, "-dc"], &bytes)
    }
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (stem, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".gz").then(|| canonical(stem))
}

/// Returns the `depends=` entry of a module's `.modinfo` section, which consists of NUL-separated
/// strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    module
        .split(|b| *b == 0)
        .find_map(|s| s.strip_prefix(KEY))
        .map(|list| {
            String::from_utf8_lossy(list)
                .split(',')
                .filter(|s| !s.is_empty())
                .map(canonical)
                .collect()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{depends, module_name};
    use std::path::Path;

    #[test]
    fn modinfo_dependencies() {
        let module = b"\x7fELF\0license=GPL\0depends=vfio-pci-core,vfio\0name=vfio_pci\0";
        assert_eq!(depends(module), ["vfio_pci_core", "vfio"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
    }

    #[test]
    fn names_of_module_files() {
        let name = |s| module_name(Path::new(s));
        assert_eq!(name("/x/vfio-pci.ko").as_deref(), Some("vfio_pci"));
        assert_eq!(name("/x/nvme.ko.xz").as_deref(), Some("nvme"));
        assert_eq!(name("/x/modules.order"), None);
    }
}
