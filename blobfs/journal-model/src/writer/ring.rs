//! The ring: batches on their way and batches that are still needed, and the pages as the newest one has them.

use std::collections::VecDeque;
use std::rc::Rc;

use super::file::{MemFile, Placing};
use super::space::Held;
use crate::device::{Cell, Device, Kind, Owner, PAGES, RING, RING0};
use crate::format::{Batch, Head, Page, Record, crc};
use crate::oracle::Ack;
use crate::rules::Rules;

/// The parts of a batch that is not sent yet.
#[derive(Debug, Default)]
pub struct Draft {
    pub records: Vec<Record>,
    /// The promises that its durability acknowledges.
    pub acks: Vec<Ack>,
    /// Blocks of files that are written in parallel with it.
    pub data: Vec<Placing>,
    /// A flush follows it.
    pub flush: bool,
    /// Bytes in place that it vouches for: block, byte in it, value.
    pub vouched: Vec<(usize, usize, u16)>,
    /// The files that are unlocked when it is durable.
    pub unlock: Vec<u32>,
    /// The clusters and pages that it releases.
    pub held: Vec<Held>,
}

impl Draft {
    /// A batch of these records and nothing else.
    pub fn of(records: Vec<Record>) -> Draft {
        Draft {
            records,
            ..Draft::default()
        }
    }

