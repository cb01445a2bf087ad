//! The writer: files in memory, batches on their way, write-behind, checkpoints. Every method that can be
//! refused returns whether it did something; what the rules forbid is refused here, and nowhere else.
//!
//! | room | holds |
//! | --- | --- |
//! | `file.rs` | a file's bytes, and which of them are in place |
//! | `space.rs` | free clusters and pages, and those that a batch releases |
//! | `ring.rs` | the batches, and the pages as of the newest one |
//! | `sync.rs` | the batch of a sync, while it is put together |
//! | `checkpoint.rs` | the checkpoint under way, and the pages in place |

mod checkpoint;
mod file;
mod ring;
mod space;
mod sync;

use crate::device::{BB, CB, Device, FC, Kind, Op, Owner, PAGES};
use crate::format::{Head, Meta, Page, Record, Verdict};
use crate::oracle::{Ack, Oracle};
use crate::rules::{Failed, Over, Release, Rules, Whole};
use checkpoint::Checkpoints;
use file::{MemFile, to_flush};
use ring::{BatchRing, Draft, RingBatch, Written};
use space::{FreeSpace, Held};
use sync::SyncBatch;

#[derive(Clone, Debug)]
pub struct Writer {
    files: Vec<Option<MemFile>>,
    ring: BatchRing,
    space: FreeSpace,
    checkpoints: Checkpoints,
    next_generation: u32,
    next_byte: u16,
}

impl Writer {
    /// After a mount: memory is what recovery has found.
    pub fn new(dev: &Device, verdict: &Verdict, head: Head, slot: usize, bytes: u16) -> Writer {
        let pages: Vec<Page> = verdict
            .pages
            .iter()
            .map(|p| p.clone().unwrap_or(None))
            .collect();
        let files: Vec<Option<MemFile>> = pages
            .iter()
            .map(|page| page.as_ref().map(|meta| MemFile::found(dev, meta)))
            .collect();
        let generations = files.iter().flatten().map(|f| f.generation + 1);
        Writer {
            // Never one that a lost batch has used.
            next_generation: generations.max().unwrap_or(1).max(bytes.into()),
            next_byte: bytes,
            space: FreeSpace::around(&files),
            files,
            ring: BatchRing::behind(head, pages.clone()),
            checkpoints: Checkpoints::new(pages, head, slot),
        }
    }

    pub fn next_byte(&self) -> u16 {
        self.next_byte
    }

    /// Whether nothing is written any longer.
    pub fn halted(&self) -> bool {
        self.ring.halted
    }

    /// Times round the ring.
    pub fn laps(&self) -> u64 {
        self.ring.laps
    }

    /// Nothing on its way, nothing unsynced, nothing owed.
    pub fn idle(&self, rules: &Rules) -> bool {
        let placed = |f: &MemFile| !rules.unload_places_owed || f.is_placed();
        self.checkpoints.upto().is_none()
            && self.ring.idle(&self.files, rules)
            && self
                .files
                .iter()
                .flatten()
                .all(|f| f.is_synced() && placed(f))
    }

    pub fn pages(&self) -> &[Page] {
        self.ring.pages()
    }

    fn fresh_byte(&mut self) -> u16 {
        self.next_byte += 1;
        self.next_byte
    }

    // ---- what the application does -------------------------------------------------------------

    pub fn create(&mut self, dev: &mut Device, o: &mut Oracle, r: &Rules, name: u8) -> bool {
        if self.files.iter().flatten().any(|f| f.name == name) {
            return false;
        }
        let free = |id: &usize| self.space.is_free(*id) && self.files[*id].is_none();
        let Some(id) = (0..PAGES).find(free) else {
            return false;
        };
        if !self.ring.room(1, r) {
            return false;
        }
        let generation = self.next_generation;
        self.next_generation += 1;
        self.space.take_id(id);
        let meta = Meta {
            generation,
            name,
            len: 0,
            map: [None; FC],
        };
        let records = vec![Record::Page {
            id,
            page: Some(meta),
            whole: self.needs_whole(id, r),
        }];
        self.files[id] = Some(MemFile::new(generation, name));
        let draft = Draft {
            acks: vec![Ack::Name(o.create(generation, name))],
            unlock: vec![generation],
            ..Draft::of(records)
        };
        self.compose(dev, r, draft);
        true
    }

    /// Appends `n` bytes, or a gap of `n` zeroes.
    pub fn append(&mut self, o: &mut Oracle, id: usize, n: usize, gap: bool) -> bool {
        let Some(file) = &mut self.files[id] else {
            return false;
        };
        let len = file.mem.len() + n;
        if file.locked || len > FC * CB * BB {
            return false;
        }
        for place in &mut file.map[..len.div_ceil(CB * BB)] {
            if place.is_none() {
                let Some(cluster) = self.space.take_cluster() else {
                    return false;
                };
                *place = Some(cluster);
            }
        }
        for _ in 0..n {
            let byte = if gap { 0 } else { self.fresh_byte() };
            self.files[id].as_mut().expect("it is there").push(byte);
        }
        let file = self.files[id].as_ref().expect("it is there");
        o.version(file.generation, &file.mem);
        true
    }

