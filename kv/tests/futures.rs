//! Tests of a database's futures, on an executor of a few lines.

mod common;

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

use common::{key, uncompressed, value, watchdog};
use pumice::rocksdb::{TransactionDBOptions, WriteBatch};
use pumice::{Db, DbOptions, Error, ErrorKind, MountOptions, mount};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Polls a future once, for a task that does not care.
fn poll_once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

/// A door that operations wait at.
#[derive(Default)]
struct Door(Mutex<bool>, Condvar);

impl Door {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        let open = self.0.lock().unwrap();
        drop(self.1.wait_while(open, |open| !*open).unwrap());
    }
}

/// One thread, which waits at a door, and room for two operations behind it.
fn busy() -> (Db, Arc<Door>) {
    let options = DbOptions::new().async_threads(1).async_queue(2);
    let db = options.open("malloc://64M").unwrap();
    let door = Arc::<Door>::default();
    let (began, begun) = mpsc::channel();
    let waiting = Arc::clone(&door);
    let mut first = db.run_async(move |_| {
        began.send(()).unwrap();
        waiting.pass();
        Ok(())
    });
    assert!(poll_once(&mut first).is_pending());
    begun.recv().unwrap();
    drop(first);
    (db, door)
}

/// Returns how many threads of futures this process has.
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names
        .filter(|name| name.starts_with("pumice-async"))
        .count()
}

#[test]
fn operations_of_every_kind_of_database() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    block_on(async {
        let db = Db::open(&uri)?;
        for n in 0..100 {
            db.put_async(key(n), value(n)).await?;
        }
        db.delete_async(key(7)).await?;
        db.flush_async().await?;
        assert_eq!(db.get_async(key(7)).await?, None);
        assert_eq!(db.get_async(key(8)).await?, Some(value(8)));
        let batch = |db: &pumice::Rocks| {
            let mut batch = WriteBatch::default();
            batch.put("batch", "1");
            Ok(db.write(batch)?)
        };
        db.run_async(batch).await?;
        db.close_async().await?;
        db.close_async().await?;
        assert_eq!(
            db.get_async("batch").await.unwrap_err().kind(),
            ErrorKind::Closed
        );
        drop(db);
        let db = DbOptions::new().open_transactions(&uri, &TransactionDBOptions::new())?;
        let sum = db.run_async(|db| {
            let transaction = db.transaction();
            transaction.put("batch", "2")?;
            Ok(transaction.commit()?)
        });
        sum.await?;
        assert_eq!(db.get_async("batch").await?.as_deref(), Some(&b"2"[..]));
        db.close_async().await
    })
    .unwrap();
}

#[test]
fn tasks_of_other_threads_share_it() {
    let _limit = watchdog();
    let db = Arc::new(uncompressed().async_queue(3).open("malloc://256M").unwrap());
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let db = Arc::clone(&db);
            scope.spawn(move || {
                block_on(async move {
                    for n in thread * 500..(thread + 1) * 500 {
                        db.put_async(key(n), value(n)).await.unwrap();
                        assert_eq!(db.get_async(key(n)).await.unwrap(), Some(value(n)));
                    }
                });
            });
        }
    });
    common::check(&db, 0..4_000);
    db.close().unwrap();
}

