//! Text for commands and completions, for logs and errors.
//!
//! ```
//! use pumice_nvme::spec::{decode, Command, Completion, IoFlags, IoOpcode};
//! let mut c = Command::blocks_io(IoOpcode::WRITE, 1, 0, 1, IoFlags::NONE);
//! c.cid = 191;
//! assert_eq!(decode::io_command(1, &c).to_string(), "WRITE sqid:1 cid:191 nsid:1 lba:0 len:1");
//! let done = Completion { cid: 191, sq_id: 1, sq_head: 2, status_phase: 1, ..Default::default() };
//! assert_eq!(
//!     decode::completion(&done).to_string(),
//!     "SUCCESS (00/00) qid:1 cid:191 cdw0:0 sqhd:0002 p:1 m:0 dnr:0"
//! );
//! ```

use std::fmt;

use super::{
    AdminOpcode, Cns, Command, Completion, FeatureId, IoOpcode, LogPage, Status, status_name,
};

/// Displays a command of queue `sqid`; 0 is the admin queue.
pub fn command(sqid: u16, command: &Command) -> impl fmt::Display + '_ {
    Shown { sqid, command }
}

/// Displays a command of an I/O queue.
pub fn io_command(sqid: u16, command: &Command) -> impl fmt::Display + '_ {
    Shown { sqid, command }
}

/// Displays a command of the admin queue.
pub fn admin_command(command: &Command) -> impl fmt::Display + '_ {
    Shown { sqid: 0, command }
}

/// Displays a completion.
pub fn completion(completion: &Completion) -> impl fmt::Display + '_ {
    ShownCompletion(completion)
}

struct Shown<'a> {
    sqid: u16,
    command: &'a Command,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.sqid == 0 {
            admin(f, self.command)
        } else {
            io(f, self.sqid, self.command)
        }
    }
}

fn head(f: &mut fmt::Formatter<'_>, name: Option<&str>, sqid: u16, c: &Command) -> fmt::Result {
    match name {
        Some(name) => f.write_str(name)?,
        None => write!(f, "OPCODE {:02x}", c.opcode)?,
    }
    write!(f, " sqid:{sqid} cid:{} nsid:{}", c.cid, c.nsid)
}

fn io(f: &mut fmt::Formatter<'_>, sqid: u16, c: &Command) -> fmt::Result {
    let op = IoOpcode(c.opcode);
    head(f, op.name(), sqid, c)?;
    match op {
        IoOpcode::FLUSH => Ok(()),
        IoOpcode::READ
        | IoOpcode::WRITE
        | IoOpcode::COMPARE
        | IoOpcode::WRITE_ZEROES
        | IoOpcode::WRITE_UNCORRECTABLE
        | IoOpcode::VERIFY => {
            write!(f, " lba:{} len:{}", c.lba(), c.blocks())?;
            if c.cdw12 >> 30 & 1 != 0 {
                f.write_str(" fua:1")?;
            }
            Ok(())
        }
        IoOpcode::DATASET_MANAGEMENT => {
            write!(f, " ranges:{}", (c.cdw10 & 0xff) + 1)?;
            if c.cdw11 & 4 != 0 {
                f.write_str(" deallocate:1")?;
            }
            Ok(())
        }
        IoOpcode::COPY => write!(f, " lba:{} ranges:{}", c.lba(), (c.cdw12 & 0xff) + 1),
        _ => raw(f, c),
    }
}

