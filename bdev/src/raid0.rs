//! `raid0`: several devices striped into one, so that one database uses them all.
//!
//! Strip `s` is strip `s / n` of leg `s % n`. An operation inside one strip goes to its leg as it
//! is. A longer one becomes one operation per leg, since its part of a leg is contiguous there.
//! There is no redundancy: if a leg is lost, the device is lost.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pumice_io::sys::wait_readable;
use pumice_io::{Completion, IoError, IoErrorKind, Limits, Op, OpKind, OpSet, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::flush_fault::FlushFault;
use crate::queue::refuse;
use crate::slots::Slots;

mod stripes;

use stripes::{child_ops, copy_back, shares};

/// Most parts of a vector in one operation of a leg.
const PARTS_MAX: u32 = 512;
/// Most operations in flight on a channel.
const DEPTH: usize = 1024;

/// Several devices, striped.
#[derive(Debug)]
pub struct Raid0 {
    info: Arc<DeviceInfo>,
    legs: Vec<Arc<dyn BlockDevice>>,
    strip_blocks: u64,
    /// The first failed flush of any leg.
    flush_fault: Arc<FlushFault>,
}

impl Raid0 {
    /// Stripes `legs` into the device `name`, in strips of `strip_kb` KiB.
    ///
    /// # Errors
    /// Fails without legs; for legs of different block sizes or shorter than a strip; for a strip
    /// size that is not a power of two or less than a block; and for more than 1 EiB in all.
    pub fn new(
        name: &str,
        legs: Vec<Arc<dyn BlockDevice>>,
        strip_kb: u32,
        uuid: Option<[u8; 16]>,
    ) -> Result<Raid0, BdevError> {
        let invalid = |what: &str, reason: String| {
            Err(BdevError::InvalidOption {
                name: format!("{name}: {what}"),
                reason,
            })
        };
        let Some(first) = legs.first() else {
            return invalid("base_bdevs", "a raid0 needs at least one device".to_owned());
        };
        let bs = first.info().block_size;
        if let Some(odd) = legs.iter().find(|l| l.info().block_size != bs) {
            let (odd, first) = (odd.info(), first.info());
            return invalid(
                "base_bdevs",
                format!(
                    "`{}` has blocks of {} bytes, `{}` of {}",
                    odd.name, odd.block_size, first.name, first.block_size
                ),
            );
        }
        let strip_bytes = u64::from(strip_kb) << 10;
        if !strip_kb.is_power_of_two() || strip_bytes < u64::from(bs) {
            return invalid(
                "strip_size_kb",
                format!("{strip_kb}: use a power of two, at least a block of {bs} bytes"),
            );
        }
        let strip_blocks = strip_bytes / u64::from(bs);
        let shortest = legs.iter().map(|l| l.info().num_blocks).min().unwrap_or(0);
        let usable = shortest - shortest % strip_blocks;
        if usable == 0 {
            let reason = format!("a device is shorter than {strip_kb} KiB");
            return invalid("base_bdevs", reason);
        }
        let num_blocks = usable.saturating_mul(legs.len() as u64);
        crate::malloc::check_geometry(name, bs, num_blocks)?;
        let mut info = DeviceInfo::new(name, "raid", bs, num_blocks);
        "Raid Volume".clone_into(&mut info.product);
        info.uuid = uuid.unwrap_or_else(crate::uuid::random);
        info.write_cache = legs.iter().any(|l| l.info().write_cache);
        info.keeps_data = legs.iter().all(|l| l.info().keeps_data);
        info.outlives_process = legs.iter().all(|l| l.info().outlives_process);
        info.unmap_zeroes = legs.iter().all(|l| l.info().unmap_zeroes);
        info.buf_align = legs.iter().map(|l| l.info().buf_align).max().unwrap_or(1);
        let strip = u32::try_from(strip_blocks).unwrap_or(u32::MAX);
        let of_legs = legs.iter().map(|l| Limits {
            boundary_blocks: None,
            ..l.info().limits
        });
        let own = Limits::new(strip.saturating_mul(PARTS_MAX), strip);
        info.limits = of_legs.fold(own, Limits::and);
        let common = legs.iter().map(|l| l.info().ops);
        info.ops = common
            .reduce(OpSet::intersection)
            .unwrap_or_default()
            .without(OpKind::Copy);
        Ok(Raid0 {
            info: Arc::new(info),
            legs,
            strip_blocks,
            flush_fault: Arc::default(),
        })
    }
}

impl BlockDevice for Raid0 {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        // The legs fill up evenly, so the one with the least room limits the device.
        let legs = self.legs.iter().filter_map(|leg| leg.host_space());
        let least = legs.min_by_key(|space| space.free_bytes + space.allocated_bytes)?;
        let count = self.legs.len() as u64;
        Some(crate::HostSpace {
            free_bytes: least.free_bytes.saturating_mul(count),
            allocated_bytes: least.allocated_bytes.saturating_mul(count),
        })
    }

    fn own_channels(&self) -> Option<usize> {
        self.legs.iter().filter_map(|leg| leg.own_channels()).min()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        let legs: Result<Vec<_>, BdevError> = self
            .legs
            .iter()
            .map(|leg| {
                Ok(Leg {
                    channel: leg.open_channel()?,
                    backlog: VecDeque::new(),
                })
            })
            .collect();
        Ok(Box::new(RaidChannel {
            info: Arc::clone(&self.info),
            flush_fault: Arc::clone(&self.flush_fault),
            strip: self.strip_blocks,
            legs: legs?,
            parents: Slots::default(),
            children: Slots::default(),
            ended: Vec::new(),
            reaped: Vec::new(),
        }))
    }

    fn driver_specific(&self) -> serde_json::Value {
        let legs: Vec<_> = self
            .legs
            .iter()
            .map(|l| {
                serde_json::json!({
                    "name": l.info().name,
                    "uuid": crate::uuid::format(&l.info().uuid),
                    "is_configured": true,
                    "data_offset": 0,
                    "data_size": self.info.num_blocks / self.legs.len() as u64,
                })
            })
            .collect();
        serde_json::json!({ "raid": {
            "name": self.info.name,
            "uuid": crate::uuid::format(&self.info.uuid),
            "strip_size_kb": self.strip_blocks * u64::from(self.info.block_size) / 1024,
            "state": "online",
            "raid_level": "raid0",
            "superblock": false,
            "num_base_bdevs": legs.len(),
            "num_base_bdevs_discovered": legs.len(),
            "num_base_bdevs_operational": legs.len(),
            "base_bdevs_list": legs,
        } })
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        // One leg that keeps data is enough, although the whole then does not.
        let end = self.info.num_blocks;
        let keeps = self.legs.iter().any(|leg| leg.info().keeps_data);
        Ok((lba < end && keeps).then_some(lba..end))
    }

    fn keep_file(&self, keep: bool) {
        for leg in &self.legs {
            leg.keep_file(keep);
        }
    }
}

