//! Tests of databases with transactions. What a killed process had committed is in `survives.rs`.

mod common;

use std::sync::Arc;

use common::{key, value, watchdog};
use pumice::rocksdb::{
    MergeOperands, OptimisticTransactionOptions, Options, TransactionDBOptions, TransactionOptions,
    WriteBatchWithTransaction, WriteOptions,
};
use pumice::{Db, DbOptions, Error, ErrorKind, MountOptions, TransactionDb, mount};

/// Lock timeouts of a millisecond, so that no test waits.
fn impatient() -> TransactionDBOptions {
    let mut how = TransactionDBOptions::new();
    how.set_txn_lock_timeout(1);
    how.set_default_lock_timeout(1);
    how
}

fn open(options: &DbOptions) -> TransactionDb {
    options
        .open_transactions("malloc://256M", &impatient())
        .unwrap()
}

fn kind(result: Result<(), pumice::rocksdb::Error>) -> ErrorKind {
    Error::from(result.unwrap_err()).kind()
}

fn concat(_key: &[u8], old: Option<&[u8]>, more: &MergeOperands) -> Option<Vec<u8>> {
    let mut all = old.unwrap_or_default().to_vec();
    more.iter()
        .for_each(|operand| all.extend_from_slice(operand));
    Some(all)
}

#[test]
fn a_transaction_is_committed_whole_or_not() {
    let _limit = watchdog();
    let db = open(
        &DbOptions::new()
            .configure(|options| options.set_merge_operator_associative("concat", concat))
            .column_family("events", Options::default()),
    );
    let events = db.cf_handle("events").unwrap();
    db.put("gone", "1").unwrap();
    let transaction = db.transaction();
    transaction.put("a", "1").unwrap();
    transaction.put_cf(&events, "a", "event").unwrap();
    transaction.merge("log", "x").unwrap();
    transaction.delete("gone").unwrap();
    transaction.set_savepoint();
    transaction.put("a", "2").unwrap();
    transaction.put("b", "2").unwrap();
    assert_eq!(transaction.get("b").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(db.get("b").unwrap(), None, "seen before the commit");
    transaction.rollback_to_savepoint().unwrap();
    transaction.commit().unwrap();
    assert_eq!(db.get("a").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(db.get("log").unwrap().as_deref(), Some(&b"x"[..]));
    assert_eq!(
        (db.get("b").unwrap(), db.get("gone").unwrap()),
        (None, None)
    );
    let event = db.get_cf(&events, "a").unwrap();
    assert_eq!(event.as_deref(), Some(&b"event"[..]));
    let undone = db.transaction();
    undone.put("a", "3").unwrap();
    undone.rollback().unwrap();
    drop(undone);
    let dropped = db.transaction();
    dropped.put("a", "4").unwrap();
    drop(dropped);
    // Its lock is gone with it.
    db.put("a", "5").unwrap();
    drop(events);
    db.close().unwrap();
}

#[test]
fn a_conflict_has_a_kind() {
    let _limit = watchdog();
    let db = open(&DbOptions::new());
    db.put("k", "0").unwrap();
    let one = db.transaction();
    one.get_for_update("k", true).unwrap();
    let two = db.transaction();
    assert_eq!(kind(two.put("k", "2")), ErrorKind::Conflict);
    assert_eq!(kind(db.put("k", "3")), ErrorKind::Conflict);
    two.put("other", "2").unwrap();
    one.put("k", "1").unwrap();
    one.commit().unwrap();
    two.put("k", "2").unwrap();
    two.commit().unwrap();
    assert_eq!(db.get("k").unwrap().as_deref(), Some(&b"2"[..]));
    // A transaction with a snapshot does not overwrite what is newer.
    let mut snapshot = TransactionOptions::new();
    snapshot.set_snapshot(true);
    let old = db.transaction_opt(&WriteOptions::default(), &snapshot);
    db.put("k", "4").unwrap();
    assert_eq!(kind(old.put("k", "5")), ErrorKind::Conflict);
    // One that is too old is not committed.
    let mut short = TransactionOptions::new();
    short.set_expiration(1);
    let expired = db.transaction_opt(&WriteOptions::default(), &short);
    expired.put("late", "1").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(kind(expired.commit()), ErrorKind::Conflict);
    drop(old);
    db.close().unwrap();
}

#[test]
fn optimistic_transactions_find_conflicts_when_they_commit() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    let db = DbOptions::new().open_optimistic(&uri).unwrap();
    let mut snapshot = OptimisticTransactionOptions::new();
    snapshot.set_snapshot(true);
    let one = db.transaction_opt(&WriteOptions::default(), &snapshot);
    let two = db.transaction();
    one.get_for_update("k", true).unwrap();
    one.put("k", "1").unwrap();
    two.put("k", "2").unwrap();
    two.commit().unwrap();
    assert_eq!(kind(one.commit()), ErrorKind::Conflict);
    let mut batch = WriteBatchWithTransaction::<true>::default();
    batch.put("batch", "1");
    db.write(batch).unwrap();
    db.close().unwrap();
    db.close().unwrap();
    assert!(db.put("late", "1").is_err());
    drop(db);
    // Any kind of database opens it.
    let db = Db::open(&uri).unwrap();
    assert_eq!(db.get("k").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(db.get("batch").unwrap().as_deref(), Some(&b"1"[..]));
    db.close().unwrap();
}

#[test]
fn prepared_transactions_are_found_after_a_restart() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let open = || {
        DbOptions::new()
            .open_transactions_in(&fs, &impatient())
            .unwrap()
    };
    let db = open();
    assert_eq!(db.prepared_transactions().len(), 0);
    for name in ["commit", "roll back"] {
        let transaction = db.transaction();
        transaction.set_name(name.as_bytes()).unwrap();
        transaction.put(name, "1").unwrap();
        transaction.prepare().unwrap();
    }
    let unprepared = db.transaction();
    unprepared.put("unprepared", "1").unwrap();
    drop(unprepared);
    db.put("plain", "1").unwrap();
    // The log with the prepared ones stays when there is nothing else in it.
    db.flush().unwrap();
    db.close().unwrap();
    drop(db);
    let db = open();
    let found = db.prepared_transactions();
    assert_eq!(found.len(), 2);
    assert_eq!(db.get("commit").unwrap(), None, "seen before the commit");
    for transaction in found {
        if transaction.get_name().as_deref() == Some(b"commit") {
            transaction.commit().unwrap();
        } else {
            transaction.rollback().unwrap();
        }
    }
    db.put("roll back", "free").unwrap();
    db.close().unwrap();
    drop(db);
    let db = open();
    assert_eq!(db.prepared_transactions().len(), 0);
    assert_eq!(db.get("commit").unwrap().as_deref(), Some(&b"1"[..]));
    assert_eq!(db.get("roll back").unwrap().as_deref(), Some(&b"free"[..]));
    assert_eq!(db.get("unprepared").unwrap(), None);
    assert_eq!(db.get("plain").unwrap().as_deref(), Some(&b"1"[..]));
    db.close().unwrap();
}

/// Close and drop keep what has no log, as those of a plain database do.
#[test]
fn what_was_put_without_a_log_is_kept() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let mut unlogged = WriteOptions::default();
    unlogged.disable_wal(true);
    let options = DbOptions::new().column_family("events", Options::default());
    for round in 0..4_u64 {
        let put = |db: &TransactionDb| {
            let events = db.cf_handle("events").unwrap();
            let transaction = db.transaction_opt(&unlogged, &TransactionOptions::new());
            transaction
                .put_cf(&events, key(round), value(round))
                .unwrap();
            transaction.commit().unwrap();
        };
        let db = options.open_transactions_in(&fs, &impatient()).unwrap();
        put(&db);
        if round % 2 == 0 {
            db.close().unwrap();
        }
        drop(db);
        let db = options.open_transactions_in(&fs, &impatient()).unwrap();
        let events = db.cf_handle("events").unwrap();
        assert_eq!(db.get_cf(&events, key(round)).unwrap(), Some(value(round)));
    }
}

