//! Tests under load: random I/O against a model, several threads, resets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pumice_nvme::queue::QueuePair;
use pumice_nvme::{Completion, IoErrorKind, Namespace, Op};

use super::model::Model;
use super::{Bench, Entry, Outcome, Random, Stop, check, fail, read, same, settle, submit};

pub(super) const TESTS: &[Entry] = &[
    ("random_io", random_io),
    ("two_threads", two_threads),
    ("reset_idle", reset_idle),
    ("reset_under_load", reset_under_load),
];

/// Compares the result of a finished I/O with the model.
fn account(
    model: &mut Model,
    done: Completion,
    places: &mut std::collections::HashMap<u64, (u64, u64)>,
) -> Result<Option<(u64, u64)>, Stop> {
    let Some((lba, blocks)) = places.remove(&done.tag) else {
        return fail(format!("tag {} was handed back twice", done.tag));
    };
    if let Err(error) = done.result {
        return fail(error.to_string());
    }
    let mut check_again = None;
    match &done.op {
        Op::Read { buf, .. } => same(
            &format!("blocks {lba}+{blocks}"),
            buf,
            model.bytes(lba, blocks),
        )?,
        Op::Unmap { .. } => check_again = Some((lba, blocks)),
        _ => {}
    }
    if check_again.is_none() {
        model.release(lba, blocks);
    }
    Ok(check_again)
}

fn random_run(
    q: &mut QueuePair,
    ns: &Namespace,
    base: u64,
    blocks: u64,
    seed: u64,
    count: u64,
) -> Outcome {
    let mut random = Random::new(seed);
    let mut model = Model::new(ns, base, blocks);
    let size = ns.block_size() as usize;
    let zeroes = pumice_io::dma::DmaBuf::zeroed(usize::try_from(blocks).unwrap_or(0) * size)?;
    super::write(q, ns, base, zeroes.freeze(), false)?;
    let mut places = std::collections::HashMap::new();
    let mut out = Vec::new();
    for tag in 0..count {
        let Some((io, lba, n)) = model.next(ns, &mut random, 300)? else {
            continue;
        };
        places.insert(tag, (lba, n));
        submit(q, ns, tag, io, &mut out)?;
        if random.below(3) == 0 {
            q.poll(&mut out);
        }
        let done: Vec<Completion> = std::mem::take(&mut out);
        for item in done {
            if let Some((lba, n)) = account(&mut model, item, &mut places)? {
                let mut others = Vec::new();
                settle(q, &mut others)?;
                out.extend(others);
                let got = read(q, ns, lba, usize::try_from(n).unwrap_or(0))?;
                model.adopt(lba, &got)?;
                model.release(lba, n);
            }
        }
    }
    settle(q, &mut out)?;
    for item in out {
        if let Some((lba, n)) = account(&mut model, item, &mut places)? {
            let got = read(q, ns, lba, usize::try_from(n).unwrap_or(0))?;
            model.adopt(lba, &got)?;
        }
    }
    check(places.is_empty(), || {
        format!("{} I/Os were not handed back", places.len())
    })?;
    let all = read(q, ns, base, usize::try_from(blocks).unwrap_or(0))?;
    same(&format!("seed {seed}"), &all, model.bytes(base, blocks))
}

fn random_io(b: &Bench) -> Outcome {
    for ns in b.namespaces()? {
        let mut q = b.queue(16)?;
        let blocks = (ns.num_blocks() / 2).min(1024);
        random_run(&mut q, &ns, 0, blocks, b.seed ^ u64::from(ns.nsid()), 300)?;
    }
    Ok(())
}

fn two_threads(b: &Bench) -> Outcome {
    if b.controller.queue_limit() < 2 {
        return super::skip("only one queue");
    }
    let ns = Arc::clone(&b.namespaces()?[0]);
    let blocks = (ns.num_blocks() / 4).min(512);
    let results: Vec<Outcome> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..2u64)
            .map(|t| {
                let ns = Arc::clone(&ns);
                scope.spawn(move || {
                    let mut q = b.queue(8)?;
                    random_run(&mut q, &ns, t * blocks, blocks, b.seed + t, 200)
                })
            })
            .collect();
        handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| fail("a thread panicked")))
            .collect()
    });
    results.into_iter().collect()
}