    pub fn overwrite(&mut self, o: &mut Oracle, id: usize, at: usize) -> bool {
        if self.files[id]
            .as_ref()
            .is_none_or(|f| f.locked || at >= f.mem.len())
        {
            return false;
        }
        let byte = self.fresh_byte();
        let file = self.files[id].as_mut().expect("it is there");
        file.overwrite(at, byte);
        o.version(file.generation, &file.mem);
        true
    }

    /// A sync of these files in one batch. `carry`: the bytes in the batch, else in parallel with it.
    pub fn sync(
        &mut self,
        dev: &mut Device,
        o: &mut Oracle,
        r: &Rules,
        ids: &[usize],
        carry: bool,
    ) -> bool {
        let mut sync = SyncBatch::default();
        for &id in ids {
            let Some(file) = &self.files[id] else {
                return false;
            };
            let page = self.pages()[id].as_ref().expect("an open file has a page");
            let whole = self.needs_whole(id, r);
            if !sync.add(r, id, file, page, whole, carry) {
                return false;
            }
            let ack = Ack::Sync(file.generation, o.newest(file.generation));
            sync.draft.acks.push(ack);
        }
        let forbidden = |(id, block): &(usize, usize)| !self.may_write(dev, r, *id, *block);
        if sync.blocks.iter().any(forbidden) || !self.ring.room(sync.draft.blocks(), r) {
            return false;
        }
        for &id in ids {
            self.files[id].as_mut().expect("it is there").synced();
        }
        let mut draft = sync.draft;
        for (id, block) in sync.blocks {
            let file = self.files[id].as_ref().expect("it is there");
            draft.data.push(file.block_write(block));
        }
        self.compose(dev, r, draft);
        true
    }

    pub fn truncate(
        &mut self,
        dev: &mut Device,
        o: &mut Oracle,
        r: &Rules,
        id: usize,
        len: usize,
    ) -> bool {
        let whole = self.needs_whole(id, r);
        let Some(file) = &mut self.files[id] else {
            return false;
        };
        if file.locked || len >= file.mem.len() || !self.ring.room(1, r) {
            return false;
        }
        let freed = file.truncate(len);
        file.locked = r.release != Release::AtOnce;
        let generation = file.generation;
        let mut page = self.ring.pages()[id].clone();
        let meta = page.as_mut().expect("an open file has a page");
        (meta.len, meta.map) = (file.jlen, file.map);
        let ack = o.truncate(generation, &file.mem);
        let draft = Draft {
            acks: vec![ack],
            unlock: vec![generation],
            held: freed.into_iter().map(Held::Cluster).collect(),
            ..Draft::of(vec![
                Record::Page { id, page, whole },
                Record::Cut {
                    id,
                    generation,
                    from: len,
                },
            ])
        };
        self.compose(dev, r, draft);
        true
    }

