//! Options of a controller's bring-up.

use std::time::Duration;

/// Options of a controller's bring-up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ControllerOptions {
    /// Number of I/O queue pairs to ask the controller for.
    pub queues: u16,
    /// Number of interrupt vectors to ask the transport for; 0 to poll only.
    pub vectors: u16,
    /// Whether to use shadow doorbells where the controller offers them.
    pub shadow_doorbells: bool,
    /// Whether to use SGLs where the controller offers them.
    pub sgl: bool,
    /// Weights of round robin arbitration between the queues' priority classes, where the
    /// controller offers it.
    pub arbitration: Option<Weights>,
    /// Time after which an admin command without completion causes a reset.
    ///
    /// A controller names the time that it needs to become ready in CAP.TO, at most 128 s, and in
    /// CRTO.CRWMT, which may say nine hours. The driver waits for as long as CRTO.CRWMT says, but
    /// no longer than 128 s or this time, whichever is longer.
    pub admin_timeout: Duration,
    /// The same for Format NVM, which may erase the whole medium. It begins again whenever the
    /// namespace reports progress (FPI), of which its first report counts as some.
    pub format_timeout: Duration,
}

pumice_io::setters!(ControllerOptions: queues: u16, vectors: u16, shadow_doorbells: bool, sgl: bool, arbitration: Option<Weights>,
    admin_timeout: Duration, format_timeout: Duration);

impl Default for ControllerOptions {
    fn default() -> Self {
        ControllerOptions {
            queues: 64,
            vectors: 65,
            shadow_doorbells: true,
            sgl: true,
            arbitration: None,
            admin_timeout: Duration::from_secs(20),
            format_timeout: Duration::from_secs(600),
        }
    }
}

/// Weights of the arbitration's classes (Base section 5.27.1.1), in commands per round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weights {
    /// Weight of the high class, 1 to 256.
    pub high: u16,
    /// Weight of the medium class, 1 to 256.
    pub medium: u16,
    /// Weight of the low class, 1 to 256.
    pub low: u16,
}
