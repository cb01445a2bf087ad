//! Tests of queue pairs: depth, number, waiting, memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_io::dma::DmaBuf;
use pumice_nvme::queue::{QueueOptions, QueuePair};
use pumice_nvme::spec::QueuePriority;
use pumice_nvme::{Namespace, NvmeError, Op, SubmitError};

use super::{Bench, Entry, Outcome, check, fail, pattern, read, same, settle, skip, submit, write};

pub(super) const TESTS: &[Entry] = &[
    ("depth_is_kept", depth),
    ("ring_wraps", wraps),
    ("batches_share_a_doorbell", batches),
    ("all_queues", all),
    ("queues_come_and_go", come_and_go),
    ("dropped_with_io_in_flight", dropped),
    ("sleeping", sleeping),
    ("interrupt_off_while_polling", interrupt_off_while_polling),
    ("controller_memory_queue", controller_memory),
    ("priorities", priorities),
    ("latency_histogram", histogram),
];

fn depth(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let size = ns.block_size() as usize;
    for depth in [1u16, 2, 5, 31] {
        let mut q = b.queue(depth)?;
        // The queue is shorter where the controller's queues are.
        let most = u64::from(b.controller.capabilities().mqes_z());
        check(q.depth() as u64 == u64::from(depth).min(most), || {
            format!("depth {}", q.depth())
        })?;
        let depth = u16::try_from(q.depth()).unwrap_or(depth);
        for n in 0..depth {
            let io = Op::Read {
                lba: u64::from(n),
                buf: DmaBuf::new(size)?,
            };
            if q.submit(&ns, u64::from(n), io).is_err() {
                return fail(format!("I/O {n} of {depth} refused"));
            }
        }
        let io = Op::Read {
            lba: 0,
            buf: DmaBuf::new(size)?,
        };
        match q.submit(&ns, 99, io) {
            Err(SubmitError::Busy(Op::Read { .. })) => {}
            other => return fail(format!("one more than {depth}: {other:?}")),
        }
        let mut out = Vec::new();
        settle(&mut q, &mut out)?;
        let mut tags: Vec<u64> = out.iter().map(|d| d.tag).collect();
        tags.sort_unstable();
        check(tags == (0..u64::from(depth)).collect::<Vec<_>>(), || {
            format!("tags {tags:?}")
        })?;
        check(out.iter().all(|d| d.result.is_ok()), || "an error".into())?;
    }
    Ok(())
}

fn wraps(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let size = ns.block_size() as usize;
    let mut q = b.queue(3)?;
    let mut out = Vec::new();
    for n in 0..200 {
        let data = pattern(&ns, n % 50, 1, n)?.freeze();
        submit(
            &mut q,
            &ns,
            n,
            Op::Write {
                lba: n % 50,
                data,
                fua: false,
            },
            &mut out,
        )?;
        // Two writes of one block are never in flight together.
        if n % 50 == 49 {
            settle(&mut q, &mut out)?;
        }
    }
    settle(&mut q, &mut out)?;
    check(out.len() == 200, || format!("{} ended", out.len()))?;
    for lba in 0..50 {
        let got = read(&mut q, &ns, lba, 1)?;
        same(
            &format!("block {lba}"),
            &got,
            &pattern(&ns, lba, 1, 150 + lba)?,
        )?;
    }
    check(size > 0, String::new)
}

fn batches(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut q = b.queue(64)?;
    let before = q.stats().sq_doorbells;
    for n in 0..q.depth().min(32) as u64 {
        let io = Op::Read {
            lba: n,
            buf: DmaBuf::new(ns.block_size() as usize)?,
        };
        if q.submit(&ns, n, io).is_err() {
            return fail("refused");
        }
    }
    let mut out = Vec::new();
    q.poll(&mut out);
    let rings = q.stats().sq_doorbells - before;
    settle(&mut q, &mut out)?;
    check(rings <= 1, || {
        format!("{rings} doorbell writes for one batch")
    })
}

fn all(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut queues = Vec::new();
    let limit = b.controller.queue_limit();
    loop {
        match b.controller.queue_pair(&QueueOptions::default().depth(4)) {
            Ok(q) => queues.push(q),
            Err(NvmeError::NoQueues { .. }) => break,
            Err(other) => return Err(other.into()),
        }
        check(queues.len() <= usize::from(limit), || {
            "more than granted".into()
        })?;
    }
    for (n, q) in queues.iter_mut().enumerate() {
        let lba = n as u64;
        write(q, &ns, lba, pattern(&ns, lba, 1, b.seed)?.freeze(), false)?;
    }
    for (n, q) in queues.iter_mut().rev().enumerate() {
        let lba = u64::from(limit) - 1 - n as u64;
        let got = read(q, &ns, lba, 1)?;
        same(
            &format!("queue {}", q.qid()),
            &got,
            &pattern(&ns, lba, 1, b.seed)?,
        )?;
    }
    Ok(())
}

fn come_and_go(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    for n in 0..30 {
        let mut q = b.queue(1 + n % 9)?;
        check(q.qid() == 1, || {
            format!("identifier {} was not given back", q.qid())
        })?;
        read(&mut q, &ns, 0, 1)?;
    }
    Ok(())
}

