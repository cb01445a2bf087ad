//! Random walks: what happens, power cuts and rot at every step, and what a recovery then finds.

use crate::device::{
    BB, CB, CLUSTERS, Cell, DATA0, Device, FC, HEADS, Kind, Owner, PAGES, RING, RING0, SUPER,
};
use crate::format::{self, Head, Page, Verdict, byte_at, page_cells, recover, recovery_steps};
use crate::oracle::{Found, Oracle};
use crate::rules::Rules;
use crate::scenario;
use crate::writer::Writer;

/// A small generator of random numbers (splitmix64).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).expect("it was one")
    }
}

/// A broken promise.
pub struct Broken {
    pub what: String,
    pub trace: Vec<String>,
}

pub struct World {
    pub dev: Device,
    pub writer: Writer,
    pub oracle: Oracle,
    pub rules: Rules,
    pub rng: Rng,
    pub states: u64,
    pub trace: Vec<String>,
}

fn found(dev: &Device, pages: &[Option<Page>]) -> Result<Found, String> {
    let mut files = Found::new();
    let mut owners = [None; CLUSTERS];
    for (id, page) in pages.iter().enumerate() {
        let Some(page) = page else {
            return Err(format!("page {id} is torn"));
        };
        let Some(meta) = page else { continue };
        for cluster in meta.map.iter().flatten() {
            if let Some(other) = owners[usize::from(*cluster)].replace(id) {
                return Err(format!(
                    "cluster {cluster} belongs to blobs {other} and {id}"
                ));
            }
        }
        let bytes: Option<Vec<u16>> = (0..meta.len).map(|i| byte_at(dev, meta, i)).collect();
        let bytes = bytes.ok_or_else(|| format!("blob {id} is longer than its clusters"))?;
        files.push((meta.generation, meta.name, bytes));
    }
    Ok(files)
}

/// The power has been cut, and `dev` is what is left: recover, check; with `depth`, cut again meanwhile.
pub fn check(
    dev: &Device,
    rules: &Rules,
    oracle: &Oracle,
    rng: &mut Rng,
    depth: usize,
    states: &mut u64,
) -> Result<(), String> {
    *states += 1;
    let verdict = recover(dev, rules);
    if let Some(damage) = &verdict.damage {
        return Err(format!("a power cut alone is taken for damage: {damage}"));
    }
    let mut after = dev.clone();
    after.put(&verdict.writes);
    found(&after, &verdict.pages).and_then(|f| oracle.check(&f))?;
    if depth == 0 {
        return Ok(());
    }
    let mut dev = dev.clone();
    for (n, (writes, flush)) in recovery_steps(&verdict, rules).into_iter().enumerate() {
        for write in writes {
            dev.write(vec![write], false, Owner::Nobody, Vec::new());
        }
        for _ in 0..2 {
            let cut = dev.cut(|n| rng.below(n));
            check(&cut, rules, oracle, rng, depth - 1, states)
                .map_err(|e| format!("second cut, in step {n} of recovery: {e}"))?;
        }
        while !dev.flying.is_empty() {
            dev.complete(rng.below(dev.flying.len()));
        }
        if flush {
            dev.flush(Owner::Nobody, Vec::new());
            dev.complete(0);
        }
    }
    Ok(())
}

impl World {
    /// Makes a copy, to try something else.
    pub fn fork(&self) -> World {
        World {
            dev: self.dev.clone(),
            writer: self.writer.clone(),
            oracle: self.oracle.clone(),
            rules: self.rules.clone(),
            rng: scenario::rng(),
            states: 0,
            trace: self.trace.clone(),
        }
    }

    pub fn new(kind: Kind, rules: &Rules, seed: u64) -> World {
        let mut dev = Device::new(kind);
        let mut writes: Vec<(usize, Cell)> = vec![(
            SUPER,
            Cell::Super {
                guard: true,
                epoch: 1,
            },
        )];
        for turn in 0..2 {
            let head = Head {
                epoch: 1,
                turn,
                pos: 0,
                seq: 1,
                pred: 0,
                upto: 0,
            };
            writes.push((
                HEADS + 1 - usize::try_from(turn).expect("small"),
                Cell::Head(head),
            ));
        }
        for id in 0..PAGES {
            writes.extend(page_cells(id, &None));
        }
        for i in 0..CLUSTERS * CB {
            // What an earlier life of the device has left.
            writes.push((
                DATA0 + i,
                Cell::Data([60_000 + u16::try_from(i).expect("few"); BB]),
            ));
        }
        dev.put(&writes);
        let (writer, oracle) = mounted(&dev, rules, 0);
        let (states, trace) = (0, Vec::new());
        World {
            dev,
            writer,
            oracle,
            rules: rules.clone(),
            rng: Rng(seed),
            states,
            trace,
        }
    }