struct Leg {
    channel: Box<dyn IoChannel>,
    /// Operations that the leg was too busy to accept.
    backlog: VecDeque<(u64, Op)>,
}

struct RaidChannel {
    info: Arc<DeviceInfo>,
    flush_fault: Arc<FlushFault>,
    strip: u64,
    legs: Vec<Leg>,
    parents: Slots<Parent>,
    children: Slots<Child>,
    ended: Vec<Completion>,
    reaped: Vec<Completion>,
}

/// An operation of the submitter.
struct Parent {
    tag: u64,
    /// The operation, or `None` while its only child carries it.
    op: Option<Op>,
    left: usize,
    error: Option<Box<IoError>>,
}

/// The part of an operation that one leg does.
struct Child {
    parent: u64,
    leg: usize,
    /// Number of blocks by which the operation was moved, if it lies in one strip.
    whole: Option<u64>,
    /// Offsets in the parent's data and lengths, in bytes, of the child's parts.
    parts: Vec<(usize, usize)>,
}

impl RaidChannel {
    fn send(&mut self, leg: usize, child: Child, op: Op) {
        let tag = self.children.insert(child);
        let leg = &mut self.legs[leg];
        if !leg.backlog.is_empty() {
            leg.backlog.push_back((tag, op));
            return;
        }
        match leg.channel.submit(tag, op) {
            Ok(()) => {}
            Err(SubmitError::Busy(op)) => leg.backlog.push_back((tag, op)),
            Err(SubmitError::Refused(op, e)) => self.child_ended(tag, op, Err(e)),
        }
    }

