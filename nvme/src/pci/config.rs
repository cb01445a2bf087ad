//! The fields of PCI configuration space that a driver in user space uses.
//!
//! Source: PCI Local Bus Specification 3.0, sections 6.1, 6.2.2, 6.7 and 6.8.2.

use std::io;

/// Offset and bits of the command register.
pub(crate) const COMMAND: u16 = 0x04;
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const COMMAND_BUS_MASTER: u16 = 1 << 2;
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;

const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const CAPABILITIES: u16 = 0x34;
const CAP_ID_MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK_ALL: u16 = 1 << 14;

/// Access to a function's configuration space, which is little-endian.
pub trait ConfigSpace {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u16, data: &mut [u8]) -> io::Result<()>;
    /// Writes `data` at `offset`.
    fn write(&self, offset: u16, data: &[u8]) -> io::Result<()>;

    /// Reads 16 bits.
    fn read_u16(&self, offset: u16) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Writes 16 bits.
    fn write_u16(&self, offset: u16, value: u16) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Reads 8 bits.
    fn read_u8(&self, offset: u16) -> io::Result<u8> {
        let mut bytes = [0; 1];
        self.read(offset, &mut bytes)?;
        Ok(bytes[0])
    }

    /// Enables memory decoding and bus mastering, and disables INTx.
    fn enable(&self) -> io::Result<()> {
        let command = self.read_u16(COMMAND)?;
        self.write_u16(
            COMMAND,
            command | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE,
        )
    }

    /// Enables memory decoding, so that the function's registers can be accessed. Bus mastering
    /// stays as it is.
    fn enable_memory(&self) -> io::Result<()> {
        let command = self.read_u16(COMMAND)?;
        self.write_u16(COMMAND, command | COMMAND_MEMORY)
    }

    /// Disables bus mastering: from then on the function transfers nothing.
    fn disable_dma(&self) -> io::Result<()> {
        let command = self.read_u16(COMMAND)?;
        self.write_u16(COMMAND, command & !COMMAND_BUS_MASTER)
    }

    /// Returns the capabilities of the chained list. A list that loops ends where it does.
    fn capabilities(&self) -> io::Result<Vec<Capability>> {
        let mut found = Vec::new();
        if self.read_u16(STATUS)? & STATUS_CAPABILITIES == 0 {
            return Ok(found);
        }
        let mut at = self.read_u8(CAPABILITIES)? & !3;
        // 48 capabilities of 4 bytes fill the space behind the header.
        while at >= 0x40 && found.len() < 48 {
            let offset = u16::from(at);
            let id = self.read_u8(offset)?;
            found.push(Capability { id, offset });
            at = self.read_u8(offset + 1)? & !3;
        }
        Ok(found)
    }

    /// Returns the MSI-X capability, if there is one.
    fn msix(&self) -> io::Result<Option<MsixCapability>> {
        let Some(capability) = self
            .capabilities()?
            .into_iter()
            .find(|c| c.id == CAP_ID_MSIX)
        else {
            return Ok(None);
        };
        let control = self.read_u16(capability.offset + 2)?;
        Ok(Some(MsixCapability {
            control_offset: capability.offset + 2,
            vectors: (control & 0x7ff) + 1,
            enabled: control & MSIX_ENABLE != 0,
        }))
    }

    /// Turns MSI-X on or off.
    fn set_msix(&self, capability: MsixCapability, on: bool) -> io::Result<()> {
        let control = self.read_u16(capability.control_offset)?;
        let off = control & !(MSIX_ENABLE | MSIX_MASK_ALL);
        let value = if on { off | MSIX_ENABLE } else { off };
        self.write_u16(capability.control_offset, value)
    }
}

/// An entry of the capability list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Capability identifier.
    pub id: u8,
    /// Offset of the capability.
    pub offset: u16,
}

/// The parts of the MSI-X capability that a driver needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MsixCapability {
    /// Offset of the message control word.
    pub control_offset: u16,
    /// Number of vectors in the table.
    pub vectors: u16,
    /// Whether MSI-X is on.
    pub enabled: bool,
}

#[cfg(test)]
mod tests {
    use super::{ConfigSpace, MsixCapability};
    use std::cell::RefCell;
    use std::io;

    struct Fake(RefCell<[u8; 256]>);

    impl ConfigSpace for Fake {
        fn read(&self, offset: u16, data: &mut [u8]) -> io::Result<()> {
            let at = usize::from(offset);
            let space = self.0.borrow();
            let from = space.get(at..at + data.len());
            data.copy_from_slice(from.ok_or(io::ErrorKind::InvalidInput)?);
            Ok(())
        }
        fn write(&self, offset: u16, data: &[u8]) -> io::Result<()> {
            let at = usize::from(offset);
            self.0.borrow_mut()[at..at + data.len()].copy_from_slice(data);
            Ok(())
        }
    }

    fn fake() -> Fake {
        let mut space = [0u8; 256];
        space[6] = 0x10;
        space[0x34] = 0x40;
        space[0x40..0x42].copy_from_slice(&[0x01, 0x80]);
        space[0x80..0x84].copy_from_slice(&[0x11, 0x00, 0x1f, 0xc0]);
        Fake(RefCell::new(space))
    }

    #[test]
    fn list_is_walked_and_msix_found() {
        let space = fake();
        assert_eq!(space.capabilities().expect("list").len(), 2);
        let msix = space.msix().expect("read").expect("there");
        assert_eq!(
            msix,
            MsixCapability {
                control_offset: 0x82,
                vectors: 32,
                enabled: true
            }
        );
        space.set_msix(msix, false).expect("written");
        assert_eq!(space.read_u16(0x82).expect("read"), 0x001f);
        space.set_msix(msix, true).expect("written");
        assert_eq!(space.read_u16(0x82).expect("read"), 0x801f);
    }

    #[test]
    fn a_list_that_loops_ends() {
        let space = fake();
        space.write(0x81, &[0x40]).expect("written");
        assert_eq!(space.capabilities().expect("list").len(), 48);
    }

    #[test]
    fn command_bits() {
        let space = fake();
        space.enable().expect("written");
        assert_eq!(space.read_u16(4).expect("read"), 0x0406);
        space.disable_dma().expect("written");
        assert_eq!(space.read_u16(4).expect("read"), 0x0402);
    }
}
