//! The soft controller's queues and the pointers of its commands.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use pumice_nvme::spec::{Command, Completion, SglDescriptor, Status};

use super::memory::DeviceMemory;

/// A submission queue.
#[derive(Debug)]
pub(super) struct Sq {
    pub qid: u16,
    pub base: u64,
    pub entries: u16,
    pub head: u16,
    pub cq: u16,
    pub priority: u8,
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Cq {
    pub base: u64,
    pub entries: u16,
    pub tail: u16,
    pub head: u16,
    pub phase: bool,
    pub vector: Option<u16>,
    /// Completions that did not fit.
    pub waiting: VecDeque<Completion>,
    /// Whether something was posted that the host was not told of.
    pub posted: bool,
}

impl Cq {
    pub fn is_full(&self) -> bool {
        (self.tail + 1) % self.entries == self.head
    }

    /// Writes an entry: the word with the phase tag last, with Release.
    pub fn post(&mut self, memory: &DeviceMemory, mut c: Completion, wrong_phase: bool) -> bool {
        let phase = self.phase != wrong_phase;
        c.status_phase = (c.status_phase & !1) | u16::from(phase);
        let Some(words) = memory.words(self.base + u64::from(self.tail) * 16, 2) else {
            return false;
        };
        let [low, high] = c.words();
        words[0].store(low, Ordering::Relaxed);
        words[1].store(high, Ordering::Release);
        self.tail += 1;
        if self.tail == self.entries {
            self.tail = 0;
            self.phase = !self.phase;
        }
        self.posted = true;
        true
    }
}

/// Most pieces of an I/O's data: 65536 blocks of 4 KiB in pages.
const PIECES_MAX: usize = 65_537;

/// Finds the memory of a command's data: `len` bytes by PRP or SGL.
pub(super) fn data_pieces(
    memory: &DeviceMemory,
    c: &Command,
    len: usize,
    out: &mut Vec<(u64, usize)>,
) -> Result<(), Status> {
    out.clear();
    match c.flags >> 6 {
        0 => prp(memory, c, len, out),
        1 => sgl(memory, c, len, out),
        _ => Err(Status::INVALID_FIELD.dnr()),
    }
}

/// Reads PRP entries: Base section 4.1.1.
fn prp(
    memory: &DeviceMemory,
    c: &Command,
    len: usize,
    out: &mut Vec<(u64, usize)>,
) -> Result<(), Status> {
    const PAGE: u64 = 4096;
    if c.prp1 & 3 != 0 {
        return Err(Status::PRP_OFFSET.dnr());
    }
    let to_end = |a: u64| usize::try_from(PAGE - a % PAGE).unwrap_or(0);
    let first = to_end(c.prp1).min(len);
    out.push((c.prp1, first));
    let mut left = len - first;
    if left == 0 {
        return Ok(());
    }
    if left <= 4096 {
        if !c.prp2.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET.dnr());
        }
        out.push((c.prp2, left));
        return Ok(());
    }
    let mut list = c.prp2;
    // Each list may begin at the end of its page and name nothing but the next one, in a circle.
    let mut lists = 0;
    while left > 0 {
        lists += 1;
        if list & 7 != 0 {
            return Err(Status::PRP_OFFSET.dnr());
        }
        let pages = left.div_ceil(4096);
        let room = to_end(list) / 8;
        // The last entry of a page points to another page when more entries follow.
        let here = if pages > room { room - 1 } else { pages };
        let count = if pages > room { room } else { pages };
        let words = memory.words(list, count).ok_or(Status::DATA_TRANSFER)?;
        for word in &words[..here] {
            let address = u64::from_le(word.load(Ordering::Relaxed));
            if address % PAGE != 0 {
                return Err(Status::PRP_OFFSET.dnr());
            }
            let n = left.min(4096);
            out.push((address, n));
            left -= n;
        }
        if here < count {
            list = u64::from_le(words[here].load(Ordering::Relaxed));
        }
        if out.len() > PIECES_MAX || lists > PIECES_MAX {
            return Err(Status::INVALID_FIELD.dnr());
        }
    }
    Ok(())
}

