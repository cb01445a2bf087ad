//! Shadow doorbells and the controller memory buffer.

use std::sync::Arc;

use pumice_io::sys::MmioMap;

use super::Core;
use crate::dma::DmaShared;
use crate::error::NvmeError;
use crate::queue::Shadow;
use crate::spec::{AdminOpcode, Cmbloc, Cmbmsc, Cmbsz, Command, Oacs, Reg};

/// The device's address of its memory buffer, far above every I/O virtual address.
const CMB_BASE: u64 = 1 << 56;

/// A mapped controller memory buffer. It is given out from front to back; queues are few.
#[derive(Debug)]
pub(super) struct ControllerMemory {
    map: MmioMap,
    used: usize,
    submission_queues: bool,
    /// Parts that queue pairs have freed: offset and length.
    free: Vec<(usize, usize)>,
}

impl Core {
    /// Gives the controller a shadow doorbell buffer, if it accepts one (Base section 5.8).
    pub(super) fn configure_shadow(&self) -> Result<(), NvmeError> {
        *self.shadow.write() = None;
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
        match self.admin(command, None) {
            Ok(_) => *self.shadow.write() = Some([values, events]),
            Err(NvmeError::Status { status, .. }) => {
                tracing::info!(device = self.name(), %status, "shadow doorbells refused");
            }
            Err(error) => {
                self.link.keep_until_quiet(Box::new((values, events)));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Returns a queue's submission and completion shadow doorbells, if they are in use.
    pub(crate) fn shadows(&self, qid: u16) -> (Option<Shadow>, Option<Shadow>) {
        let guard = self.shadow.read();
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

    /// Maps the controller memory buffer, if there is one (Base sections 3.1.3.11 to 3.1.3.16).
    pub(super) fn configure_memory(&self) {
        if !self.link.cap.cmbs() {
            return;
        }
        if let Err(error) = self.map_controller_memory() {
            tracing::info!(device = self.name(), %error, "controller memory buffer not used");
        }
    }

    fn map_controller_memory(&self) -> Result<(), NvmeError> {
        // CRE makes the location and size readable.
        self.link
            .transport
            .write64(Reg::CMBMSC, Cmbmsc::new().with_cre(true).into())?;
        let size = Cmbsz::from(self.link.transport.read32(Reg::CMBSZ)?);
        let place = Cmbloc::from(self.link.transport.read32(Reg::CMBLOC)?);
        if size.is_empty() {
            return Ok(());
        }
        let msc = Cmbmsc::new()
            .with_cre(true)
            .with_cmse(true)
            .with_cba(CMB_BASE >> 12);
        self.link.transport.write64(Reg::CMBMSC, msc.into())?;
        let mut guard = self.memory.lock();
        if guard.is_some() {
            // After a reset the mapping is as before, and the queue pairs keep their parts.
            return Ok(());
        }
        let offset = u64::from(place.ofst()) * size.unit();
        // 64 MiB hold more queues than a controller can have.
        let len = usize::try_from(size.len().min(64 << 20)).unwrap_or(0);
        let map = self.link.transport.map_memory(place.bir(), offset, len)?;
        *guard = Some(ControllerMemory {
            map,
            used: 0,
            submission_queues: size.sqs(),
            free: Vec::new(),
        });
        Ok(())
    }

    /// Takes `len` bytes of controller memory for a submission queue. Returns the mapping, the
    /// offset in it and the device's address.
    pub(super) fn take_controller_memory(&self, len: usize) -> Option<(MmioMap, usize, u64)> {
        let mut guard = self.memory.lock();
        let memory = guard.as_mut().filter(|m| m.submission_queues)?;
        let len = len.next_multiple_of(1 << self.link.page_shift);
        let offset = match memory.free.iter().position(|(_, l)| *l == len) {
            Some(at) => memory.free.swap_remove(at).0,
            None => {
                let offset = memory.used;
                if offset.checked_add(len)? > memory.map.len() {
                    return None;
                }
                memory.used += len;
                offset
            }
        };
        Some((memory.map.clone(), offset, CMB_BASE + offset as u64))
    }

    pub(super) fn give_controller_memory(&self, offset: usize, len: usize) {
        if let Some(memory) = self.memory.lock().as_mut() {
            let len = len.next_multiple_of(1 << self.link.page_shift);
            memory.free.push((offset, len));
        }
    }
}
