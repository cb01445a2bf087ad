//! Short stories, tried exhaustively: every order in which the device can complete what is on its way, in
//! every interleaving with the story, and at every point every combination of blocks that a power cut can
//! leave (up to a limit; beyond it a sample).

use crate::device::{Device, Kind, Owner};
use crate::oracle::Oracle;
use crate::rules::Rules;
use crate::world::{Rng, World, check};
use crate::writer::Writer;

#[derive(Clone, Copy, Debug)]
pub enum Act {
    Create(u8),
    Append(usize, usize),
    Gap(usize),
    Overwrite(usize, usize),
    Carry(usize),
    Parallel(usize),
    Both(usize, usize),
    Truncate(usize, usize),
    Unlink(usize),
    RenameOver(usize, usize),
    Behind(usize, usize),
    Revoke(usize),
    Checkpoint,
    /// A write-behind is taken for aborted (only without rule 17).
    Forget,
    /// Everything on its way completes, in order; what stands before is not interleaved.
    Settle,
}
use Act::*;

pub const STORIES: &[(&str, &[Act])] = &[
    (
        "write-behind races with a later sync of the block",
        &[
            Create(0),
            Settle,
            Append(0, 1),
            Carry(0),
            Behind(0, 0),
            Append(0, 1),
            Carry(0),
            Behind(0, 0),
            Checkpoint,
        ],
    ),
    (
        "append, carry, truncate, append again",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Carry(0),
            Truncate(0, 0),
            Append(0, 2),
            Behind(0, 0),
            Parallel(0),
        ],
    ),
    (
        "append in parallel, truncate, append again",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Parallel(0),
            Truncate(0, 1),
            Append(0, 1),
            Parallel(0),
        ],
    ),
    (
        "unlink with owed bytes; id and clusters used again",
        &[
            Create(0),
            Append(0, 2),
            Carry(0),
            Settle,
            Unlink(0),
            Checkpoint,
            Create(1),
            Append(0, 2),
            Carry(0),
            Behind(0, 0),
        ],
    ),
    (
        "unlink right behind a parallel sync; reuse",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Parallel(0),
            Unlink(0),
            Create(1),
            Append(1, 2),
            Behind(1, 0),
            Carry(1),
        ],
    ),
    (
        "rename over, both with owed bytes",
        &[
            Create(0),
            Append(0, 1),
            Carry(0),
            Settle,
            Create(1),
            Append(1, 2),
            Carry(1),
            RenameOver(1, 0),
            Behind(1, 0),
            Checkpoint,
        ],
    ),
    (
        "recycled log",
        &[
            Create(0),
            Append(0, 2),
            Carry(0),
            Settle,
            Overwrite(0, 0),
            Behind(0, 0),
            Revoke(0),
            Behind(0, 0),
            Carry(0),
        ],
    ),
    (
        "recycled log, its bytes in place",
        &[
            Create(0),
            Append(0, 2),
            Carry(0),
            Behind(0, 0),
            Settle,
            Overwrite(0, 0),
            Revoke(0),
            Behind(0, 0),
            Parallel(0),
        ],
    ),
    (
        "recycled log, its bytes in place, no revocation",
        &[
            Create(0),
            Append(0, 2),
            Carry(0),
            Behind(0, 0),
            Settle,
            Overwrite(0, 0),
            Behind(0, 0),
            Parallel(0),
        ],
    ),
    (
        "overwritten while its parallel sync is on its way",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Parallel(0),
            Overwrite(0, 0),
            Carry(0),
            Behind(0, 0),
        ],
    ),
    (
        "checkpoint between carried syncs",
        &[
            Create(0),
            Append(0, 1),
            Settle,
            Carry(0),
            Checkpoint,
            Append(0, 1),
            Carry(0),
            Behind(0, 0),
            Checkpoint,
            Checkpoint,
        ],
    ),
    (
        "group of two in parallel",
        &[
            Create(0),
            Create(1),
            Append(0, 1),
            Append(1, 1),
            Settle,
            Both(0, 1),
            Append(0, 1),
            Carry(0),
        ],
    ),
    (
        "gap",
        &[
            Create(0),
            Append(0, 1),
            Settle,
            Parallel(0),
            Gap(0),
            Append(0, 1),
            Carry(0),
            Behind(0, 1),
        ],
    ),
    (
        "write-behind taken for aborted, then a sync",
        &[
            Create(0),
            Append(0, 1),
            Settle,
            Behind(0, 0),
            Forget,
            Append(0, 1),
            Parallel(0),
        ],
    ),
    (
        "a cluster used again while a write-behind is on its way",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Behind(0, 0),
            Truncate(0, 0),
            Create(1),
            Append(1, 2),
            Carry(1),
            Behind(1, 0),
            Checkpoint,
        ],
    ),
    (
        "write-behind, then a sync in parallel",
        &[
            Create(0),
            Append(0, 2),
            Settle,
            Behind(0, 0),
            Append(0, 2),
            Parallel(0),
            Checkpoint,
        ],
    ),
];

