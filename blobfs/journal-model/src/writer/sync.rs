//! The batch of a sync, while it is put together.

use std::collections::BTreeSet;

use super::file::MemFile;
use super::ring::Draft;
use crate::device::BB;
use crate::format::{Meta, Record};
use crate::rules::Rules;

#[derive(Debug, Default)]
pub struct SyncBatch {
    pub draft: Draft,
    /// The blocks that go to their place in parallel with it: file, block of the file.
    pub blocks: BTreeSet<(usize, usize)>,
}

impl SyncBatch {
    /// Adds what is unsynced of a file whose page in the newest batch is `page`. Returns false if there is nothing.
    /// `whole`: the page has to be journaled as a whole.
    pub fn add(
        &mut self,
        r: &Rules,
        id: usize,
        file: &MemFile,
        page: &Meta,
        whole: bool,
        carry: bool,
    ) -> bool {
        let todo = file.unsynced();
        if file.locked || todo.is_empty() {
            return false;
        }
        self.draft.records.push(length(r, id, file, page, whole));
        for at in todo {
            if carry {
                self.carry(r, id, file, at);
            } else {
                self.write(r, id, file, at);
            }
        }
        true
    }

    /// Carries a byte that is not in place.
    fn carry(&mut self, r: &Rules, id: usize, file: &MemFile, at: usize) {
        if file.placed(at) < 2 && !is_assumed(r, file, at) {
            self.draft.records.push(Record::Carry {
                id,
                generation: file.generation,
                at,
                byte: file.mem[at],
            });
        }
    }

    /// Writes a byte that is not in place, or makes one durable, and vouches for it.
    fn write(&mut self, r: &Rules, id: usize, file: &MemFile, at: usize) {
        let placed = file.placed(at);
        self.draft.flush |= placed == 1 && r.earlier_writes_flushed;
        if placed == 0 && !is_assumed(r, file, at) {
            self.blocks.insert((id, at / BB));
        }
        let vouch = match placed {
            0 => true,
            1 => r.vouch_unflushed,
            _ => false,
        };
        if r.vouches && at >= file.jlen && vouch {
            let byte = file.mem[at];
            self.draft.records.push(Record::Vouch {
                id,
                from: at,
                bytes: vec![byte],
            });
            let (addr, in_block) = file.locate(at).expect("allocated");
            self.draft.vouched.push((addr, in_block, byte));
        }
    }
}

/// Whether the protocol takes this byte for a zero without writing it.
fn is_assumed(r: &Rules, file: &MemFile, at: usize) -> bool {
    file.mem[at] == 0 && !r.gaps_written
}

/// The record that gives a file the length that it has in memory.
fn length(r: &Rules, id: usize, file: &MemFile, page: &Meta, whole: bool) -> Record {
    let mut meta = page.clone();
    meta.len = file.mem.len();
    if r.allocation_in_batch {
        meta.map = file.map;
    }
    if whole || meta.map != page.map {
        return Record::Page {
            id,
            page: Some(meta),
            whole,
        };
    }
    Record::Len {
        id,
        generation: file.generation,
        len: meta.len,
    }
}
