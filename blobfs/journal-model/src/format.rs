//! What is on the device, and recovery's reading of it.

use std::rc::Rc;

use crate::device::{BB, CB, Cell, DATA0, Device, FC, HEADS, PAGE0, PAGES, RING, RING0, SUPER};
use crate::rules::Rules;

/// A file as its metadata page has it.
#[derive(Clone, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Meta {
    pub generation: u32,
    pub name: u8,
    pub len: usize,
    pub map: [Option<u8>; FC],
}

/// A metadata page: nothing, or a file.
pub type Page = Option<Meta>;

#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum Record {
    /// A page's new content. `whole`: an image, which needs nothing to apply to.
    Page { id: usize, page: Page, whole: bool },
    /// A new length; applies to the page that is there.
    Len {
        id: usize,
        generation: u32,
        len: usize,
    },
    /// Bytes that are in flight together with the batch.
    Vouch {
        id: usize,
        from: usize,
        bytes: Vec<u16>,
    },
    /// Bytes in the batch.
    Carry {
        id: usize,
        generation: u32,
        at: usize,
        byte: u16,
    },
    /// Makes void what was carried from `from` on (a truncation, or a deletion: from 0).
    Cut {
        id: usize,
        generation: u32,
        from: usize,
    },
    /// Makes void what was carried of this byte.
    Revoke {
        id: usize,
        generation: u32,
        at: usize,
    },
}

/// One append to the journal. Its CRC is modelled by [`crc`].
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct Batch {
    pub epoch: u32,
    pub seq: u32,
    pub pred: u64,
    pub upto: u32,
    pub blocks: usize,
    pub records: Vec<Record>,
}

pub fn crc(batch: &Batch) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    batch.hash(&mut hasher);
    hasher.finish()
}

/// A ring header: where the oldest batch that counts stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    pub epoch: u32,
    pub turn: u32,
    pub pos: usize,
    pub seq: u32,
    pub pred: u64,
    /// Data up to this sequence has been checked, or is known to be durable.
    pub upto: u32,
}

/// The decisions of recovery.
#[derive(Debug)]
pub struct Verdict {
    /// None: torn, and not rebuilt.
    pub pages: Vec<Option<Page>>,
    pub writes: Vec<(usize, Cell)>,
    pub guard: bool,
    pub epoch: u32,
    pub head: Head,
    /// The header's slot that may be overwritten.
    pub slot: usize,
    /// Position of the next batch.
    pub pos: usize,
    pub seq: u32,
    pub pred: u64,
    /// The reason why nothing may be written: the ring is damaged, and what has been found may not be all.
    pub damage: Option<String>,
}

pub fn page_at(dev: &Device, id: usize) -> Option<Page> {
    match (dev.read(PAGE0 + 2 * id), dev.read(PAGE0 + 2 * id + 1)) {
        (Cell::Half(a), Cell::Half(b)) if a == b => Some((**a).clone()),
        _ => None,
    }
}

pub fn page_cells(id: usize, page: &Page) -> [(usize, Cell); 2] {
    let page = Rc::new(page.clone());
    [
        (PAGE0 + 2 * id, Cell::Half(Rc::clone(&page))),
        (PAGE0 + 2 * id + 1, Cell::Half(page)),
    ]
}

/// Returns the block of byte `at` of a file, and the byte in it.
pub fn locate(meta: &Meta, at: usize) -> Option<(usize, usize)> {
    let block = at / BB;
    let cluster = (*meta.map.get(block / CB)?)?;
    Some((DATA0 + usize::from(cluster) * CB + block % CB, at % BB))
}

pub fn byte_at(dev: &Device, meta: &Meta, at: usize) -> Option<u16> {
    let (addr, i) = locate(meta, at)?;
    match dev.read(addr) {
        Cell::Data(bytes) => Some(bytes[i]),
        _ => Some(0),
    }
}

