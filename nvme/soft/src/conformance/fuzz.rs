//! Bodies of the fuzzers: a device that returns arbitrary bytes, and a caller that submits
//! arbitrary requests. They panic when an I/O does not end exactly once or takes too long. The fuzz
//! targets in `fuzz/` and a seeded run in the tests call them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pumice_io::dma::DmaBuf;
use pumice_nvme::controller::{Controller, ControllerOptions};
use pumice_nvme::queue::{QueueOptions, QueuePair};
use pumice_nvme::spec::{
    AdminOpcode, Command, Completion, IdentifyNamespace, IoOpcode, Status, ascii, decode,
    ns_descriptors, ns_list,
};
use pumice_nvme::{Completion as IoCompletion, IoErrorKind, Namespace, Op, SubmitError};
use zerocopy::FromBytes;

use crate::{Fault, FaultRule, MemoryBackend, SoftConfig, SoftController, SoftNamespace};

/// Bytes taken from the front. Zeroes follow when they are used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        (0..8).fold(0, |n, _| n << 8 | u64::from(self.byte()))
    }

    fn some(&mut self, most: usize) -> Vec<u8> {
        let n = (usize::from(self.byte()) * 16).min(most).min(self.0.len());
        let (now, rest) = self.0.split_at(n);
        self.0 = rest;
        now.to_vec()
    }
}

/// Time after which an operation counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);

fn quick(soft: &SoftController) -> Option<Arc<Controller>> {
    let mut options = ControllerOptions::default();
    options.admin_timeout = Duration::from_millis(30);
    options.queues = 2;
    options.vectors = 3;
    Controller::new(soft.transport(), options).ok()
}

fn queue(controller: &Arc<Controller>, depth: u16, retries: u8) -> Option<QueuePair> {
    let mut options = QueueOptions::default().depth(depth);
    options.timeout = Duration::from_millis(10);
    options.max_retries = retries;
    controller.queue_pair(&options).ok()
}

/// Polls until everything that was accepted has ended, each I/O once.
fn settle(q: &mut QueuePair, mut open: HashSet<u64>, mut out: Vec<IoCompletion>) {
    let start = Instant::now();
    loop {
        for done in out.drain(..) {
            assert!(open.remove(&done.tag), "tag {} ended twice", done.tag);
        }
        if q.in_flight() == 0 {
            break;
        }
        assert!(start.elapsed() < PATIENCE, "{} I/Os hang", q.in_flight());
        if q.poll(&mut out) == 0 && q.wait(Duration::from_millis(5)).is_err() {
            q.poll(&mut out);
        }
    }
    assert!(open.is_empty(), "{} I/Os were lost", open.len());
}

/// Tests the device side: arbitrary bytes in completions, Identify pages, lists and logs.
pub fn device(data: &[u8]) {
    parsers(data);
    let mut bytes = Bytes(data);
    let shape = bytes.byte();
    let backend = Box::new(MemoryBackend::new(1 << 20));
    let mut config = SoftConfig::new(vec![SoftNamespace::new(backend, 512)]);
    config.mdts = shape & 7;
    config.sgl = shape & 8 != 0;
    config.shadow_doorbells = shape & 16 != 0;
    config.timeout_500ms = 1;
    let Ok(soft) = SoftController::new(config) else {
        return;
    };
    for _ in 0..(shape >> 5) + 1 {
        let fault = match bytes.byte() % 8 {
            0 => Fault::Status(Status((bytes.word() & 0x7fff) as u16)),
            1 => Fault::WrongId,
            2 => Fault::WrongPhase,
            3 => Fault::Raw([bytes.word(), bytes.word()]),
            4 => Fault::Fatal,
            5 => Fault::Drop,
            _ => Fault::Data(bytes.some(4096)),
        };
        let (which, skip) = (bytes.byte(), u64::from(bytes.byte() % 8));
        let rule = match which % 8 {
            0..=3 => FaultRule::admin(
                [
                    AdminOpcode::IDENTIFY,
                    AdminOpcode::GET_LOG_PAGE,
                    AdminOpcode::CREATE_SQ,
                    AdminOpcode::SET_FEATURES,
                ][usize::from(which % 4)],
                fault,
            ),
            4 => FaultRule::io(IoOpcode::READ, fault),
            _ => FaultRule::any_io(fault),
        };
        soft.faults()
            .add(rule.after(skip).times(u64::from(which >> 6) + 1));
    }
    let Some(controller) = quick(&soft) else {
        return;
    };
    for ns in controller.namespaces() {
        assert!(ns.block_size().is_power_of_two());
        let Some(mut q) = queue(&controller, 4, 1) else {
            continue;
        };
        let mut open = HashSet::new();
        let mut out = Vec::new();
        for tag in 0..8 {
            if let Some(io) = small(&ns, tag)
                && q.submit(&ns, tag, io).is_ok()
            {
                open.insert(tag);
            }
            q.poll(&mut out);
        }
        settle(&mut q, open, out);
    }
    // The results do not matter: only panics and hangs count.
    let _ = controller.smart_log();
    let _ = controller.error_log(4);
    let _ = controller.rescan();
}

fn small(ns: &Namespace, n: u64) -> Option<Op> {
    // A device may claim blocks of 64 KiB, of which a few are enough.
    let size = ns.block_size() as usize;
    let lba = n % ns.num_blocks().max(1);
    Some(match n % 3 {
        0 => Op::Write {
            lba,
            data: DmaBuf::zeroed(size).ok()?.freeze(),
            fua: false,
        },
        1 => Op::Read {
            lba,
            buf: DmaBuf::zeroed(size).ok()?,
        },
        _ => Op::Flush,
    })
}

