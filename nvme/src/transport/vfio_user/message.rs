//! Messages of the vfio-user protocol, version 0.1, as bytes.
//!
//! Source: the vfio-user specification (QEMU `docs/interop/vfio-user.rst`), sections "Header" to
//! "VFIO_USER_DEVICE_RESET". Fields are in the byte order of the machine that both sides run on.

/// Length of the header of every message.
pub const HEADER_LEN: usize = 16;

/// Longest message that we accept: 1 MiB of data with its header, and some room.
pub const MAX_MESSAGE: usize = (1 << 20) + 4096;

const FLAG_TYPE: u32 = 0xf;
const FLAG_REPLY: u32 = 1;
const FLAG_NO_REPLY: u32 = 1 << 4;
const FLAG_ERROR: u32 = 1 << 5;

/// Flags of a DMA region that the device may read and write.
pub const DMA_READ_WRITE: u32 = 3;

/// The request of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Agrees on the protocol version.
    Version = 1,
    /// Gives the server memory.
    DmaMap = 2,
    /// Takes memory back from the server.
    DmaUnmap = 3,
    /// Asks for the device's regions and interrupts.
    GetInfo = 4,
    /// Asks for a region's length and flags.
    GetRegionInfo = 5,
    /// Asks for an index of interrupts.
    GetIrqInfo = 7,
    /// Sets or clears the eventfds of interrupts.
    SetIrqs = 8,
    /// Reads a region.
    RegionRead = 9,
    /// Writes a region.
    RegionWrite = 10,
    /// Resets the device.
    Reset = 13,
}

impl Command {
    /// The command of this number, if it is one that we know.
    pub fn from_number(number: u16) -> Option<Command> {
        use Command::*;
        [
            Version,
            DmaMap,
            DmaUnmap,
            GetInfo,
            GetRegionInfo,
            GetIrqInfo,
            SetIrqs,
            RegionRead,
            RegionWrite,
            Reset,
        ]
        .into_iter()
        .find(|c| *c as u16 == number)
    }

    /// The specification's name of the command, without its prefix.
    pub fn name(self) -> &'static str {
        match self {
            Command::Version => "VERSION",
            Command::DmaMap => "DMA_MAP",
            Command::DmaUnmap => "DMA_UNMAP",
            Command::GetInfo => "DEVICE_GET_INFO",
            Command::GetRegionInfo => "DEVICE_GET_REGION_INFO",
            Command::GetIrqInfo => "DEVICE_GET_IRQ_INFO",
            Command::SetIrqs => "DEVICE_SET_IRQS",
            Command::RegionRead => "REGION_READ",
            Command::RegionWrite => "REGION_WRITE",
            Command::Reset => "DEVICE_RESET",
        }
    }
}

/// The first 16 bytes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The sender of a request chooses it, and the answer repeats it.
    pub id: u16,
    /// The number of the [`Command`].
    pub command: u16,
    /// Size of the whole message, header included.
    pub size: u32,
    flags: u32,
    /// The errno that an answer reports; 0 in a request.
    pub errno: u32,
}

impl Header {
    /// Makes the header of a request. Returns `None` when the body is too long for one message.
    pub fn request(id: u16, command: Command, body_len: usize) -> Option<Header> {
        Some(Header {
            id,
            command: command as u16,
            size: u32::try_from(HEADER_LEN + body_len).ok()?,
            flags: 0,
            errno: 0,
        })
    }

    /// Makes the header of the answer to this message; `errno` 0 is success.
    pub fn reply(&self, body_len: usize, errno: u32) -> Option<Header> {
        Some(Header {
            id: self.id,
            command: self.command,
            size: u32::try_from(HEADER_LEN + body_len).ok()?,
            flags: FLAG_REPLY | if errno == 0 { 0 } else { FLAG_ERROR },
            errno,
        })
    }

    /// Returns the header as bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..2].copy_from_slice(&self.id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.command.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.size.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.errno.to_ne_bytes());
        bytes
    }

    /// Decodes a header. Returns `None` when no message can have its size.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Option<Header> {
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let header = Header {
            id: u16_at(0),
            command: u16_at(2),
            size: u32_at(4),
            flags: u32_at(8),
            errno: u32_at(12),
        };
        (HEADER_LEN..=MAX_MESSAGE)
            .contains(&(header.size as usize))
            .then_some(header)
    }

    /// Length of the part behind the header.
    pub fn body_len(&self) -> usize {
        (self.size as usize).saturating_sub(HEADER_LEN)
    }

    /// Whether the message is an answer.
    pub fn is_reply(&self) -> bool {
        self.flags & FLAG_TYPE == FLAG_REPLY
    }

    /// Whether the answer reports an error.
    pub fn is_error(&self) -> bool {
        self.flags & FLAG_ERROR != 0
    }

    /// Whether the sender of a request does not wait for an answer.
    pub fn wants_no_reply(&self) -> bool {
        self.flags & FLAG_NO_REPLY != 0
    }
}

