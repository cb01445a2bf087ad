//! The slots of a queue pair's commands, and the command identifiers that they assign.

use std::ops::{Index, IndexMut};

use pumice_io::{Completion as IoCompletion, Op};

use crate::spec::{Command, Completion, decode};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    InFlight,
    /// In flight for too long; an abort was requested.
    Overdue,
    /// Ended, waiting to be sent again.
    Retrying,
}

/// Number of retries that says that the command must not be sent again.
pub(crate) const NO_RETRY: u8 = u8::MAX;

/// Value of `split` for a command that is all of its I/O.
pub(crate) const WHOLE: u32 = u32::MAX;

/// The end of the list of free slots.
const NONE: u16 = u16::MAX;

/// The words of a submission queue entry that I/O commands use: dwords 0 and 1, the data
/// pointer, dwords 10 and 11, 12 and 13. The others are zero.
pub(crate) type Kept = [u64; 5];

/// The slot of one command. Its number is the low part of the command identifier. The high part is
/// a sequence number, by which a completion of an earlier command in the slot is recognised.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Slot {
    /// The command. Its identifier may be an earlier one, see [`command`](Self::command).
    pub kept: Kept,
    pub tag: u64,
    /// The I/O, if this command is all of it; else `Op::Flush`, which holds nothing.
    pub io: Op,
    /// Time at which the command is overdue, in milliseconds of the queue's clock; 0 if it is not
    /// set yet.
    pub deadline_ms: u64,
    pub started_ns: u64,
    /// The submission queue and, above it, the command identifier that the completion must name.
    ticket: u32,
    /// The split I/O that this command is a part of.
    pub split: u32,
    /// The number of the namespace that the command is for, see `handles`.
    pub namespace: u32,
    next_free: u16,
    pub state: SlotState,
    pub retries: u8,
}

/// A slot has two cache lines.
const _: () = assert!(size_of::<Slot>() <= 128);

impl Slot {
    /// Command identifier.
    #[inline]
    pub fn cid(&self) -> u16 {
        (self.ticket >> 16) as u16
    }

    /// Whether the controller has a command of this slot.
    pub fn is_sent(&self) -> bool {
        matches!(self.state, SlotState::InFlight | SlotState::Overdue)
    }

    /// Whether a completion names this command's submission queue and identifier.
    #[inline]
    pub fn is_named_by(&self, completion: &Completion) -> bool {
        self.ticket == ticket(completion.sq_id, completion.cid)
    }

    /// Puts a command that is all of an I/O in flight. `words` contain the slot's identifier.
    #[inline]
    pub fn begin(&mut self, words: [u64; 8], namespace: u32, tag: u64, io: Op) {
        self.kept = [words[0], words[3], words[4], words[5], words[6]];
        self.namespace = namespace;
        self.tag = tag;
        // The replaced value holds nothing that must be dropped.
        std::mem::forget(std::mem::replace(&mut self.io, io));
        self.deadline_ms = 0;
        self.state = SlotState::InFlight;
        self.retries = 0;
    }

    /// Puts a command in flight under the slot's identifier, and returns it with that identifier.
    pub fn put_in_flight(&mut self, mut command: Command) -> Command {
        command.cid = self.cid();
        let [head, reserved, metadata, prp1, prp2, lba, cdw12, cdw14] = command.words();
        assert!(
            reserved | metadata | cdw14 == 0,
            "an I/O command with words that are not kept"
        );
        self.kept = [head, prp1, prp2, lba, cdw12];
        self.state = SlotState::InFlight;
        self.deadline_ms = 0;
        command
    }

    /// Returns the command that was recorded last.
    pub fn command(&self) -> Command {
        let [head, prp1, prp2, lba, cdw12] = self.kept;
        Command::from_words([head, 0, 0, prp1, prp2, lba, cdw12, 0])
    }

    /// Returns the size of the blocks of the command, which is all of `io`.
    pub fn block_size(&self, io: &Op) -> u32 {
        // The command counts its blocks from 0.
        let blocks = u64::from(self.command().cdw12 & 0xffff) + 1;
        u32::try_from(io.len_bytes(1) / blocks).unwrap_or(0)
    }

    /// Returns the command in words.
    pub fn in_words(&self, qid: u16) -> String {
        let command = self.command();
        let command = decode::io_command(qid, &command);
        match self.retries {
            0 | NO_RETRY => command.to_string(),
            retries => format!("{command} (sent again {retries} times)"),
        }
    }
}

