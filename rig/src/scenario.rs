//! The scenarios: devices, mode and steps of each boot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Error;
use crate::image::Base;
use crate::qemu::{Boot, Iommu, Outcome};

/// One boot with its steps.
pub struct Scenario {
    /// Name on the command line.
    pub name: &'static str,
    /// Description of what it tests.
    pub about: &'static str,
    iommu: Iommu,
    mode: &'static str,
    huge_pages: u32,
    disks: &'static [Disk],
    /// Devices, as arguments of QEMU.
    devices: &'static [&'static str],
    steps: &'static str,
    timeout_s: u64,
    /// Whether the steps run `db_bench`.
    database: bool,
}

/// The programs for the guest.
#[derive(Debug)]
pub struct Programs {
    /// Directory of the static programs.
    pub bin: PathBuf,
    /// Path of `db_bench`, which may be linked dynamically and may not have been built.
    pub db_bench: PathBuf,
}

/// A backing store of a namespace.
enum Disk {
    /// A sparse file: node name and MiB.
    File(&'static str, u64),
    /// Reads zeroes and discards writes: node name, bytes, and latency in ns.
    Null(&'static str, u64, u64),
    /// A sparse file with fault rules of `blkdebug`: node name, MiB, rules.
    Faulty(&'static str, u64, &'static str),
}

/// Slots of bus 0, which the steps name as `$(slot N)`.
const MULTI: &[&str] = &[
    // A controller with all kinds of namespaces.
    "nvme,id=n0,addr=0x8,serial=multi,max_ioqpairs=8,msix_qsize=9,mdts=5,cmb_size_mb=16",
    "nvme-ns,bus=n0,drive=d1,nsid=1,logical_block_size=512",
    "nvme-ns,bus=n0,drive=d2,nsid=2,logical_block_size=4096,physical_block_size=4096",
    "nvme-ns,bus=n0,drive=d3,nsid=3,logical_block_size=4096,physical_block_size=4096,ms=8,pi=1,pil=0,mset=0",
    "nvme-ns,bus=n0,drive=d4,nsid=4,logical_block_size=4096,physical_block_size=4096,zoned=on,zoned.zone_size=4M,zoned.zone_capacity=3M,zoned.max_open=4,zoned.max_active=8",
    "nvme-ns,bus=n0,drive=d5,nsid=5",
    // A controller whose reads, writes and flushes fail according to the rules.
    "nvme,id=n1,addr=0x9,serial=faulty,max_ioqpairs=4,msix_qsize=5",
    "nvme-ns,bus=n1,drive=d6,nsid=1,logical_block_size=512",
    // A controller that can be removed.
    "pcie-root-port,id=rp0,addr=0xa,slot=1,chassis=1",
    "nvme,id=n2,bus=rp0,serial=pulled,max_ioqpairs=4,msix_qsize=5",
    "nvme-ns,bus=n2,drive=d7,nsid=1,logical_block_size=4096,physical_block_size=4096",
    // A controller that is slow enough for commands to be in flight when something happens.
    "nvme,id=n3,addr=0xb,serial=slow,max_ioqpairs=4,msix_qsize=5",
    "nvme-ns,bus=n3,drive=d8,nsid=1,logical_block_size=4096,physical_block_size=4096",
];

const MULTI_DISKS: &[Disk] = &[
    Disk::File("d1", 256),
    Disk::File("d2", 256),
    Disk::File("d3", 64),
    Disk::File("d4", 64),
    Disk::File("d5", 64),
    Disk::Faulty("d6", 64, FAULTS),
    Disk::Null("d7", 256 << 20, 30_000_000),
    Disk::Null("d8", 256 << 20, 50_000_000),
];

/// The rules count sectors of 512 bytes.
const FAULTS: &str = r#"
[inject-error]
event = "none"
iotype = "read"
errno = "5"
sector = "2048"
once = "off"

[inject-error]
event = "none"
iotype = "write"
errno = "5"
sector = "4096"
once = "off"
"#;

/// A controller with virtual functions, which share its namespace.
const VIRTUAL: &[&str] = &[
    "pcie-root-port,id=rp0,addr=0xa,slot=1,chassis=1",
    "nvme-subsys,id=sub0,nqn=sub0",
    "nvme,id=pf,bus=rp0,serial=virtual,subsys=sub0,max_ioqpairs=6,msix_qsize=8,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=4",
    "nvme-ns,drive=d1,bus=pf,nsid=1,shared=on",
];

/// A plain controller with a namespace of each block size.
const PLAIN: &[&str] = &[
    "nvme,id=n0,addr=0x8,serial=plain,max_ioqpairs=8,msix_qsize=9,mdts=5",
    "nvme-ns,bus=n0,drive=d1,nsid=1,logical_block_size=512",
    "nvme-ns,bus=n0,drive=d2,nsid=2,logical_block_size=4096,physical_block_size=4096",
];

const PLAIN_DISKS: &[Disk] = &[Disk::File("d1", 256), Disk::File("d2", 256)];

/// Two functions of a slot, which are in one group; a controller with a single queue pair; and six
/// that ask for more interrupt vectors than two processors have.
const EDGES: &[&str] = &[
    "nvme,id=n0,addr=0x8.0,multifunction=on,serial=first,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n0,drive=d1,nsid=1",
    "nvme,id=n1,addr=0x8.1,serial=second,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n1,drive=d2,nsid=1",
    "nvme,id=n2,addr=0x9,serial=single,max_ioqpairs=1,msix_qsize=2",
    "nvme-ns,bus=n2,drive=d3,nsid=1",
    "nvme,id=n3,addr=0xa,serial=many3,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n3,drive=d4,nsid=1",
    "nvme,id=n4,addr=0xb,serial=many4,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n4,drive=d5,nsid=1",
    "nvme,id=n5,addr=0xc,serial=many5,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n5,drive=d6,nsid=1",
    "nvme,id=n6,addr=0xd,serial=many6,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n6,drive=d7,nsid=1",
    "nvme,id=n7,addr=0xe,serial=many7,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n7,drive=d8,nsid=1",
    "nvme,id=n8,addr=0xf,serial=many8,max_ioqpairs=64,msix_qsize=65",
    "nvme-ns,bus=n8,drive=d9,nsid=1",
];

const EDGES_DISKS: &[Disk] = &[
    Disk::File("d1", 16),
    Disk::File("d2", 16),
    Disk::File("d3", 16),
    Disk::File("d4", 16),
    Disk::File("d5", 16),
    Disk::File("d6", 16),
    Disk::File("d7", 16),
    Disk::File("d8", 16),
    Disk::File("d9", 16),
];

/// The disks are sparse: a database allocates what it writes.
const DATABASE_DISKS: &[Disk] = &[Disk::File("d1", 64), Disk::File("d2", 2048)];

/// Returns every scenario, in the order in which they run.
pub fn all() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "intel",
            about: "vfio-pci behind VT-d: all kinds of namespaces, faults, reset, removal",
            iommu: Iommu::Intel,
            mode: "vfio",
            huge_pages: 0,
            disks: MULTI_DISKS,
            devices: MULTI,
            steps: include_str!("../guest/vfio.sh"),
            timeout_s: 900,
            database: false,
        },
        Scenario {
            name: "amd",
            about: "vfio-pci behind AMD-Vi",
            iommu: Iommu::Amd,
            mode: "vfio",
            huge_pages: 0,
            disks: PLAIN_DISKS,
            devices: PLAIN,
            steps: include_str!("../guest/plain.sh"),
            timeout_s: 600,
            database: false,
        },
        Scenario {
            name: "uio",
            about: "uio_pci_generic without an IOMMU: huge pages, physical addresses, polling",
            iommu: Iommu::None,
            mode: "uio",
            huge_pages: 80,
            disks: PLAIN_DISKS,
            devices: PLAIN,
            steps: include_str!("../guest/uio.sh"),
            timeout_s: 600,
            database: false,
        },
        Scenario {
            name: "edges",
            about: "two controllers in one group, one queue pair, more vectors than processors have",
            iommu: Iommu::Intel,
            mode: "vfio",
            huge_pages: 0,
            disks: EDGES_DISKS,
            devices: EDGES,
            steps: include_str!("../guest/edges.sh"),
            timeout_s: 600,
            database: false,
        },
        Scenario {
            name: "sriov",
            about: "a virtual function under vfio-pci, its physical one under the kernel's driver",
            iommu: Iommu::Intel,
            mode: "none",
            huge_pages: 0,
            disks: &[Disk::File("d1", 256)],
            devices: VIRTUAL,
            steps: include_str!("../guest/sriov.sh"),
            timeout_s: 600,
            database: false,
        },
        Scenario {
            name: "setup",
            about: "pumice setup and doctor on the kernel's driver: mounts, swap, bind, unbind",
            iommu: Iommu::Intel,
            mode: "kernel",
            huge_pages: 0,
            disks: PLAIN_DISKS,
            devices: PLAIN,
            steps: include_str!("../guest/setup.sh"),
            timeout_s: 600,
            database: false,
        },
        Scenario {
            name: "database",
            about: "db_bench on the device: RocksDB under VFIO, filled, read, checked",
            iommu: Iommu::Intel,
            mode: "vfio",
            huge_pages: 0,
            disks: DATABASE_DISKS,
            devices: PLAIN,
            steps: include_str!("../guest/database.sh"),
            timeout_s: 900,
            database: true,
        },
    ]
}

