//! Operations of a database as futures.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use pumice_blobfs::fs::FileSystem;

use super::{Db, Held};
use crate::Error;
use crate::handle::DbHandle;
use crate::pool::{AsyncPool, NotTaken, Task};

/// An operation of a database that ends some time: [`Db::get_async`], [`Db::put_async`] and the others return it.
///
/// It needs no runtime: a thread of the database wakes the task that polls it, whatever executor that task is in. Nothing
/// happens before the first poll. The operation is then in the queue of the database, and is done whether or not the future is
/// polled again: dropping the future does not undo it, and does not say whether it was done. While the queue is full
/// ([`DbOptions::async_queue`](crate::DbOptions::async_queue)), the future waits for its turn behind those that came before it,
/// and dropping it there does nothing. An operation whose future has returned `Ok` is done.
#[must_use = "futures do nothing unless they are polled"]
pub struct DbFuture<'db, T> {
    fs: &'db FileSystem,
    path: &'db str,
    pool: &'db AsyncPool,
    step: FutureStep<'db, T>,
}

enum FutureStep<'db, T> {
    New(Box<dyn FnOnce(Arc<Answer<T>>) -> AsyncTask + Send + 'db>),
    Waiting(Arc<Answer<T>>, Option<u64>),
    Over,
}

/// A task with the kind of thread that does it.
enum AsyncTask {
    OfThePool(Box<dyn Task>),
    OfItsOwn(Box<dyn Task>),
}

/// The result of an operation, or its panic.
type Outcome<T> = Result<Result<T, Error>, Box<dyn Any + Send>>;

/// The place where a future finds the result of its operation.
struct Answer<T>(Mutex<AnswerSlot<T>>);

enum AnswerSlot<T> {
    Empty(Option<Waker>),
    Full(Outcome<T>),
}

impl<T> Answer<T> {
    fn lock(&self) -> MutexGuard<'_, AnswerSlot<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fill(&self, outcome: Outcome<T>) -> Option<Waker> {
        match std::mem::replace(&mut *self.lock(), AnswerSlot::Full(outcome)) {
            AnswerSlot::Empty(waker) => waker,
            AnswerSlot::Full(_) => None,
        }
    }
}

/// An operation, and its future's answer.
struct Operation<T, D: DbHandle, F> {
    held: Arc<Held<D>>,
    operation: F,
    answer: Arc<Answer<T>>,
}

impl<T, D, F> Task for Operation<T, D, F>
where
    T: Send,
    D: DbHandle,
    F: FnOnce(&Held<D>) -> Result<T, Error> + Send,
{
    fn run(self: Box<Self>) -> Option<Waker> {
        let Operation {
            held,
            operation,
            answer,
        } = *self;
        let outcome = catch_unwind(AssertUnwindSafe(|| operation(&held)));
        // The thread that gets the answer may drop the database, and is then the last to have it.
        drop(held);
        answer.fill(outcome)
    }

    fn refuse(self: Box<Self>) -> Option<Waker> {
        let Operation { held, answer, .. } = *self;
        let path = held.root.clone();
        drop(held);
        answer.fill(Ok(Err(Error::Closed { path })))
    }
}

impl<T> std::fmt::Debug for DbFuture<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DbFuture").finish_non_exhaustive()
    }
}

impl<T> DbFuture<'_, T> {
    fn ask(&self, asked: AsyncTask) -> Result<Option<u64>, Error> {
        let not_started = |source| Error::Threads { source };
        match asked {
            AsyncTask::OfThePool(task) => self.pool.submit(task).map(Some).map_err(|e| match e {
                NotTaken::Closed => self.closed(),
                NotTaken::NoThread(source) => not_started(source),
            }),
            AsyncTask::OfItsOwn(task) => {
                self.pool.close_by(task).map(|()| None).map_err(not_started)
            }
        }
    }

    fn closed(&self) -> Error {
        let path = self.path.to_owned();
        Error::Closed { path }
    }
}

impl<T> Future for DbFuture<'_, T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T, Error>> {
        match std::mem::replace(&mut self.step, FutureStep::Over) {
            // The threads are the parent's, and the locks may be held for ever.
            FutureStep::New(_) | FutureStep::Waiting(..) if self.fs.is_inherited() => {
                Poll::Ready(Err(self.closed()))
            }
            FutureStep::New(start) => {
                let waker = context.waker().clone();
                let answer = Arc::new(Answer(Mutex::new(AnswerSlot::Empty(Some(waker)))));
                match self.ask(start(Arc::clone(&answer))) {
                    Ok(ticket) => {
                        self.step = FutureStep::Waiting(answer, ticket);
                        Poll::Pending
                    }
                    Err(error) => Poll::Ready(Err(error)),
                }
            }
            FutureStep::Waiting(answer, ticket) => {
                let mut slot = answer.lock();
                match std::mem::replace(&mut *slot, AnswerSlot::Empty(None)) {
                    AnswerSlot::Full(outcome) => {
                        drop(slot);
                        Poll::Ready(outcome.unwrap_or_else(|panic| resume_unwind(panic)))
                    }
                    AnswerSlot::Empty(_) => {
                        *slot = AnswerSlot::Empty(Some(context.waker().clone()));
                        drop(slot);
                        self.step = FutureStep::Waiting(answer, ticket);
                        Poll::Pending
                    }
                }
            }
            FutureStep::Over => panic!("a future of a database was polled after its end"),
        }
    }
}