fn admin(f: &mut fmt::Formatter<'_>, c: &Command) -> fmt::Result {
    let op = AdminOpcode(c.opcode);
    head(f, op.name(), 0, c)?;
    let low = (c.cdw10 & 0xff) as u8;
    match op {
        AdminOpcode::IDENTIFY => write!(f, " cns:{}", Cns(low)),
        AdminOpcode::GET_LOG_PAGE => {
            let dwords = u64::from(c.cdw10 >> 16 | (c.cdw11 & 0xffff) << 16) + 1;
            write!(f, " log:{} bytes:{}", LogPage(low), dwords * 4)
        }
        AdminOpcode::GET_FEATURES => write!(f, " feature:{}", FeatureId(low)),
        AdminOpcode::SET_FEATURES => {
            write!(f, " feature:{} value:{:#x}", FeatureId(low), c.cdw11)
        }
        AdminOpcode::CREATE_SQ => write!(
            f,
            " qid:{} entries:{} cqid:{} prp1:{:#x}",
            c.cdw10 & 0xffff,
            (c.cdw10 >> 16) + 1,
            c.cdw11 >> 16,
            c.prp1
        ),
        AdminOpcode::CREATE_CQ => write!(
            f,
            " qid:{} entries:{} ien:{} iv:{} prp1:{:#x}",
            c.cdw10 & 0xffff,
            (c.cdw10 >> 16) + 1,
            c.cdw11 >> 1 & 1,
            c.cdw11 >> 16,
            c.prp1
        ),
        AdminOpcode::DELETE_SQ | AdminOpcode::DELETE_CQ => write!(f, " qid:{}", c.cdw10 & 0xffff),
        AdminOpcode::ABORT => write!(
            f,
            " target-sqid:{} target-cid:{}",
            c.cdw10 & 0xffff,
            c.cdw10 >> 16
        ),
        AdminOpcode::ASYNC_EVENT_REQUEST => Ok(()),
        AdminOpcode::FORMAT_NVM => write!(
            f,
            " lbaf:{} ses:{}",
            (c.cdw10 & 15) | (c.cdw10 >> 12 & 3) << 4,
            c.cdw10 >> 9 & 7
        ),
        _ => raw(f, c),
    }
}

fn raw(f: &mut fmt::Formatter<'_>, c: &Command) -> fmt::Result {
    write!(
        f,
        " cdw10:{:08x} cdw11:{:08x} cdw12:{:08x}",
        c.cdw10, c.cdw11, c.cdw12
    )
}

impl fmt::Display for Command {
    /// Prints a command as an I/O queue's, without the queue.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io(f, 0, self)
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Command(opc:{:02x} flags:{:02x} cid:{} nsid:{} prp1:{:#x} prp2:{:#x} cdw10-15:{:x?})",
            self.opcode,
            self.flags,
            self.cid,
            self.nsid,
            self.prp1,
            self.prp2,
            [
                self.cdw10, self.cdw11, self.cdw12, self.cdw13, self.cdw14, self.cdw15
            ]
        )
    }
}

impl fmt::Display for Status {
    /// Prints for example `LBA OUT OF RANGE (00/80) dnr:1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = status_name(*self).unwrap_or("UNKNOWN STATUS");
        write!(f, "{name} ({:02x}/{:02x})", self.sct().0, self.sc())?;
        if self.is_success() {
            return Ok(());
        }
        write!(f, " dnr:{}", u8::from(self.do_not_retry()))
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

struct ShownCompletion<'a>(&'a Completion);

impl fmt::Display for ShownCompletion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = self.0;
        let s = c.status();
        let name = status_name(s).unwrap_or("UNKNOWN STATUS");
        write!(
            f,
            "{name} ({:02x}/{:02x}) qid:{} cid:{} cdw0:{:x} sqhd:{:04x} p:{} m:{} dnr:{}",
            s.sct().0,
            s.sc(),
            c.sq_id,
            c.cid,
            c.dw0,
            c.sq_head,
            u8::from(c.phase()),
            u8::from(s.more()),
            u8::from(s.do_not_retry())
        )
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&ShownCompletion(self), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_commands_name_what_they_ask() {
        let text = admin_command(&Command::identify(Cns::CONTROLLER, 0)).to_string();
        assert_eq!(text, "IDENTIFY sqid:0 cid:0 nsid:0 cns:controller");
        let log = Command::get_log(LogPage::SMART, u32::MAX, 0, 512, false);
        assert_eq!(
            admin_command(&log).to_string(),
            "GET LOG PAGE sqid:0 cid:0 nsid:4294967295 log:SMART / health bytes:512"
        );
    }

    #[test]
    fn unknown_values_are_data() {
        let text = io_command(3, &Command::new(0x77, 1)).to_string();
        assert!(text.starts_with("OPCODE 77 sqid:3"), "{text}");
        assert_eq!(
            Status(0x7ff | Status::DNR).to_string(),
            "UNKNOWN STATUS (07/ff) dnr:1"
        );
    }
}