/// Tests everything that reads a device's bytes without a device.
fn parsers(data: &[u8]) {
    let mut page = [0u8; 4096];
    let n = data.len().min(4096);
    page[..n].copy_from_slice(&data[..n]);
    if let Some(list) = ns_list(&page, 0) {
        assert!(list.is_sorted());
    }
    for d in ns_descriptors(&page) {
        assert!(!format!("{d:?}").is_empty());
    }
    assert!(
        ascii(&page[..40])
            .bytes()
            .all(|b| (b' '..=b'~').contains(&b))
    );
    if let Ok(id) = IdentifyNamespace::read_from_bytes(&page) {
        assert!(id.format_index() < 64 || id.nlbaf_z > 15);
        let _ = id.format();
    }
    let mut bytes = Bytes(data);
    let command = Command::from_words(std::array::from_fn(|_| bytes.word()));
    assert!(!decode::command(0, &command).to_string().is_empty());
    assert!(!decode::command(1, &command).to_string().is_empty());
    let completion = Completion::from_words([bytes.word(), bytes.word()]);
    assert!(!decode::completion(&completion).to_string().is_empty());
}

/// Tests the caller's side: any I/O and any order of calls, on a device without faults.
pub fn caller(data: &[u8]) {
    let mut bytes = Bytes(data);
    let shape = bytes.byte();
    let disk = |size| SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), size);
    let mut config = SoftConfig::new(vec![disk(512), disk(4096).boundary(16)]);
    config.mdts = shape & 7;
    config.sgl = shape & 8 != 0;
    config.shadow_doorbells = shape & 16 != 0;
    config.write_cache = shape & 32 != 0;
    let Ok(soft) = SoftController::new(config) else {
        return;
    };
    let options = ControllerOptions::default();
    let Ok(controller) = Controller::new(soft.transport(), options) else {
        panic!("a healthy controller does not come up");
    };
    let namespaces = controller.namespaces();
    let Some(mut q) = queue(&controller, u16::from(bytes.byte() % 32), 3) else {
        panic!("no queue pair on a healthy controller");
    };
    let mut open = HashSet::new();
    let mut out = Vec::new();
    let mut tag = 0;
    let mut steps = 0;
    while !bytes.0.is_empty() && steps < 200 {
        steps += 1;
        match bytes.byte() % 16 {
            0..=9 => {
                let ns = &namespaces[usize::from(bytes.byte()) % namespaces.len()];
                let Some(io) = any_io(&mut bytes) else {
                    continue;
                };
                tag += 1;
                match q.submit(ns, tag, io) {
                    Ok(()) => assert!(open.insert(tag)),
                    Err(SubmitError::Refused(_, e)) if e.kind == IoErrorKind::Removed => {
                        panic!("a healthy controller is gone")
                    }
                    Err(_) => {}
                }
            }
            10..=12 => {
                q.poll(&mut out);
            }
            13 => {
                let _ = q.wait(Duration::from_micros(u64::from(bytes.byte())));
            }
            14 => {
                let mut command = Command::new(bytes.byte(), u32::from(bytes.byte()));
                // Commands that change the namespaces under the test are left out.
                if command.opcode == AdminOpcode::FORMAT_NVM.0 {
                    continue;
                }
                command.cdw10 = (bytes.word() >> 32 & 0x00ff_00ff) as u32;
                command.prp1 = bytes.word();
                let buf = DmaBuf::zeroed(usize::from(bytes.byte()) * 64 + 1).ok();
                let _ = controller.admin_command(command, buf);
            }
            _ => {
                if steps < 100 {
                    let _ = controller.reset();
                }
            }
        }
        for done in out.drain(..) {
            assert!(open.remove(&done.tag), "tag {} ended twice", done.tag);
        }
    }
    if shape & 64 != 0 {
        soft.unplug();
    }
    if shape & 128 != 0 {
        drop(q);
        return;
    }
    settle(&mut q, open, out);
}

fn any_io(bytes: &mut Bytes<'_>) -> Option<Op> {
    let lba = match bytes.byte() % 4 {
        0 => bytes.word(),
        _ => u64::from(bytes.byte()) * 8,
    };
    let len = match bytes.byte() % 4 {
        0 => usize::from(bytes.byte()) + 1,
        1 => (usize::from(bytes.byte()) + 1) * 4096,
        _ => (usize::from(bytes.byte() % 16) + 1) * 512,
    };
    let offset = usize::from(bytes.byte() % 16) * 4;
    let data = |len: usize| {
        let buf = DmaBuf::zeroed(len + offset).ok()?.freeze();
        Some(buf.slice(offset..offset + len))
    };
    let fua = len & 512 != 0;
    let len_blocks = (len / 512) as u64;
    Some(match bytes.byte() % 12 {
        0 | 1 => Op::Read {
            lba,
            buf: DmaBuf::new(len).ok()?,
        },
        2 | 3 => Op::Write {
            lba,
            data: data(len)?,
            fua,
        },
        4 => Op::WriteV {
            lba,
            data: (0..bytes.byte() % 20)
                .map(|_| data(len.min(8192)))
                .collect::<Option<_>>()?,
            fua,
        },
        5 => Op::ReadV {
            lba,
            bufs: (0..bytes.byte() % 20)
                .map(|_| DmaBuf::new(len.min(8192)).ok())
                .collect::<Option<_>>()?,
        },
        6 => Op::Compare {
            lba,
            data: data(len)?,
        },
        7 => Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        },
        8 => Op::Unmap { lba, len_blocks },
        9 => Op::Copy {
            src_lba: lba,
            dst_lba: bytes.word() % 2048,
            len_blocks,
        },
        10 => Op::Abort { tag: lba },
        _ => Op::Verify { lba, len_blocks },
    })
}