    fn child_ended(&mut self, tag: u64, op: Op, result: Result<(), Box<IoError>>) {
        let Some(child) = self.children.remove(tag) else {
            return;
        };
        let Some(parent) = self.parents.get_mut(child.parent) else {
            return;
        };
        if let (Op::Flush, Err(e)) = (&op, &result) {
            // The submitter gets the first leg's error, and another leg's may be the one that counts.
            self.flush_fault.note(e);
        }
        match child.whole {
            Some(shift) => {
                let mut op = op;
                op.shift(shift.wrapping_neg());
                parent.op = Some(op);
            }
            None => {
                if let (Some(whole), Ok(())) = (&mut parent.op, &result) {
                    copy_back(whole, &op, &child.parts);
                }
            }
        }
        if let Err(mut e) = result {
            if let (IoErrorKind::Miscompare { offset_bytes }, [(at, _), ..]) =
                (e.kind, &child.parts[..])
            {
                e.kind = IoErrorKind::Miscompare {
                    offset_bytes: offset_bytes + *at as u64,
                };
            }
            // What may still change the medium must not pass for something that can be sent again, or that has ended.
            let is_late = |e: &IoError| e.kind == IoErrorKind::TimedOut;
            if parent
                .error
                .as_deref()
                .is_none_or(|first| is_late(&e) && !is_late(first))
            {
                parent.error = Some(e);
            }
        }
        parent.left -= 1;
        if parent.left == 0
            && let Some(Parent {
                tag,
                op: Some(op),
                error,
                ..
            }) = self.parents.remove(child.parent)
        {
            let result = error.map_or(Ok(()), Err);
            let result = self.flush_fault.settle(&self.info, &op, result);
            self.ended.push(Completion { tag, op, result });
        }
    }

    fn divide(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let bs = u64::from(self.info.block_size);
        let (lba, len) = (op.lba(), op.len_bytes(self.info.block_size) / bs);
        let n = self.legs.len() as u64;
        let mut children = Vec::new();
        match &op {
            Op::Flush | Op::Reset => {
                for leg in 0..self.legs.len() {
                    let op = if matches!(op, Op::Flush) {
                        Op::Flush
                    } else {
                        Op::Reset
                    };
                    children.push((leg, Vec::new(), op));
                }
            }
            Op::Abort { tag: target } => {
                let aborts: Vec<_> = self
                    .children
                    .iter()
                    .filter(|(_, c)| {
                        let parent = self.parents.iter().find(|(i, _)| *i == c.parent);
                        parent.is_some_and(|(_, p)| p.tag == *target)
                    })
                    .map(|(tag, c)| (c.leg, Vec::new(), Op::Abort { tag }))
                    .collect();
                children = aborts;
            }
            _ => {
                let data = !matches!(op, Op::WriteZeroes { .. } | Op::Unmap { .. });
                for (leg, share) in shares(lba, len, self.strip, n, data)
                    .into_iter()
                    .enumerate()
                {
                    if share.len_blocks == 0 {
                        continue;
                    }
                    match child_ops(&op, &share, bs) {
                        Ok(ops) => {
                            children.extend(ops.into_iter().map(|(parts, op)| (leg, parts, op)));
                        }
                        Err(reason) => {
                            let e = self.info.error(&op, IoErrorKind::NoMemory, reason);
                            return refuse(op, e);
                        }
                    }
                }
            }
        }
        if children.is_empty() {
            self.ended.push(Completion {
                tag,
                op,
                result: Ok(()),
            });
            return Ok(());
        }
        let left = children.len();
        let parent = self.parents.insert(Parent {
            tag,
            op: Some(op),
            left,
            error: None,
        });
        for (leg, parts, op) in children {
            self.send(
                leg,
                Child {
                    parent,
                    leg,
                    whole: None,
                    parts,
                },
                op,
            );
        }
        Ok(())
    }
}

