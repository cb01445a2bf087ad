//! A file in memory: its bytes, and which of them are in their place on the device.

use crate::device::{BB, CB, Cell, Device, FC};
use crate::format::{Meta, byte_at, locate};

/// A byte of a file: generation, position, value.
pub type Byte = (u32, usize, u16);
/// A block that goes to its place, and the bytes of a file that it puts there.
pub type Placing = ((usize, Cell), Vec<Byte>);

#[derive(Clone, Debug)]
pub struct MemFile {
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
    pub locked: bool,
}

impl MemFile {
    /// Makes an empty file, whose creation is on its way.
    pub fn new(generation: u32, name: u8) -> MemFile {
        MemFile {
            generation,
            name,
            mem: Vec::new(),
            map: [None; FC],
            jlen: 0,
            placed: Vec::new(),
            was_placed: Vec::new(),
            dirty: Vec::new(),
            locked: true,
        }
    }

    /// Reads the file that a recovery has found.
    pub fn found(dev: &Device, meta: &Meta) -> MemFile {
        let mem: Vec<u16> = (0..meta.len)
            .map(|i| byte_at(dev, meta, i).unwrap_or(0))
            .collect();
        MemFile {
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
    }

    /// Returns the block of byte `at`, and the byte in it.
    pub fn locate(&self, at: usize) -> Option<(usize, usize)> {
        let meta = Meta {
            generation: self.generation,
            name: self.name,
            len: self.mem.len(),
            map: self.map,
        };
        locate(&meta, at)
    }

    /// The clusters that it has.
    pub fn clusters(&self) -> impl Iterator<Item = u8> {
        self.map.iter().flatten().copied()
    }

    pub fn push(&mut self, byte: u16) {
        self.mem.push(byte);
        self.placed.push(0);
        self.was_placed.push(0);
        self.dirty.push(false);
    }

    pub fn overwrite(&mut self, at: usize, byte: u16) {
        self.mem[at] = byte;
        if !self.dirty[at] {
            self.was_placed[at] = self.placed[at];
        }
        self.dirty[at] = at < self.jlen;
        self.placed[at] = 0;
    }

    /// Cuts it, and returns the clusters that it does not need any longer.
    pub fn truncate(&mut self, len: usize) -> Vec<u8> {
        let cut = self.map[len.div_ceil(CB * BB)..].iter_mut();
        let clusters = cut.filter_map(Option::take).collect();
        self.mem.truncate(len);
        self.placed.truncate(len);
        self.was_placed.truncate(len);
        self.dirty.truncate(len);
        self.jlen = self.jlen.min(len);
        clusters
    }

    /// The bytes that no batch has.
    pub fn unsynced(&self) -> Vec<usize> {
        let unsynced = |i: &usize| *i >= self.jlen || self.dirty[*i];
        (0..self.mem.len()).filter(unsynced).collect()
    }

    /// Whether batches have everything.
    pub fn is_synced(&self) -> bool {
        self.jlen == self.mem.len() && !self.dirty.contains(&true)
    }

    /// A batch has everything.
    pub fn synced(&mut self) {
        self.jlen = self.mem.len();
        self.dirty.fill(false);
    }

    /// The batch is replaced by one without this file: it has `jlen` bytes again.
    pub fn unsync(&mut self, jlen: usize) {
        self.jlen = jlen;
        self.locked = false;
        for i in 0..jlen {
            self.dirty[i] |= self.placed[i] < 2;
        }
    }

    /// The state of byte `at`: 0 not in place, 1 in place but perhaps only in the cache, 2 durable.
    pub fn placed(&self, at: usize) -> u8 {
        self.placed[at]
    }

    /// Whether the synced value of byte `at` was durable in place when the byte was overwritten.
    pub fn was_durable(&self, at: usize) -> bool {
        self.was_placed[at] == 2
    }

    /// Whether all of it is durable in place.
    pub fn is_placed(&self) -> bool {
        self.placed.iter().all(|p| *p == 2)
    }

    /// Whether this value of byte `at` is in place, or was when it was overwritten.
    pub fn has_placed(&self, at: usize, byte: u16, needed: u8) -> bool {
        let same = self.mem.get(at) == Some(&byte);
        (same && self.placed[at] >= needed) || (!same && self.was_placed.get(at) >= Some(&needed))
    }

    /// This value of byte `at` has arrived in place, or a flush has covered it.
    pub fn arrived(&mut self, at: usize, byte: u16, level: u8, flush: bool) {
        if self.mem.get(at) == Some(&byte) && (!flush || self.placed[at] > 0) {
            self.placed[at] = self.placed[at].max(level);
        }
    }

    /// Whether byte `at` is as the newest batch has it, and not durable in place.
    pub fn needs_its_batch(&self, at: usize) -> bool {
        !self.dirty[at] && self.placed[at] < 2
    }

    /// Whether a byte of this block is not in place.
    pub fn has_unplaced(&self, block: usize) -> bool {
        let mut range = block * BB..self.mem.len().min((block + 1) * BB);
        range.any(|i| self.placed[i] == 0)
    }

    /// The block as it goes to its place.
    pub fn block_write(&self, block: usize) -> Placing {
        let (addr, _) = self.locate(block * BB).expect("allocated");
        let mut bytes = [0; BB];
        let mut places = Vec::new();
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = block * BB + i;
            if let Some(b) = self.mem.get(at) {
                *byte = *b;
                places.push((self.generation, at, *b));
            }
        }
        ((addr, Cell::Data(bytes)), places)
    }

    /// The bytes that a flush makes durable in place.
    pub fn to_flush(&self) -> impl Iterator<Item = Byte> {
        let done = (0..self.mem.len()).filter(|i| self.placed[*i] == 1);
        done.map(|i| (self.generation, i, self.mem[i]))
    }
}

/// The bytes of all files that a flush makes durable in place.
pub fn to_flush(files: &[Option<MemFile>]) -> Vec<Byte> {
    files.iter().flatten().flat_map(MemFile::to_flush).collect()
}