fn dropped(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    for _ in 0..5 {
        let mut q = b.queue(32)?;
        for n in 0..q.depth() as u64 {
            let io = Op::Read {
                lba: n,
                buf: DmaBuf::new(ns.block_size() as usize)?,
            };
            if q.submit(&ns, n, io).is_err() {
                return fail("refused");
            }
        }
        let mut out = Vec::new();
        q.poll(&mut out);
    }
    let mut q = b.queue(4)?;
    read(&mut q, &ns, 0, 1).map(|_| ())
}

fn sleeping(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut options = QueueOptions::default().depth(4);
    // The queue never spins: every wait is a sleep.
    options.spin_max = Duration::ZERO;
    let mut q = b.controller.queue_pair(&options)?;
    reads_asleep(&mut q, &ns, 100)
}

/// Reads one block after the other and sleeps for each.
fn reads_asleep(q: &mut QueuePair, ns: &Namespace, count: u32) -> Outcome {
    let start = Instant::now();
    let mut out = Vec::new();
    for n in 0..u64::from(count) {
        let io = Op::Read {
            lba: n,
            buf: DmaBuf::new(ns.block_size() as usize)?,
        };
        submit(q, ns, n, io, &mut out)?;
        while q.in_flight() > 0 {
            q.wait(Duration::from_secs(5))?;
            q.poll(&mut out);
        }
    }
    check(out.len() == count as usize, || {
        format!("{} ended", out.len())
    })?;
    // Each lost wake-up would cost half a second.
    check(start.elapsed() < Duration::from_millis(450) * count, || {
        format!("{count} I/Os took {:?} asleep", start.elapsed())
    })
}

/// Reads by polling only, for so long that the interrupt is off where the transport supports that.
/// `is_on` says that it is certainly on now.
fn reads_polled(q: &mut QueuePair, ns: &Namespace, is_on: bool) -> Outcome {
    let (switches, mut out) = (q.stats().interrupt_switches, Vec::new());
    for n in 0..1500u64 {
        let io = Op::Read {
            lba: n % 8,
            buf: DmaBuf::new(ns.block_size() as usize)?,
        };
        submit(q, ns, n, io, &mut out)?;
        while q.in_flight() > 0 {
            q.poll(&mut out);
        }
        out.clear();
    }
    let switches = q.stats().interrupt_switches - switches;
    let can = q.controller().transport_kind() == "vfio" && q.controller().interrupt_count() > 1;
    let want = u64::from(can);
    check(switches == want || (!is_on && switches == 0), || {
        format!("the interrupt was switched {switches} times")
    })
}

fn interrupt_off_while_polling(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut options = QueueOptions::default().depth(4);
    options.spin_max = Duration::ZERO;
    let mut q = b.controller.queue_pair(&options)?;
    reads_polled(&mut q, &ns, true)?;
    reads_asleep(&mut q, &ns, 20)?;
    // The interrupt is on again for the vector's next user. With a device that always completed
    // before the sleep it may have stayed off.
    reads_polled(&mut q, &ns, false)?;
    drop(q);
    let mut q = b.controller.queue_pair(&options)?;
    reads_asleep(&mut q, &ns, 20)?;
    // The interrupt is on after a reset too.
    reads_polled(&mut q, &ns, true)?;
    b.controller.reset()?;
    reads_asleep(&mut q, &ns, 20)
}

fn controller_memory(b: &Bench) -> Outcome {
    if !b.controller.capabilities().cmbs() {
        return skip("no controller memory buffer");
    }
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut options = QueueOptions::default().depth(15);
    options.controller_memory = true;
    let mut q = b.controller.queue_pair(&options)?;
    if !q.in_controller_memory() {
        return skip("the buffer takes no submission queue");
    }
    for n in 0..100 {
        write(&mut q, &ns, n, pattern(&ns, n, 1, b.seed)?.freeze(), false)?;
        same(
            "through the CMB",
            &read(&mut q, &ns, n, 1)?,
            &pattern(&ns, n, 1, b.seed)?,
        )?;
    }
    Ok(())
}

fn priorities(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    if b.controller.queue_limit() < 3 {
        return skip("fewer than three queues");
    }
    let mut queues = Vec::new();
    for priority in [
        QueuePriority::HIGH,
        QueuePriority::MEDIUM,
        QueuePriority::LOW,
    ] {
        let mut options = QueueOptions::default().depth(16);
        options.priority = priority;
        queues.push(b.controller.queue_pair(&options)?);
    }
    for (n, q) in queues.iter_mut().enumerate() {
        let lba = 10 * n as u64;
        write(q, &ns, lba, pattern(&ns, lba, 4, b.seed)?.freeze(), false)?;
        same(
            "by class",
            &read(q, &ns, lba, 4)?,
            &pattern(&ns, lba, 4, b.seed)?,
        )?;
    }
    Ok(())
}

fn histogram(b: &Bench) -> Outcome {
    let ns = Arc::clone(&b.namespaces()?[0]);
    let mut options = QueueOptions::default().depth(4);
    options.histogram = true;
    let mut q = b.controller.queue_pair(&options)?;
    for n in 0..20 {
        read(&mut q, &ns, n, 1)?;
    }
    match q.histogram() {
        Some(h) if h.len() == 20 && h.min() > 0 => Ok(()),
        Some(h) => fail(format!("{} latencies, least {} ns", h.len(), h.min())),
        None => fail("no histogram"),
    }
}