/// Reads SGL descriptors: Base section 4.1.2.
fn sgl(
    memory: &DeviceMemory,
    c: &Command,
    len: usize,
    out: &mut Vec<(u64, usize)>,
) -> Result<(), Status> {
    let mut left = len;
    let mut take = |d: &SglDescriptor| {
        let n = (d.len as usize).min(left);
        out.push((d.address, n));
        left -= n;
    };
    let mut next = c.sgl();
    // A chain of segments that forms a circle is cut off.
    for _ in 0..64 {
        match next.kind {
            SglDescriptor::DATA_BLOCK => {
                take(&next);
                return if left == 0 {
                    Ok(())
                } else {
                    Err(Status::SGL_LENGTH.dnr())
                };
            }
            SglDescriptor::SEGMENT | SglDescriptor::LAST_SEGMENT => {
                let last = next.kind == SglDescriptor::LAST_SEGMENT;
                let count = next.len as usize / 16;
                if count == 0 || count > 4096 || !next.len.is_multiple_of(16) {
                    return Err(Status::of(0, 0x0d).dnr());
                }
                let words = memory
                    .words(next.address, count * 2)
                    .ok_or(Status::DATA_TRANSFER)?;
                let at = |n: usize| SglDescriptor {
                    address: u64::from_le(words[2 * n].load(Ordering::Relaxed)),
                    len: (words[2 * n + 1].load(Ordering::Relaxed) & 0xffff_ffff) as u32,
                    reserved: [0; 3],
                    kind: (words[2 * n + 1].load(Ordering::Relaxed) >> 56) as u8,
                };
                let blocks = if last { count } else { count - 1 };
                for n in 0..blocks {
                    let d = at(n);
                    if d.kind != SglDescriptor::DATA_BLOCK {
                        return Err(Status::SGL_TYPE.dnr());
                    }
                    take(&d);
                }
                if last {
                    return if left == 0 {
                        Ok(())
                    } else {
                        Err(Status::SGL_LENGTH.dnr())
                    };
                }
                next = at(count - 1);
            }
            _ => return Err(Status::SGL_TYPE.dnr()),
        }
    }
    Err(Status::of(0, 0x0d).dnr())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// A list that names itself as the next one has no end, and no entry for data.
    #[test]
    fn a_prp_list_that_goes_in_a_circle_ends() {
        const BASE: u64 = 1 << 40;
        let memory = DeviceMemory::new(2 * 4096);
        memory.set_buffer_base(Some(BASE));
        let last = BASE + 4096 - 8;
        memory.words(last, 1).expect("mapped")[0].store(last.to_le(), Ordering::Relaxed);
        let mut command = Command::new(0, 1);
        (command.prp1, command.prp2) = (BASE, last);
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut pieces = Vec::new();
            let found = data_pieces(&memory, &command, 3 * 4096, &mut pieces);
            let _ = sender.send(found);
        });
        let found = receiver.recv_timeout(Duration::from_secs(120));
        assert_eq!(found, Ok(Err(Status::INVALID_FIELD.dnr())));
    }

    /// PRP1 may begin anywhere in its page, at a multiple of four; every other entry is a whole page.
    #[test]
    fn a_prp_entry_is_aligned() {
        const BASE: u64 = 1 << 40;
        let memory = DeviceMemory::new(2 * 4096);
        memory.set_buffer_base(Some(BASE));
        for (first, second, good) in [
            (BASE + 4, BASE + 4096, true),
            (BASE + 2, BASE + 4096, false),
            (BASE + 4, BASE + 4100, false),
        ] {
            let mut command = Command::new(0, 1);
            (command.prp1, command.prp2) = (first, second);
            let mut pieces = Vec::new();
            let found = data_pieces(&memory, &command, 4096, &mut pieces);
            let refused = Err(Status::PRP_OFFSET.dnr());
            assert_eq!(found, if good { Ok(()) } else { refused });
            assert!(!good || pieces == [(first, 4092), (second, 4)]);
        }
    }
}
