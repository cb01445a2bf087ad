use super::*;
use crate::fake_host::FakeHost;

const NVME: &str = "0000:01:00.0";

fn rich() -> Process {
    Process {
        memlock: Memlock::Unlimited,
        unlimited: false,
    }
}

fn ready() -> FakeHost {
    let fake = FakeHost::new();
    fake.nvme(NVME, "vfio-pci", Some(7));
    fake.dir("/sys/class/iommu/dmar0");
    fake.dir("/sys/module/vfio_pci");
    fake.file(
        "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
        "65535",
    );
    fake.file("/dev/vfio/7", "");
    fake
}

fn find<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks
        .iter()
        .find(|c| c.name.starts_with(name))
        .unwrap_or_else(|| panic!("no check {name}: {checks:#?}"))
}

#[test]
fn a_machine_that_is_ready() {
    let checks = examine(&ready().host(), None, &rich());
    assert!(
        checks.iter().all(|c| c.state == CheckState::Good),
        "{checks:#?}"
    );
    assert_eq!(as_json(&checks)["ready"], true);
    assert!(as_text(&checks).ends_with("nothing is missing\n"));
}

#[test]
fn a_bare_machine() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", None);
    fake.file("/proc/cpuinfo", "vendor_id : AuthenticAMD\n");
    let poor = Process {
        memlock: Memlock::Bytes(8 << 20),
        unlimited: false,
    };
    let checks = examine(&fake.host(), None, &poor);
    let iommu = find(&checks, "IOMMU");
    assert_eq!(iommu.state, CheckState::Missing);
    assert!(
        iommu
            .fix
            .as_deref()
            .is_some_and(|f| f.contains("amd_iommu=on"))
    );
    assert_eq!(
        find(&checks, "kernel module vfio-pci").state,
        CheckState::Missing
    );
    assert_eq!(find(&checks, "huge pages").state, CheckState::Missing);
    let controller = find(&checks, "controller 0000");
    assert_eq!(controller.state, CheckState::Note);
    assert!(
        controller
            .fix
            .as_deref()
            .is_some_and(|f| f.contains("setup bind"))
    );
    let json = as_json(&checks);
    assert_eq!(json["ready"], false);
    let asked = examine(&fake.host(), Some(NVME.parse().expect("an address")), &poor);
    assert_eq!(find(&asked, "controller 0000").state, CheckState::Missing);
}

#[test]
fn memlock_only_binds_without_the_capability() {
    let mut process = Process {
        memlock: Memlock::Bytes(8 << 20),
        unlimited: false,
    };
    let checks = examine(&ready().host(), None, &process);
    assert_eq!(find(&checks, "memlock").state, CheckState::Missing);
    process.unlimited = true;
    let checks = examine(&ready().host(), None, &process);
    assert_eq!(find(&checks, "memlock").state, CheckState::Good);
    assert!(has_ipc_lock("Name: x\nCapEff:\t000001ffffffffff\n"));
    assert!(!has_ipc_lock("CapEff:\t0000000000000000\n"));
    assert!(!has_ipc_lock(""));
}

#[test]
fn switched_off_and_unsafe_modes() {
    let fake = FakeHost::new();
    fake.file("/proc/cmdline", "root=/dev/sda1 intel_iommu=off quiet\n");
    fake.file(
        "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        "Y\n",
    );
    let checks = examine(&fake.host(), None, &rich());
    assert!(find(&checks, "IOMMU").detail.contains("switched off"));
    assert_eq!(find(&checks, "no-IOMMU").state, CheckState::Note);
    assert_eq!(find(&checks, "controllers").state, CheckState::Note);
}

fn advice(fake: &FakeHost) -> String {
    let only = Some(NVME.parse().expect("an address"));
    let checks = examine(&fake.host(), only, &rich());
    let group = find(&checks, "controller 0000:01:00.0: group 7");
    assert_eq!(group.state, CheckState::Missing);
    format!("{} -> {}", group.detail, group.fix.as_deref().unwrap_or(""))
}

#[test]
fn a_neighbour_in_the_group_is_never_pulled() {
    const OTHER: &str = "0000:02:00.0";
    let fake = ready();
    fake.nvme(OTHER, "nvme", Some(7));
    fake.block(
        OTHER,
        "nvme1",
        "nvme1n1",
        "259:4",
        &[("nvme1n1p1", "259:5")],
    );
    let free = advice(&fake);
    assert!(
        free.contains("not in use -> pumice setup bind 0000:02:00.0"),
        "{free}"
    );
    fake.file(
        "/proc/self/mountinfo",
        "30 1 259:5 / / rw - ext4 /dev/root rw\n",
    );
    let mounted = advice(&fake);
    assert!(mounted.contains("nvme1n1p1 is mounted at /"), "{mounted}");
    assert!(mounted.contains("another slot"), "{mounted}");
    // A source that cannot be checked counts as in use.
    fake.remove("/proc/self/mountinfo");
    let unchecked = advice(&fake);
    assert!(unchecked.contains("counts as in use"), "{unchecked}");
    // The other function is a network card, or the controller of the root disk.
    let fake = ready();
    fake.other(OTHER, "0x010601\n", "ahci", Some(7));
    let sata = advice(&fake);
    assert!(
        sata.contains("not an NVMe controller -> move one"),
        "{sata}"
    );
    for text in [free, mounted, unchecked, sata] {
        assert!(!text.contains("unbind"), "{text}");
    }
}

#[test]
fn a_machine_without_controllers_lacks_nothing() {
    let fake = FakeHost::new();
    let poor = Process {
        memlock: Memlock::Bytes(8 << 20),
        unlimited: false,
    };
    let checks = examine(&fake.host(), None, &poor);
    assert_eq!(find(&checks, "controllers").state, CheckState::Note);
    assert_eq!(as_json(&checks)["ready"], true, "{checks:#?}");
    // A controller that was named and does not exist is missing.
    let asked = examine(&fake.host(), Some(NVME.parse().expect("an address")), &poor);
    assert_eq!(as_json(&asked)["ready"], false);
}

#[test]
fn a_node_that_is_not_there() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "vfio-pci", Some(9));
    let checks = examine(&fake.host(), None, &rich());
    assert_eq!(find(&checks, "controller 0000").state, CheckState::Missing);
}
