//! Injection of faults.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use pumice_nvme::spec::{AdminOpcode, Command, Completion, IoOpcode, Status};

/// The effect of a fault on a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The command is not carried out and completes with this status.
    Status(Status),
    /// The command is carried out at once and completes this much later.
    Delay(Duration),
    /// The command is carried out and never completes.
    DropCompletion,
    /// The command is neither carried out nor completed.
    Drop,
    /// The completion has another identifier.
    WrongId,
    /// The completion is written with the phase tag of the previous pass.
    WrongPhase,
    /// The command completes with a status that no specification defines.
    UnknownStatus,
    /// The completion consists of these words (with the right phase tag).
    Raw([u64; 2]),
    /// The command is carried out and its completion has this in dword 0, the result of a feature
    /// for example.
    Result(u32),
    /// The command's data is overwritten with repetitions of these bytes before it completes with
    /// success (Identify pages for example).
    Data(Vec<u8>),
    /// The controller reports a fatal status and stops.
    Fatal,
    /// The controller is unplugged.
    Remove,
}

/// The commands that a fault applies to. A field that is `None` matches everything.
#[derive(Debug, Clone)]
pub struct FaultRule {
    admin: bool,
    opcode: Option<u8>,
    qid: Option<u16>,
    nsid: Option<u32>,
    lba: Option<Range<u64>>,
    skip: u64,
    count: u64,
    fault: Fault,
}

impl FaultRule {
    /// Makes a fault of every I/O command of this opcode.
    pub fn io(opcode: IoOpcode, fault: Fault) -> FaultRule {
        FaultRule {
            opcode: Some(opcode.0),
            ..FaultRule::any_io(fault)
        }
    }

    /// Makes a fault of every I/O command.
    pub fn any_io(fault: Fault) -> FaultRule {
        FaultRule {
            admin: false,
            opcode: None,
            qid: None,
            nsid: None,
            lba: None,
            skip: 0,
            count: u64::MAX,
            fault,
        }
    }

    /// Makes a fault of every admin command of this opcode.
    pub fn admin(opcode: AdminOpcode, fault: Fault) -> FaultRule {
        FaultRule {
            admin: true,
            opcode: Some(opcode.0),
            ..FaultRule::any_io(fault)
        }
    }

    /// Restricts the fault to this queue.
    #[must_use]
    pub fn queue(mut self, qid: u16) -> FaultRule {
        self.qid = Some(qid);
        self
    }

    /// Restricts the fault to this namespace.
    #[must_use]
    pub fn namespace(mut self, nsid: u32) -> FaultRule {
        self.nsid = Some(nsid);
        self
    }

    /// Restricts the fault to commands that touch a block of this range.
    #[must_use]
    pub fn blocks(mut self, range: Range<u64>) -> FaultRule {
        self.lba = Some(range);
        self
    }

    /// Exempts the first `n` matching commands.
    #[must_use]
    pub fn after(mut self, n: u64) -> FaultRule {
        self.skip = n;
        self
    }

    /// Applies the fault `n` times and no more.
    #[must_use]
    pub fn times(mut self, n: u64) -> FaultRule {
        self.count = n;
        self
    }

    fn matches(&self, qid: u16, c: &Command) -> bool {
        if self.admin != (qid == 0)
            || self.opcode.is_some_and(|o| o != c.opcode)
            || self.qid.is_some_and(|q| q != qid)
            || self.nsid.is_some_and(|n| n != c.nsid)
        {
            return false;
        }
        self.lba.as_ref().is_none_or(|range| {
            let start = c.lba();
            let end = start.saturating_add(u64::from(c.blocks()));
            start < range.end && range.start < end
        })
    }
}

/// The rules in force. The first one that matches applies.
#[derive(Debug, Default)]
pub struct Faults {
    any: AtomicBool,
    rules: Mutex<Vec<FaultRule>>,
    struck: Mutex<u64>,
}

impl Faults {
    /// Adds a rule after the existing ones.
    pub fn add(&self, rule: FaultRule) {
        let mut rules = self.rules.lock();
        rules.push(rule);
        self.any.store(true, Ordering::SeqCst);
    }

    /// Removes all rules.
    pub fn clear(&self) {
        let mut rules = self.rules.lock();
        rules.clear();
        self.any.store(false, Ordering::SeqCst);
    }

    /// Number of commands that a fault was applied to.
    pub fn struck(&self) -> u64 {
        *self.struck.lock()
    }

    pub(super) fn strike(&self, qid: u16, c: &Command) -> Option<Fault> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        let mut rules = self.rules.lock();
        let rule = rules
            .iter_mut()
            .find(|r| r.count > 0 && r.matches(qid, c))?;
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        rule.count -= 1;
        *self.struck.lock() += 1;
        Some(rule.fault.clone())
    }
}

/// Applies a fault to the completion.
pub(super) fn corrupt(fault: &Fault, c: &mut Completion) {
    match fault {
        Fault::WrongId => c.cid ^= 0x5a5a,
        Fault::UnknownStatus => c.status_phase = 0x3ff << 1,
        Fault::Result(dw0) => c.dw0 = *dw0,
        Fault::Raw(words) => *c = Completion::from_words(*words),
        _ => {}
    }
}