impl Scenario {
    /// Returns the reason why it cannot run, if there is one.
    pub fn lacks(&self, programs: &Programs) -> Option<String> {
        (self.database && !programs.db_bench.is_file()).then(|| {
            format!(
                "{} has not been built (cargo build --release -p pumice-bench --bin db_bench)",
                programs.db_bench.display()
            )
        })
    }

    /// Boots it and runs its steps, or `steps` instead.
    pub fn boot(
        &self,
        base: &Base,
        programs: &Programs,
        steps: Option<&str>,
        verbose: bool,
        timeout: Option<Duration>,
    ) -> Result<Outcome, Error> {
        let work = tempfile::Builder::new()
            .prefix("pumice-rig.")
            .tempdir()
            .map_err(|e| Error::Other(format!("no directory for temporary files: {e}")))?;
        let mut devices = Vec::new();
        for disk in self.disks {
            devices.push("-blockdev".to_owned());
            devices.push(disk.argument(work.path())?);
        }
        for device in self.devices {
            devices.push("-device".to_owned());
            devices.push((*device).to_owned());
        }
        let initrd = work.path().join("initrd");
        let db_bench = self.database.then_some(programs.db_bench.as_path());
        base.initramfs(
            steps.unwrap_or(self.steps),
            &programs.guest()?,
            db_bench,
            &initrd,
        )?;
        Boot {
            kernel: &base.kernel,
            initrd: &initrd,
            work: work.path(),
            iommu: self.iommu,
            mode: self.mode,
            huge_pages: self.huge_pages,
            memory_mib: if self.database { 1024 } else { 512 },
            devices: &devices,
            timeout: timeout.unwrap_or(Duration::from_secs(self.timeout_s)),
            verbose,
        }
        .run()
    }
}

