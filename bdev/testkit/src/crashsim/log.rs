//! The log of a simulated device, and its possible contents after a power cut.

use std::sync::Arc;

use super::image::CrashImage;

/// The effect of a logged operation on the medium.
#[derive(Debug, Clone)]
pub enum Action {
    /// The bytes are written.
    Write(Arc<[u8]>),
    /// The blocks become zero.
    Zero,
    /// The contents are discarded and become `filler`.
    Unmap {
        /// The byte that unmapped blocks read as.
        filler: u8,
    },
    /// Everything that had completed before becomes durable.
    Flush,
}

/// An operation that changes what is durable.
#[derive(Debug, Clone)]
pub struct Change {
    /// Number of the operation, in order of submission on the device.
    pub id: u64,
    /// The effect.
    pub action: Action,
    /// First block.
    pub lba: u64,
    /// Length in blocks; 0 for a flush.
    pub len_blocks: u64,
    /// Whether it is durable when it completes.
    pub fua: bool,
}

/// An entry of the log.
#[derive(Debug, Clone)]
pub enum Event {
    /// A change was submitted: it may take effect from now on.
    Submitted(Arc<Change>),
    /// The device completed a change.
    Completed {
        /// Number of the change.
        id: u64,
    },
    /// A note of the test, by [`super::CrashDevice::mark`].
    Mark(u64),
}

/// A part of a change that may or may not survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// Number of the change.
    pub id: u64,
    /// First block of the part.
    pub lba: u64,
    /// Number of blocks: the tearing unit, or less at the ends.
    pub len_blocks: u64,
    /// Whether the device had completed the change.
    pub completed: bool,
}

#[derive(Debug, Clone)]
struct Pending {
    change: Arc<Change>,
    completed: bool,
    settled: bool,
}

/// An iteration over a log, with the contents that are certainly durable and those that may be.
#[derive(Debug, Clone)]
pub struct CrashPoints {
    log: Arc<Vec<Event>>,
    at: usize,
    /// The settled changes whose order relative to pending ones no longer matters.
    base: CrashImage,
    pending: Vec<Pending>,
    /// Flushes in flight: id, and the numbers of the changes that each one makes durable.
    flushes: Vec<(u64, Vec<u64>)>,
    block_size: u32,
    tear_blocks: u64,
    write_cache: bool,
}

impl CrashPoints {
    pub(super) fn new(
        log: Vec<Event>,
        base: CrashImage,
        block_size: u32,
        tear_blocks: u64,
        write_cache: bool,
    ) -> CrashPoints {
        CrashPoints {
            log: Arc::new(log),
            at: 0,
            base,
            pending: Vec::new(),
            flushes: Vec::new(),
            block_size,
            tear_blocks,
            write_cache,
        }
    }

    /// Number of events passed, after which the power is cut.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Number of events of the log.
    pub fn len_events(&self) -> usize {
        self.log.len()
    }

    /// The marks among the events passed, the latest last.
    pub fn marks(&self) -> impl Iterator<Item = u64> + '_ {
        self.log[..self.at].iter().filter_map(|e| match e {
            Event::Mark(m) => Some(*m),
            _ => None,
        })
    }

    /// Passes one more event. Returns `None` at the end of the log.
    pub fn advance(&mut self) -> Option<&Event> {
        let event = self.log.get(self.at)?.clone();
        self.at += 1;
        match event {
            Event::Submitted(change) => {
                if let Action::Flush = change.action {
                    let covered = self.pending.iter().filter(|p| p.completed);
                    self.flushes
                        .push((change.id, covered.map(|p| p.change.id).collect()));
                } else {
                    self.pending.push(Pending {
                        change,
                        completed: false,
                        settled: false,
                    });
                }
            }
            Event::Completed { id } => self.complete(id),
            Event::Mark(_) => {}
        }
        self.log.get(self.at - 1)
    }

    fn complete(&mut self, id: u64) {
        if let Some(i) = self.flushes.iter().position(|(f, _)| *f == id) {
            let (_, covered) = self.flushes.swap_remove(i);
            for p in &mut self.pending {
                p.settled |= covered.contains(&p.change.id);
            }
        } else if let Some(p) = self.pending.iter_mut().find(|p| p.change.id == id) {
            p.completed = true;
            p.settled = p.change.fua || !self.write_cache;
        }
        self.retire();
    }

    /// Moves settled changes into the base, except where an earlier unsettled one overlaps, because
    /// that one must not overwrite them later.
    fn retire(&mut self) {
        let mut kept: Vec<Pending> = Vec::new();
        for p in std::mem::take(&mut self.pending) {
            if p.settled && !kept.iter().any(|k| overlap(&k.change, &p.change)) {
                let c = &p.change;
                apply(&mut self.base, c, self.block_size, c.lba, c.len_blocks);
            } else {
                kept.push(p);
            }
        }
        self.pending = kept;
    }

    /// Returns the parts that may or may not survive here, in order of submission.
    pub fn unsettled(&self) -> Vec<Unsettled> {
        let open = self.pending.iter().filter(|p| !p.settled);
        open.flat_map(|p| self.pieces(p)).collect()
    }

    fn pieces(&self, p: &Pending) -> impl Iterator<Item = Unsettled> + use<> {
        let Change {
            id,
            lba,
            len_blocks,
            ..
        } = *p.change;
        let (unit, completed, end) = (self.tear_blocks, p.completed, lba + len_blocks);
        let mut at = lba;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            // Units are aligned on the device, as sectors and pages are.
            let next = ((at / unit + 1) * unit).min(end);
            let piece = Unsettled {
                id,
                lba: at,
                len_blocks: next - at,
                completed,
            };
            at = next;
            Some(piece)
        })
    }

    /// Returns the contents after a power cut here: the settled changes and those unsettled parts
    /// that `choose` accepts. It is asked for each, in order of submission.
    pub fn image(&self, choose: &mut dyn FnMut(&Unsettled) -> bool) -> CrashImage {
        let mut image = self.base.clone();
        for p in &self.pending {
            for piece in self.pieces(p) {
                if p.settled || choose(&piece) {
                    apply(
                        &mut image,
                        &p.change,
                        self.block_size,
                        piece.lba,
                        piece.len_blocks,
                    );
                }
            }
        }
        image
    }
}

fn overlap(a: &Change, b: &Change) -> bool {
    a.lba < b.lba + b.len_blocks && b.lba < a.lba + a.len_blocks
}

/// Applies `len_blocks` blocks from `lba` of `change`, which contains them.
#[expect(
    clippy::cast_possible_truncation,
    reason = "lengths of operations fit memory"
)]
pub(super) fn apply(
    image: &mut CrashImage,
    change: &Change,
    block_size: u32,
    lba: u64,
    len_blocks: u64,
) {
    let bs = u64::from(block_size);
    let (offset, len) = (lba * bs, (len_blocks * bs) as usize);
    match &change.action {
        Action::Write(data) => {
            let from = ((lba - change.lba) * bs) as usize;
            image.write(offset, &data[from..from + len]);
        }
        Action::Zero => image.fill(offset, len, 0),
        Action::Unmap { filler } => image.fill(offset, len, *filler),
        Action::Flush => {}
    }
}