#[test]
fn threads_start_when_they_are_needed_and_end_with_the_close() {
    let _limit = watchdog();
    // The other tests of this process have threads, too: this one runs alone.
    let name = "threads_start_when_they_are_needed_and_end_with_the_close";
    if std::env::var_os("PUMICE_TEST_ALONE").is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env("PUMICE_TEST_ALONE", "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let db = DbOptions::new()
        .async_threads(2)
        .open("malloc://64M")
        .unwrap();
    drop(db.put_async("never polled", "1"));
    db.put("a", "1").unwrap();
    assert_eq!(threads(), 0);
    for n in 0..50 {
        block_on(db.put_async(key(n), "1")).unwrap();
    }
    assert!((1..=2).contains(&threads()));
    assert_eq!(db.get("never polled").unwrap(), None);
    db.close().unwrap();
    let started = Instant::now();
    while threads() > 0 {
        assert!(started.elapsed() < common::LIMIT / 3, "they go on");
        std::thread::yield_now();
    }
}

/// Operations in the queue are done although nobody waits for them, and those that wait for room are not.
#[test]
fn dropped_futures_and_a_full_queue() {
    let _limit = watchdog();
    let (db, door) = busy();
    let mut futures: Vec<_> = (0..5).map(|n| db.put_async(key(n), value(n))).collect();
    assert!(
        futures
            .iter_mut()
            .all(|future| poll_once(future).is_pending())
    );
    let last = futures.pop().unwrap();
    drop(futures);
    // The fifth has moved up to the third place, behind two whose futures are gone.
    drop(last);
    let after = db.put_async("after", "1");
    let opener = std::thread::spawn(move || door.open());
    block_on(after).unwrap();
    opener.join().unwrap();
    for n in 0..5 {
        assert_eq!(
            db.get(key(n)).unwrap(),
            (n < 2).then(|| value(n)),
            "key {n}"
        );
    }
    db.close().unwrap();
}

/// Those that wait for room get it in the order in which they came.
#[test]
fn a_full_queue_is_fair() {
    let _limit = watchdog();
    let (db, door) = busy();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut futures: Vec<_> = (0..10)
        .map(|n| {
            let order = Arc::clone(&order);
            db.run_async(move |_| {
                order.lock().unwrap().push(n);
                Ok(())
            })
        })
        .collect();
    assert!(
        futures
            .iter_mut()
            .all(|future| poll_once(future).is_pending())
    );
    door.open();
    futures
        .into_iter()
        .rev()
        .for_each(|future| block_on(future).unwrap());
    assert_eq!(*order.lock().unwrap(), (0..10).collect::<Vec<_>>());
}

/// Closing does what is in the queue, and answers the rest.
#[test]
fn closed_while_in_flight() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    for by_future in [false, true] {
        let options = DbOptions::new().async_threads(1).async_queue(2);
        let db = options.open(&uri).unwrap();
        let door = Arc::<Door>::default();
        let waiting = Arc::clone(&door);
        let (began, begun) = mpsc::channel();
        let mut first = db.run_async(move |db| {
            began.send(()).unwrap();
            waiting.pass();
            Ok(db.put("first", "1")?)
        });
        assert!(poll_once(&mut first).is_pending());
        begun.recv().unwrap();
        let mut puts: Vec<_> = (0..20).map(|n| db.put_async(key(n), value(n))).collect();
        assert!(puts.iter_mut().all(|put| poll_once(put).is_pending()));
        let mut closing = db.close_async();
        if by_future {
            // It is closed although the future is dropped.
            assert!(poll_once(&mut closing).is_pending());
        }
        drop(closing);
        std::thread::scope(|scope| {
            let close = scope.spawn(|| db.close());
            door.open();
            close.join().unwrap().unwrap();
        });
        block_on(first).unwrap();
        let mut done = 0;
        for put in puts {
            match block_on(put) {
                Ok(()) => done += 1,
                Err(error) => assert_eq!(error.kind(), ErrorKind::Closed, "{error}"),
            }
        }
        drop(db);
        let db = options.open(&uri).unwrap();
        assert!(db.get("first").unwrap().is_some());
        let kept = (0..20)
            .filter(|n| db.get(key(*n)).unwrap().is_some())
            .count();
        assert!(
            done >= 2 && kept == done,
            "{done} acknowledged, {kept} kept"
        );
        for n in 0..20 {
            db.delete(key(n)).unwrap();
        }
        db.close().unwrap();
    }
}

/// Dropping the database waits for what was accepted, and for a close whose future was dropped.
#[test]
fn dropped_while_in_flight() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    let db = DbOptions::new().async_threads(2).open(&uri).unwrap();
    for n in 0..50 {
        assert!(!matches!(
            poll_once(&mut db.put_async(key(n), value(n))),
            Poll::Ready(Err(_))
        ));
    }
    drop(db);
    let db = Db::open(&uri).unwrap();
    common::check(&db, 0..50);
    let fs = db.file_system().clone();
    assert!(poll_once(&mut db.close_async()).is_pending());
    drop(db);
    // The closing is over, and the device is free.
    assert!(fs.exists("/").is_err(), "still mounted");
    mount(&uri, &MountOptions::new())
        .unwrap()
        .unmount()
        .unwrap();
}