    /// The number of blocks that it takes in the ring.
    pub fn blocks(&self) -> usize {
        let big = |r: &&Record| matches!(r, Record::Page { whole: true, .. });
        1 + self.records.iter().filter(big).count()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum BatchState {
    Writing,
    Flushing,
    Durable,
    Failed,
}

/// A batch that is still in the ring.
#[derive(Clone, Debug)]
pub struct RingBatch {
    batch: Rc<Batch>,
    pos: usize,
    /// All pages as of this batch.
    after: Vec<Page>,
    state: BatchState,
    waiting: usize,
    flush: bool,
    acks: Vec<Ack>,
    done: bool,
    vouched: Vec<(usize, usize, u16)>,
    unlock: Vec<u32>,
}

impl RingBatch {
    pub fn seq(&self) -> u32 {
        self.batch.seq
    }

    /// All pages as of this batch.
    pub fn pages(&self) -> &[Page] {
        &self.after
    }
}

/// The state of a batch after the completion of one of its writes.
#[derive(PartialEq, Eq)]
pub enum Written {
    /// Other writes of the batch are on their way, or it is not waited for any longer.
    InPart,
    /// A flush makes it durable.
    ToFlush,
    /// It is durable.
    Durable,
}

/// A batch that has just become durable.
pub struct Settled {
    pub seq: u32,
    pub acks: Vec<Ack>,
    /// The files that it unlocks.
    pub unlock: Vec<u32>,
}

#[derive(Clone, Debug)]
pub struct BatchRing {
    batches: VecDeque<RingBatch>,
    /// The pages as of the newest batch.
    pages: Vec<Page>,
    /// The batch with the last whole image of each page.
    whole: Vec<u32>,
    pos: usize,
    seq: u32,
    pred: u64,
    epoch: u32,
    tail: u32,
    /// The greatest `upto` of a durable batch or header.
    known: u32,
    /// Nothing is written any longer.
    pub halted: bool,
    /// Times round the ring.
    pub laps: u64,
}

impl BatchRing {
    /// The empty ring behind this header.
    pub fn behind(head: Head, pages: Vec<Page>) -> BatchRing {
        BatchRing {
            batches: VecDeque::new(),
            pages,
            whole: vec![0; PAGES],
            pos: head.pos,
            seq: head.seq,
            pred: head.pred,
            epoch: head.epoch,
            tail: head.seq,
            known: head.upto,
            halted: false,
            laps: 0,
        }
    }

    /// The pages as of the newest batch.
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// The sequence of the newest batch.
    pub fn newest(&self) -> u32 {
        self.seq - 1
    }

    pub fn tail(&self) -> u32 {
        self.tail
    }

    /// Whether the newest image of this page is in a batch up to `base`, or in none.
    pub fn is_whole_upto(&self, id: usize, base: u32) -> bool {
        self.whole[id] <= base
    }

    /// Whether everything is done and, if the rules ask for it, nothing is owed.
    pub fn idle(&self, files: &[Option<MemFile>], r: &Rules) -> bool {
        let idle = |b: &RingBatch| b.done && !(r.unload_places_owed && self.owes(b, files, r));
        self.batches.iter().all(idle)
    }

    pub fn room(&self, blocks: usize, r: &Rules) -> bool {
        let used: usize = self.batches.iter().map(|b| b.batch.blocks).sum();
        let open = self.batches.iter().filter(|b| !b.done).count();
        // One block is left for a deletion.
        used + blocks + 2 <= RING && open < r.depth && !self.halted
    }

    /// Sends a batch, and returns its sequence.
    pub fn append(&mut self, dev: &mut Device, draft: Draft) -> u32 {
        let seq = self.seq;
        for record in &draft.records {
            match record {
                Record::Page { id, page, whole } => {
                    self.pages[*id] = page.clone();
                    if *whole {
                        self.whole[*id] = seq;
                    }
                }
                Record::Len { id, len, .. } => self.pages[*id].as_mut().expect("a page").len = *len,
                _ => {}
            }
        }
        let batch = Rc::new(Batch {
            epoch: self.epoch,
            seq,
            pred: self.pred,
            upto: seq - 1,
            blocks: draft.blocks(),
            records: draft.records,
        });
        let waiting = 1 + draft.data.len();
        let own = Owner::Batch(seq);
        dev.write(batch_cells(&batch, self.pos), true, own.clone(), Vec::new());
        for (write, places) in draft.data {
            dev.write(vec![write], true, own.clone(), places);
        }
        let pos = self.pos;
        self.pos = (pos + batch.blocks) % RING;
        self.laps += u64::from(self.pos < pos);
        self.pred = crc(&batch);
        self.seq += 1;
        self.batches.push_back(RingBatch {
            after: self.pages.clone(),
            batch,
            pos,
            state: BatchState::Writing,
            waiting,
            flush: draft.flush,
            acks: draft.acks,
            done: false,
            vouched: draft.vouched,
            unlock: draft.unlock,
        });
        seq
    }

    fn find(&mut self, seq: u32) -> Option<&mut RingBatch> {
        self.batches.iter_mut().find(|b| b.batch.seq == seq)
    }

    /// A write of the batch `seq` has completed.
    pub fn written(&mut self, seq: u32, kind: Kind) -> Written {
        let Some(b) = self.find(seq) else {
            return Written::InPart;
        };
        b.waiting -= 1;
        if b.waiting > 0 || b.state != BatchState::Writing {
            return Written::InPart;
        }
        if kind == Kind::FlushOnly || (b.flush && kind != Kind::NoCache) {
            b.state = BatchState::Flushing;
            Written::ToFlush
        } else {
            b.state = BatchState::Durable;
            Written::Durable
        }
    }

    /// The flush behind the batch `seq` has completed.
    pub fn flushed(&mut self, seq: u32) {
        if let Some(b) = self.find(seq)
            && b.state == BatchState::Flushing
        {
            b.state = BatchState::Durable;
        }
    }

    /// A write of the batch `seq` has failed. Returns the files whose syncs have failed with it.
    pub fn failed(&mut self, seq: u32) -> Option<Vec<u32>> {
        let b = self.find(seq)?;
        b.waiting -= 1;
        b.state = BatchState::Failed;
        Some(b.acks.iter().filter_map(Ack::file).collect())
    }

    /// Counts the batch `seq`, which has failed, as done.
    pub fn ignore(&mut self, seq: u32) {
        if let Some(b) = self.find(seq) {
            b.done = true;
        }
    }

    pub fn is_last(&self, seq: u32) -> bool {
        self.batches.back().is_some_and(|b| b.batch.seq == seq)
    }

    /// Replaces the last batch, nothing of which has been acknowledged, by an empty one at its place.
    /// `in_place`: the pages before the first batch.
    pub fn replace_last(&mut self, dev: &mut Device, in_place: &[Page]) {
        let before = self.batches.len().checked_sub(2);
        let before = before.map(|i| self.batches[i].after.clone());
        self.pages = before.unwrap_or_else(|| in_place.to_vec());
        let b = self.batches.back_mut().expect("the caller has looked");
        for record in &b.batch.records {
            if let Record::Page { id, .. } = record {
                self.whole[*id] = 0;
            }
        }
        b.batch = Rc::new(Batch {
            records: Vec::new(),
            ..(*b.batch).clone()
        });
        b.after.clone_from(&self.pages);
        b.acks.clear();
        b.vouched.clear();
        b.state = BatchState::Writing;
        b.waiting += 1;
        self.pred = crc(&b.batch);
        let cells = batch_cells(&b.batch, b.pos);
        dev.write(cells, true, Owner::Batch(b.batch.seq), Vec::new());
    }

    /// Takes the batches that are durable, as are all before them.
    pub fn settle(&mut self) -> Vec<Settled> {
        let mut settled = Vec::new();
        if self.halted {
            return settled;
        }
        for b in self.batches.iter_mut().filter(|b| !b.done) {
            if b.state != BatchState::Durable {
                break;
            }
            b.done = true;
            self.known = self.known.max(b.batch.upto);
            settled.push(Settled {
                seq: b.batch.seq,
                acks: std::mem::take(&mut b.acks),
                unlock: std::mem::take(&mut b.unlock),
            });
        }
        settled
    }

    /// Whether a marker would make more known.
    pub fn has_unknown(&self) -> bool {
        self.known != self.durable_upto()
    }

    /// Returns the greatest sequence up to which everything is durable.
    fn durable_upto(&self) -> u32 {
        let durable = |b: &&RingBatch| b.done && b.state == BatchState::Durable;
        let done = self.batches.iter().take_while(durable);
        done.last().map_or(self.tail - 1, RingBatch::seq)
    }

    /// The batches at the tail that owe nothing.
    pub fn coverable(
        &self,
        files: &[Option<MemFile>],
        r: &Rules,
    ) -> impl Iterator<Item = &RingBatch> {
        let good = |b: &&RingBatch| b.done && !self.owes(b, files, r);
        self.batches.iter().take_while(good)
    }

    /// The header with which the ring begins behind this batch.
    pub fn head_behind(&self, last: &RingBatch, turn: u32) -> Head {
        Head {
            epoch: self.epoch,
            turn,
            pos: (last.pos + last.batch.blocks) % RING,
            seq: last.batch.seq + 1,
            pred: crc(&last.batch),
            upto: self.durable_upto(),
        }
    }

    /// Frees the ring up to the batch `upto`.
    pub fn free_upto(&mut self, upto: u32) {
        self.tail = upto + 1;
        self.batches.retain(|b| b.batch.seq > upto);
    }

    /// A durable header says that everything up to `upto` is durable.
    pub fn learn(&mut self, upto: u32) {
        self.known = self.known.max(upto);
    }

    /// Whether a batch that is not known to be durable vouches for another value of this byte.
    pub fn vouches_for_another(&self, addr: usize, at: usize, value: u16) -> bool {
        let other = |&(a, k, v): &(usize, usize, u16)| (a, k) == (addr, at) && v != value;
        let unknown = |b: &&RingBatch| b.batch.seq > self.known;
        let mut unknown = self.batches.iter().filter(unknown);
        unknown.any(|b| b.vouched.iter().any(other))
    }

    /// Returns the value that recovery would put at this byte, if a batch in the ring carries it.
    pub fn carried(&self, generation: u32, at: usize) -> Option<u16> {
        let mut found = None;
        for b in &self.batches {
            for record in &b.batch.records {
                match record {
                    Record::Carry {
                        generation: g,
                        at: a,
                        byte,
                        ..
                    } if (*g, *a) == (generation, at) => found = Some(*byte),
                    Record::Cut {
                        generation: g,
                        from,
                        ..
                    } if *g == generation && *from <= at => found = None,
                    Record::Revoke {
                        generation: g,
                        at: a,
                        ..
                    } if (*g, *a) == (generation, at) && b.done => found = None,
                    _ => {}
                }
            }
        }
        found
    }

    /// Whether a batch carries bytes that are nowhere else.
    fn owes(&self, b: &RingBatch, files: &[Option<MemFile>], r: &Rules) -> bool {
        let needed = 1;
        r.owed_pins_ring
            && b.batch.records.iter().any(|record| {
                let Record::Carry {
                    generation,
                    at,
                    byte,
                    ..
                } = record
                else {
                    return false;
                };
                let mut of_file = files.iter().flatten();
                let file = of_file.find(|f| f.generation == *generation);
                let placed = file.is_some_and(|f| f.has_placed(*at, *byte, needed));
                !placed && !self.is_void(b.batch.seq, *generation, *at)
            })
    }

    /// Whether a batch behind `seq` makes this carried byte void.
    fn is_void(&self, seq: u32, generation: u32, at: usize) -> bool {
        let later = |b: &&RingBatch| b.batch.seq > seq && b.done;
        let mut later = self.batches.iter().filter(later);
        later.any(|b| {
            b.batch.records.iter().any(|record| match record {
                Record::Carry {
                    generation: g,
                    at: a,
                    ..
                }
                | Record::Revoke {
                    generation: g,
                    at: a,
                    ..
                } => (*g, *a) == (generation, at),
                Record::Cut {
                    generation: g,
                    from,
                    ..
                } => *g == generation && *from <= at,
                _ => false,
            })
        })
    }
}

fn batch_cells(batch: &Rc<Batch>, pos: usize) -> Vec<(usize, Cell)> {
    (0..batch.blocks)
        .map(|i| (RING0 + (pos + i) % RING, Cell::Part(i, Rc::clone(batch))))
        .collect()
}
