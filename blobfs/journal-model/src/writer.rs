//! The writer: files in memory, batches on their way, write-behind, checkpoints. Every method that can be
//! refused returns whether it did something; what the rules forbid is refused here, and nowhere else.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::device::{
    BB, CB, CLUSTERS, Cell, Device, FC, HEADS, Kind, Op, Owner, PAGES, RING, RING0,
};
use crate::format::{Batch, Head, Meta, Page, Record, Verdict, byte_at, crc, locate, page_cells};
use crate::oracle::{Ack, Oracle};
use crate::rules::{Failed, Over, Release, Rules, Whole};

/// A block that goes to its place, and the bytes of a file that it puts there.
type Placing = ((usize, Cell), Vec<(u32, usize, u16)>);

#[derive(Clone, Debug)]
pub struct File {
    pub generation: u32,
    pub name: u8,
    pub mem: Vec<u16>,
    pub map: [Option<u8>; FC],
    /// The length that the newest batch gives it.
    pub jlen: usize,
    /// Per byte: 0 not in place, 1 in place but perhaps only in the cache, 2 durable in place.
    placed: Vec<u8>,
    /// The value of `placed` when the byte's synced value was overwritten.
    was_placed: Vec<u8>,
    /// Overwritten below `jlen` since the last sync.
    dirty: Vec<bool>,
    /// A truncation, deletion or rename is on its way.
    locked: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Writing,
    Flushing,
    Durable,
    Failed,
}

#[derive(Clone, Copy, Debug)]
enum Held {
    Cluster(u8),
    Id(usize),
}

/// A batch that is still in the ring.
#[derive(Clone, Debug)]
struct Info {
    batch: Rc<Batch>,
    pos: usize,
    /// All pages as of this batch.
    after: Vec<Page>,
    state: State,
    waiting: usize,
    flush: bool,
    acks: Vec<Ack>,
    done: bool,
    /// Bytes in place that it vouches for: block, byte in it, value.
    vouched: Vec<(usize, usize, u16)>,
    unlock: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Checkpoint {
    /// The batch up to which it covers everything.
    upto: u32,
    /// The pages are on their way; before, it waits for batches and owed bytes.
    begun: bool,
    pages: Vec<Page>,
    waiting: usize,
    head: Head,
}

#[derive(Clone, Debug)]
pub struct Writer {
    pub files: Vec<Option<File>>,
    pages: Vec<Page>,
    in_place: Vec<Page>,
    /// The batch with the last whole image of each page.
    whole: Vec<u32>,
    ring: VecDeque<Info>,
    pos: usize,
    seq: u32,
    pred: u64,
    epoch: u32,
    head: Head,
    slot: usize,
    tail: u32,
    held: Vec<(Held, u32)>,
    free: Vec<bool>,
    free_ids: Vec<bool>,
    checkpoint: Option<Checkpoint>,
    /// The greatest `upto` of a durable batch or header.
    known: u32,
    pub halted: bool,
    /// Times round the ring.
    pub laps: u64,
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
        let mut free = vec![true; CLUSTERS];
        let mut next_generation = 1;
        let mut files = Vec::new();
        for page in &pages {
            files.push(page.as_ref().map(|meta| {
                next_generation = next_generation.max(meta.generation + 1);
                meta.map
                    .iter()
                    .flatten()
                    .for_each(|c| free[usize::from(*c)] = false);
                let mem: Vec<u16> = (0..meta.len)
                    .map(|i| byte_at(dev, meta, i).unwrap_or(0))
                    .collect();
                File {
                    generation: meta.generation,
                    name: meta.name,
                    map: meta.map,
                    jlen: meta.len,
                    placed: vec![2; mem.len()],
                    was_placed: vec![0; mem.len()],
                    dirty: vec![false; mem.len()],
                    mem,
                    locked: false,
                }
            }));
        }
        Writer {
            free_ids: files.iter().map(Option::is_none).collect(),
            files,
            in_place: pages.clone(),
            pages,
            whole: vec![0; PAGES],
            ring: VecDeque::new(),
            pos: head.pos,
            seq: head.seq,
            pred: head.pred,
            epoch: head.epoch,
            head,
            slot,
            tail: head.seq,
            held: Vec::new(),
            free,
            checkpoint: None,
            known: head.upto,
            halted: false,
            laps: 0,
            // Never one that a lost batch has used.
            next_generation: next_generation.max(bytes.into()),
            next_byte: bytes,
        }
    }

