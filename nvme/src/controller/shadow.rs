//! Shadow doorbells: Base section 5.8.

use std::sync::Arc;

use parking_lot::RwLock;

use super::admin::Admin;
use super::link::Link;
use crate::dma::DmaShared;
use crate::error::NvmeError;
use crate::queue::Shadow;
use crate::spec::{AdminOpcode, Command, Oacs};

/// The shadow doorbells of all queues.
#[derive(Debug)]
pub(crate) struct ShadowDoorbells {
    link: Arc<Link>,
    admin: Arc<Admin>,
    /// Values and event indexes, when the controller has accepted them.
    pages: RwLock<Option<[Arc<DmaShared>; 2]>>,
}

impl ShadowDoorbells {
    pub fn new(admin: &Arc<Admin>) -> ShadowDoorbells {
        ShadowDoorbells {
            link: Arc::clone(&admin.link),
            admin: Arc::clone(admin),
            pages: RwLock::new(None),
        }
    }

    pub fn are_in_use(&self) -> bool {
        self.pages.read().is_some()
    }

    /// Forgets them: the controller is disabled.
    pub fn forget(&self) {
        *self.pages.write() = None;
    }

    /// Gives the controller a shadow doorbell buffer, if it accepts one (Base section 5.8).
    pub fn configure(&self) -> Result<(), NvmeError> {
        self.forget();
        let info = self.link.info()?;
        let offered = info.identify.oacs.get() & Oacs::DOORBELL_BUFFER != 0;
        if !offered || !self.link.options.shadow_doorbells {
            return Ok(());
        }
        let page = 1usize << self.link.page_shift;
        let values = Arc::new(self.link.queue_memory(page)?);
        let events = Arc::new(self.link.queue_memory(page)?);
        let address = |m: &DmaShared| {
            self.link
                .table
                .translate(m.region(), m.region_offset())
                .map(|(address, _)| address)
        };
        let (Some(prp1), Some(prp2)) = (address(&values), address(&events)) else {
            return Ok(());
        };
        let command = Command {
            prp1,
            prp2,
            ..Command::new(AdminOpcode::DOORBELL_BUFFER_CONFIG.0, 0)
        };
        match self.admin.run(command, None) {
            Ok(_) => *self.pages.write() = Some([values, events]),
            Err(NvmeError::Status { status, .. }) => {
                tracing::info!(device = self.link.name(), %status, "shadow doorbells refused");
            }
            Err(error) => {
                self.link.keep_until_quiet(Box::new((values, events)));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Returns a queue's submission and completion shadow doorbells, if they are in use.
    pub fn of(&self, qid: u16) -> (Option<Shadow>, Option<Shadow>) {
        let guard = self.pages.read();
        let Some([values, events]) = guard.as_ref() else {
            return (None, None);
        };
        let word = |completion: usize| {
            let index = (2 * usize::from(qid) + completion) << self.link.cap.dstrd().min(10);
            (index < values.as_u32().len()).then(|| Shadow {
                values: Arc::clone(values),
                events: Arc::clone(events),
                index,
            })
        };
        (word(0), word(1))
    }
}