fn batch_at(dev: &Device, pos: usize) -> Option<Rc<Batch>> {
    let Cell::Part(0, batch) = dev.read(RING0 + pos) else {
        return None;
    };
    let whole = (1..batch.blocks)
        .all(|i| matches!(dev.read(RING0 + (pos + i) % RING), Cell::Part(part, other) if *part == i && other == batch));
    whole.then(|| Rc::clone(batch))
}

fn apply(pages: &mut [Option<Page>], record: &Record) {
    match record {
        Record::Page { id, page, whole } if *whole || pages[*id].is_some() => {
            pages[*id] = Some(page.clone());
        }
        Record::Len {
            id,
            generation,
            len,
        } => {
            if let Some(Some(meta)) = &mut pages[*id]
                && meta.generation == *generation
            {
                meta.len = *len;
            }
        }
        _ => {}
    }
}

/// Returns the batches from the header's tail on, each with its place: by epoch, exact sequence and predecessor's CRC.
pub fn walk(dev: &Device, rules: &Rules, from: &Verdict) -> Vec<(usize, Rc<Batch>)> {
    let (mut pos, mut seq, mut pred) = (from.head.pos, from.head.seq, from.head.pred);
    let mut batches = Vec::new();
    let mut used = 0;
    while let Some(batch) = batch_at(dev, pos) {
        used += batch.blocks;
        if used > RING
            || batch.seq != seq
            || (rules.epoch_checked && batch.epoch != from.epoch)
            || (rules.pred_checked && batch.pred != pred)
        {
            break;
        }
        let at = pos;
        pos = (pos + batch.blocks) % RING;
        (seq, pred) = (seq + 1, crc(&batch));
        batches.push((at, batch));
    }
    batches
}

/// Tells the end from damage behind the last batch, at `pos` and with the sequence `seq`. A power cut alone
/// leaves both headers whole, every block readable, and nothing behind a batch that is not whole.
fn damage(dev: &Device, rules: &Rules, epoch: u32, pos: usize, seq: u32) -> Option<String> {
    if rules.damage_headers
        && let Some(i) = (0..2).find(|i| !matches!(dev.read(HEADS + i), Cell::Head(_)))
    {
        return Some(format!("header {i} cannot be used"));
    }
    let blocks = match dev.read(RING0 + pos) {
        Cell::Part(0, batch) => batch.blocks,
        _ => 1,
    };
    let unreadable = |i: usize| *dev.read(RING0 + (pos + i) % RING) == Cell::Unreadable;
    if rules.damage_unreadable && (0..blocks).any(unreadable) {
        return Some(format!("batch {seq} cannot be read"));
    }
    let later = (0..RING)
        .filter_map(|at| batch_at(dev, at))
        .find(|batch| batch.seq > seq && (batch.epoch == epoch || !rules.damage_epoch));
    let later = later.filter(|_| rules.damage_later)?;
    Some(format!(
        "batch {seq} is not whole, and there is batch {}",
        later.seq
    ))
}

