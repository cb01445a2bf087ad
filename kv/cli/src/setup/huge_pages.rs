//! Reserving pages of 2 MiB, never more than the machine can spare.

use pumice_nvme::pci::Host;
use serde_json::{Value, json};

use super::SetupError;

const PAGE_KIB: u64 = 2048;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Returns the number of pages, and of free ones.
pub fn counts(host: &Host) -> Value {
    let number = |name: &str| read_number(host, &format!("{POOL}/{name}"));
    json!({ "size_kib": PAGE_KIB, "total": number("nr_hugepages"), "free": number("free_hugepages") })
}

fn read_number(host: &Host, path: &str) -> Option<u64> {
    host.read(path).ok().flatten()?.parse().ok()
}

/// Sets the number of pages to `count`. If that is more than the machine can spare, or if fewer
/// could be reserved, restores the earlier number.
pub fn reserve(host: &Host, count: u64, node: Option<u32>) -> Result<String, SetupError> {
    let path = match node {
        None => format!("{POOL}/nr_hugepages"),
        Some(n) => {
            format!("/sys/devices/system/node/node{n}/hugepages/hugepages-2048kB/nr_hugepages")
        }
    };
    let Some(before) = read_number(host, &path) else {
        return Err(SetupError::Refused(format!(
            "{path} cannot be read: the kernel has no pages of 2 MiB, or there is no such node"
        )));
    };
    if count > before {
        check_room(host, count - before, node)?;
    }
    host.write(&path, &count.to_string())?;
    let have = read_number(host, &path).unwrap_or(0);
    if have == count {
        return Ok(format!("{have} pages of 2 MiB are reserved"));
    }
    if have < count {
        host.write(&path, &before.to_string())?;
        return Err(SetupError::Refused(format!(
            "only {have} of {count} pages of 2 MiB could be reserved, memory is in pieces; {before} are reserved as before. Reserve them at boot instead: hugepages={count} on the kernel's command line"
        )));
    }
    Err(SetupError::Refused(format!(
        "{have} pages of 2 MiB are still reserved: that many are in use"
    )))
}

/// Refuses to reserve more than is free, less a reserve for other processes.
fn check_room(host: &Host, more: u64, node: Option<u32>) -> Result<(), SetupError> {
    let (path, word) = match node {
        None => ("/proc/meminfo".to_owned(), "MemAvailable:"),
        Some(n) => (
            format!("/sys/devices/system/node/node{n}/meminfo"),
            "MemFree:",
        ),
    };
    let table = host.read(&path)?.unwrap_or_default();
    let (Some(free), Some(total)) = (kib(&table, word), kib(&table, "MemTotal:")) else {
        return Err(SetupError::Refused(format!(
            "{path} does not say how much memory is free, so nothing is reserved"
        )));
    };
    let spare = free.saturating_sub(total / 16);
    if more.saturating_mul(PAGE_KIB) <= spare {
        return Ok(());
    }
    Err(SetupError::Refused(format!(
        "{more} more pages of 2 MiB are {} MiB, and the machine can spare {} MiB ({} MiB are free, and a sixteenth of all memory stays for the rest of it): at most {} more; nothing was changed",
        more.saturating_mul(2),
        spare >> 10,
        free >> 10,
        spare / PAGE_KIB
    )))
}

/// Reads a number of KiB from a table of memory (proc(5)). The tables of nodes have `Node 0` in
/// front.
fn kib(table: &str, word: &str) -> Option<u64> {
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|w| *w != word);
        words.next()?;
        words.next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_host::FakeHost;

    const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn machine() -> FakeHost {
        let fake = FakeHost::new();
        fake.file(PATH, "8");
        fake.file(
            "/proc/meminfo",
            "MemTotal:  1048576 kB\nMemFree: 100 kB\nMemAvailable:  524288 kB\n",
        );
        fake
    }

    fn have(fake: &FakeHost) -> Option<u64> {
        read_number(&fake.host(), PATH)
    }

    #[test]
    fn what_fits_is_reserved_and_given_back() {
        let fake = machine();
        let text = reserve(&fake.host(), 64, None).expect("room for them");
        assert!(text.contains("64 pages"), "{text}");
        reserve(&fake.host(), 0, None).expect("given back");
        assert_eq!(have(&fake), Some(0));
        assert!(reserve(&fake.host(), 64, Some(3)).is_err());
    }

    #[test]
    fn more_than_is_free_is_refused_before_anything_is_taken() {
        // 512 MiB are free, of which 64 MiB must stay: 224 pages.
        let fake = machine();
        for count in [8 + 225, 99_999_999, u64::MAX] {
            let text = reserve(&fake.host(), count, None)
                .expect_err("too many")
                .to_string();
            assert!(text.contains("at most 224 more"), "{text}");
            assert_eq!(have(&fake), Some(8));
        }
        reserve(&fake.host(), 8 + 224, None).expect("as many as there is room for");
    }

    #[test]
    fn nothing_is_taken_when_the_room_is_unknown() {
        let fake = FakeHost::new();
        fake.file(PATH, "8");
        fake.file("/proc/meminfo", "");
        assert!(reserve(&fake.host(), 9, None).is_err());
        assert_eq!(have(&fake), Some(8));
    }

    #[test]
    fn a_node_has_its_own_room() {
        let fake = machine();
        let node = "/sys/devices/system/node/node1";
        fake.file(
            &format!("{node}/hugepages/hugepages-2048kB/nr_hugepages"),
            "0",
        );
        fake.file(
            &format!("{node}/meminfo"),
            "Node 1 MemTotal: 163840 kB\nNode 1 MemFree: 20480 kB\n",
        );
        assert!(reserve(&fake.host(), 6, Some(1)).is_err());
        reserve(&fake.host(), 5, Some(1)).expect("room for them");
    }
}
