use super::*;
use crate::fake_host::FakeHost;

fn address(text: &str) -> PciAddress {
    text.parse().expect("an address")
}

fn refusal(fake: &FakeHost, at: &str, way: BindDriver) -> String {
    match plan(&fake.host(), &[address(at)], way, None) {
        Ok(_) => String::new(),
        Err(e) => e.to_string(),
    }
}

const NVME: &str = "0000:01:00.0";

#[test]
fn a_free_controller_may_go() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.block(NVME, "nvme0", "nvme0n1", "259:0", &[("nvme0n1p1", "259:1")]);
    assert_eq!(refusal(&fake, NVME, BindDriver::Vfio), "");
}

#[test]
fn whatever_is_in_use_stays() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.block(
        NVME,
        "nvme0",
        "nvme0n1",
        "259:0",
        &[
            ("nvme0n1p1", "259:1"),
            ("nvme0n1p2", "259:2"),
            ("nvme0n1p3", "259:3"),
        ],
    );
    fake.file("/proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n30 1 259:1 / /srv\\040data rw,noatime shared:1 - ext4 /dev/nvme0n1p1 rw\n");
    let text = refusal(&fake, NVME, BindDriver::Vfio);
    assert!(text.contains("nvme0n1p1 is mounted at /srv data"), "{text}");
    assert!(refusal(&fake, NVME, BindDriver::Uio).contains("mounted"));

    fake.file(
        "/proc/self/mountinfo",
        "30 1 0:42 / /b rw shared:1 - btrfs /dev/nvme0n1p2 rw\n",
    );
    assert!(refusal(&fake, NVME, BindDriver::Vfio).contains("mounted at /b"));

    fake.file("/proc/self/mountinfo", "");
    fake.file(
        "/proc/swaps",
        "Filename Type Size Used Priority\n/dev/nvme0n1p3 partition 1 0 -2\n",
    );
    assert!(refusal(&fake, NVME, BindDriver::Vfio).contains("nvme0n1p3 is swap space"));

    fake.file(
        "/proc/swaps",
        "Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n",
    );
    fake.holder("nvme0n1", Some("nvme0n1p2"), "dm-3", Some("vg0-home"));
    assert!(
        refusal(&fake, NVME, BindDriver::Vfio).contains("nvme0n1p2 is part of dm-3 (vg0-home)")
    );
}

#[test]
fn whole_disk_raid_and_open_files() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.block(NVME, "nvme0", "nvme0c0n1", "259:9", &[]);
    fake.block_device("nvme0n1", "259:0", &[]);
    fake.holder("nvme0n1", None, "md127", None);
    fake.process(4711, "qemu", "/dev/nvme0n1");
    let text = refusal(&fake, NVME, BindDriver::Vfio);
    assert!(text.contains("nvme0n1 is part of md127"), "{text}");
    assert!(text.contains("open in process 4711 (qemu)"), "{text}");
}

#[test]
fn groups_go_as_a_whole() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.nvme("0000:02:00.0", "nvme", Some(7));
    fake.bridge("0000:00:01.0", Some(7));
    let text = refusal(&fake, NVME, BindDriver::Vfio);
    assert!(
        text.contains("0000:02:00.0 (nvme)") && !text.contains("0000:00:01.0"),
        "{text}"
    );
    let both = [address(NVME), address("0000:02:00.0")];
    assert!(plan(&fake.host(), &both, BindDriver::Vfio, None).is_ok());
}

#[test]
fn of_several_none_goes_when_one_is_in_use() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.nvme("0000:02:00.0", "nvme", Some(8));
    fake.block("0000:02:00.0", "nvme1", "nvme1n1", "259:4", &[]);
    let both = [address(NVME), address("0000:02:00.0")];
    assert!(plan(&fake.host(), &both, BindDriver::Vfio, None).is_ok());
    fake.process(4711, "qemu", "/dev/nvme1n1");
    let error = plan(&fake.host(), &both, BindDriver::Vfio, None).err();
    let text = error.map(|e| e.to_string()).unwrap_or_default();
    assert!(text.contains("process 4711"), "{text}");
}

#[test]
fn no_iommu_is_said() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", None);
    assert!(refusal(&fake, NVME, BindDriver::Vfio).contains("no IOMMU group"));
    assert_eq!(refusal(&fake, NVME, BindDriver::Uio), "");
    fake.file(
        "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        "Y\n",
    );
    assert_eq!(refusal(&fake, NVME, BindDriver::Vfio), "");
}

#[test]
fn unbinding_waits_for_nobody() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "vfio-pci", Some(7));
    fake.process(99, "db", "/dev/vfio/7");
    let text = unbind(&fake.host(), address(NVME))
        .expect_err("in use")
        .to_string();
    assert!(text.contains("process 99 (db)"), "{text}");
    fake.nvme("0000:02:00.0", "nvme", Some(9));
    let text = unbind(&fake.host(), address("0000:02:00.0")).expect("nothing to do");
    assert!(text.contains("is not Pumice's"), "{text}");
}