    pub fn next_byte(&self) -> u16 {
        self.next_byte
    }

    /// Nothing on its way, nothing unsynced, nothing owed.
    pub fn idle(&self, rules: &Rules) -> bool {
        let placed = |f: &File| !rules.unload_places_owed || f.placed.iter().all(|p| *p == 2);
        self.checkpoint.is_none()
            && self
                .ring
                .iter()
                .all(|info| info.done && !(rules.unload_places_owed && self.owes(info, rules)))
            && self
                .files
                .iter()
                .flatten()
                .all(|f| f.jlen == f.mem.len() && !f.dirty.contains(&true) && placed(f))
    }

    pub fn pages(&self) -> &[Page] {
        &self.pages
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
        let Some(id) = (0..PAGES).find(|id| self.free_ids[*id] && self.files[*id].is_none()) else {
            return false;
        };
        let generation = self.next_generation;
        let meta = Meta {
            generation,
            name,
            len: 0,
            map: [None; FC],
        };
        if !self.room(1, r) {
            return false;
        }
        self.next_generation += 1;
        self.free_ids[id] = false;
        let whole = self.needs_whole(id, r);
        let records = vec![Record::Page {
            id,
            page: Some(meta),
            whole,
        }];
        self.files[id] = Some(File {
            generation,
            name,
            mem: Vec::new(),
            map: [None; FC],
            jlen: 0,
            placed: Vec::new(),
            was_placed: Vec::new(),
            dirty: Vec::new(),
            locked: true,
        });
        let op = o.create(generation, name);
        self.compose(
            dev,
            r,
            records,
            vec![Ack::Name(op)],
            Vec::new(),
            false,
            Vec::new(),
            vec![generation],
            Vec::new(),
        );
        true
    }

