//! A queue pair's interrupt vector: on while the thread sleeps, off while it polls.

use crate::controller::Link;

/// Number of completions after the last sleep from which the thread counts as one that polls.
const POLLING_COMPLETIONS: u64 = 1024;

/// State of the queue's interrupt vector.
#[derive(Debug)]
pub(super) struct Interrupt {
    vector: Option<u16>,
    /// Whether this queue pair has switched its vector off.
    off: bool,
    /// The count of completions at the last sleep.
    since: u64,
    /// Number of times that the vector was switched.
    switches: u64,
}

impl Interrupt {
    pub fn new(vector: Option<u16>) -> Interrupt {
        Interrupt {
            vector,
            off: false,
            since: 0,
            switches: 0,
        }
    }

    pub fn is_off(&self) -> bool {
        self.off
    }

    pub fn switches(&self) -> u64 {
        self.switches
    }

    /// Notes a sleep, after so many completions.
    pub fn slept(&mut self, completions: u64) {
        self.since = completions;
    }

    /// Switches the interrupt off when the thread finds its completions by polling: each interrupt
    /// would cost the kernel about as much as the I/O itself.
    pub fn off_while_polling(&mut self, link: &Link, completions: u64) {
        if !self.off && completions - self.since >= POLLING_COMPLETIONS {
            self.since = completions;
            self.switch(link, false);
        }
    }

    /// Switches the interrupt on again, for a sleep, after a reset has set up the vector again, and
    /// for its next user.
    pub fn on(&mut self, link: &Link) {
        if self.off {
            self.switch(link, true);
        }
    }

    fn switch(&mut self, link: &Link, on: bool) {
        let Some(vector) = self.vector else {
            return;
        };
        match link.transport.switch_interrupt(vector, on) {
            Ok(true) => {
                self.off = !on;
                self.switches += 1;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(device = link.name(), vector, on, %error, "interrupt not switched");
            }
        }
    }
}