impl Programs {
    /// Returns the programs for the guest's `/bin` that every scenario needs.
    fn guest(&self) -> Result<Vec<PathBuf>, Error> {
        let found = ["nvme-suite", "pumice", "pumice-rig"]
            .iter()
            .map(|name| self.bin.join(name))
            .filter(|path| path.is_file())
            .collect::<Vec<_>>();
        if found.is_empty() {
            return Err(Error::Other(format!(
                "{} holds none of the guest's programs; rig/run builds them",
                self.bin.display()
            )));
        }
        Ok(found)
    }
}

impl Disk {
    fn argument(&self, work: &Path) -> Result<String, Error> {
        let file = |node: &str, mib: u64| -> Result<PathBuf, Error> {
            let path = work.join(format!("{node}.img"));
            let file = std::fs::File::create(&path).map_err(|e| Error::at(&path, e))?;
            file.set_len(mib << 20).map_err(|e| Error::at(&path, e))?;
            Ok(path)
        };
        Ok(match self {
            Disk::File(node, mib) => format!(
                "driver=file,filename={},node-name={node},discard=unmap",
                file(node, *mib)?.display()
            ),
            Disk::Null(node, bytes, latency_ns) => format!(
                "driver=null-co,size={bytes},node-name={node},read-zeroes=on,latency-ns={latency_ns}"
            ),
            Disk::Faulty(node, mib, rules) => {
                let config = work.join(format!("{node}.faults"));
                std::fs::write(&config, rules).map_err(|e| Error::at(&config, e))?;
                format!(
                    "driver=blkdebug,config={},node-name={node},image.driver=file,image.filename={},image.discard=unmap",
                    config.display(),
                    file(node, *mib)?.display()
                )
            }
        })
    }
}
