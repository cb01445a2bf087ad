//! Every store does what the comparison takes for granted.

use pumice_others::kind::ALL;
use pumice_others::store::{KEY_LEN, StoreSizes, SyncMode};
use pumice_others::workloads::{self, Amount};

const ROOM: StoreSizes = StoreSizes {
    cache_bytes: 8 << 20,
    data_bytes: 256 << 20,
};

fn entry(number: u8) -> ([u8; KEY_LEN], Vec<u8>) {
    ([number; KEY_LEN], vec![number; usize::from(number)])
}

#[test]
fn what_was_written_is_read_after_it_was_opened_again() {
    for kind in ALL {
        let dir = tempfile::tempdir().unwrap();
        let name = kind.name();
        let store = kind.open(dir.path(), ROOM).unwrap();
        store
            .put(&[entry(1), entry(2)], SyncMode::AtReturn)
            .unwrap();
        store.put(&[entry(3), entry(4)], SyncMode::Later).unwrap();
        store.sync().unwrap();
        assert_eq!(store.get(&[3; KEY_LEN]).unwrap(), Some(3), "{name}");
        store.close().unwrap();
        let store = kind.open(dir.path(), ROOM).unwrap();
        for number in 1..=4 {
            let found = store.get(&[number; KEY_LEN]).unwrap();
            assert_eq!(found, Some(usize::from(number)), "{name}");
        }
        assert_eq!(store.get(&[9; KEY_LEN]).unwrap(), None, "{name}");
        assert_eq!(store.scan(&[2; KEY_LEN], 2).unwrap(), 2, "{name}");
        assert_eq!(store.scan(&[2; KEY_LEN], 100).unwrap(), 3, "{name}");
        store.close().unwrap();
    }
}

#[test]
fn every_phase_is_measured() {
    let amount = Amount {
        entries: 2500,
        value_len: 50,
        durable: 20,
        reads: 100,
    };
    for kind in ALL {
        let dir = tempfile::tempdir().unwrap();
        let mut noted = Vec::new();
        let measured =
            workloads::run(kind, dir.path(), ROOM, amount, |phase| noted.push(phase)).unwrap();
        // The last one needs the right to empty the kernel's cache.
        assert!(noted.len() >= 5, "{noted:?}");
        assert!(measured.micros.iter().all(|(_, micros)| *micros > 0.0));
        assert!(measured.micros.iter().map(|(phase, _)| *phase).eq(noted));
        assert!(measured.disk_bytes >= 2500 * 66, "{measured:?}");
    }
}