/// A message body, put together field by field.
#[derive(Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// Adds 16 bits.
    pub fn u16(mut self, value: u16) -> Body {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Adds 32 bits.
    pub fn u32(mut self, value: u32) -> Body {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Adds 64 bits.
    pub fn u64(mut self, value: u64) -> Body {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Adds bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Body {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Returns the fields as bytes.
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Makes a `struct vfio_user_dma_map`.
pub fn dma_map(address: u64, len: u64) -> Vec<u8> {
    Body::default()
        .u32(32)
        .u32(DMA_READ_WRITE)
        .u64(0)
        .u64(address)
        .u64(len)
        .done()
}

/// Makes a `struct vfio_user_dma_unmap`.
pub fn dma_unmap(address: u64, len: u64) -> Vec<u8> {
    Body::default().u32(24).u32(0).u64(address).u64(len).done()
}

/// Makes a `struct vfio_device_info` or `struct vfio_irq_info`, which have the same shape.
pub fn info(third: u32) -> Vec<u8> {
    Body::default().u32(16).u32(0).u32(third).u32(0).done()
}

/// Makes a `struct vfio_region_info` with the room that the answer may take.
pub fn region_info(index: u32, room: u32) -> Vec<u8> {
    Body::default()
        .u32(room)
        .u32(0)
        .u32(index)
        .u32(0)
        .u64(0)
        .u64(0)
        .done()
}

/// Makes a `struct vfio_irq_set`. The eventfds are sent beside the message.
pub fn set_irqs(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    Body::default()
        .u32(20)
        .u32(flags)
        .u32(index)
        .u32(start)
        .u32(count)
        .done()
}

/// Makes a `struct vfio_user_region_access`.
pub fn region_access(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    Body::default()
        .u64(offset)
        .u32(region)
        .u32(count)
        .bytes(data)
        .done()
}

/// Length of the fixed part of a region access.
pub const REGION_ACCESS_LEN: usize = 16;

/// Makes a protocol version with the capabilities as JSON, ended by a NUL.
pub fn version(capabilities: &str) -> Vec<u8> {
    Body::default()
        .u16(0)
        .u16(1)
        .bytes(capabilities.as_bytes())
        .bytes(&[0])
        .done()
}

/// The content of a version message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
    /// Most descriptors that may be sent with one message.
    pub max_msg_fds: usize,
    /// Most bytes of one region access.
    pub max_data_xfer_size: u64,
}

impl Version {
    /// Decodes a version message, with the specification's defaults where the JSON has no value.
    pub fn decode(body: &[u8]) -> Option<Version> {
        let major = u16::from_ne_bytes(body.get(0..2)?.try_into().ok()?);
        let minor = u16::from_ne_bytes(body.get(2..4)?.try_into().ok()?);
        let text = body.get(4..)?;
        let text = text.split(|b| *b == 0).next().unwrap_or(&[]);
        let json: serde_json::Value = serde_json::from_slice(text).unwrap_or_default();
        let number = |name: &str| json.get("capabilities")?.get(name)?.as_u64();
        let fds = number("max_msg_fds").unwrap_or(1).clamp(1, 64);
        Some(Version {
            major,
            minor,
            max_msg_fds: usize::try_from(fds).unwrap_or(1),
            max_data_xfer_size: number("max_data_xfer_size").unwrap_or(1 << 20),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_go_round() {
        let request = Header::request(7, Command::DmaMap, 32).expect("fits");
        assert_eq!(request.size, 48);
        let back = Header::decode(&request.encode()).expect("valid");
        assert_eq!(back, request);
        assert!(!back.is_reply() && !back.is_error() && !back.wants_no_reply());
        let refused = back.reply(0, 22).expect("fits");
        let refused = Header::decode(&refused.encode()).expect("valid");
        assert!(refused.is_reply() && refused.is_error());
        assert_eq!((refused.id, refused.errno, refused.body_len()), (7, 22, 0));
    }

    #[test]
    fn layouts() {
        assert_eq!(dma_map(1, 2).len(), 32);
        assert_eq!(dma_unmap(1, 2).len(), 24);
        assert_eq!(info(2).len(), 16);
        assert_eq!(region_info(0, 4096).len(), 32);
        assert_eq!(set_irqs(36, 2, 0, 4).len(), 20);
        assert_eq!(region_access(0, 8, 4, &[1, 2, 3, 4]).len(), 20);
    }

    #[test]
    fn versions() {
        let body = version(r#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}"#);
        let decoded = Version::decode(&body).expect("whole");
        assert_eq!(
            (decoded.major, decoded.minor, decoded.max_msg_fds),
            (0, 1, 8)
        );
        let bare = Version::decode(&[0, 0, 1, 0]).expect("whole");
        assert_eq!(bare.max_msg_fds, 1);
        assert_eq!(Version::decode(&[0, 0, 1]), None);
        let garbage = Version::decode(&version("{\"capabilities\":[")).expect("whole");
        assert_eq!(garbage.max_msg_fds, 1);
    }

    proptest! {
        #[test]
        fn any_header_is_bounded(bytes in proptest::array::uniform16(any::<u8>())) {
            if let Some(header) = Header::decode(&bytes) {
                prop_assert!(header.body_len() <= MAX_MESSAGE);
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn any_version_is_read(body in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(version) = Version::decode(&body) {
                prop_assert!((1..=64).contains(&version.max_msg_fds));
            }
        }
    }
}