impl IoChannel for RaidChannel {
    fn submit(&mut self, tag: u64, mut op: Op) -> Result<(), SubmitError> {
        let checked = self.info.check(&op);
        if let Err(e) = checked.and_then(|()| self.flush_fault.check(&self.info, &op)) {
            return refuse(op, e);
        }
        if self.in_flight() >= DEPTH {
            return Err(SubmitError::Busy(op));
        }
        let len = op.len_bytes(self.info.block_size) / u64::from(self.info.block_size);
        let (lba, strip) = (op.lba(), self.strip);
        if len == 0 || lba % strip + len > strip {
            return self.divide(tag, op);
        }
        let (s, n) = (lba / strip, self.legs.len() as u64);
        let shift = (s / n * strip + lba % strip).wrapping_sub(lba);
        op.shift(shift);
        let leg = usize::try_from(s % n).unwrap_or(0);
        let parent = self.parents.insert(Parent {
            tag,
            op: None,
            left: 1,
            error: None,
        });
        self.send(
            leg,
            Child {
                parent,
                leg,
                whole: Some(shift),
                parts: Vec::new(),
            },
            op,
        );
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        for i in 0..self.legs.len() {
            let leg = &mut self.legs[i];
            // `reaped` may hold completions that `wait` has found.
            leg.channel.poll(&mut self.reaped);
            while let Some((tag, op)) = leg.backlog.pop_front() {
                match leg.channel.submit(tag, op) {
                    Ok(()) => {}
                    Err(SubmitError::Busy(op)) => {
                        leg.backlog.push_front((tag, op));
                        break;
                    }
                    Err(SubmitError::Refused(op, e)) => {
                        self.reaped.push(Completion {
                            tag,
                            op,
                            result: Err(e),
                        });
                    }
                }
            }
            let mut reaped = std::mem::take(&mut self.reaped);
            for Completion { tag, op, result } in reaped.drain(..) {
                self.child_ended(tag, op, result);
            }
            self.reaped = reaped;
        }
        let n = self.ended.len();
        out.append(&mut self.ended);
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if !self.ended.is_empty() {
            return Ok(());
        }
        let mut busy: Vec<&mut Leg> = self
            .legs
            .iter_mut()
            .filter(|l| l.channel.in_flight() > 0)
            .collect();
        if let [leg] = &mut busy[..] {
            return leg.channel.wait(timeout);
        }
        if busy.is_empty() {
            return Ok(());
        }
        if busy.iter().all(|l| l.channel.event_fd().is_some()) {
            // This passes the operations to the devices, and finds completions that have arrived.
            for leg in &mut busy {
                leg.channel.poll(&mut self.reaped);
            }
            if !self.reaped.is_empty() {
                return Ok(());
            }
            let fds: Vec<_> = busy.iter().filter_map(|l| l.channel.event_fd()).collect();
            return wait_readable(&fds, Some(timeout))
                .map(drop)
                .map_err(|e| BdevError::os(&self.info.name, "waiting for the legs", e));
        }
        // A leg without a descriptor is waited for a short time on each leg in turn.
        let step = (timeout / 4).min(Duration::from_micros(100));
        busy.iter_mut().try_for_each(|leg| leg.channel.wait(step))
    }

    fn in_flight(&self) -> usize {
        self.parents.len() + self.ended.len()
    }
}
