//! The controller memory buffer: Base sections 3.1.3.11 to 3.1.3.16.

use std::sync::Arc;

use parking_lot::Mutex;
use pumice_io::sys::MmioMap;

use super::link::Link;
use crate::error::NvmeError;
use crate::spec::{Cmbloc, Cmbmsc, Cmbsz, Reg};

/// The device's address of its memory buffer, far above every I/O virtual address.
const CMB_BASE: u64 = 1 << 56;

/// A mapped buffer. It is given out from front to back; queues are few.
#[derive(Debug)]
struct Mapped {
    map: MmioMap,
    used: usize,
    submission_queues: bool,
    /// Parts that queue pairs have freed: offset and length.
    free: Vec<(usize, usize)>,
}

/// The controller memory buffer, if there is one.
#[derive(Debug)]
pub(super) struct ControllerMemory {
    link: Arc<Link>,
    mapped: Mutex<Option<Mapped>>,
}

impl ControllerMemory {
    pub fn new(link: &Arc<Link>) -> ControllerMemory {
        ControllerMemory {
            link: Arc::clone(link),
            mapped: Mutex::new(None),
        }
    }

    /// Maps it.
    pub fn configure(&self) {
        if !self.link.cap.cmbs() {
            return;
        }
        if let Err(error) = self.map() {
            tracing::info!(device = self.link.name(), %error, "controller memory buffer not used");
        }
    }

    fn map(&self) -> Result<(), NvmeError> {
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
        let mut guard = self.mapped.lock();
        if guard.is_some() {
            // After a reset the mapping is as before, and the queue pairs keep their parts.
            return Ok(());
        }
        let offset = u64::from(place.ofst()) * size.unit();
        // 64 MiB hold more queues than a controller can have.
        let len = usize::try_from(size.len().min(64 << 20)).unwrap_or(0);
        let map = self.link.transport.map_memory(place.bir(), offset, len)?;
        *guard = Some(Mapped {
            map,
            used: 0,
            submission_queues: size.sqs(),
            free: Vec::new(),
        });
        Ok(())
    }

    /// Takes `len` bytes of controller memory for a submission queue. Returns the mapping, the
    /// offset in it and the device's address.
    pub fn take(&self, len: usize) -> Option<(MmioMap, usize, u64)> {
        let mut guard = self.mapped.lock();
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

    pub fn give(&self, offset: usize, len: usize) {
        if let Some(memory) = self.mapped.lock().as_mut() {
            let len = len.next_multiple_of(1 << self.link.page_shift);
            memory.free.push((offset, len));
        }
    }
}