    /// Cuts the power in many ways, and looks.
    fn cuts(&mut self) -> Result<(), String> {
        let sizes: Vec<usize> = self.dev.choices().iter().map(|(_, c)| c.len()).collect();
        let all = sizes
            .iter()
            .try_fold(1usize, |n, s| n.checked_mul(*s))
            .unwrap_or(usize::MAX);
        let exhaustive = all <= 16;
        for n in 0..if exhaustive { all } else { 8 } {
            let (mut k, rng) = (n, &mut self.rng);
            let cut = self.dev.cut(|size| {
                if !exhaustive {
                    return rng.below(size);
                }
                let i = k % size;
                k /= size;
                i
            });
            let depth = if self.rng.below(6) == 0 {
                1 + self.rng.below(2)
            } else {
                0
            };
            check(
                &cut,
                &self.rules,
                &self.oracle,
                &mut self.rng,
                depth,
                &mut self.states,
            )?;
        }
        if self.rng.below(4) == 0 {
            self.rot()
        } else {
            Ok(())
        }
    }

    /// A block of the ring or a header has rotted, or cannot be read, when the power comes back: recovery refuses,
    /// or what it finds is what the promise allows. Of the newest batch nobody can tell rot from a power cut.
    fn rot(&mut self) -> Result<(), String> {
        let rng = &mut self.rng;
        let mut dev = self.dev.cut(|n| rng.below(n));
        let before = recover(&dev, &self.rules);
        let batches = format::walk(&dev, &self.rules, &before);
        let newest = batches.len();
        let mut blocks = vec![(HEADS, 0), (HEADS + 1, 0)];
        for (n, (pos, batch)) in batches.iter().enumerate() {
            blocks.extend((0..batch.blocks).map(|i| (RING0 + (pos + i) % RING, n + 1)));
        }
        let (addr, of) = blocks[rng.below(blocks.len())];
        let cell = if rng.below(2) == 0 {
            Cell::Rotten
        } else {
            Cell::Unreadable
        };
        let unseen = of == newest && newest > 0 && cell == Cell::Rotten;
        dev.put(&[(addr, cell.clone())]);
        self.states += 1;
        let verdict = recover(&dev, &self.rules);
        if verdict.damage.is_some() {
            return Ok(());
        }
        dev.put(&verdict.writes);
        let files = found(&dev, &verdict.pages);
        let what = |e| {
            format!("block {addr} (batch {of} of {newest} in the ring) is {cell:?}, unnoticed: {e}")
        };
        if unseen {
            Ok(())
        } else {
            files.and_then(|f| self.oracle.check(&f)).map_err(what)
        }
    }

    /// The power really goes, or the process dies; then a mount.
    fn crash(&mut self, power: bool) -> Result<(), String> {
        if power {
            let rng = &mut self.rng;
            self.dev = self.dev.cut(|n| rng.below(n));
        } else {
            self.dev.kill();
            if self.rules.late_writes_waited {
                while !self.dev.flying.is_empty() {
                    let index = self.rng.below(self.dev.flying.len());
                    let rng = &mut self.rng;
                    let whole = rng.below(2) == 0;
                    self.dev.flying[index]
                        .writes
                        .retain(|_| whole || rng.below(2) == 0);
                    self.dev.complete(index);
                }
            }
        }
        let verdict = recover(&self.dev, &self.rules);
        if let Some(damage) = &verdict.damage {
            return Err(format!("a crash is taken for damage: {damage}"));
        }
        for (writes, flush) in recovery_steps(&verdict, &self.rules) {
            for write in writes {
                self.dev
                    .write(vec![write], false, Owner::Batch(0), Vec::new());
            }
            self.cuts()?;
            while self.dev.flying.iter().any(|op| op.owner == Owner::Batch(0)) {
                self.dev.complete(self.rng.below(self.dev.flying.len()));
                self.cuts()?;
            }
            if flush && self.dev.kind != Kind::NoCache {
                self.dev.flush(Owner::Nobody, Vec::new());
                let last = self.dev.flying.len() - 1;
                self.dev.complete(last);
            }
            self.cuts()?;
        }
        let files = found(&self.dev, &recover(&self.dev, &self.rules).pages)?;
        self.oracle.check(&files)?;
        let bytes = self.writer.next_byte();
        (self.writer, self.oracle) = mounted(&self.dev, &self.rules, bytes);
        Ok(())
    }