/// Reads the device and decides what to put in place. Writes nothing.
pub fn recover(dev: &Device, rules: &Rules) -> Verdict {
    let (guard, first) = match dev.read(SUPER) {
        Cell::Super { guard, epoch } => (*guard, *epoch),
        other => panic!("no super block: {other:?}"),
    };
    let mut pages: Vec<Option<Page>> = (0..PAGES).map(|id| page_at(dev, id)).collect();
    let in_place = pages.clone();
    let none = Head {
        epoch: first,
        turn: 0,
        pos: 0,
        seq: 1,
        pred: 0,
        upto: 0,
    };
    let mut head = none;
    let mut slot = 0;
    for i in 0..2 {
        if let Cell::Head(found) = dev.read(HEADS + i)
            && found.turn > head.turn
        {
            (head, slot) = (*found, 1 - i);
        }
    }
    // The epoch stands in the ring's header, not in the super block.
    let epoch = head.epoch;
    let (mut pos, mut seq, pred) = (head.pos, head.seq, head.pred);
    let mut verdict = Verdict {
        pages: Vec::new(),
        writes: Vec::new(),
        guard,
        epoch,
        head,
        slot,
        pos,
        seq,
        pred,
        damage: None,
    };
    if !guard {
        verdict.pages = pages;
        return verdict;
    }
    let walked = walk(dev, rules, &verdict);
    if let Some((at, last)) = walked.last() {
        pos = (at + last.blocks) % RING;
        seq = last.seq + 1;
    }
    verdict.damage = damage(dev, rules, epoch, pos, seq);
    let mut batches: Vec<Rc<Batch>> = walked.into_iter().map(|(_, batch)| batch).collect();
    let upto = batches
        .iter()
        .map(|b| b.upto)
        .max()
        .unwrap_or(0)
        .max(head.upto);
    let mut valid = 0;
    for batch in &batches {
        let mut after = pages.clone();
        batch.records.iter().for_each(|r| apply(&mut after, r));
        let good = |record: &Record| match record {
            Record::Vouch { id, from, bytes } => match &after[*id] {
                Some(Some(meta)) => bytes
                    .iter()
                    .enumerate()
                    .all(|(i, b)| byte_at(dev, meta, from + i) == Some(*b)),
                _ => false,
            },
            _ => true,
        };
        if batch.seq > upto && !batch.records.iter().all(good) {
            break;
        }
        pages = after;
        valid += 1;
        verdict.pos = (verdict.pos + batch.blocks) % RING;
        (verdict.seq, verdict.pred) = (batch.seq + 1, crc(batch));
    }
    batches.truncate(valid);
    for id in 0..PAGES {
        if let Some(page) = &pages[id]
            && in_place[id].as_ref() != Some(page)
        {
            verdict.writes.extend(page_cells(id, page));
        }
    }
    // Carried bytes: after all metadata, in order, without what a later record made void.
    let all: Vec<&Record> = batches.iter().flat_map(|b| &b.records).collect();
    for (n, record) in all.iter().enumerate() {
        let Record::Carry { id, at, byte, .. } = record else {
            continue;
        };
        let void = all[n + 1..].iter().any(|later| match later {
            Record::Cut { id: i, from, .. } => i == id && from <= at,
            Record::Revoke { id: i, at: a, .. } => i == id && a == at,
            _ => false,
        });
        if void && rules.replay_leaves_out {
            continue;
        }
        let place = match &pages[*id] {
            Some(Some(meta)) if *at < meta.len || !rules.replay_leaves_out => locate(meta, *at),
            _ => None,
        };
        let Some((addr, i)) = place else { continue };
        let pending = verdict.writes.iter().position(|(a, _)| *a == addr);
        let mut bytes = match pending.map_or(dev.read(addr), |p| &verdict.writes[p].1) {
            Cell::Data(bytes) if rules.replay_exact || pending.is_some() => *bytes,
            _ => [0; BB],
        };
        bytes[i] = *byte;
        match pending {
            Some(p) => verdict.writes[p].1 = Cell::Data(bytes),
            None => verdict.writes.push((addr, Cell::Data(bytes))),
        }
    }
    verdict.pages = pages;
    verdict
}

/// Returns the steps of recovery after its verdict, each durable before the next.
pub fn recovery_steps(verdict: &Verdict, rules: &Rules) -> Vec<(Vec<(usize, Cell)>, bool)> {
    let mut steps = Vec::new();
    if !verdict.guard || verdict.damage.is_some() {
        return steps;
    }
    if rules.recovery_flushes_first {
        steps.push((Vec::new(), true));
    }
    let (turn, slot) = (verdict.head.turn + 1, verdict.slot);
    steps.push((verdict.writes.clone(), rules.recovery_flushes_last));
    let epoch = verdict.epoch + 1;
    let (pos, seq, pred) = (verdict.pos, verdict.seq, verdict.pred);
    let head = Head {
        epoch,
        turn,
        pos,
        seq,
        pred,
        upto: seq - 1,
    };
    steps.push((vec![(HEADS + slot, Cell::Head(head))], true));
    steps
}
