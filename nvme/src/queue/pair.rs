//! The queue pair, as its owner sees it.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use pumice_io::{Completion as IoCompletion, Op, SubmitError};

use super::bounce::Bounce;
use super::commands::Commands;
use super::observer::Observer;
use super::options::QueueOptions;
use super::ring::QueueMem;
use super::spin::Spin;
use super::stats::QueueStats;
use crate::controller::Controller;
use crate::error::{Cause, NvmeError};
use crate::namespace::Namespace;

/// The longest single sleep, so that time-outs and a lost interrupt are noticed.
const SLICE_MAX: Duration = Duration::from_millis(500);

/// A submission and a completion queue, which one thread owns.
#[derive(Debug)]
pub struct QueuePair {
    commands: Commands,
    /// The callers' I/Os, where the device must not see their buffers.
    bounce: Option<Box<Bounce>>,
    spin: Spin,
    spin_max: Duration,
    /// Keeps the controller enabled.
    controller: Arc<Controller>,
    not_sync: PhantomData<Cell<()>>,
}

impl Controller {
    /// Makes an I/O queue pair. Blocks for the admin commands.
    ///
    /// # Errors
    /// Fails with [`NvmeError::NoQueues`] when the controller has no more queues.
    pub fn queue_pair(self: &Arc<Self>, options: &QueueOptions) -> Result<QueuePair, NvmeError> {
        let core = Arc::clone(&self.core);
        let parts = core.queues.pair(options)?;
        let observer = Observer::new(options.histogram);
        Ok(QueuePair {
            bounce: core.link.transport.domain().map(|_| Box::default()),
            commands: Commands::new(core, parts, options.max_retries, options.timeout, observer),
            spin: Spin::new(),
            spin_max: options.spin_max,
            controller: Arc::clone(self),
            not_sync: PhantomData,
        })
    }
}

impl QueuePair {
    /// Returns the queue identifier, from 1.
    pub fn qid(&self) -> u16 {
        self.commands.shared().qid
    }

    /// The largest number of commands in flight.
    pub fn depth(&self) -> usize {
        self.commands.depth()
    }

    /// Whether the submission queue is in the controller memory buffer.
    pub fn in_controller_memory(&self) -> bool {
        matches!(self.commands.shared().sq_mem, QueueMem::Controller(..))
    }

    /// Number of I/Os that were accepted and not handed back yet.
    pub fn in_flight(&self) -> usize {
        match self.is_here() {
            true => self.commands.in_flight(),
            false => 0,
        }
    }

    /// Returns the controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.controller
    }

    /// Counters since the queue pair was made.
    pub fn stats(&self) -> QueueStats {
        self.commands.stats()
    }

    /// Latencies in nanoseconds, submission to completion, if they are recorded.
    pub fn histogram(&self) -> Option<&Histogram<u64>> {
        self.commands.observer().histogram()
    }

    fn is_here(&self) -> bool {
        self.commands.core().link.birth.is_here()
    }

    /// Accepts an I/O, which [`poll`](Self::poll) hands back with its tag. Never blocks. Does not
    /// ring the doorbell: `poll` does, once for everything that was submitted before it.
    ///
    /// # Errors
    /// Returns the I/O when the queue is full or the controller is being reset
    /// ([`SubmitError::Busy`]), and when the I/O is invalid for the namespace or the controller was
    /// removed ([`SubmitError::Refused`]).
    #[inline]
    pub fn submit(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        if self.bounce.is_some() {
            return self.submit_copy(ns, tag, io);
        }
        self.commands.submit(ns, tag, io)
    }

    /// Submits a copy whose data is in the device's own memory.
    fn submit_copy(&mut self, ns: &Namespace, tag: u64, io: Op) -> Result<(), SubmitError> {
        let commands = &mut self.commands;
        if commands.must_catch_up() && !commands.catch_up() {
            return Err(commands.not_now(ns, io));
        }
        let core = Arc::clone(commands.core());
        let (Some(bounce), Some(domain)) = (&mut self.bounce, core.link.transport.domain()) else {
            return commands.submit(ns, tag, io);
        };
        if let Op::Abort { tag: target } = &io {
            for number in bounce.numbers_of(*target) {
                commands.abort(number);
            }
        } else if !commands.has_slot() {
            return Err(SubmitError::Busy(io));
        }
        // A copy would be valid. An error has to be about the caller's buffers.
        if !Bounce::is_aligned(&io) {
            return commands.submit(ns, tag, io);
        }
        let (number, copy) = match bounce.lend(domain, tag, io) {
            Ok(lent) => lent,
            Err(io) => return Err(commands.refuse(ns, io, Cause::NotMapped)),
        };
        commands.submit(ns, number, copy).map_err(|mut refused| {
            let copy = std::mem::replace(refused.op_mut(), Op::Flush);
            *refused.op_mut() = bounce.take_back(number, copy, false).1;
            refused
        })
    }

    /// Rings the doorbells for submitted I/Os and hands back those that have ended. Never blocks.
    /// Returns how many it added to `out`.
    #[inline]
    pub fn poll(&mut self, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        let count = self.commands.poll(out);
        if let Some(bounce) = &mut self.bounce {
            for done in &mut out[before..] {
                bounce.finish(done);
            }
        }
        count
    }

    /// Asks the controller to abort the I/O that was submitted with `tag` (Base section 5.1), and
    /// sends none of its commands again. Never blocks. The controller cannot abort a command that
    /// it has not fetched yet. The I/O still ends once, with success or as aborted. Returns whether
    /// it was in flight.
    pub fn abort(&mut self, tag: u64) -> bool {
        if !self.is_here() {
            return false;
        }
        match &self.bounce {
            None => self.commands.abort(tag),
            Some(bounce) => {
                let mut found = false;
                for number in bounce.numbers_of(tag) {
                    found |= self.commands.abort(number);
                }
                found
            }
        }
    }

    /// Blocks until [`poll`](Self::poll) may have something to hand back or to do, or until
    /// `timeout` is over. Rings the doorbells first. Spins for a bounded time that follows the
    /// recent waits, then sleeps until the queue's interrupt (or in short naps, where there is
    /// none). Returns at once when nothing is in flight, except while the controller is being
    /// reset, whose end it waits for.
    ///
    /// # Errors
    /// Fails when the controller is gone and everything has been handed back.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), NvmeError> {
        if !self.is_here() {
            return Err(self.commands.core().life.gone(Cause::OtherProcess));
        }
        if self.commands.wait_for_reset(timeout.min(SLICE_MAX)) || self.commands.ready() {
            return Ok(());
        }
        self.commands.check_alive()?;
        self.commands.ring_all();
        if !self.commands.any() {
            return Ok(());
        }
        let start = Instant::now();
        let budget = self.spin.budget(self.spin_max).min(timeout);
        loop {
            for _ in 0..32 {
                if self.commands.ready() {
                    self.spin.learn(start.elapsed());
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= budget {
                break;
            }
        }
        let until = self.commands.until_side_work();
        let slice = timeout
            .saturating_sub(start.elapsed())
            .min(SLICE_MAX)
            .min(until.max(Duration::from_micros(50)));
        if !slice.is_zero() {
            self.commands.sleep(slice);
        }
        self.commands.look_at_clock();
        self.spin.learn(start.elapsed());
        Ok(())
    }
}