#[test]
fn threads_transfer_and_nothing_is_lost_or_made() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    let mut how = TransactionDBOptions::new();
    how.set_txn_lock_timeout(20);
    let db = Arc::new(DbOptions::new().open_transactions(&uri, &how).unwrap());
    let number =
        |bytes: Option<Vec<u8>>| -> u64 { u64::from_le_bytes(bytes.unwrap().try_into().unwrap()) };
    for n in 0..8 {
        db.put(key(n), 100_u64.to_le_bytes()).unwrap();
    }
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let db = &db;
            scope.spawn(move || {
                let mut x = thread + 1;
                for _ in 0..200 {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let (from, to) = ((x >> 33) % 8, (x >> 40) % 8);
                    let transfer = || -> Result<(), pumice::rocksdb::Error> {
                        let transaction = db.transaction();
                        let had = number(transaction.get_for_update(key(from), true)?);
                        transaction.put(key(from), had.saturating_sub(1).to_le_bytes())?;
                        let had_there = number(transaction.get_for_update(key(to), true)?);
                        transaction.put(key(to), (had_there + had.min(1)).to_le_bytes())?;
                        transaction.commit()
                    };
                    if let Err(error) = transfer() {
                        assert_eq!(Error::from(error).kind(), ErrorKind::Conflict);
                    }
                }
            });
        }
    });
    db.close().unwrap();
    drop(db);
    let db = DbOptions::new().open_transactions(&uri, &how).unwrap();
    let sum: u64 = (0..8).map(|n| number(db.get(key(n)).unwrap())).sum();
    assert_eq!(sum, 800);
    db.close().unwrap();
}

#[test]
fn the_rest_of_a_database_is_there_too() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let db = DbOptions::new()
        .path("/db")
        .open_transactions_in(&fs, &impatient())
        .unwrap();
    db.put("a", "1").unwrap();
    db.create_cf("late", &Options::default()).unwrap();
    assert_eq!(db.column_families().unwrap(), ["default", "late"]);
    assert!(db.property_int_value("pumice.free-bytes").unwrap() > Some(0));
    assert!(db.property_value("rocksdb.stats").unwrap().is_some());
    db.checkpoint("/copy").unwrap();
    db.export(&dir.path().join("out")).unwrap();
    assert!(dir.path().join("out/CURRENT").exists());
    // The crate has no backup of it.
    let error = db.backup("/backups").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let copy = DbOptions::new()
        .path("/copy")
        .open_optimistic_in(&fs)
        .unwrap();
    assert_eq!(copy.get("a").unwrap().as_deref(), Some(&b"1"[..]));
    copy.backup("/backups").unwrap();
    assert_eq!(copy.backups("/backups").unwrap().len(), 1);
    copy.close().unwrap();
    db.close().unwrap();
    let reading = DbOptions::new().path("/db").read_only(true);
    for error in [
        reading
            .open_transactions_in(&fs, &impatient())
            .err()
            .unwrap(),
        reading.open_optimistic_in(&fs).err().unwrap(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
    fs.unmount().unwrap();
}
