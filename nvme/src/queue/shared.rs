//! What a queue pair's owner and the controller's reset share.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use super::ring::QueueMem;
use crate::dma::DmaShared;
use crate::spec::QueuePriority;
use crate::transport::EventFd;

/// The part of a queue pair that the controller needs to create its queues anew.
///
/// There are two completion queues' worth of memory: a reset creates the queue on the other
/// one, so that the owner can still read what was completed before the reset.
#[derive(Debug)]
pub(crate) struct QueueShared {
    pub qid: u16,
    pub sq_entries: u16,
    pub cq_entries: u16,
    pub vector: Option<u16>,
    pub interrupt: Option<Arc<EventFd>>,
    pub priority: QueuePriority,
    pub sq_mem: QueueMem,
    pub sq_address: u64,
    pub cq_mem: [Arc<DmaShared>; 2],
    pub cq_address: [u64; 2],
    /// The owner is writing doorbells, see `barrier`.
    pub ringing: AtomicBool,
    /// Lock order: after the controller's registry of queues.
    pub bank: Mutex<Bank>,
}

/// Which completion queue memory is in use, and whether the device has the queues.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bank {
    pub current: usize,
    pub created: bool,
}
