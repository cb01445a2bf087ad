//! Options of a queue pair.

use std::time::Duration;

use crate::spec::QueuePriority;

/// Options of a queue pair.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueOptions {
    /// Most commands in flight, 1 to 4095. It is lower when the controller's queues are shorter.
    pub depth: u16,
    /// Priority class under weighted round robin arbitration.
    pub priority: QueuePriority,
    /// Whether to use an interrupt vector, with which [`QueuePair::wait`](super::QueuePair::wait) sleeps until the device
    /// interrupts. Without one it sleeps in short naps. Through VFIO the vector is switched off
    /// while the thread finds completions by polling; a controller in another process (vfio-user)
    /// interrupts for each completion.
    pub interrupt: bool,
    /// Whether to place the submission queue in the controller's memory buffer, if there is one.
    pub controller_memory: bool,
    /// Whether to record latencies, submission to completion. Costs nothing when it is off.
    pub histogram: bool,
    /// Time after which a command without completion is aborted. If that does not help, the
    /// controller is reset.
    pub timeout: Duration,
    /// Most times that a command is sent again when its status allows it.
    pub max_retries: u8,
    /// Longest time that `wait` spins before it sleeps.
    pub spin_max: Duration,
}

pumice_io::setters!(QueueOptions: depth: u16, priority: QueuePriority, interrupt: bool, controller_memory: bool, histogram: bool,
    timeout: Duration, max_retries: u8, spin_max: Duration);

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions {
            depth: 128,
            priority: QueuePriority::MEDIUM,
            interrupt: true,
            controller_memory: false,
            histogram: false,
            timeout: Duration::from_secs(30),
            max_retries: 3,
            spin_max: Duration::from_micros(50),
        }
    }
}