#[inline]
fn ticket(qid: u16, cid: u16) -> u32 {
    u32::from(qid) | u32::from(cid) << 16
}

/// All slots of a queue pair. A free slot belongs to no split I/O, and its own I/O holds no buffer.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    first_free: u16,
    in_use: u16,
    /// The bits of an identifier that hold the slot's number. The sequence number is above them.
    number_mask: u16,
    /// The amount by which a ticket grows with each command.
    step: u32,
}

impl Slots {
    /// Makes `depth` (at most 4095) slots for the commands of queue `qid`.
    pub fn new(qid: u16, depth: u16) -> Slots {
        let number_bits = u32::from(depth.max(2) - 1).ilog2() + 1;
        let slots = (0..depth).map(|n| Slot {
            kept: [0; 5],
            tag: 0,
            io: Op::Flush,
            deadline_ms: 0,
            started_ns: 0,
            ticket: ticket(qid, n),
            split: WHOLE,
            namespace: 0,
            next_free: if n + 1 == depth { NONE } else { n + 1 },
            state: SlotState::Free,
            retries: 0,
        });
        Slots {
            slots: slots.collect(),
            first_free: if depth == 0 { NONE } else { 0 },
            in_use: 0,
            number_mask: (1 << number_bits) - 1,
            step: 1 << (16 + number_bits),
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Number of slots that are not free.
    pub fn in_use(&self) -> usize {
        usize::from(self.in_use)
    }

    /// The slot that `take` will return next.
    #[inline]
    pub fn next(&self) -> Option<u16> {
        (self.first_free != NONE).then_some(self.first_free)
    }

    pub fn numbers(&self) -> std::ops::Range<u16> {
        0..u16::try_from(self.slots.len()).expect("at most 4095 slots")
    }

    /// Takes a free slot, if there is one, and returns it with its number. Its state is still
    /// `Free`.
    #[inline]
    pub fn take(&mut self) -> Option<(u16, &mut Slot)> {
        let number = self.first_free;
        let slot = self.slots.get_mut(usize::from(number))?;
        self.first_free = slot.next_free;
        self.in_use += 1;
        Some((number, slot))
    }

    /// Returns the slot of the command in flight that a completion names, if there is one.
    #[inline]
    pub fn named_by(&self, completion: &Completion) -> Option<u16> {
        let number = completion.cid & self.number_mask;
        let slot = self.slots.get(usize::from(number))?;
        (slot.is_named_by(completion) && slot.is_sent()).then_some(number)
    }

    /// Handles the plain case of a completion: if it names a command in flight that is not overdue
    /// and is all of its I/O, hands the I/O back as done and frees the slot. `done` has room.
    #[inline]
    pub fn finish_plain(&mut self, completion: &Completion, done: &mut Vec<IoCompletion>) -> bool {
        let number = completion.cid & self.number_mask;
        let Some(slot) = self.slots.get_mut(usize::from(number)) else {
            return false;
        };
        if !slot.is_named_by(completion) || slot.state != SlotState::InFlight || slot.split != WHOLE
        {
            return false;
        }
        slot.release(self.step);
        slot.next_free = self.first_free;
        self.first_free = number;
        self.in_use -= 1;
        done.push(IoCompletion {
            tag: slot.tag,
            op: std::mem::replace(&mut slot.io, Op::Flush),
            result: Ok(()),
        });
        true
    }

    /// Frees a slot. The next command in it gets another identifier.
    pub fn give(&mut self, number: u16) {
        let slot = &mut self.slots[usize::from(number)];
        slot.release(self.step);
        slot.split = WHOLE;
        slot.io = Op::Flush;
        slot.next_free = self.first_free;
        self.first_free = number;
        self.in_use -= 1;
    }

    /// Gives a slot in use another identifier.
    pub fn rename(&mut self, number: u16) {
        self.slots[usize::from(number)].release(self.step);
    }

    /// Returns the I/Os of slots that are not used any longer.
    pub fn into_ios(self) -> Vec<Op> {
        self.slots.into_iter().map(|slot| slot.io).collect()
    }
}

impl Slot {
    /// Frees the slot and advances its sequence number. 0xffff is not a valid command identifier
    /// (Base section 3.3.3.1, "CID").
    #[inline]
    fn release(&mut self, step: u32) {
        self.state = SlotState::Free;
        let next = self.ticket.wrapping_add(step);
        self.ticket = if next >= 0xffff_0000 {
            next.wrapping_add(step)
        } else {
            next
        };
    }
}

impl Index<u16> for Slots {
    type Output = Slot;

    #[inline]
    fn index(&self, number: u16) -> &Slot {
        &self.slots[usize::from(number)]
    }
}

impl IndexMut<u16> for Slots {
    #[inline]
    fn index_mut(&mut self, number: u16) -> &mut Slot {
        &mut self.slots[usize::from(number)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{IoFlags, IoOpcode};

    fn completion(cid: u16) -> Completion {
        Completion {
            sq_id: 3,
            cid,
            ..Completion::default()
        }
    }

    fn begin(slots: &mut Slots, tag: u64) -> (u16, u16) {
        let (number, slot) = slots.take().unwrap();
        let cid = slot.cid();
        slot.begin([0; 8], 0, tag, Op::Flush);
        (number, cid)
    }

    #[test]
    fn every_slot_once_and_the_last_given_first() {
        for depth in [1, 2, 31, 4095] {
            let mut slots = Slots::new(3, depth);
            let mut numbers: Vec<u16> = (0..depth).map(|_| begin(&mut slots, 0).0).collect();
            assert!(slots.take().is_none() && slots.next().is_none());
            assert_eq!(slots.in_use(), usize::from(depth));
            slots.give(depth - 1);
            assert_eq!(slots.next(), Some(depth - 1));
            numbers.sort_unstable();
            assert!(numbers.into_iter().eq(0..depth));
        }
        assert!(Slots::new(0, 0).take().is_none() && Slots::new(0, 0).next().is_none());
    }

    #[test]
    fn an_identifier_is_known_while_in_flight_and_not_again() {
        for depth in [1, 2, 31, 4095] {
            let mut slots = Slots::new(3, depth);
            let mut last = None;
            for tag in 0..if cfg!(miri) { 300 } else { 70_000 } {
                let (number, cid) = begin(&mut slots, tag);
                assert_ne!(cid, u16::MAX);
                assert_ne!(last, Some(cid));
                assert_eq!(slots.named_by(&completion(cid)), Some(number));
                let mut done = Vec::with_capacity(1);
                let other_queue = Completion {
                    sq_id: 4,
                    ..completion(cid)
                };
                assert!(!slots.finish_plain(&other_queue, &mut done));
                assert!(slots.finish_plain(&completion(cid), &mut done));
                assert_eq!(done[0].tag, tag);
                assert!(!slots.finish_plain(&completion(cid), &mut done));
                assert_eq!(slots.named_by(&completion(cid)), None);
                last = Some(cid);
            }
            assert_eq!(slots.in_use(), 0);
        }
    }

    #[test]
    fn what_is_not_plain_is_not_finished() {
        let mut slots = Slots::new(3, 4);
        let (number, cid) = begin(&mut slots, 0);
        let mut done = Vec::with_capacity(1);
        for (state, split) in [
            (SlotState::Overdue, WHOLE),
            (SlotState::Retrying, WHOLE),
            (SlotState::Free, WHOLE),
            (SlotState::InFlight, 0),
        ] {
            (slots[number].state, slots[number].split) = (state, split);
            assert!(!slots.finish_plain(&completion(cid), &mut done));
            let is_sent = matches!(state, SlotState::InFlight | SlotState::Overdue);
            assert_eq!(slots.named_by(&completion(cid)).is_some(), is_sent);
        }
        slots.rename(number);
        (slots[number].state, slots[number].split) = (SlotState::InFlight, WHOLE);
        assert!(!slots.finish_plain(&completion(cid), &mut done));
        assert!(done.is_empty());
    }

    #[test]
    fn a_command_is_kept_as_it_is() {
        let mut slots = Slots::new(3, 4);
        let (_, slot) = slots.take().unwrap();
        // It is sent again, and has as much time as before.
        (slot.state, slot.deadline_ms) = (SlotState::Retrying, 5);
        let mut command = Command::blocks_io(IoOpcode::WRITE, 9, 1 << 40, 8, IoFlags::fua(true));
        (command.prp1, command.prp2, command.cdw13) = (0x1000, 0x2000, 7);
        let sent = slot.put_in_flight(command);
        assert_eq!((slot.state, slot.deadline_ms), (SlotState::InFlight, 0));
        assert_eq!(sent.cid, slot.cid());
        assert_eq!(slot.command().words(), sent.words());
    }
}