fn act(w: &mut Writer, dev: &mut Device, o: &mut Oracle, r: &Rules, what: Act) -> bool {
    match what {
        Create(name) => w.create(dev, o, r, name),
        Append(id, n) => w.append(o, id, n, false),
        Gap(id) => w.append(o, id, 1, true),
        Overwrite(id, at) => w.overwrite(o, id, at),
        Carry(id) => w.sync(dev, o, r, &[id], true),
        Parallel(id) => w.sync(dev, o, r, &[id], false),
        Both(a, b) => w.sync(dev, o, r, &[a, b], false),
        Truncate(id, len) => w.truncate(dev, o, r, id, len),
        Unlink(id) => w.unlink(dev, o, r, id, None),
        RenameOver(by, over) => w.unlink(dev, o, r, over, Some(by)),
        Behind(id, block) => w.write_behind(dev, r, id, block),
        Revoke(id) => w.revoke(dev, r, id),
        Checkpoint => w.begin_checkpoint(dev, r),
        Forget => {
            let behind = dev
                .flying
                .iter_mut()
                .find(|op| op.owner == Owner::Behind && op.flush.is_none());
            let Some(op) = behind.filter(|_| !r.no_retry_in_flight) else {
                return false;
            };
            op.owner = Owner::Nobody;
            op.places.clear();
            true
        }
        Settle => true,
    }
}

/// Every power cut here.
fn every_cut(world: &mut World) -> Result<(), String> {
    const LIMIT: usize = 64;
    let sizes: Vec<usize> = world.dev.choices().iter().map(|(_, c)| c.len()).collect();
    let all = sizes
        .iter()
        .try_fold(1usize, |n, s| n.checked_mul(*s))
        .unwrap_or(usize::MAX);
    for n in 0..all.min(LIMIT) {
        let mut k = n;
        let rng = &mut world.rng;
        let cut = world.dev.cut(|size| {
            let i = if all <= LIMIT {
                k % size
            } else {
                rng.below(size)
            };
            k /= size;
            i
        });
        check(
            &cut,
            &world.rules,
            &world.oracle,
            &mut world.rng,
            usize::from(n % 8 == 0),
            &mut world.states,
        )?;
    }
    Ok(())
}

fn complete(world: &mut World, index: usize) {
    let op = world.dev.complete(index);
    world.trace.push(format!(
        "complete {:?} {:?}",
        op.owner,
        op.writes.iter().map(|(a, _)| *a).collect::<Vec<_>>()
    ));
    world
        .writer
        .completed(&mut world.dev, &mut world.oracle, &world.rules.clone(), &op);
}

fn go(world: &World, story: &[Act], budget: &mut u64) -> Result<u64, (String, Vec<String>)> {
    let mut states = 0;
    if let Some((first, rest)) = story.split_first() {
        let mut next = world.fork();
        let r = next.rules.clone();
        if act(
            &mut next.writer,
            &mut next.dev,
            &mut next.oracle,
            &r,
            *first,
        ) {
            next.trace.push(format!("{first:?}"));
            every_cut(&mut next).map_err(|e| (e, next.trace.clone()))?;
            states += next.states;
            next.states = 0;
            states += go(&next, rest, budget)?;
        } else if next.dev.flying.is_empty() {
            states += go(&next, rest, budget)?;
        }
    }
    for index in 0..world.dev.flying.len() {
        if *budget == 0 {
            break;
        }
        *budget -= 1;
        let mut next = world.fork();
        complete(&mut next, index);
        every_cut(&mut next).map_err(|e| (e, next.trace.clone()))?;
        states += next.states;
        next.states = 0;
        states += go(&next, story, budget)?;
    }
    Ok(states)
}

/// Tries a story. Returns the number of states, or the broken promise and how it came to that.
pub fn tell(
    kind: Kind,
    rules: &Rules,
    story: &[Act],
    budget: u64,
) -> Result<u64, (String, Vec<String>)> {
    let mut world = World::new(kind, rules, 1);
    let settle = story.iter().position(|a| matches!(a, Settle)).unwrap_or(0);
    for first in &story[..settle] {
        let r = rules.clone();
        act(
            &mut world.writer,
            &mut world.dev,
            &mut world.oracle,
            &r,
            *first,
        );
        while !world.dev.flying.is_empty() {
            complete(&mut world, 0);
        }
    }
    let mut budget = budget;
    go(&world, &story[settle..], &mut budget)
}

/// A generator for a fork: the same numbers again, so that a story is told the same way each time.
pub fn rng() -> Rng {
    Rng::new(1)
}

/// Rule 23: the write-behind of one file fails for ever. How many syncs of another file does the ring take,
/// as it is, and if the owed bytes are carried again when it is full?
pub fn pinned(rules: &Rules) {
    for again in [false, true] {
        let mut world = World::new(Kind::NoCache, rules, 1);
        let r = rules.clone();
        let World {
            dev,
            writer: w,
            oracle: o,
            ..
        } = &mut world;
        let settle = |w: &mut Writer, dev: &mut Device, o: &mut Oracle| {
            while !dev.flying.is_empty() {
                let op = dev.complete(0);
                w.completed(dev, o, &r, &op);
            }
        };
        for what in [Create(0), Create(1), Append(0, 1), Carry(0), Append(1, 1)] {
            act(w, dev, o, &r, what);
            settle(w, dev, o);
        }
        let mut syncs = 0;
        while syncs < 1000 {
            act(w, dev, o, &r, Overwrite(1, 0));
            if !act(w, dev, o, &r, Carry(1)) {
                break;
            }
            syncs += 1;
            settle(w, dev, o);
            act(w, dev, o, &r, Behind(1, 0));
            settle(w, dev, o);
            // It chooses what it covers; what is carried again stands behind that.
            act(w, dev, o, &r, Checkpoint);
            if again {
                w.carry_again(dev, &r, 0);
                settle(w, dev, o);
                act(w, dev, o, &r, Checkpoint);
            }
            settle(w, dev, o);
        }
        let how = if again {
            "owed bytes carried again"
        } else {
            "as it is"
        };
        println!(
            "write-behind of one file fails for ever, {how}: {syncs} syncs of another until the ring is stuck (1000: never)"
        );
    }
}
