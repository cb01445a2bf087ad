//! What a caller's own admin command may be, so that no safe call makes a device write where
//! it must not.

use crate::dma::DmaBuf;
use crate::error::NvmeError;
use crate::spec::{AdminOpcode, Command};

const PAGE: usize = 4096;

/// Bytes that the device transfers, by the command's own fields (Base section 5).
fn transfer_len(c: &Command) -> Option<usize> {
    let dwords = |z: u32| (z as usize).checked_add(1)?.checked_mul(4);
    match AdminOpcode(c.opcode) {
        AdminOpcode::GET_LOG_PAGE => dwords(c.cdw10 >> 16 | (c.cdw11 & 0xffff) << 16),
        AdminOpcode::IDENTIFY
        | AdminOpcode::GET_FEATURES
        | AdminOpcode::SET_FEATURES
        | AdminOpcode::NS_MANAGEMENT
        | AdminOpcode::NS_ATTACHMENT => Some(PAGE),
        AdminOpcode::FIRMWARE_DOWNLOAD
        | AdminOpcode::DIRECTIVE_SEND
        | AdminOpcode::DIRECTIVE_RECEIVE => dwords(c.cdw10),
        AdminOpcode::SECURITY_SEND | AdminOpcode::SECURITY_RECEIVE => Some(c.cdw11 as usize),
        // Vendor specific: the number of dwords, not 0's based.
        AdminOpcode(0xc0..) => (c.cdw10 as usize).checked_mul(4),
        // No data.
        AdminOpcode::ABORT
        | AdminOpcode::KEEP_ALIVE
        | AdminOpcode::FIRMWARE_COMMIT
        | AdminOpcode::DEVICE_SELF_TEST
        | AdminOpcode::VIRTUALIZATION
        | AdminOpcode::FORMAT_NVM
        | AdminOpcode::SANITIZE => Some(0),
        _ => None,
    }
}

/// Checks a command and clears its pointers. A short buffer is replaced by a page, of which
/// the caller's part is given back: the device may fill the page. Returns the command, the
/// buffer to send and the caller's own.
pub(super) fn prepare(
    device: &str,
    mut command: Command,
    data: Option<DmaBuf>,
) -> Result<(Command, Option<DmaBuf>, Option<DmaBuf>), NvmeError> {
    let refuse = |what: String| NvmeError::Unsupported {
        device: device.to_owned(),
        what: format!("{}: {what}", crate::spec::decode::admin_command(&command)),
    };
    let Some(len) = transfer_len(&command) else {
        return Err(refuse(
            "not passed on: it is the driver's own or not known".into(),
        ));
    };
    // Features without data take no buffer; whether one has data, its caller knows.
    let optional = matches!(
        AdminOpcode(command.opcode),
        AdminOpcode::GET_FEATURES | AdminOpcode::SET_FEATURES
    );
    let have = match &data {
        Some(buf) if buf.len() < PAGE => PAGE,
        Some(buf) => buf.len(),
        None => 0,
    };
    if len > have && !(optional && data.is_none()) {
        return Err(refuse(format!(
            "transfers {len} bytes, the buffer has {have}"
        )));
    }
    command.flags = 0;
    command.mptr = 0;
    command.prp1 = 0;
    command.prp2 = 0;
    match data {
        Some(buf) if buf.capacity() < PAGE => {
            let mut page = DmaBuf::zeroed(PAGE)?;
            page[..buf.len()].copy_from_slice(&buf);
            Ok((command, Some(page), Some(buf)))
        }
        Some(mut buf) if buf.len() < PAGE => {
            // The rest of the page is the buffer's own capacity.
            let len = buf.len();
            buf.set_len(PAGE);
            buf[len..].fill(0);
            buf.set_len(len);
            Ok((command, Some(buf), None))
        }
        data => Ok((command, data, None)),
    }
}

/// Gives the caller's own buffer back, filled.
pub(super) fn finish(sent: Option<DmaBuf>, own: Option<DmaBuf>) -> Option<DmaBuf> {
    match (sent, own) {
        (Some(page), Some(mut buf)) => {
            let len = buf.len();
            buf.copy_from_slice(&page[..len]);
            Some(buf)
        }
        (sent, None) => sent,
        (None, own) => own,
    }
}