#[test]
fn other_devices_are_refused() {
    let fake = FakeHost::new();
    fake.bridge("0000:00:01.0", Some(1));
    let text = refusal(&fake, "0000:00:01.0", BindDriver::Vfio);
    assert!(text.contains("not an NVMe controller"), "{text}");
    let text = refusal(&fake, "0000:09:00.0", BindDriver::Vfio);
    assert!(text.contains("no such PCI function"), "{text}");
}

#[test]
fn users() {
    let passwd = "root:x:0:0:root:/root:/bin/bash\ndb:x:998:997::/nonexistent:/bin/false\n";
    assert_eq!(user_ids(passwd, "db"), Some((998, 997)));
    assert_eq!(user_ids(passwd, "d"), None);
}

/// Makes a machine with one controller and one disk of two partitions, which nothing uses.
fn one_disk() -> FakeHost {
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    let parts = [("nvme0n1p1", "259:1"), ("nvme0n1p2", "259:2")];
    fake.block(NVME, "nvme0", "nvme0n1", "259:0", &parts);
    fake
}

fn refused_for(fake: &FakeHost, word: &str) {
    let text = refusal(fake, NVME, BindDriver::Vfio);
    assert!(text.contains(word), "not {word}: {text:?}");
    assert_eq!(
        fake.host()
            .function(address(NVME))
            .expect("there")
            .driver
            .as_deref(),
        Some("nvme")
    );
}

#[test]
fn loop_devices_and_targets_are_users() {
    let fake = one_disk();
    assert_eq!(refusal(&fake, NVME, BindDriver::Vfio), "");
    // The name does not matter: a link, and a device in the place of another's node.
    fake.link("/dev/disk/by-id/nvme-x", "../../nvme0n1");
    for path in ["/dev/nvme0n1", "/dev/disk/by-id/nvme-x", "/dev/nvme0n1p2"] {
        let fake = one_disk();
        fake.link("/dev/disk/by-id/nvme-x", "../../nvme0n1");
        fake.file("/sys/block/loop3/loop/backing_file", path);
        refused_for(&fake, "the loop device loop3");
    }
    let subsystem = "/sys/kernel/config/nvmet/subsystems/nqn.org";
    for (attribute, path) in [
        ("namespaces/1/device_path", "/dev/nvme0n1\n"),
        ("passthru/device_path", "/dev/nvme0\n"),
    ] {
        let fake = one_disk();
        fake.file("/sys/class/nvme/nvme0/dev", "241:0");
        fake.file(
            &format!("/sys/bus/pci/devices/{NVME}/nvme/nvme0/dev"),
            "241:0",
        );
        fake.file(&format!("{subsystem}/{attribute}"), path);
        refused_for(&fake, "the NVMe target (nvmet) nqn.org");
    }
    let fake = one_disk();
    fake.file(
        "/sys/kernel/config/target/core/fileio_0/disk/info",
        "Status: ACTIVATED\n TCM FILEIO ID: 0        File: /dev/nvme0n1p1  Size: 1\n",
    );
    refused_for(&fake, "nvme0n1p1 is open in the SCSI target (LIO) disk");
    // The user has another disk, or a file, so it does not matter.
    let fake = one_disk();
    fake.block_device("sda", "8:0", &[]);
    fake.file("/sys/block/loop3/loop/backing_file", "/dev/sda");
    fake.file("/srv/image", "");
    fake.file("/sys/block/loop4/loop/backing_file", "/srv/image");
    assert_eq!(refusal(&fake, NVME, BindDriver::Vfio), "");
}

#[test]
fn what_cannot_be_checked_counts_as_in_use() {
    // A loop device on a node that no longer exists.
    let fake = one_disk();
    fake.file("/sys/block/loop3/loop/backing_file", "/tmp/node (deleted)");
    refused_for(&fake, "losetup -d /dev/loop3");
    // There is no table of mounts.
    let fake = one_disk();
    fake.remove("/proc/self/mountinfo");
    refused_for(&fake, "what is mounted could not be checked");
    // There is no node to claim.
    let fake = one_disk();
    fake.remove("/dev/nvme0n1");
    refused_for(&fake, "nvme0n1 could not be checked");
    // A multipath controller whose head is not visible.
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", Some(7));
    fake.block(NVME, "nvme0", "nvme1c0n1", "259:9", &[]);
    refused_for(&fake, "nvme1n1 could not be checked");
    // A container that sees only its own processes.
    let fake = one_disk();
    fake.link("/proc/self/ns/pid", "pid:[4026532000]");
    refused_for(&fake, "run this command on the host");
    let fake = one_disk();
    fake.link("/proc/self/ns/pid", "pid:[4026531836]");
    assert_eq!(refusal(&fake, NVME, BindDriver::Vfio), "");
    // A target whose configuration is not visible.
    let fake = one_disk();
    fake.dir("/sys/module/nvmet");
    refused_for(&fake, "nvmet is loaded");
}

#[test]
fn mounts_of_other_namespaces_are_mounts() {
    let fake = one_disk();
    fake.link("/proc/self/ns/mnt", "mnt:[1]");
    let row = "30 1 259:2 / /srv/data rw - xfs /dev/whatever rw\n";
    fake.mount_namespace(815, row);
    fake.mount_namespace(816, row);
    refused_for(
        &fake,
        "nvme0n1p2 is mounted at /srv/data in the mount namespace of process 815",
    );
}