    /// Appends `n` bytes, or a gap of `n` zeroes.
    pub fn append(&mut self, o: &mut Oracle, id: usize, n: usize, gap: bool) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        let len = file.mem.len() + n;
        if file.locked || len > FC * CB * BB {
            return false;
        }
        for i in 0..len.div_ceil(CB * BB) {
            if self.files[id].as_ref().is_some_and(|f| f.map[i].is_none()) {
                let usable = |c: &usize| self.free[*c];
                let Some(cluster) = (0..CLUSTERS).find(usable) else {
                    return false;
                };
                self.free[cluster] = false;
                let file = self.files[id].as_mut().expect("it is there");
                file.map[i] = Some(u8::try_from(cluster).expect("few"));
            }
        }
        for _ in 0..n {
            let byte = if gap { 0 } else { self.fresh_byte() };
            let file = self.files[id].as_mut().expect("it is there");
            file.mem.push(byte);
            file.placed.push(0);
            file.was_placed.push(0);
            file.dirty.push(false);
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
        file.mem[at] = byte;
        if !file.dirty[at] {
            file.was_placed[at] = file.placed[at];
        }
        file.dirty[at] = at < file.jlen;
        file.placed[at] = 0;
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
        let mut records = Vec::new();
        let mut acks = Vec::new();
        let mut data: Vec<(usize, usize)> = Vec::new();
        let mut vouched = Vec::new();
        let mut flush = false;
        let mut lens = Vec::new();
        for &id in ids {
            let Some(file) = &self.files[id] else {
                return false;
            };
            let unsynced = |i: &usize| *i >= file.jlen || file.dirty[*i];
            let todo: Vec<usize> = (0..file.mem.len()).filter(unsynced).collect();
            if file.locked || todo.is_empty() {
                return false;
            }
            let mut meta = self.pages[id].clone().expect("an open file has a page");
            let old = meta.clone();
            meta.len = file.mem.len();
            if r.allocation_in_batch {
                meta.map = file.map;
            }
            if self.needs_whole(id, r) {
                records.push(Record::Page {
                    id,
                    page: Some(meta),
                    whole: true,
                });
            } else if meta.map != old.map {
                records.push(Record::Page {
                    id,
                    page: Some(meta),
                    whole: false,
                });
            } else {
                records.push(Record::Len {
                    id,
                    generation: file.generation,
                    len: meta.len,
                });
            }
            let real = Meta {
                generation: file.generation,
                name: file.name,
                len: file.mem.len(),
                map: file.map,
            };
            for i in todo {
                let (addr, at) = locate(&real, i).expect("allocated");
                let assumed_zero = file.mem[i] == 0 && !r.gaps_written;
                if carry {
                    if file.placed[i] < 2 && !assumed_zero {
                        let (generation, byte) = (file.generation, file.mem[i]);
                        records.push(Record::Carry {
                            id,
                            generation,
                            at: i,
                            byte,
                        });
                    }
                    continue;
                }
                flush |= file.placed[i] == 1 && r.earlier_writes_flushed;
                if file.placed[i] == 0 && !assumed_zero {
                    data.push((id, i / BB));
                }
                let vouch = r.vouches
                    && i >= file.jlen
                    && match file.placed[i] {
                        0 => true,
                        1 => r.vouch_unflushed,
                        _ => false,
                    };
                if vouch {
                    records.push(Record::Vouch {
                        id,
                        from: i,
                        bytes: vec![file.mem[i]],
                    });
                    vouched.push((addr, at, file.mem[i]));
                }
            }
            lens.push((id, file.mem.len()));
            acks.push(Ack::Sync(file.generation, o.newest(file.generation)));
        }
        data.sort_unstable();
        data.dedup();
        if data
            .iter()
            .any(|(id, block)| !self.may_write(dev, r, *id, *block))
        {
            return false;
        }
        if !self.room(Self::size(&records), r) {
            return false;
        }
        for (id, len) in lens {
            let file = self.files[id].as_mut().expect("it is there");
            file.jlen = len;
            file.dirty.fill(false);
        }
        let data = data
            .into_iter()
            .map(|(id, block)| self.block_write(id, block))
            .collect();
        self.compose(
            dev,
            r,
            records,
            acks,
            data,
            flush,
            vouched,
            Vec::new(),
            Vec::new(),
        );
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
        let Some(file) = &self.files[id] else {
            return false;
        };
        if file.locked || len >= file.mem.len() || !self.room(1, r) {
            return false;
        }
        let mut file = file.clone();
        let mut held = Vec::new();
        for i in len.div_ceil(CB * BB)..FC {
            held.extend(file.map[i].take().map(Held::Cluster));
        }
        file.mem.truncate(len);
        file.placed.truncate(len);
        file.was_placed.truncate(len);
        file.dirty.truncate(len);
        file.jlen = file.jlen.min(len);
        file.locked = r.release != Release::AtOnce;
        let generation = file.generation;
        let mut meta = self.pages[id].clone().expect("an open file has a page");
        (meta.len, meta.map) = (file.jlen, file.map);
        let whole = self.needs_whole(id, r);
        let records = vec![
            Record::Page {
                id,
                page: Some(meta),
                whole,
            },
            Record::Cut {
                id,
                generation,
                from: len,
            },
        ];
        let ack = o.truncate(generation, &file.mem);
        self.files[id] = Some(file);
        self.compose(
            dev,
            r,
            records,
            vec![ack],
            Vec::new(),
            false,
            Vec::new(),
            vec![generation],
            held,
        );
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
        if file.locked || !self.room(2, r) {
            return false;
        }
        let mut unlock = Vec::new();
        let mut records = Vec::new();
        if let Some(by) = by {
            let name = file.name;
            if by == id || self.files[by].as_ref().is_none_or(|f| f.locked) {
                return false;
            }
            let whole = self.needs_whole(by, r);
            let mut page = self.pages[by].clone();
            page.as_mut().expect("an open file has a page").name = name;
            records.push(Record::Page {
                id: by,
                page,
                whole,
            });
            let other = self.files[by].as_mut().expect("checked");
            (other.name, other.locked) = (name, true);
            unlock.push(other.generation);
        }
        let file = self.files[id].take().expect("checked");
        let whole = self.needs_whole(id, r);
        records.push(Record::Page {
            id,
            page: None,
            whole,
        });
        records.push(Record::Cut {
            id,
            generation: file.generation,
            from: 0,
        });
        let mut held: Vec<Held> = file
            .map
            .iter()
            .flatten()
            .map(|c| Held::Cluster(*c))
            .collect();
        held.push(Held::Id(id));
        let op = o.unlink(
            file.generation,
            by.map(|by| self.files[by].as_ref().expect("checked").generation),
        );
        self.compose(
            dev,
            r,
            records,
            vec![Ack::Name(op)],
            Vec::new(),
            false,
            Vec::new(),
            unlock,
            held,
        );
        true
    }