    /// An orderly unload, a session of SPDK, and a mount.
    fn away(&mut self) -> Result<bool, String> {
        if !self.dev.flying.is_empty() || self.writer.halted() || !self.writer.idle(&self.rules) {
            return Ok(false);
        }
        let Verdict {
            head, slot, epoch, ..
        } = recover(&self.dev, &self.rules);
        let mut writes = Vec::new();
        let mut pages = self.writer.pages().to_vec();
        let there: Vec<Option<Page>> = pages.iter().cloned().map(Some).collect();
        self.oracle.check(&found(&self.dev, &there)?)?;
        if self.rng.below(2) == 0 {
            let id = self.rng.below(PAGES);
            pages[id] = None;
        }
        for (id, page) in pages.iter().enumerate() {
            writes.extend(page_cells(id, page));
        }
        let epoch = if self.rules.new_epoch_at_mount {
            let head = Head {
                epoch: epoch + 1,
                turn: head.turn + 1,
                pos: 0,
                seq: 1,
                pred: 0,
                upto: 0,
            };
            writes.push((HEADS + slot, Cell::Head(head)));
            epoch + 1
        } else {
            epoch
        };
        writes.push((SUPER, Cell::Super { guard: true, epoch }));
        self.dev.put(&writes);
        let bytes = self.writer.next_byte();
        // The promise is about what SPDK has left; the writer takes the journal to be empty.
        let there: Vec<Option<Page>> = pages.into_iter().map(Some).collect();
        let files = found(&self.dev, &there).expect("it was in order");
        self.oracle = Oracle::rebase(&files);
        let mut verdict = recover(&self.dev, &self.rules);
        verdict.pages = there;
        (verdict.pos, verdict.seq, verdict.pred) =
            (verdict.head.pos, verdict.head.seq, verdict.head.pred);
        self.writer = writer_of(&self.dev, &verdict, bytes);
        Ok(true)
    }

    /// Lets one thing happen.
    fn step(&mut self) -> Result<bool, String> {
        let World {
            dev,
            writer: w,
            oracle: o,
            rules,
            rng,
            ..
        } = self;
        let r = &rules.clone();
        let id = rng.below(PAGES);
        let what = rng.below(100);
        if w.halted() && what < 60 {
            return Ok(false);
        }
        let (name, did) = match what {
            0..8 => {
                let name = u8::try_from(rng.below(3)).expect("few");
                (format!("create {name}"), w.create(dev, o, r, name))
            }
            8..22 => {
                let n = 1 + rng.below(2);
                (
                    format!("append {n} bytes to blob {id}"),
                    w.append(o, id, n, false),
                )
            }
            22 | 23 => (
                format!("append a zero to blob {id}"),
                w.append(o, id, 1, true),
            ),
            24..28 => {
                let at = rng.below(FC * CB * BB);
                (
                    format!("overwrite byte {at} of blob {id}"),
                    w.overwrite(o, id, at),
                )
            }
            28..37 => (
                format!("sync blob {id}, carried"),
                w.sync(dev, o, r, &[id], true),
            ),
            37..44 => (
                format!("sync blob {id}, in parallel"),
                w.sync(dev, o, r, &[id], false),
            ),
            44 | 45 => {
                let other = (id + 1) % PAGES;
                (
                    format!("sync blobs {id} and {other}, in parallel"),
                    w.sync(dev, o, r, &[id, other], false),
                )
            }
            46..49 => {
                let len = rng.below(FC * CB * BB);
                (
                    format!("truncate blob {id} to {len}"),
                    w.truncate(dev, o, r, id, len),
                )
            }
            49 | 50 => (format!("unlink blob {id}"), w.unlink(dev, o, r, id, None)),
            51 => {
                let by = (id + 1) % PAGES;
                (
                    format!("rename blob {by} over blob {id}"),
                    w.unlink(dev, o, r, id, Some(by)),
                )
            }
            52..60 => {
                let block = rng.below(FC * CB);
                (
                    format!("write behind: block {block} of blob {id}"),
                    w.write_behind(dev, r, id, block),
                )
            }
            60 => ("flush".into(), w.flush(dev)),
            61 | 62 => ("marker batch".into(), w.marker(dev, r)),
            63 => (format!("revoke for blob {id}"), w.revoke(dev, r, id)),
            64 => (
                format!("carry again what blob {id} is owed"),
                w.carry_again(dev, r, id),
            ),
            65..70 => ("begin a checkpoint".into(), w.begin_checkpoint(dev, r)),
            70 if !dev.flying.is_empty() => {
                let index = rng.below(dev.flying.len());
                let landed: Vec<bool> = dev.flying[index]
                    .writes
                    .iter()
                    .map(|_| rng.below(2) == 0)
                    .collect();
                let addrs: Vec<usize> = dev.flying[index].writes.iter().map(|(a, _)| *a).collect();
                (
                    format!("the write at {addrs:?} fails, landed {landed:?}"),
                    w.fail(dev, r, index, &landed),
                )
            }
            71 if !r.no_retry_in_flight && !dev.flying.is_empty() => {
                let index = rng.below(dev.flying.len());
                let data =
                    dev.flying[index].owner == Owner::Behind && dev.flying[index].flush.is_none();
                if data {
                    dev.flying[index].owner = Owner::Nobody;
                    dev.flying[index].places.clear();
                }
                ("a write behind is taken for aborted".into(), data)
            }
            72 if rng.below(3) == 0 => {
                self.trace.push("power cut and mount".into());
                self.crash(true)?;
                return Ok(true);
            }
            73 | 74 if rng.below(2) == 0 => {
                self.trace.push("kill -9 and mount".into());
                self.crash(false)?;
                return Ok(true);
            }
            75 | 76 => ("unload, SPDK, mount".into(), self.away()?),
            77.. if !dev.flying.is_empty() => {
                let index = rng.below(dev.flying.len());
                let op = dev.complete(index);
                let addrs: Vec<usize> = op.writes.iter().map(|(a, _)| *a).collect();
                let name = format!("complete {:?} {addrs:?}", op.owner);
                w.completed(dev, o, r, &op);
                (name, true)
            }
            _ => return Ok(false),
        };
        if did {
            self.trace.push(name);
            self.cuts()?;
        }
        Ok(did)
    }
}