#[test]
fn devices_are_known_by_number_not_by_name() {
    // LVM's and other names of swap space and mounts are links to the node.
    let name = "/dev/disk/by-uuid/77";
    for (node, file, line, said) in [
        (
            "../../nvme0n1p2",
            "/proc/self/mountinfo",
            format!("30 1 0:42 / /b rw - btrfs {name} rw\n"),
            "mounted at /b",
        ),
        (
            "/dev/nvme0n1p1",
            "/proc/swaps",
            format!("Filename Type Size Used Priority\n{name} partition 1 0 -2\n"),
            "nvme0n1p1 is swap space",
        ),
    ] {
        let fake = one_disk();
        fake.link(name, node);
        fake.file(file, &line);
        refused_for(&fake, said);
    }
    // Held without an entry in `holders`, but named by the holder.
    let fake = one_disk();
    fake.file("/sys/class/block/bcache0/slaves/nvme0n1p1", "");
    refused_for(&fake, "nvme0n1p1 is part of bcache0");
    // The generic character device leads to the same data.
    let fake = one_disk();
    fake.file("/sys/class/nvme-generic/ng0n1/dev", "240:0");
    fake.process(4711, "fio", "/dev/ng0n1");
    refused_for(&fake, "ng0n1 is open in process 4711 (fio)");
    // A mapping that outlives its descriptor.
    let fake = one_disk();
    fake.file("/proc/4712/comm", "m\u{1b}[2Jdb");
    fake.file(
        "/proc/4712/maps",
        "7f00-7f01 rw-s 00000000 00:05 13 /dev/nvme0n1\n",
    );
    refused_for(&fake, "nvme0n1 is open in process 4712 (m\\u{1b}[2Jdb)");
}

#[test]
fn a_node_of_any_name_is_the_device() {
    let fake = one_disk();
    if fake.node("/srv/precious", 259, 2).is_none() {
        println!("skipped: a_node_of_any_name_is_the_device: mknod is not allowed here");
        return;
    }
    fake.process(4711, "qemu", "/srv/precious");
    refused_for(&fake, "srv/precious is open in process 4711");
    let fake = one_disk();
    fake.node("/srv/precious", 259, 0).expect("made before");
    fake.file("/sys/block/loop0/loop/backing_file", "/srv/precious");
    refused_for(&fake, "nvme0n1 is open in the loop device loop0");
}

#[test]
fn the_user_is_looked_up_before_anything_changes() {
    let fake = one_disk();
    fake.file(
        "/etc/passwd",
        "root:x:0:0::/:/bin/sh\ndb:x:998:997::/:/bin/sh\n",
    );
    let at = [address(NVME)];
    let told = |way, user| match plan(&fake.host(), &at, way, Some(user)) {
        Ok(plan) => format!("{:?}", plan.user),
        Err(e) => e.to_string(),
    };
    assert!(told(BindDriver::Vfio, "nosuch").contains("there is no user"));
    assert!(told(BindDriver::Vfio, "--help").contains("not a user's name"));
    assert!(told(BindDriver::Uio, "db").contains("needs root"));
    assert!(told(BindDriver::Vfio, "db").contains("998"));
    assert!(told(BindDriver::Vfio, "998").contains("997"));
    // Without an IOMMU a device is never handed over.
    let fake = FakeHost::new();
    fake.nvme(NVME, "nvme", None);
    fake.file("/etc/passwd", "db:x:998:997::/:/bin/sh\n");
    fake.file(
        "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        "Y",
    );
    let refused = plan(&fake.host(), &at, BindDriver::Vfio, Some("db")).err();
    let text = refused.map(|e| e.to_string()).unwrap_or_default();
    assert!(text.contains("only root"), "{text}");
}

#[test]
fn what_somebody_else_wrote_is_not_believed() {
    let fake = one_disk();
    let host = fake.host();
    let at = address(NVME);
    remember(&host, at, Some("nvme")).expect("written");
    assert_eq!(remembered(&host, at), Some(Some("nvme".to_owned())));
    remember(&host, at, None).expect("written");
    assert_eq!(remembered(&host, at), Some(None));
    for bad in ["--remove", "a b", "nvme\n-r", "../x"] {
        fake.file(&format!("/run/pumice/setup/{NVME}"), bad);
        assert_eq!(remembered(&host, at), None, "{bad}");
    }
    let path = host.path(&format!("/run/pumice/setup/{NVME}"));
    fs::write(&path, "nvme").expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("set");
    assert_eq!(remembered(&host, at), None, "anybody could have written it");
}

#[test]
fn a_controller_that_a_process_drives_does_not_change_its_driver() {
    let fake = FakeHost::new();
    fake.nvme(NVME, "vfio-pci", Some(7));
    fake.process(99, "db", "/dev/vfio/7");
    let text = refusal(&fake, NVME, BindDriver::Uio);
    assert!(text.contains("process 99 (db)"), "{text}");
}
