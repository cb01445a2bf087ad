//! A device of blocks. One block is the atomic unit: it is written whole or not at all, and the blocks of
//! one write land in any order. With a volatile cache a landed block is durable only after FUA or a flush
//! that was *submitted* after the block had landed; the cache may write back any version at any time.

use std::rc::Rc;

use crate::format::{Batch, Head, Page};

/// Bytes of a data block.
pub const BB: usize = 2;
/// Data blocks of a cluster.
pub const CB: usize = 2;
/// Data clusters of the device.
pub const CLUSTERS: usize = 4;
/// Metadata pages, so blob ids.
pub const PAGES: usize = 3;
/// Clusters that a file can have.
pub const FC: usize = 2;
/// Blocks of the ring.
pub const RING: usize = 12;

pub const SUPER: usize = 0;
pub const HEADS: usize = 1;
pub const RING0: usize = HEADS + 2;
/// A metadata page is two blocks.
pub const PAGE0: usize = RING0 + RING;
pub const DATA0: usize = PAGE0 + 2 * PAGES;
pub const BLOCKS: usize = DATA0 + CLUSTERS * CB;

/// The content of a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cell {
    Zero,
    Data([u16; BB]),
    /// One half of a metadata page. The page's CRC is good if both halves are of the same image.
    Half(Rc<Page>),
    /// Block `.0` of a batch; its CRC is good if all blocks are of the same batch.
    Part(usize, Rc<Batch>),
    Head(Head),
    Super {
        guard: bool,
        epoch: u32,
    },
    /// The content has rotted: it can be read, and its CRC is wrong.
    Rotten,
    /// The device cannot read it.
    Unreadable,
}

/// The kind of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    NoCache,
    Fua,
    FlushOnly,
}

/// The one that waits for an operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The batch's own blocks, or data that goes with it.
    Batch(u32),
    BatchFlush(u32),
    /// Write-behind or a flush in the background.
    Behind,
    CheckPages,
    CheckFlush,
    CheckHead,
    CheckHeadFlush,
    /// A process that has died.
    Nobody,
}

#[derive(Clone, Debug)]
pub struct Op {
    pub writes: Vec<(usize, Cell)>,
    pub fua: bool,
    /// A flush: covers what had landed with a stamp up to this.
    pub flush: Option<u64>,
    pub owner: Owner,
    /// Bytes of files that this puts in place, (generation, offset, value); of a flush: that it covers.
    pub places: Vec<(u32, usize, u16)>,
}

#[derive(Clone, Debug)]
pub struct Device {
    pub kind: Kind,
    pub durable: Vec<Cell>,
    /// Landed versions that are not durable, oldest first.
    pub cache: Vec<Vec<(u64, Cell)>>,
    pub flying: Vec<Op>,
    stamp: u64,
}

impl Device {
    pub fn new(kind: Kind) -> Device {
        Device {
            kind,
            durable: vec![Cell::Zero; BLOCKS],
            cache: vec![Vec::new(); BLOCKS],
            flying: Vec::new(),
            stamp: 0,
        }
    }

    pub fn write(
        &mut self,
        writes: Vec<(usize, Cell)>,
        fua: bool,
        owner: Owner,
        places: Vec<(u32, usize, u16)>,
    ) {
        let fua = fua && self.kind == Kind::Fua;
        self.flying.push(Op {
            writes,
            fua,
            flush: None,
            owner,
            places,
        });
    }

    pub fn flush(&mut self, owner: Owner, places: Vec<(u32, usize, u16)>) {
        let flush = Some(self.stamp);
        self.flying.push(Op {
            writes: Vec::new(),
            fua: false,
            flush,
            owner,
            places,
        });
    }

    fn land(&mut self, addr: usize, cell: Cell, fua: bool) {
        self.stamp += 1;
        if fua || self.kind == Kind::NoCache {
            self.durable[addr] = cell;
            self.cache[addr].clear();
        } else {
            self.cache[addr].push((self.stamp, cell));
        }
    }

    fn make_durable(&mut self, upto: u64) {
        for (durable, cache) in self.durable.iter_mut().zip(&mut self.cache) {
            while cache.first().is_some_and(|(stamp, _)| *stamp <= upto) {
                *durable = cache.remove(0).1;
            }
        }
    }

    /// Completes the operation at `index`.
    pub fn complete(&mut self, index: usize) -> Op {
        let op = self.flying.remove(index);
        match op.flush {
            Some(upto) => self.make_durable(upto),
            None => {
                for (addr, cell) in &op.writes {
                    self.land(*addr, cell.clone(), op.fua);
                }
            }
        }
        op
    }

    /// Returns the content that a read finds.
    pub fn read(&self, addr: usize) -> &Cell {
        self.cache[addr]
            .last()
            .map_or(&self.durable[addr], |(_, cell)| cell)
    }

    /// Whether a write of this block is in flight. With `forgotten`, also one that nobody waits for.
    pub fn busy(&self, addr: usize, forgotten: bool) -> bool {
        let counts = |op: &&Op| forgotten || op.owner != Owner::Nobody;
        self.flying
            .iter()
            .filter(counts)
            .any(|op| op.writes.iter().any(|(at, _)| *at == addr))
    }

    /// Performs all writes at once, durably.
    pub fn put(&mut self, writes: &[(usize, Cell)]) {
        for (addr, cell) in writes {
            self.land(*addr, cell.clone(), false);
        }
        self.make_durable(u64::MAX);
    }

    /// Returns the blocks on which a power cut has a choice, with the choices.
    pub fn choices(&self) -> Vec<(usize, Vec<Cell>)> {
        let mut found = Vec::new();
        for addr in 0..BLOCKS {
            let mut cells = vec![self.durable[addr].clone()];
            cells.extend(self.cache[addr].iter().map(|(_, cell)| cell.clone()));
            for op in &self.flying {
                cells.extend(
                    op.writes
                        .iter()
                        .filter(|(at, _)| *at == addr)
                        .map(|(_, c)| c.clone()),
                );
            }
            cells.dedup();
            if cells.len() > 1 {
                found.push((addr, cells));
            }
        }
        found
    }

    /// Returns the device after a power cut in which `pick(number of choices)` was taken for each such block.
    pub fn cut(&self, mut pick: impl FnMut(usize) -> usize) -> Device {
        let mut after = Device::new(self.kind);
        after.durable.clone_from(&self.durable);
        for (addr, cells) in self.choices() {
            after.durable[addr] = cells[pick(cells.len())].clone();
        }
        after.stamp = self.stamp;
        after
    }

    /// Lets the process die: nobody waits for its operations, but they stay in flight.
    pub fn kill(&mut self) {
        for op in &mut self.flying {
            op.owner = Owner::Nobody;
            op.places.clear();
        }
    }
}
