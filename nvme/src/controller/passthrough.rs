//! Checks of a caller's own admin command, so that no safe call makes a device write where it must
//! not, or changes state that the driver relies on.

use super::link::Link;
use crate::dma::DmaBuf;
use crate::error::NvmeError;
use crate::spec::{AdminOpcode, Command, FeatureId, decode};

const PAGE: usize = 4096;

/// A command ready to be sent.
pub(super) struct Prepared {
    pub command: Command,
    /// The driver's own buffer. The device is given no other.
    pub sent: Option<DmaBuf>,
    /// The caller's buffer.
    pub own: Option<DmaBuf>,
}

/// The data of a command.
enum Data {
    None,
    /// Exactly this many bytes, by the command's own fields. A buffer is required.
    Bytes(usize),
    /// At most a page, whether the caller has a buffer or not.
    Page,
    /// At most the largest data of any command.
    Any,
}

/// Returns the data that the device transfers (Base section 5), or the reason why the command is
/// refused.
fn data_of(c: &Command) -> Result<Data, &'static str> {
    let dwords = |z: u32| u64::from(z).saturating_add(1).saturating_mul(4);
    let bytes = |len: u64| Data::Bytes(usize::try_from(len).unwrap_or(usize::MAX));
    Ok(match AdminOpcode(c.opcode) {
        AdminOpcode::GET_LOG_PAGE => bytes(dwords(c.cdw10 >> 16 | (c.cdw11 & 0xffff) << 16)),
        AdminOpcode::IDENTIFY | AdminOpcode::NS_MANAGEMENT | AdminOpcode::NS_ATTACHMENT => {
            Data::Bytes(PAGE)
        }
        AdminOpcode::GET_FEATURES => get_feature(feature(c))?,
        AdminOpcode::SET_FEATURES => set_feature(feature(c))?,
        AdminOpcode::FIRMWARE_DOWNLOAD
        | AdminOpcode::DIRECTIVE_SEND
        | AdminOpcode::DIRECTIVE_RECEIVE => bytes(dwords(c.cdw10)),
        AdminOpcode::SECURITY_SEND | AdminOpcode::SECURITY_RECEIVE => bytes(c.cdw11.into()),
        AdminOpcode::ABORT
        | AdminOpcode::KEEP_ALIVE
        | AdminOpcode::FIRMWARE_COMMIT
        | AdminOpcode::DEVICE_SELF_TEST
        | AdminOpcode::VIRTUALIZATION
        | AdminOpcode::FORMAT_NVM
        | AdminOpcode::SANITIZE => Data::None,
        // Vendor specific commands. Bits 1:0 of every opcode say whether there is data (Base
        // section 3.3.3.1). Its length is not known.
        AdminOpcode(op @ 0xc0..) if op & 3 == 0 => Data::None,
        AdminOpcode(0xc0..) => Data::Any,
        _ => return Err("not passed on: it is the driver's own or not known"),
    })
}

fn feature(c: &Command) -> u8 {
    (c.cdw10 & 0xff) as u8
}

/// Base figure 317 and NVM figure 97: no feature of the specifications has more than a page.
fn get_feature(id: u8) -> Result<Data, &'static str> {
    match id {
        0x01..=0x1e | 0x78..=0x85 => Ok(Data::Page),
        _ => Err("not passed on: no specification says how long the feature's data is"),
    }
}

/// Refuses features that tell the device where to write, and those that the driver has set and
/// relies on.
fn set_feature(id: u8) -> Result<Data, &'static str> {
    match FeatureId(id) {
        FeatureId::NUMBER_OF_QUEUES
        | FeatureId::ASYNC_EVENT_CONFIG
        | FeatureId::KEEP_ALIVE
        | FeatureId::HOST_BEHAVIOR => Err("not passed on: the driver sets the feature itself"),
        FeatureId::VOLATILE_WRITE_CACHE => {
            Err("not passed on: the driver has to know; use Controller::set_write_cache")
        }
        FeatureId(0x0d) => {
            Err("not passed on: it gives the device memory (host memory buffer) by its address")
        }
        // Features without data.
        FeatureId(0x01 | 0x02 | 0x04 | 0x05 | 0x08..=0x0a | 0x10 | 0x11 | 0x13 | 0x15) => {
            Ok(Data::None)
        }
        FeatureId(0x17 | 0x18 | 0x80 | 0x82..=0x84) => Ok(Data::None),
        // LBA range type, autonomous power states, timestamp, read recovery and predictable
        // latency configuration, host identifier.
        FeatureId(0x03 | 0x0c | 0x0e | 0x12 | 0x14 | 0x81) => Ok(Data::Bytes(PAGE)),
        _ => Err("not passed on: the feature is not known"),
    }
}

