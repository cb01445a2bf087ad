//! The list areas of a queue pair's slots.

use std::sync::Arc;

use super::data::{ListArea, NotMapped};
use crate::dma::{AddressTable, DmaShared};

/// Memory for the PRP list or the ranges of each slot's command.
#[derive(Debug)]
pub(crate) struct Lists {
    memory: Arc<DmaShared>,
    /// The device address of each slot's area.
    addresses: Vec<u64>,
    /// Length of an area in words of 8 bytes.
    words: usize,
}

impl Lists {
    /// Divides memory into areas of `len` bytes, one for each of `count` slots.
    pub fn new(
        memory: Arc<DmaShared>,
        table: &AddressTable,
        count: u16,
        len: usize,
    ) -> Result<Lists, NotMapped> {
        let address = |slot| {
            let offset = memory.region_offset() + usize::from(slot) * len;
            let (address, _) = table.translate(memory.region(), offset).ok_or(NotMapped)?;
            Ok(address)
        };
        let addresses = (0..count).map(address).collect::<Result<_, _>>()?;
        Ok(Lists {
            addresses,
            memory,
            words: len / 8,
        })
    }

    /// Returns a slot's area.
    #[inline]
    pub fn area(&self, slot: u16) -> ListArea<'_> {
        let at = usize::from(slot);
        ListArea {
            words: &self.memory.as_u64()[at * self.words..(at + 1) * self.words],
            address: self.addresses[at],
        }
    }

    /// Returns the memory of all areas.
    pub fn memory(&self) -> Arc<DmaShared> {
        Arc::clone(&self.memory)
    }
}