/// Memory and promise after a mount.
fn mounted(dev: &Device, rules: &Rules, bytes: u16) -> (Writer, Oracle) {
    let verdict = recover(dev, rules);
    let files = found(dev, &verdict.pages).unwrap_or_default();
    (writer_of(dev, &verdict, bytes), Oracle::rebase(&files))
}

fn writer_of(dev: &Device, verdict: &Verdict, bytes: u16) -> Writer {
    let upto = verdict.seq - 1;
    let head = Head {
        pos: verdict.pos,
        seq: verdict.seq,
        pred: verdict.pred,
        upto,
        ..verdict.head
    };
    let turn = verdict.head.turn;
    Writer::new(
        dev,
        verdict,
        Head {
            turn,
            epoch: verdict.epoch,
            ..head
        },
        verdict.slot,
        bytes,
    )
}

fn walk(kind: Kind, rules: &Rules, seed: u64, steps: usize) -> (u64, Option<Broken>) {
    let mut world = World::new(kind, rules, seed);
    let mut done = 0;
    for _ in 0..steps * 6 {
        match world.step() {
            Ok(did) => done += usize::from(did),
            Err(what) => {
                let trace = std::mem::take(&mut world.trace);
                return (world.states, Some(Broken { what, trace }));
            }
        }
        if done >= steps {
            break;
        }
    }
    (world.states, None)
}

pub const KINDS: [Kind; 3] = [Kind::NoCache, Kind::Fua, Kind::FlushOnly];

/// Walks until `budget` states have been checked, or enough walks are broken. Returns the states checked, the
/// states until the first broken walk, how many were broken, and the shortest.
pub fn search(
    rules: &Rules,
    budget: u64,
    enough: u64,
) -> (u64, u64, u64, Option<(Kind, u64, Broken)>) {
    let (mut states, mut first, mut broken, mut best) = (0, 0, 0, None::<(Kind, u64, Broken)>);
    let mut seed = 0;
    while states < budget && broken < enough {
        for kind in KINDS {
            let (n, result) = walk(kind, rules, seed, 60);
            states += n;
            let Some(result) = result else { continue };
            if broken == 0 {
                first = states;
            }
            broken += 1;
            if best
                .as_ref()
                .is_none_or(|(_, _, b)| b.trace.len() > result.trace.len())
            {
                best = Some((kind, seed, result));
            }
        }
        seed += 1;
    }
    (states, first, broken, best)
}

/// Counts what happens in walks of the whole protocol, so that one can see that something does.
pub fn coverage(walks: u64) {
    let mut counts = std::collections::BTreeMap::<String, u64>::new();
    let mut laps = 0;
    for seed in 0..walks {
        for kind in KINDS {
            let mut world = World::new(kind, &Rules::all(), seed);
            for _ in 0..360 {
                world.step().expect("the whole protocol holds");
            }
            laps += world.writer.laps();
            for what in &world.trace {
                let words: Vec<&str> = what.split([' ', '(']).take(2).collect();
                *counts.entry(words.join(" ")).or_default() += 1;
            }
        }
    }
    println!(
        "{} walks, the last writers' laps of the ring {laps}",
        3 * walks
    );
    counts.iter().for_each(|(what, n)| println!("{n:8} {what}"));
}