/// Checks a caller's command with a buffer of `have` bytes, and clears its pointers. Returns the
/// length of the driver's own buffer, 0 for none, or the reason why the command is not sent. A
/// command has at most `largest` bytes of data.
fn check(mut command: Command, have: usize, largest: usize) -> Result<(Command, usize), String> {
    let len = match data_of(&command)? {
        Data::None => 0,
        Data::Page => PAGE,
        // The caller may want only the beginning of a page.
        Data::Bytes(len) if have > 0 && len <= have.next_multiple_of(PAGE) => len,
        Data::Bytes(0) => 0,
        Data::Bytes(len) => {
            return Err(format!("transfers {len} bytes, the buffer has {have}"));
        }
        Data::Any => largest,
    };
    command.flags = 0;
    command.mptr = 0;
    command.prp1 = 0;
    command.prp2 = 0;
    // The device may fill whole pages.
    let len = match len {
        0 => 0,
        len => len.max(have).next_multiple_of(PAGE),
    };
    Ok((command, len))
}

/// Checks a command, clears its pointers and takes a buffer as long as the device may need, with
/// the caller's data copied into it.
pub(super) fn prepare(
    link: &Link,
    command: Command,
    own: Option<DmaBuf>,
) -> Result<Prepared, NvmeError> {
    let have = own.as_ref().map_or(0, DmaBuf::len);
    let (command, len) = check(command, have, link.info()?.transfer_bytes)
        .map_err(|why| link.unsupported(format!("{}: {why}", decode::admin_command(&command))))?;
    let sent = match len {
        0 => None,
        len => {
            let mut sent = link.admin_buffer(len)?;
            if let Some(own) = &own {
                sent[..own.len()].copy_from_slice(own);
            }
            Some(sent)
        }
    };
    Ok(Prepared { command, sent, own })
}

/// Returns the caller's own buffer, filled.
pub(super) fn finish(sent: Option<DmaBuf>, own: Option<DmaBuf>) -> Option<DmaBuf> {
    let mut own = own?;
    if let Some(sent) = sent {
        let len = own.len();
        own.copy_from_slice(&sent[..len]);
    }
    Some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_given_no_address_but_ours() {
        const LARGEST: usize = 1 << 17;
        let mut buffers = 0;
        for opcode in 0..=u8::MAX {
            for feature in 0..=u32::from(u8::MAX) {
                for have in [0, 8, PAGE] {
                    let mut c = Command::new(opcode, 1);
                    (c.prp1, c.prp2, c.mptr, c.flags) =
                        (0xdead_b000, 0xdead_c000, 0xdead_d000, 0x40);
                    (c.cdw10, c.cdw11) = (feature, 8);
                    (c.cdw13, c.cdw14) = (0xdead_b000, 1);
                    let Ok((command, sent)) = check(c, have, LARGEST) else {
                        continue;
                    };
                    assert_eq!((command.prp1, command.prp2, command.mptr), (0, 0, 0));
                    assert_eq!(command.flags, 0);
                    let has_data = match data_of(&command).expect("passed") {
                        Data::None | Data::Bytes(0) => 0,
                        Data::Bytes(len) => len,
                        Data::Page => PAGE,
                        Data::Any => LARGEST,
                    };
                    assert!(sent >= has_data && sent.is_multiple_of(PAGE), "{c:?}");
                    buffers += usize::from(sent > 0);
                    let set = AdminOpcode(opcode) == AdminOpcode::SET_FEATURES;
                    assert!(!set || !matches!(feature, 0x06 | 0x07 | 0x0b | 0x0d | 0x0f | 0x16));
                }
            }
        }
        assert!(buffers > 1000);
    }
}
