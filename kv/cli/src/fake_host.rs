//! A machine made of files, for tests of code that reads `/sys` and `/proc`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use pumice_nvme::pci::Host;

/// A directory that looks like `/`.
pub struct FakeHost(tempfile::TempDir);

impl FakeHost {
    /// Makes a machine on which nothing is mounted and only this process runs.
    pub fn new() -> FakeHost {
        let fake = FakeHost(tempfile::tempdir().expect("a directory"));
        fake.file("/proc/self/mountinfo", "");
        fake
    }

    pub fn host(&self) -> Host {
        Host::at(self.0.path())
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.0.path().join(absolute.trim_start_matches('/'))
    }

    pub fn dir(&self, absolute: &str) {
        fs::create_dir_all(self.path(absolute)).expect("made");
    }

    pub fn file(&self, absolute: &str, text: &str) {
        let path = self.path(absolute);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub fn remove(&self, absolute: &str) {
        fs::remove_file(self.path(absolute)).expect("removed");
    }

    pub fn link(&self, absolute: &str, target: &str) {
        let path = self.path(absolute);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        let _ = fs::remove_file(&path);
        symlink(target, path).expect("linked");
    }

    fn function(&self, address: &str, class: &str, driver: &str, group: Option<u32>) {
        let dir = format!("/sys/bus/pci/devices/{address}");
        self.file(&format!("{dir}/class"), class);
        self.file(&format!("{dir}/vendor"), "0x1b36\n");
        self.file(&format!("{dir}/device"), "0x0010\n");
        self.file(&format!("{dir}/numa_node"), "-1\n");
        self.file(&format!("{dir}/driver_override"), "(null)\n");
        self.dir(&format!("/sys/bus/pci/drivers/{driver}"));
        self.link(&format!("{dir}/driver"), &format!("../../drivers/{driver}"));
        if let Some(id) = group {
            let there = self.path(&format!("/sys/kernel/iommu_groups/{id}"));
            self.dir(&format!("/sys/kernel/iommu_groups/{id}/devices"));
            self.link(&format!("{dir}/iommu_group"), &there.display().to_string());
            self.file(
                &format!("/sys/kernel/iommu_groups/{id}/devices/{address}"),
                "",
            );
        }
    }

    pub fn nvme(&self, address: &str, driver: &str, group: Option<u32>) {
        self.function(address, "0x010802\n", driver, group);
    }

    pub fn other(&self, address: &str, class: &str, driver: &str, group: Option<u32>) {
        self.function(address, class, driver, group);
    }

    pub fn bridge(&self, address: &str, group: Option<u32>) {
        self.function(address, "0x060400\n", "pcieport", group);
    }

    /// Adds a namespace of a controller with its partitions.
    pub fn block(
        &self,
        address: &str,
        controller: &str,
        name: &str,
        dev: &str,
        parts: &[(&str, &str)],
    ) {
        self.dir(&format!(
            "/sys/bus/pci/devices/{address}/nvme/{controller}/{name}"
        ));
        self.block_device(name, dev, parts);
    }

    pub fn block_device(&self, name: &str, dev: &str, parts: &[(&str, &str)]) {
        self.file(&format!("/sys/class/block/{name}/dev"), dev);
        self.file(&format!("/dev/{name}"), "");
        for (part, dev) in parts {
            self.file(&format!("/sys/class/block/{name}/{part}/dev"), dev);
        }
    }

    pub fn holder(&self, disk: &str, part: Option<&str>, holder: &str, volume: Option<&str>) {
        let under = part.map_or_else(|| disk.to_owned(), |p| format!("{disk}/{p}"));
        self.dir(&format!("/sys/class/block/{holder}"));
        self.file(&format!("/sys/class/block/{under}/holders/{holder}"), "");
        if let Some(volume) = volume {
            self.file(&format!("/sys/class/block/{holder}/dm/name"), volume);
        }
    }

    pub fn process(&self, pid: u32, name: &str, open: &str) {
        self.file(&format!("/proc/{pid}/comm"), name);
        self.link(&format!("/proc/{pid}/fd/5"), open);
    }

    /// Adds a process in a mount namespace of its own, with `table` as its mounts.
    pub fn mount_namespace(&self, pid: u32, table: &str) {
        self.link(&format!("/proc/{pid}/ns/mnt"), &format!("mnt:[{pid}]"));
        self.file(&format!("/proc/{pid}/mountinfo"), table);
    }

    /// Adds a node of any name. Returns `None` where this process may not make one.
    pub fn node(&self, absolute: &str, major: u32, minor: u32) -> Option<()> {
        let path = self.path(absolute);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        let numbers = [major.to_string(), minor.to_string()];
        let made = std::process::Command::new("mknod")
            .arg(path)
            .arg("b")
            .args(numbers)
            .output();
        made.is_ok_and(|output| output.status.success())
            .then_some(())
    }
}
