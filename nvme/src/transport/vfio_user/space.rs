//! The regions of the connection's domain, given to the other process by descriptor.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::client::Client;
use crate::dma::{AddressTable, CHUNK_LEN, DmaError, DmaMapper, Region, RegionId};
use crate::transport::{IovaSpace, TransportError};

/// Most regions that SPDK's controller accepts.
const MAX_REGIONS: usize = 64;

/// The highest address that every controller of this kind accepts.
const TOP: u64 = (1 << 47) - 1;

/// The mapper of one connection.
pub(super) struct SharedSpace {
    client: Arc<Client>,
    table: Arc<AddressTable>,
    state: Mutex<(IovaSpace, HashMap<RegionId, u64>)>,
}

impl SharedSpace {
    pub(super) fn new(client: Arc<Client>, table: Arc<AddressTable>) -> SharedSpace {
        SharedSpace {
            client,
            table,
            state: Mutex::new((IovaSpace::new(vec![0..=TOP]), HashMap::new())),
        }
    }
}

// SAFETY: the regions are given to the other process and not touched here.
#[allow(unsafe_code, reason = "the contract of DmaMapper")]
unsafe impl DmaMapper for SharedSpace {
    fn map(&self, region: &Region) -> Result<(), DmaError> {
        let device = || self.client.device().to_owned();
        if self.client.is_broken() {
            return Err(DmaError::Map {
                device: device(),
                len: region.len(),
                reason: "the connection has ended".to_owned(),
            });
        }
        let mut state = self.state.lock();
        let (space, regions) = &mut *state;
        if regions.len() >= MAX_REGIONS {
            return Err(DmaError::Map {
                device: device(),
                len: region.len(),
                reason: format!(
                    "{MAX_REGIONS} regions are mapped and a vfio-user controller takes no more; let the arena use larger ones (ArenaOptions::region_min)"
                ),
            });
        }
        let len = region.len() as u64;
        // A gap behind each region: parts of two regions can never look contiguous, since a queue
        // or an SGL element has to lie inside one.
        let gap = CHUNK_LEN as u64;
        let address = space.take(len + gap, gap).ok_or_else(|| DmaError::NoIova {
            device: device(),
            len: region.len(),
            windows: space.describe(),
        })?;
        if let Err(error) = self.client.dma_map(address, len, region.fd()) {
            if !matches!(error, TransportError::Timeout { .. }) {
                // After a time-out the server may still map the region, so the address stays taken.
                space.give(address);
            }
            return Err(DmaError::Map {
                device: device(),
                len: region.len(),
                reason: error.to_string(),
            });
        }
        regions.insert(region.id(), address);
        self.table.set_region(region, address);
        Ok(())
    }

    fn unmap(&self, region: &Region) {
        self.table.clear_region(region);
        let mut state = self.state.lock();
        let Some(address) = state.1.remove(&region.id()) else {
            return;
        };
        if self.client.is_broken() {
            return;
        }
        match self.client.dma_unmap(address, region.len() as u64) {
            Ok(()) => state.0.give(address),
            Err(error) => {
                tracing::warn!(device = self.client.device(), %error, "region not taken back; the end of the connection does it");
                self.client.shut_down();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::client::tests::pair;
    use super::super::message::Command;
    use super::super::stream;
    use super::*;
    use crate::dma::{DmaBuf, DmaDomain};
    use crate::transport::vfio::info::u64_at;

    /// The other side may still map what it was asked for, and would refuse another region there.
    #[test]
    fn an_address_whose_mapping_has_no_answer_is_not_given_away() {
        let (client, server) = pair(Duration::from_millis(10));
        let domain = DmaDomain::new();
        let table = Arc::new(domain.address_table());
        let space = SharedSpace::new(Arc::new(client), table);
        let _mapper = domain.register_mapper(Arc::new(space)).expect("a mapper");
        let mut addresses = Vec::new();
        for _ in 0..2 {
            DmaBuf::new_in(Some(&domain), 4096).expect_err("no answer");
            let request = stream::receive(&server, None).expect("read").expect("open");
            assert_eq!(request.header.command, Command::DmaMap as u16);
            addresses.push(u64_at(&request.body, 16).expect("an address"));
        }
        assert_ne!(addresses[0], addresses[1]);
    }
}