    /// Deletes a file; or renames `id` over `over`, which is deleted in the same batch.
    pub fn unlink(
        &mut self,
        dev: &mut Device,
        o: &mut Oracle,
        r: &Rules,
        id: usize,
        by: Option<usize>,
    ) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        if file.locked || !self.ring.room(2, r) {
            return false;
        }
        let mut draft = Draft::default();
        if let Some(by) = by {
            let name = file.name;
            if by == id || self.files[by].as_ref().is_none_or(|f| f.locked) {
                return false;
            }
            let mut page = self.pages()[by].clone();
            page.as_mut().expect("an open file has a page").name = name;
            draft.records.push(Record::Page {
                id: by,
                page,
                whole: self.needs_whole(by, r),
            });
            let other = self.files[by].as_mut().expect("checked");
            (other.name, other.locked) = (name, true);
            draft.unlock.push(other.generation);
        }
        let file = self.files[id].take().expect("checked");
        draft.records.push(Record::Page {
            id,
            page: None,
            whole: self.needs_whole(id, r),
        });
        draft.records.push(Record::Cut {
            id,
            generation: file.generation,
            from: 0,
        });
        draft.held = file.clusters().map(Held::Cluster).collect();
        draft.held.push(Held::Id(id));
        let op = o.unlink(
            file.generation,
            by.map(|by| self.files[by].as_ref().expect("checked").generation),
        );
        draft.acks.push(Ack::Name(op));
        self.compose(dev, r, draft);
        true
    }

    // ---- what happens in the background --------------------------------------------------------

    /// Sends a block of a file to its place.
    pub fn write_behind(&mut self, dev: &mut Device, r: &Rules, id: usize, block: usize) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        if !file.has_unplaced(block) || !self.may_write(dev, r, id, block) {
            return false;
        }
        let (write, places) = file.block_write(block);
        dev.write(vec![write], false, Owner::Behind, places);
        true
    }

    pub fn flush(&mut self, dev: &mut Device) -> bool {
        if dev.kind == Kind::NoCache || dev.flying.iter().any(|op| op.flush.is_some()) {
            return false;
        }
        dev.flush(Owner::Behind, to_flush(&self.files));
        true
    }

    /// An empty batch, whose `upto` becomes durable with it.
    pub fn marker(&mut self, dev: &mut Device, r: &Rules) -> bool {
        if !self.ring.has_unknown() || !self.ring.room(1, r) {
            return false;
        }
        self.compose(dev, r, Draft::default());
        true
    }

    /// Makes carried bytes void that were overwritten in memory.
    pub fn revoke(&mut self, dev: &mut Device, r: &Rules, id: usize) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        let generation = file.generation;
        let records: Vec<Record> = (0..file.mem.len())
            .filter(|&at| {
                let in_place = file.was_durable(at) || r.over == Over::NotOwed;
                let carried = self.ring.carried(generation, at);
                carried.is_some_and(|byte| byte != file.mem[at]) && in_place
            })
            .map(|at| Record::Revoke { id, generation, at })
            .collect();
        if file.locked || records.is_empty() || !self.ring.room(1, r) {
            return false;
        }
        self.compose(dev, r, Draft::of(records));
        true
    }

    /// Carries bytes again that are not in place, so that the ring can advance although they cannot be
    /// written where they belong.
    pub fn carry_again(&mut self, dev: &mut Device, r: &Rules, id: usize) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        let generation = file.generation;
        let records: Vec<Record> = (0..file.jlen)
            .filter(|at| {
                file.needs_its_batch(*at)
                    && self.ring.carried(generation, *at) == Some(file.mem[*at])
            })
            .map(|at| Record::Carry {
                id,
                generation,
                at,
                byte: file.mem[at],
            })
            .collect();
        if file.locked || records.is_empty() || !self.ring.room(1, r) {
            return false;
        }
        self.compose(dev, r, Draft::of(records));
        true
    }

    /// Begins a checkpoint, which covers every batch composed so far, or goes on with it if it waits.
    pub fn begin_checkpoint(&mut self, dev: &mut Device, r: &Rules) -> bool {
        let upto = self.checkpoints.upto().unwrap_or_else(|| {
            if r.covers_composed {
                self.ring.newest()
            } else {
                // What can be covered at once.
                let last = self.ring.coverable(&self.files, r).last();
                last.map_or(0, RingBatch::seq)
            }
        });
        if self.checkpoints.upto().is_none() {
            if upto < self.ring.tail() {
                return false;
            }
            self.checkpoints.wait_for(upto);
        }
        if self.checkpoints.has_begun() {
            return false;
        }
        let turn = self.checkpoints.next_turn();
        let last = self
            .ring
            .coverable(&self.files, r)
            .find(|b| b.seq() == upto);
        let last = last.map(|b| (b.pages().to_vec(), self.ring.head_behind(b, turn)));
        let Some((durable, head)) = last else {
            return false;
        };
        let pages = if r.pages_as_of_durable {
            durable
        } else {
            self.pages().to_vec()
        };
        let all_there = self.checkpoints.begin(dev, upto, pages, head);
        if all_there || !r.pages_before_tail {
            self.pages_written(dev, r);
        }
        true
    }

    fn pages_written(&mut self, dev: &mut Device, r: &Rules) {
        if dev.kind != Kind::NoCache && r.pages_flushed {
            dev.flush(Owner::CheckFlush, to_flush(&self.files));
        } else {
            self.write_head(dev, r);
        }
    }

    fn write_head(&mut self, dev: &mut Device, r: &Rules) {
        self.checkpoints.write_head(dev);
        if !r.ring_free_after_tail {
            self.free_ring(self.checkpoints.upto());
        }
    }

    fn free_ring(&mut self, upto: Option<u32>) {
        if let Some(upto) = upto {
            self.ring.free_upto(upto);
            self.space.release_upto(upto);
        }
    }

    // ---- completions ---------------------------------------------------------------------------

    pub fn completed(&mut self, dev: &mut Device, o: &mut Oracle, r: &Rules, op: &Op) {
        let durable = op.flush.is_some() || op.fua || dev.kind == Kind::NoCache;
        let level = if durable { 2 } else { 1 };
        for &(generation, at, byte) in &op.places {
            let mut files = self.files.iter_mut().flatten();
            if let Some(file) = files.find(|f| f.generation == generation) {
                file.arrived(at, byte, level, op.flush.is_some());
            }
        }
        match op.owner {
            Owner::Batch(seq) => match self.ring.written(seq, dev.kind) {
                Written::InPart => return,
                Written::ToFlush => dev.flush(Owner::BatchFlush(seq), to_flush(&self.files)),
                Written::Durable => {}
            },
            Owner::BatchFlush(seq) => self.ring.flushed(seq),
            Owner::CheckPages => {
                if self.checkpoints.page_arrived() && r.pages_before_tail {
                    self.pages_written(dev, r);
                }
            }
            Owner::CheckFlush => self.write_head(dev, r),
            Owner::CheckHead if dev.kind == Kind::FlushOnly => {
                dev.flush(Owner::CheckHeadFlush, Vec::new());
            }
            Owner::CheckHead | Owner::CheckHeadFlush => {
                let upto = self.checkpoints.upto();
                if let Some(head) = self.checkpoints.end() {
                    self.free_ring(upto);
                    self.ring.learn(head.upto);
                }
            }
            Owner::Behind | Owner::Nobody => {}
        }
        self.settle(o, r);
    }

    /// Lets the write at `index` fail, although `landed` of its blocks have landed.
    pub fn fail(&mut self, dev: &mut Device, r: &Rules, index: usize, landed: &[bool]) -> bool {
        let Owner::Batch(seq) = dev.flying[index].owner else {
            return false;
        };
        let own = dev
            .flying
            .iter()
            .any(|op| op.owner == Owner::Batch(seq) && op.places.is_empty());
        if dev.flying[index].places.is_empty() || own {
            return false;
        }
        let mut keep = landed.iter();
        let writes = &mut dev.flying[index].writes;
        writes.retain(|_| *keep.next().unwrap_or(&false));
        dev.complete(index);
        let Some(failed) = self.ring.failed(seq) else {
            return false;
        };
        // Their syncs have failed; nothing more is asked of these files.
        for file in self.files.iter_mut().flatten() {
            file.locked |= failed.contains(&file.generation);
        }
        match r.failed {
            Failed::Ignored => self.ring.ignore(seq),
            Failed::Replaced if self.ring.is_last(seq) => self.replace_last(dev, &failed),
            Failed::Replaced => self.ring.halted = true,
        }
        true
    }

    /// Replaces the last batch by an empty one at its place. What was to be synced is unsynced again.
    fn replace_last(&mut self, dev: &mut Device, failed: &[u32]) {
        self.ring.replace_last(dev, self.checkpoints.in_place());
        for (file, page) in self.files.iter_mut().zip(self.ring.pages()) {
            if let Some(file) = file.as_mut().filter(|f| failed.contains(&f.generation)) {
                file.unsync(page.as_ref().map_or(0, |meta| meta.len));
            }
        }
    }

    /// Acknowledges what may be acknowledged.
    fn settle(&mut self, o: &mut Oracle, r: &Rules) {
        for settled in self.ring.settle() {
            settled.acks.into_iter().for_each(|ack| o.acked(ack));
            for file in self.files.iter_mut().flatten() {
                file.locked &= !settled.unlock.contains(&file.generation);
            }
            if r.release == Release::Durable {
                self.space.release_upto(settled.seq);
            }
        }
    }

    // ---- parts ---------------------------------------------------------------------------------

    /// Whether this block of the file may go to its place now.
    fn may_write(&self, dev: &Device, r: &Rules, id: usize, block: usize) -> bool {
        let file = self.files[id].as_ref().expect("checked");
        let Some((addr, _)) = file.locate(block * BB) else {
            return false;
        };
        if file.locked || (r.one_write_per_block && dev.busy(addr, r.no_retry_in_flight)) {
            return false;
        }
        (0..BB).all(|i| {
            let at = block * BB + i;
            let new = file.mem.get(at).copied().unwrap_or(0);
            let carried = self.ring.carried(file.generation, at);
            let over = at < file.mem.len() && carried.is_some_and(|byte| byte != new);
            let allowed = !over
                || match r.over {
                    Over::Free => true,
                    Over::NotOwed => file.was_durable(at),
                    Over::NotInRing => false,
                };
            let vouched = r.upto_before_overwriting && self.ring.vouches_for_another(addr, i, new);
            allowed && !vouched
        })
    }

    /// Whether the next change of a page has to be journaled as a whole.
    fn needs_whole(&self, id: usize, r: &Rules) -> bool {
        let base = match (r.whole, self.checkpoints.upto()) {
            (Whole::Never, _) => return false,
            (Whole::SinceBegun, Some(upto)) => upto,
            _ => self.ring.tail() - 1,
        };
        self.ring.is_whole_upto(id, base)
    }

    fn compose(&mut self, dev: &mut Device, r: &Rules, mut draft: Draft) {
        let held = std::mem::take(&mut draft.held);
        let seq = self.ring.append(dev, draft);
        self.space.hold(held, seq, r);
    }
}