#[test]
fn panics_of_callers_and_operations() {
    let _limit = watchdog();
    let db = DbOptions::new()
        .async_threads(1)
        .open("malloc://64M")
        .unwrap();
    // A caller panics while its operation is in the queue.
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut put = db.put_async("in flight", "1");
        assert!(poll_once(&mut put).is_pending());
        panic!("as the test wants it");
    }));
    assert!(panicked.is_err());
    // An operation panics: its task gets the panic, and the thread goes on.
    let bad = db.run_async(|_| -> Result<(), Error> { panic!("in an operation") });
    let panic = catch_unwind(AssertUnwindSafe(|| block_on(bad))).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"in an operation"));
    assert_eq!(
        block_on(db.get_async("in flight")).unwrap().as_deref(),
        Some(&b"1"[..])
    );
    // An executor panics when it is woken.
    struct Bad;
    impl Wake for Bad {
        fn wake(self: Arc<Self>) {
            panic!("in an executor");
        }
    }
    let waker = Arc::new(Bad).into();
    let mut put = db.put_async("bad waker", "1");
    let door = Arc::<Door>::default();
    let waiting = Arc::clone(&door);
    let mut first = db.run_async(move |_| {
        waiting.pass();
        Ok(())
    });
    assert!(poll_once(&mut first).is_pending());
    assert!(
        Pin::new(&mut put)
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    door.open();
    assert!(block_on(db.get_async("bad waker")).unwrap().is_some());
    drop((first, put));
    db.close().unwrap();
}

/// A task that owns the database, and nobody but its waker owns the task: the thread that wakes it drops the database.
#[test]
fn dropped_by_a_thread_of_its_own() {
    struct Owner {
        db: Mutex<Option<Db>>,
        over: Mutex<mpsc::Sender<()>>,
    }
    impl Wake for Owner {
        fn wake(self: Arc<Self>) {
            drop(self.db.lock().unwrap().take());
            self.over.lock().unwrap().send(()).unwrap();
        }
    }
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=64M&create=1", dir.path().display());
    let db = DbOptions::new().async_threads(1).open(&uri).unwrap();
    let door = Arc::<Door>::default();
    let waiting = Arc::clone(&door);
    let (sender, over) = mpsc::channel();
    let owner = Arc::new(Owner {
        db: Mutex::new(None),
        over: Mutex::new(sender),
    });
    let waker = Waker::from(Arc::clone(&owner));
    let mut first = db.run_async(move |_| {
        waiting.pass();
        Ok(())
    });
    assert!(
        Pin::new(&mut first)
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    drop(first);
    for n in 0..10 {
        assert!(poll_once(&mut db.put_async(key(n), value(n))).is_pending());
    }
    *owner.db.lock().unwrap() = Some(db);
    door.open();
    over.recv().unwrap();
    let db = Db::open(&uri).unwrap();
    common::check(&db, 0..10);
}

/// An operation may close the database that it is an operation of, and two may do so at once.
#[test]
fn closed_by_operations_of_its_own() {
    let _limit = watchdog();
    let db = Arc::new(
        DbOptions::new()
            .async_threads(2)
            .open("malloc://64M")
            .unwrap(),
    );
    let both = Arc::new(AtomicUsize::new(0));
    let close = || {
        let (own, both) = (Arc::clone(&db), Arc::clone(&both));
        db.run_async(move |_| {
            both.fetch_add(1, Ordering::SeqCst);
            while both.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            own.close()
        })
    };
    let (mut one, mut two) = (close(), close());
    assert!(poll_once(&mut one).is_pending() && poll_once(&mut two).is_pending());
    block_on(one).unwrap();
    block_on(two).unwrap();
    db.close().unwrap();
}
