//! The interrupt vectors of a controller.

use std::sync::Arc;

use parking_lot::RwLock;
use pumice_io::sys::EventFd;

use super::link::Link;
use crate::error::NvmeError;

/// The interrupt vectors: the admin queue's, then one for each queue identifier.
#[derive(Debug)]
pub(crate) struct Interrupts {
    link: Arc<Link>,
    vectors: RwLock<Vec<Arc<EventFd>>>,
}

impl Interrupts {
    pub fn new(link: &Arc<Link>) -> Interrupts {
        Interrupts {
            link: Arc::clone(link),
            vectors: RwLock::default(),
        }
    }

    /// Enables the vectors that the options name, unless there are some.
    pub fn enable(&self) -> Result<(), NvmeError> {
        if self.count() == 0 && self.link.options.vectors > 0 {
            *self.vectors.write() = self.some(self.link.options.vectors)?;
        }
        Ok(())
    }

    /// Enables as many as before, after a reset of the function.
    pub fn enable_again(&self) -> Result<(), NvmeError> {
        let want = self.count();
        if want > 0 {
            // A queue pair whose interrupt vector is missing now wakes from time to time and looks.
            self.some(u16::try_from(want).unwrap_or(u16::MAX))?;
        }
        Ok(())
    }

    /// Enables as many interrupt vectors as the transport gives, at most `want`. Without any,
    /// completions are polled.
    fn some(&self, want: u16) -> Result<Vec<Arc<EventFd>>, NvmeError> {
        let mut count = want;
        while count > 0 {
            match self.link.transport.enable_interrupts(count) {
                Ok(vectors) => return Ok(vectors),
                Err(error) if self.link.transport.is_gone() => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(device = self.link.name(), count, %error, "interrupt vectors refused; trying fewer");
                    count /= 2;
                }
            }
        }
        Ok(Vec::new())
    }

    pub fn count(&self) -> usize {
        self.vectors.read().len()
    }

    /// Returns the vector of the queues with this identifier, which is 0 for the admin queues.
    pub fn of(&self, qid: u16) -> Option<Arc<EventFd>> {
        self.vectors.read().get(usize::from(qid)).cloned()
    }

    /// Wakes every queue pair that sleeps on an interrupt.
    pub fn wake_sleepers(&self) {
        for interrupt in self.vectors.read().iter() {
            interrupt.signal();
        }
    }
}