fn reset_idle(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut q = b.queue(8)?;
    super::write(
        &mut q,
        &ns,
        2,
        super::pattern(&ns, 2, 2, b.seed)?.freeze(),
        true,
    )?;
    let before = b.controller.generation();
    for _ in 0..3 {
        b.controller.reset()?;
        let got = read(&mut q, &ns, 2, 2)?;
        same("after a reset", &got, &super::pattern(&ns, 2, 2, b.seed)?)?;
    }
    check(b.controller.generation() >= before + 3, || {
        "no reset happened".into()
    })?;
    check(q.stats().resets == 3, || {
        format!("the queue saw {} resets", q.stats().resets)
    })
}

/// Writes and reads continue while the controller is reset repeatedly. Every I/O ends once, with
/// success or as aborted, and no block ever shows content that was not written to it.
fn reset_under_load(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let size = ns.block_size() as usize;
    let stop = AtomicBool::new(false);
    let ended = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| -> Outcome {
            let mut q = b.queue(16)?;
            let mut random = Random::new(b.seed);
            // Last version written to each block, and the one before (of an aborted write).
            let mut versions = [0u64; 64];
            super::write(
                &mut q,
                &ns,
                0,
                pumice_io::dma::DmaBuf::zeroed(64 * size)?.freeze(),
                false,
            )?;
            let mut out: Vec<Completion> = Vec::new();
            let mut version = 0;
            while !stop.load(Ordering::Relaxed) {
                let mut used = [false; 64];
                let mut sent = 0;
                for _ in 0..12 {
                    let block = usize::try_from(random.below(64)).unwrap_or(0);
                    if std::mem::replace(&mut used[block], true) {
                        continue;
                    }
                    sent += 1;
                    let io = if random.below(2) == 0 {
                        version += 1;
                        versions[block] = version;
                        let mut data = pumice_io::dma::DmaBuf::new(size)?;
                        for word in data.as_chunks_mut::<8>().0 {
                            *word = version.to_le_bytes();
                        }
                        Op::Write {
                            lba: block as u64,
                            data: data.freeze(),
                            fua: false,
                        }
                    } else {
                        Op::Read {
                            lba: block as u64,
                            buf: pumice_io::dma::DmaBuf::new(size)?,
                        }
                    };
                    submit(&mut q, &ns, block as u64, io, &mut out)?;
                }
                settle(&mut q, &mut out)?;
                check(out.len() == sent, || {
                    format!("{sent} sent, {} ended", out.len())
                })?;
                for done in out.drain(..) {
                    ended.fetch_add(1, Ordering::Relaxed);
                    match &done.result {
                        Ok(()) => {}
                        Err(e) if e.kind == IoErrorKind::Aborted => {
                            return fail(format!("retries used up: {e}"));
                        }
                        Err(e) => return fail(e.to_string()),
                    }
                    if let Op::Read { lba, buf } = &done.op {
                        let want = versions[usize::try_from(*lba).unwrap_or(0)];
                        let whole = buf
                            .as_chunks::<8>()
                            .0
                            .iter()
                            .all(|w| u64::from_le_bytes(*w) == want);
                        check(whole, || format!("block {lba} is not version {want}"))?;
                    }
                }
            }
            Ok(())
        });
        let mut result = Ok(());
        for _ in 0..5 {
            let mark = ended.load(Ordering::Relaxed);
            let start = std::time::Instant::now();
            while ended.load(Ordering::Relaxed) < mark + 100
                && start.elapsed() < Duration::from_secs(10)
                && !worker.is_finished()
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            if let Err(error) = b.controller.reset() {
                result = fail(error.to_string());
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        worker
            .join()
            .unwrap_or_else(|_| fail("the worker panicked"))
            .and(result)
    })
}
