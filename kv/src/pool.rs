//! The threads that do a database's operations for futures.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::thread;

thread_local! {
    /// The pool whose operation this thread is doing.
    static DOING: Cell<*const Workers> = const { Cell::new(std::ptr::null()) };
}

/// An operation of a future.
pub(crate) trait Task: Send {
    /// Does it. Returns the waker of the future that waits for it.
    fn run(self: Box<Self>) -> Option<Waker>;
    /// Answers that the database is closed. Returns the waker of the future that waits for it.
    fn refuse(self: Box<Self>) -> Option<Waker>;
}

/// The reason why an operation was not taken.
pub(crate) enum NotTaken {
    /// The database is being closed, or is closed.
    Closed,
    /// No thread could be started.
    NoThread(io::Error),
}

/// The way in which the pool answers new operations.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum PoolPhase {
    /// It takes them.
    Open,
    /// It refuses them while the database is being closed, which may fail.
    Paused,
    /// It refuses them, and the threads end.
    Ended,
}

/// A queue of operations and the threads that do them. Threads start with the first operation. They are not joined: a thread
/// that has done an operation runs the waker of its future, which may do anything, such as dropping the database.
pub(crate) struct AsyncPool(Arc<Workers>);

struct Workers {
    queue: Mutex<TaskQueue>,
    work: Condvar,
    quiet: Condvar,
    most_threads: usize,
    /// Operations in the queue that are done also if their futures are dropped.
    bound: usize,
}

struct TaskQueue {
    tasks: VecDeque<(u64, Box<dyn Task>)>,
    next_ticket: u64,
    threads: usize,
    idle: usize,
    /// Operations that threads are doing, without those that wait for the pool themselves.
    doing: usize,
    /// Threads that close the database.
    closers: usize,
    phase: PoolPhase,
}

impl AsyncPool {
    pub(crate) fn new(most_threads: usize, bound: usize) -> AsyncPool {
        AsyncPool(Arc::new(Workers {
            queue: Mutex::new(TaskQueue {
                tasks: VecDeque::new(),
                next_ticket: 0,
                threads: 0,
                idle: 0,
                doing: 0,
                closers: 0,
                phase: PoolPhase::Open,
            }),
            work: Condvar::new(),
            quiet: Condvar::new(),
            most_threads,
            bound,
        }))
    }

    /// Puts an operation into the queue. Returns its ticket.
    pub(crate) fn submit(&self, task: Box<dyn Task>) -> Result<u64, NotTaken> {
        let mut queue = self.0.lock();
        if queue.phase != PoolPhase::Open {
            return Err(NotTaken::Closed);
        }
        if queue.tasks.len() >= queue.idle && queue.threads < self.0.most_threads {
            let workers = Arc::clone(&self.0);
            let thread = thread::Builder::new().name("pumice-async".to_owned());
            match thread.spawn(move || workers.work()) {
                Ok(_) => queue.threads += 1,
                // The other threads do it.
                Err(_) if queue.threads > 0 => {}
                Err(error) => return Err(NotTaken::NoThread(error)),
            }
        }
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.tasks.push_back((ticket, task));
        self.0.work.notify_one();
        Ok(ticket)
    }

    /// Takes back an operation that is not among the first of the queue, which are as good as begun.
    pub(crate) fn withdraw(&self, ticket: u64) {
        let mut queue = self.0.lock();
        let place = queue.tasks.binary_search_by_key(&ticket, |(of, _)| *of);
        let withdrawn = place.ok().filter(|place| *place >= self.0.bound);
        let task = withdrawn.and_then(|place| queue.tasks.remove(place));
        drop(queue);
        drop(task);
    }

    /// Whether operations are waiting or being done.
    pub(crate) fn is_busy(&self) -> bool {
        let queue = self.0.lock();
        queue.doing > 0 || !queue.tasks.is_empty()
    }

    /// Goes to a phase. For one that takes no operations those that were accepted are done before this returns, also by this
    /// thread: the others may all be waiting for the caller. The rest is refused.
    pub(crate) fn drain(&self, phase: PoolPhase) {
        let mut queue = self.0.lock();
        queue.phase = phase;
        self.0.work.notify_all();
        if phase == PoolPhase::Open {
            return;
        }
        let accepted = queue.tasks.len().min(self.0.bound);
        let refused = queue.tasks.split_off(accepted);
        let mut wakers = Vec::new();
        while let Some((_, task)) = queue.tasks.pop_front() {
            let waker;
            (queue, waker) = self.0.run(queue, task);
            wakers.extend(waker);
        }
        // An operation that closes its own database does not wait for itself.
        let own = usize::from(DOING.get() == Arc::as_ptr(&self.0));
        queue.doing -= own;
        self.0.quiet.notify_all();
        while queue.doing > 0 {
            queue = self.0.wait(queue, &self.0.quiet);
        }
        queue.doing += own;
        drop(queue);
        wakers.extend(refused.into_iter().filter_map(|(_, task)| task.refuse()));
        wakers.into_iter().for_each(wake);
    }

    /// Runs `close` in a thread of its own, for which [`AsyncPool::wait_for_closers`] waits.
    pub(crate) fn close_by(&self, close: Box<dyn Task>) -> io::Result<()> {
        let workers = Arc::clone(&self.0);
        let mut queue = self.0.lock();
        let thread = thread::Builder::new().name("pumice-close".to_owned());
        thread.spawn(move || {
            let waker = close.run();
            workers.lock().closers -= 1;
            workers.quiet.notify_all();
            waker.map(wake)
        })?;
        queue.closers += 1;
        Ok(())
    }

    pub(crate) fn wait_for_closers(&self) {
        let mut queue = self.0.lock();
        while queue.closers > 0 {
            queue = self.0.wait(queue, &self.0.quiet);
        }
    }
}

impl Workers {
    fn lock(&self) -> MutexGuard<'_, TaskQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        queue: MutexGuard<'a, TaskQueue>,
        on: &Condvar,
    ) -> MutexGuard<'a, TaskQueue> {
        on.wait(queue).unwrap_or_else(PoisonError::into_inner)
    }

    /// Does an operation without the lock.
    fn run<'a>(
        &'a self,
        mut queue: MutexGuard<'a, TaskQueue>,
        task: Box<dyn Task>,
    ) -> (MutexGuard<'a, TaskQueue>, Option<Waker>) {
        queue.doing += 1;
        drop(queue);
        let before = DOING.replace(std::ptr::from_ref(self));
        let waker = task.run();
        DOING.set(before);
        let mut queue = self.lock();
        queue.doing -= 1;
        if queue.doing == 0 {
            self.quiet.notify_all();
        }
        (queue, waker)
    }

    /// The life of a thread.
    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some((_, task)) = queue.tasks.pop_front() {
                let waker;
                (queue, waker) = self.run(queue, task);
                if let Some(waker) = waker {
                    drop(queue);
                    wake(waker);
                    queue = self.lock();
                }
            } else if queue.phase == PoolPhase::Ended {
                queue.threads -= 1;
                return;
            } else {
                queue.idle += 1;
                queue = self.wait(queue, &self.work);
                queue.idle -= 1;
            }
        }
    }
}

/// Wakes a task. A panic of its executor's went to the panic hook, and has no other place to go.
fn wake(waker: Waker) {
    let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
}