    // ---- what happens in the background --------------------------------------------------------

    /// Sends a block of a file to its place.
    pub fn write_behind(&mut self, dev: &mut Device, r: &Rules, id: usize, block: usize) -> bool {
        let Some(file) = &self.files[id] else {
            return false;
        };
        let mut range = block * BB..file.mem.len().min((block + 1) * BB);
        if !range.any(|i| file.placed[i] == 0) || !self.may_write(dev, r, id, block) {
            return false;
        }
        let (write, places) = self.block_write(id, block);
        dev.write(vec![write], false, Owner::Behind, places);
        true
    }

    pub fn flush(&mut self, dev: &mut Device) -> bool {
        if dev.kind == Kind::NoCache || dev.flying.iter().any(|op| op.flush.is_some()) {
            return false;
        }
        let places = self.to_flush();
        dev.flush(Owner::Behind, places);
        true
    }

    /// An empty batch, whose `upto` becomes durable with it.
    pub fn marker(&mut self, dev: &mut Device, r: &Rules) -> bool {
        if self.known == self.durable_upto() || !self.room(1, r) {
            return false;
        }
        self.compose(
            dev,
            r,
            Vec::new(),
            Vec::new(),
            Vec::new(),
            false,
            Vec::new(),
            Vec::new(),
            Vec::new(),
        );
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
                let in_place = file.was_placed[at] == 2 || r.over == Over::NotOwed;
                self.carried(generation, at)
                    .is_some_and(|byte| byte != file.mem[at])
                    && in_place
            })
            .map(|at| Record::Revoke { id, generation, at })
            .collect();
        if file.locked || records.is_empty() || !self.room(1, r) {
            return false;
        }
        self.compose(
            dev,
            r,
            records,
            Vec::new(),
            Vec::new(),
            false,
            Vec::new(),
            Vec::new(),
            Vec::new(),
        );
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
                !file.dirty[*at]
                    && file.placed[*at] < 2
                    && self.carried(generation, *at) == Some(file.mem[*at])
            })
            .map(|at| Record::Carry {
                id,
                generation,
                at,
                byte: file.mem[at],
            })
            .collect();
        if file.locked || records.is_empty() || !self.room(1, r) {
            return false;
        }
        self.compose(
            dev,
            r,
            records,
            Vec::new(),
            Vec::new(),
            false,
            Vec::new(),
            Vec::new(),
            Vec::new(),
        );
        true
    }

    /// Begins a checkpoint, which covers every batch composed so far, or goes on with it if it waits.
    pub fn begin_checkpoint(&mut self, dev: &mut Device, r: &Rules) -> bool {
        let good = self
            .ring
            .iter()
            .take_while(|info| info.done && !self.owes(info, r))
            .count();
        if self.checkpoint.is_none() {
            let upto = if r.covers_composed {
                self.seq - 1
            } else {
                // What can be covered at once.
                good.checked_sub(1).map_or(0, |i| self.ring[i].batch.seq)
            };
            if upto < self.tail {
                return false;
            }
            let head = self.head;
            self.checkpoint = Some(Checkpoint {
                upto,
                begun: false,
                pages: Vec::new(),
                waiting: 0,
                head,
            });
        }
        let c = self.checkpoint.as_ref().expect("it is there");
        let Some(n) = self.ring.iter().position(|info| info.batch.seq == c.upto) else {
            return false;
        };
        if c.begun || n >= good {
            return false;
        }
        let last = &self.ring[n];
        let upto = last.batch.seq;
        let pages = if r.pages_as_of_durable {
            last.after.clone()
        } else {
            self.pages.clone()
        };
        let head = Head {
            epoch: self.epoch,
            turn: self.head.turn + 1,
            pos: (last.pos + last.batch.blocks) % RING,
            seq: upto + 1,
            pred: crc(&last.batch),
            upto: self.durable_upto(),
        };
        let mut waiting = 0;
        for (id, page) in pages.iter().enumerate() {
            if *page != self.in_place[id] {
                dev.write(
                    page_cells(id, page).to_vec(),
                    false,
                    Owner::CheckPages,
                    Vec::new(),
                );
                waiting += 1;
            }
        }
        self.checkpoint = Some(Checkpoint {
            upto,
            begun: true,
            pages,
            waiting,
            head,
        });
        if waiting == 0 || !r.pages_before_tail {
            self.pages_written(dev, r);
        }
        true
    }

    fn pages_written(&mut self, dev: &mut Device, r: &Rules) {
        if dev.kind != Kind::NoCache && r.pages_flushed {
            let places = self.to_flush();
            dev.flush(Owner::CheckFlush, places);
        } else {
            self.write_head(dev, r);
        }
    }

    fn write_head(&mut self, dev: &mut Device, r: &Rules) {
        let head = self.checkpoint.as_ref().expect("under way").head;
        dev.write(
            vec![(HEADS + self.slot, Cell::Head(head))],
            true,
            Owner::CheckHead,
            Vec::new(),
        );
        if !r.ring_free_after_tail {
            self.free_ring();
        }
    }

    fn free_ring(&mut self) {
        let Some(c) = &self.checkpoint else { return };
        self.tail = c.upto + 1;
        let upto = c.upto;
        self.ring.retain(|info| info.batch.seq > upto);
        let now: Vec<_> = self
            .held
            .iter()
            .filter(|(_, seq)| *seq <= upto)
            .map(|(h, _)| *h)
            .collect();
        self.held.retain(|(_, seq)| *seq > upto);
        now.into_iter().for_each(|h| self.release(h));
    }

    fn end_checkpoint(&mut self) {
        self.free_ring();
        let c = self.checkpoint.take().expect("under way");
        self.in_place = c.pages;
        self.head = c.head;
        self.known = self.known.max(c.head.upto);
        self.slot = 1 - self.slot;
    }

    // ---- completions ---------------------------------------------------------------------------

    pub fn completed(&mut self, dev: &mut Device, o: &mut Oracle, r: &Rules, op: &Op) {
        let level = if op.flush.is_some() || op.fua || dev.kind == Kind::NoCache {
            2
        } else {
            1
        };
        for (generation, at, byte) in &op.places {
            let Some(file) = self
                .files
                .iter_mut()
                .flatten()
                .find(|f| f.generation == *generation)
            else {
                continue;
            };
            if file.mem.get(*at) == Some(byte) && (op.flush.is_none() || file.placed[*at] > 0) {
                file.placed[*at] = file.placed[*at].max(level);
            }
        }
        match op.owner {
            Owner::Batch(seq) => {
                let Some(info) = self.ring.iter_mut().find(|i| i.batch.seq == seq) else {
                    return;
                };
                info.waiting -= 1;
                if info.waiting > 0 || info.state != State::Writing {
                    return;
                }
                if dev.kind == Kind::FlushOnly || (info.flush && dev.kind != Kind::NoCache) {
                    info.state = State::Flushing;
                    let places = self.to_flush();
                    dev.flush(Owner::BatchFlush(seq), places);
                } else {
                    info.state = State::Durable;
                }
            }
            Owner::BatchFlush(seq) => {
                if let Some(info) = self.ring.iter_mut().find(|i| i.batch.seq == seq)
                    && info.state == State::Flushing
                {
                    info.state = State::Durable;
                }
            }
            Owner::CheckPages => {
                let c = self.checkpoint.as_mut().expect("under way");
                c.waiting -= 1;
                if c.waiting == 0 && r.pages_before_tail {
                    self.pages_written(dev, r);
                }
            }
            Owner::CheckFlush => self.write_head(dev, r),
            Owner::CheckHead if dev.kind == Kind::FlushOnly => {
                dev.flush(Owner::CheckHeadFlush, Vec::new());
            }
            Owner::CheckHead | Owner::CheckHeadFlush => {
                if self.checkpoint.as_ref().is_some_and(|c| c.waiting == 0) {
                    self.end_checkpoint();
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
        let mut op = dev.flying[index].clone();
        let mut keep = landed.iter();
        op.writes.retain(|_| *keep.next().unwrap_or(&false));
        dev.flying[index].writes = op.writes;
        dev.complete(index);
        let Some(info) = self.ring.iter_mut().find(|i| i.batch.seq == seq) else {
            return false;
        };
        info.waiting -= 1;
        info.state = State::Failed;
        // Their syncs have failed; nothing more is asked of these files.
        let failed: Vec<u32> = info.acks.iter().filter_map(Ack::file).collect();
        self.files
            .iter_mut()
            .flatten()
            .filter(|f| failed.contains(&f.generation))
            .for_each(|f| f.locked = true);
        match r.failed {
            Failed::Ignored => info.done = true,
            Failed::Replaced => {
                if self.ring.back().is_none_or(|last| last.batch.seq != seq) {
                    self.halted = true;
                    return true;
                }
                self.replace_last(dev, &failed);
            }
        }
        true
    }

    /// Replaces the last batch, nothing of which has been acknowledged, by an empty one at its place. What
    /// was to be synced is unsynced again.
    fn replace_last(&mut self, dev: &mut Device, failed: &[u32]) {
        let before = self
            .ring
            .len()
            .checked_sub(2)
            .map(|i| self.ring[i].after.clone());
        self.pages = before.unwrap_or_else(|| self.in_place.clone());
        let info = self.ring.back_mut().expect("the caller has looked");
        for record in &info.batch.records {
            if let Record::Page { id, .. } = record {
                self.whole[*id] = 0;
            }
        }
        info.batch = Rc::new(Batch {
            records: Vec::new(),
            ..(*info.batch).clone()
        });
        info.after.clone_from(&self.pages);
        info.acks.clear();
        info.vouched.clear();
        info.state = State::Writing;
        info.waiting += 1;
        self.pred = crc(&info.batch);
        let (batch, pos) = (Rc::clone(&info.batch), info.pos);
        dev.write(
            batch_cells(&batch, pos),
            true,
            Owner::Batch(batch.seq),
            Vec::new(),
        );
        for (file, page) in self.files.iter_mut().zip(&self.pages) {
            let Some(file) = file.as_mut().filter(|f| failed.contains(&f.generation)) else {
                continue;
            };
            file.jlen = page.as_ref().map_or(0, |meta| meta.len);
            file.locked = false;
            for i in 0..file.jlen {
                file.dirty[i] |= file.placed[i] < 2;
            }
        }
    }

    /// Acknowledges what may be acknowledged.
    fn settle(&mut self, o: &mut Oracle, r: &Rules) {
        if self.halted {
            return;
        }
        for i in 0..self.ring.len() {
            let info = &mut self.ring[i];
            if info.done {
                continue;
            }
            if info.state != State::Durable {
                break;
            }
            info.done = true;
            let (seq, upto) = (info.batch.seq, info.batch.upto);
            self.known = self.known.max(upto);
            info.acks.drain(..).for_each(|ack| o.acked(ack));
            let unlock = std::mem::take(&mut info.unlock);
            for file in self.files.iter_mut().flatten() {
                if unlock.contains(&file.generation) {
                    file.locked = false;
                }
            }
            if r.release == Release::Durable {
                let now: Vec<_> = self
                    .held
                    .iter()
                    .filter(|(_, s)| *s <= seq)
                    .map(|(h, _)| *h)
                    .collect();
                self.held.retain(|(_, s)| *s > seq);
                now.into_iter().for_each(|h| self.release(h));
            }
        }
    }

    // ---- parts ---------------------------------------------------------------------------------

    fn release(&mut self, held: Held) {
        match held {
            Held::Cluster(c) => self.free[usize::from(c)] = true,
            Held::Id(id) => self.free_ids[id] = true,
        }
    }

    /// Returns the greatest sequence up to which everything is durable.
    fn durable_upto(&self) -> u32 {
        let done = self
            .ring
            .iter()
            .take_while(|info| info.done && info.state == State::Durable);
        done.last().map_or(self.tail - 1, |info| info.batch.seq)
    }

    /// Returns the value that recovery would put at this byte, if a batch in the ring carries it.
    fn carried(&self, generation: u32, at: usize) -> Option<u16> {
        let mut found = None;
        for info in &self.ring {
            for record in &info.batch.records {
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
                    } if (*g, *a) == (generation, at) && info.done => found = None,
                    _ => {}
                }
            }
        }
        found
    }

    /// Whether a batch carries bytes that are nowhere else.
    fn owes(&self, info: &Info, r: &Rules) -> bool {
        let needed = 1;
        r.owed_pins_ring
            && info.batch.records.iter().any(|record| {
                let Record::Carry {
                    generation,
                    at,
                    byte,
                    ..
                } = record
                else {
                    return false;
                };
                let later = self
                    .ring
                    .iter()
                    .filter(|i| i.batch.seq > info.batch.seq && i.done);
                let void = later
                    .flat_map(|i| &i.batch.records)
                    .any(|record| match record {
                        Record::Carry {
                            generation: g,
                            at: a,
                            ..
                        }
                        | Record::Revoke {
                            generation: g,
                            at: a,
                            ..
                        } => (g, a) == (generation, at),
                        Record::Cut {
                            generation: g,
                            from,
                            ..
                        } => g == generation && from <= at,
                        _ => false,
                    });
                let file = self
                    .files
                    .iter()
                    .flatten()
                    .find(|f| f.generation == *generation);
                let placed = file.is_some_and(|f| {
                    let same = f.mem.get(*at) == Some(byte);
                    (same && f.placed[*at] >= needed)
                        || (!same && f.was_placed.get(*at) >= Some(&needed))
                });
                !void && !placed
            })
    }

    /// Whether this block of the file may go to its place now.
    fn may_write(&self, dev: &Device, r: &Rules, id: usize, block: usize) -> bool {
        let file = self.files[id].as_ref().expect("checked");
        let meta = Meta {
            generation: file.generation,
            name: 0,
            len: 0,
            map: file.map,
        };
        let Some((addr, _)) = locate(&meta, block * BB) else {
            return false;
        };
        if file.locked || (r.one_write_per_block && dev.busy(addr, r.no_retry_in_flight)) {
            return false;
        }
        for i in 0..BB {
            let at = block * BB + i;
            let new = file.mem.get(at).copied().unwrap_or(0);
            if at < file.mem.len()
                && let Some(byte) = self.carried(file.generation, at)
                && byte != new
            {
                match r.over {
                    Over::Free => {}
                    Over::NotOwed if file.was_placed[at] == 2 => {}
                    Over::NotOwed | Over::NotInRing => return false,
                }
            }
            let vouched = |info: &Info| {
                info.batch.seq > self.known
                    && info
                        .vouched
                        .iter()
                        .any(|(a, k, v)| (*a, *k) == (addr, i) && *v != new)
            };
            if r.upto_before_overwriting && self.ring.iter().any(vouched) {
                return false;
            }
        }
        true
    }

    fn block_write(&self, id: usize, block: usize) -> Placing {
        let file = self.files[id].as_ref().expect("checked");
        let meta = Meta {
            generation: file.generation,
            name: 0,
            len: 0,
            map: file.map,
        };
        let (addr, _) = locate(&meta, block * BB).expect("allocated");
        let mut bytes = [0; BB];
        let mut places = Vec::new();
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = block * BB + i;
            if let Some(b) = file.mem.get(at) {
                *byte = *b;
                places.push((file.generation, at, *b));
            }
        }
        ((addr, Cell::Data(bytes)), places)
    }

    fn to_flush(&self) -> Vec<(u32, usize, u16)> {
        let mut places = Vec::new();
        for f in self.files.iter().flatten() {
            let done = (0..f.mem.len()).filter(|i| f.placed[*i] == 1);
            places.extend(done.map(|i| (f.generation, i, f.mem[i])));
        }
        places
    }

    fn needs_whole(&self, id: usize, r: &Rules) -> bool {
        let base = match (r.whole, &self.checkpoint) {
            (Whole::Never, _) => return false,
            (Whole::SinceBegun, Some(c)) => c.upto,
            _ => self.tail - 1,
        };
        self.whole[id] <= base
    }

    fn size(records: &[Record]) -> usize {
        let big = |r: &&Record| matches!(r, Record::Page { whole: true, .. });
        1 + records.iter().filter(big).count()
    }

    fn room(&self, blocks: usize, r: &Rules) -> bool {
        let used: usize = self.ring.iter().map(|i| i.batch.blocks).sum();
        let open = self.ring.iter().filter(|i| !i.done).count();
        // One block is left for a deletion.
        used + blocks + 2 <= RING && open < r.depth && !self.halted
    }

    #[allow(clippy::too_many_arguments)]
    fn compose(
        &mut self,
        dev: &mut Device,
        r: &Rules,
        records: Vec<Record>,
        acks: Vec<Ack>,
        data: Vec<Placing>,
        flush: bool,
        vouched: Vec<(usize, usize, u16)>,
        unlock: Vec<u32>,
        held: Vec<Held>,
    ) {
        let seq = self.seq;
        for record in &records {
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
            blocks: Self::size(&records),
            records,
        });
        let waiting = 1 + data.len();
        dev.write(
            batch_cells(&batch, self.pos),
            true,
            Owner::Batch(seq),
            Vec::new(),
        );
        for (write, places) in data {
            dev.write(vec![write], true, Owner::Batch(seq), places);
        }
        self.held.extend(held.into_iter().map(|h| (h, seq)));
        if r.release == Release::AtOnce {
            let now: Vec<_> = self.held.drain(..).map(|(h, _)| h).collect();
            now.into_iter().for_each(|h| self.release(h));
        }
        let pos = self.pos;
        self.pos = (pos + batch.blocks) % RING;
        self.laps += u64::from(self.pos < pos);
        self.pred = crc(&batch);
        self.seq += 1;
        self.ring.push_back(Info {
            after: self.pages.clone(),
            batch,
            pos,
            state: State::Writing,
            waiting,
            flush,
            acks,
            done: false,
            vouched,
            unlock,
        });
    }
}

fn batch_cells(batch: &Rc<Batch>, pos: usize) -> Vec<(usize, Cell)> {
    (0..batch.blocks)
        .map(|i| (RING0 + (pos + i) % RING, Cell::Part(i, Rc::clone(batch))))
        .collect()
}