impl<T> Drop for DbFuture<'_, T> {
    fn drop(&mut self) {
        if let FutureStep::Waiting(_, Some(ticket)) = self.step
            && !self.fs.is_inherited()
        {
            self.pool.withdraw(ticket);
        }
    }
}

impl<D: DbHandle> Db<D> {
    /// Runs `operation` on a thread of the database's, for a task that must not block: a `WriteBatch`, a scan, a transaction from
    /// its beginning to its commit, or anything else that the other methods do not offer.
    ///
    /// The threads start when they are first needed, at most as many as
    /// [`DbOptions::async_threads`](crate::DbOptions::async_threads) allows, and end with the database. Each operation costs two
    /// changes of thread, some microseconds, and a copy of its keys and values: a value that is in memory is found sooner by a
    /// blocking `get`. Several operations in one `run_async` cost that once. A panic of `operation` continues in the task that
    /// awaits it.
    ///
    /// ```
    /// # fn block_on<F: Future>(future: F) -> F::Output {
    /// #     struct Thread(std::thread::Thread);
    /// #     impl std::task::Wake for Thread {
    /// #         fn wake(self: std::sync::Arc<Self>) { self.0.unpark(); }
    /// #     }
    /// #     let waker = std::sync::Arc::new(Thread(std::thread::current())).into();
    /// #     let mut future = std::pin::pin!(future);
    /// #     loop {
    /// #         match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
    /// #             std::task::Poll::Ready(output) => return output,
    /// #             std::task::Poll::Pending => std::thread::park(),
    /// #         }
    /// #     }
    /// # }
    /// let db = pumice::Db::open("malloc://256M")?;
    /// block_on(async {
    ///     db.put_async(b"fruit", b"apple").await?;
    ///     assert_eq!(db.get_async(b"fruit").await?.as_deref(), Some(&b"apple"[..]));
    ///     let batch = |db: &pumice::Rocks| {
    ///         let mut batch = pumice::rocksdb::WriteBatch::default();
    ///         batch.put(b"root", b"carrot");
    ///         batch.delete(b"fruit");
    ///         Ok(db.write(batch)?)
    ///     };
    ///     db.run_async(batch).await?;
    ///     db.flush_async().await?;
    ///     db.close_async().await
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn run_async<T, F>(&self, operation: F) -> DbFuture<'_, T>
    where
        T: Send + 'static,
        F: FnOnce(&D) -> Result<T, Error> + Send + 'static,
    {
        self.future(AsyncTask::OfThePool, move |held| operation(held.handle()))
    }

    /// Reads the value of a key of the default column family: `get` as [`Db::run_async`] does it.
    pub fn get_async(&self, key: impl AsRef<[u8]>) -> DbFuture<'_, Option<Vec<u8>>> {
        let key = key.as_ref().to_vec();
        self.run_async(move |db| Ok(db.read(&key)?))
    }

    /// Puts a value into the default column family: `put` as [`Db::run_async`] does it.
    pub fn put_async(&self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> DbFuture<'_, ()> {
        let (key, value) = (key.as_ref().to_vec(), value.as_ref().to_vec());
        self.run_async(move |db| Ok(db.write(&key, &value)?))
    }

    /// Deletes a key of the default column family: `delete` as [`Db::run_async`] does it.
    pub fn delete_async(&self, key: impl AsRef<[u8]>) -> DbFuture<'_, ()> {
        let key = key.as_ref().to_vec();
        self.run_async(move |db| Ok(db.remove(&key)?))
    }

    /// Writes the default column family to tables: `flush` as [`Db::run_async`] does it.
    pub fn flush_async(&self) -> DbFuture<'_, ()> {
        self.run_async(|db| Ok(db.flush_default()?))
    }

    /// Closes the database as [`Db::close`] does, on a thread of its own. Operations that are in the queue are done first, and
    /// those that wait for room in it end with [`Error::Closed`]. A put that RocksDB holds up on a full device fails after five
    /// seconds with what follows it, except in a [`TransactionDb`](crate::TransactionDb). Dropping the future does not stop
    /// the closing, and dropping the database waits for it. It can be repeated as [`Db::close`] can.
    pub fn close_async(&self) -> DbFuture<'_, ()> {
        self.future(AsyncTask::OfItsOwn, Held::close)
    }

    fn future<T: Send + 'static>(
        &self,
        asked: fn(Box<dyn Task>) -> AsyncTask,
        operation: impl FnOnce(&Held<D>) -> Result<T, Error> + Send + 'static,
    ) -> DbFuture<'_, T> {
        // A future that is forgotten before its first poll does not keep the database.
        let held = &self.held;
        DbFuture {
            fs: &self.held.fs,
            path: &self.held.root,
            pool: &self.held.pool,
            step: FutureStep::New(Box::new(move |answer| {
                asked(Box::new(Operation {
                    held: Arc::clone(held),
                    operation,
                    answer,
                }))
            })),
        }
    }
}
