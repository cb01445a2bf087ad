//! The slots of commands, and the way of a command from there to the submission queue.

use std::sync::Arc;

use pumice_io::{Op, SubmitError};

use super::data::{NotMapped, Pointer, PointerStyle, Segment, point_at, point_directly};
use super::handles::Handles;
use super::lists::Lists;
use super::observer::Observer;
use super::rings::Rings;
use super::slot::Slots;
use super::split::Split;
use crate::dma::AddressTable;
use crate::error::Cause;
use crate::namespace::Namespace;
use crate::spec::{BlocksIo, Command};

/// The slots, and what their commands are made with.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub slots: Slots,
    pub handles: Handles,
    pub lists: Lists,
    pub table: Arc<AddressTable>,
    pub style: PointerStyle,
    pub observer: Observer,
    /// Number of commands that were written to the submission queue.
    pub sent: u64,
}

impl Outgoing {
    /// Makes the data pointer of a plain command, if it needs no list.
    #[inline]
    pub fn point(&self, segment: Segment) -> Option<Pointer> {
        point_directly(&self.table, segment, self.style)
    }

    /// Makes a command's data pointer in the slot's list area.
    pub fn point_by_list(&self, slot: u16, segment: Segment) -> Result<Pointer, NotMapped> {
        let area = self.lists.area(slot);
        let mut command = Command::default();
        point_at(&mut command, &self.table, segment, self.style, &area)?;
        Ok(Pointer {
            words: [command.prp1, command.prp2],
            flags: command.flags,
        })
    }

    /// Takes a slot for an I/O of one command and writes the command to the submission queue.
    #[inline]
    pub fn enter(
        &mut self,
        rings: &mut Rings,
        ns: &Namespace,
        tag: u64,
        io: Op,
        entry: BlocksIo,
        pointer: Pointer,
    ) -> Result<(), SubmitError> {
        let Some((number, slot)) = self.slots.take() else {
            return Err(SubmitError::Busy(io));
        };
        let words = entry.words(slot.cid(), pointer.words, pointer.flags);
        slot.begin(words, self.handles.number(&ns.validity), tag, io);
        self.sent += 1;
        rings.push(words);
        if self.observer.wants_commands() {
            self.show(rings, number);
        }
        Ok(())
    }

    #[cold]
    fn show(&mut self, rings: &Rings, number: u16) {
        let slot = &mut self.slots[number];
        self.observer
            .sent(rings.link.name(), rings.shared.qid, number, slot);
    }

    /// Sends a flush.
    pub fn flush(
        &mut self,
        rings: &mut Rings,
        ns: &Namespace,
        tag: u64,
        io: Op,
    ) -> Result<(), SubmitError> {
        let Some((slot, entry)) = self.slots.take() else {
            return Err(SubmitError::Busy(io));
        };
        entry.namespace = self.handles.number(&ns.validity);
        entry.tag = tag;
        entry.io = io;
        entry.retries = 0;
        self.send(rings, slot, Command::flush(ns.limits.nsid));
        Ok(())
    }

    /// Writes a slot's command to the submission queue.
    pub fn send(&mut self, rings: &mut Rings, slot: u16, command: Command) {
        let entry = &mut self.slots[slot];
        let command = entry.put_in_flight(command);
        self.sent += 1;
        rings.push(command.words());
        if self.observer.wants_commands() {
            self.show(rings, slot);
        }
    }

    /// Whether the command of a slot may be sent again: its namespace is what it was.
    pub fn may_repeat(&self, rings: &Rings, slot: u16) -> bool {
        let namespace = self.slots[slot].namespace;
        self.handles.are_current(namespace, rings.link.number)
    }

    /// Sends commands of a split I/O, whose number is `index`, while there are slots. The first
    /// ones may have been sent long ago, when its namespace was another one or had another format.
    pub fn send_parts(&mut self, rings: &mut Rings, split: &mut Split, index: u32) {
        if !self.handles.are_current(split.namespace, rings.link.number) {
            return split.fail(rings.link.name(), Cause::Replaced, "");
        }
        while split.has_more()
            && let Some((slot, entry)) = self.slots.take()
        {
            entry.tag = split.tag;
            entry.namespace = split.namespace;
            entry.split = index;
            entry.retries = 0;
            let area = self.lists.area(slot);
            let Split {
                work, limits, io, ..
            } = split;
            match work.next_command(limits, io, &self.table, self.style, &area) {
                Ok(command) => {
                    split.outstanding += 1;
                    self.send(rings, slot, command);
                }
                Err(NotMapped) => {
                    split.fail(rings.link.name(), Cause::NotMapped, "");
                    self.slots.give(slot);
                }
            }
        }
    }
}
