//! Compares page cache policies by the reads that miss, on what RocksDB reads from its tables.
//!
//! `cargo bench -p pumice-blobfs --bench policies`. The traces are in `traces`, and `traces/record.py`
//! makes them. The sizes are shares of the pages that a trace has. "Pumice" is the file system itself, with
//! a file for each of RocksDB's; the others are models. A policy that costs no more than another
//! and misses more often should not be the file system's.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;

use lru::LruCache;
use pumice_blobfs::fs::{Access, File, FileSystem, FormatOptions, MountOptions, OpenOptions};

const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
const PERCENTS: [usize; 3] = [1, 10, 50];
const TRACES: [(&str, &[u8]); 6] = [
    ("uniform", include_bytes!("traces/uniform.trace")),
    ("skewed", include_bytes!("traces/skewed.trace")),
    ("seeks", include_bytes!("traces/seeks.trace")),
    ("scan", include_bytes!("traces/scan.trace")),
    ("mixgraph", include_bytes!("traces/mixgraph.trace")),
    ("beside", include_bytes!("traces/beside.trace")),
];

/// A page: number of the file, and of the page in it.
type Page = (u32, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AccessKind {
    Read,
    Background,
    Write,
}

fn main() {
    println!("{:10} {:>6} {:>7} {}", "trace", "share", "pages", header());
    for (name, bytes) in TRACES {
        let trace = decode(bytes);
        let pages: HashSet<Page> = trace.iter().map(|(_, page)| *page).collect();
        for percent in PERCENTS {
            let room = (pages.len() * percent / 100).max(4);
            let row: Vec<String> = policies(room)
                .into_iter()
                .map(|(_, mut policy)| format!("{:>11.4}", misses(&trace, &mut *policy)))
                .collect();
            let ours = misses(&trace, &mut PumiceCache::new(room, &pages));
            println!(
                "{name:10} {percent:>5}% {room:>7} {} {ours:>11.4}",
                row.join(" ")
            );
        }
    }
}

fn header() -> String {
    let names = policies(8)
        .into_iter()
        .map(|(name, _)| format!("{name:>11}"));
    let names: Vec<String> = names.chain([format!("{:>11}", "Pumice")]).collect();
    names.join(" ")
}

/// The accesses of a trace; `traces/record.py` has the format.
fn decode(bytes: &[u8]) -> Vec<(AccessKind, Page)> {
    let (mut trace, mut file, mut last, mut at) = (Vec::new(), 0, 0i64, 0);
    while at < bytes.len() {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            value |= u64::from(bytes[at] & 127) << shift;
            shift += 7;
            at += 1;
            if bytes[at - 1] < 128 {
                break;
            }
        }
        let (kind, value) = (value & 3, value >> 2);
        let kind = match kind {
            0 => AccessKind::Read,
            1 => AccessKind::Background,
            2 => AccessKind::Write,
            _ => {
                file = u32::try_from(value).expect("few files");
                continue;
            }
        };
        let half = i64::try_from(value >> 1).expect("few pages");
        last += if value & 1 == 0 { half } else { -half - 1 };
        trace.push((kind, (file, u64::try_from(last).expect("a page"))));
    }
    trace
}

/// Decides which pages stay in memory.
trait Policy {
    /// Brings a page into memory. Returns whether it was there. `counts` is whether that is a use of it.
    fn access(&mut self, page: Page, counts: bool) -> bool;
}

/// The share of the foreground's reads that miss.
fn misses(trace: &[(AccessKind, Page)], policy: &mut dyn Policy) -> f64 {
    let (mut reads, mut missed) = (0u32, 0u32);
    for (kind, page) in trace {
        let counts = *kind == AccessKind::Read;
        let was_there = policy.access(*page, counts);
        reads += u32::from(counts);
        missed += u32::from(counts && !was_there);
    }
    f64::from(missed) / f64::from(reads)
}

fn policies(room: usize) -> Vec<(&'static str, Box<dyn Policy>)> {
    vec![
        (
            "LRU",
            Box::new(Lru(LruCache::new(NonZeroUsize::new(room).unwrap()))),
        ),
        ("clock", Box::new(Clock::new(room))),
        ("CLOCK-Pro", Box::new(Pro::new(room))),
        ("S3, 2 bits", Box::new(S3Fifo::new(room, 3))),
        ("S3, 1 bit", Box::new(S3Fifo::new(room, 1))),
    ]
}

/// The reference.
struct Lru(LruCache<Page, ()>);

impl Policy for Lru {
    fn access(&mut self, page: Page, counts: bool) -> bool {
        if counts && self.0.get(&page).is_some() || self.0.contains(&page) {
            return true;
        }
        self.0.put(page, ());
        false
    }
}

/// One queue; what has been used since it was last passed is passed over.
struct Clock {
    room: usize,
    used: HashMap<Page, bool>,
    queue: VecDeque<Page>,
}

impl Clock {
    fn new(room: usize) -> Clock {
        Clock {
            room,
            used: HashMap::new(),
            queue: VecDeque::new(),
        }
    }
}

impl Policy for Clock {
    fn access(&mut self, page: Page, counts: bool) -> bool {
        if let Some(used) = self.used.get_mut(&page) {
            *used |= counts;
            return true;
        }
        while self.used.len() >= self.room {
            let first = self.queue.pop_front().unwrap();
            if std::mem::take(self.used.get_mut(&first).unwrap()) {
                self.queue.push_back(first);
            } else {
                self.used.remove(&first);
            }
        }
        self.used.insert(page, false);
        self.queue.push_back(page);
        false
    }
}

/// S3-FIFO (Yang et al., SOSP 2023), which counts uses up to a bound.
struct S3Fifo {
    room: usize,
    most: u8,
    uses: HashMap<Page, u8>,
    young: VecDeque<Page>,
    old: VecDeque<Page>,
    gone: HashSet<Page>,
    gone_order: VecDeque<Page>,
}

impl S3Fifo {
    fn new(room: usize, most: u8) -> S3Fifo {
        S3Fifo {
            room,
            most,
            uses: HashMap::new(),
            young: VecDeque::new(),
            old: VecDeque::new(),
            gone: HashSet::new(),
            gone_order: VecDeque::new(),
        }
    }

    fn evict(&mut self) {
        if self.young.len() > self.room / 10 || self.old.is_empty() {
            while let Some(page) = self.young.pop_front() {
                if std::mem::take(self.uses.get_mut(&page).unwrap()) > 0 {
                    self.old.push_back(page);
                    continue;
                }
                self.uses.remove(&page);
                if self.gone.insert(page) {
                    self.gone_order.push_back(page);
                }
                if self.gone_order.len() > self.room {
                    self.gone.remove(&self.gone_order.pop_front().unwrap());
                }
                return;
            }
        }
        while let Some(page) = self.old.pop_front() {
            let uses = self.uses.get_mut(&page).unwrap();
            if *uses == 0 {
                self.uses.remove(&page);
                return;
            }
            *uses -= 1;
            self.old.push_back(page);
        }
    }
}

impl Policy for S3Fifo {
    fn access(&mut self, page: Page, counts: bool) -> bool {
        if let Some(uses) = self.uses.get_mut(&page) {
            *uses = (*uses + u8::from(counts)).min(self.most);
            return true;
        }
        while self.uses.len() >= self.room {
            self.evict();
        }
        if self.gone.remove(&page) {
            self.old.push_back(page);
        } else {
            self.young.push_back(page);
        }
        self.uses.insert(page, 0);
        false
    }
}

/// A page in the ring of [`Pro`].
struct RingPage {
    state: PageState,
    used: bool,
    in_test: bool,
    next: Page,
    before: Page,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PageState {
    Hot,
    Cold,
    /// It is not in memory, and still in its test.
    Gone,
}

/// CLOCK-Pro (Jiang, Chen and Zhang, USENIX 2005).
struct Pro {
    room: usize,
    ring: HashMap<Page, RingPage>,
    hands: Option<[Page; 3]>,
    cold_most: usize,
    hot: usize,
    cold: usize,
    gone: usize,
}

const HOT: usize = 0;
const COLD: usize = 1;
const TEST: usize = 2;

impl Pro {
    fn new(room: usize) -> Pro {
        Pro {
            room,
            ring: HashMap::new(),
            hands: None,
            cold_most: (room / 100).max(1),
            hot: 0,
            cold: 0,
            gone: 0,
        }
    }

    fn hand(&self, which: usize) -> Page {
        self.hands.expect("the ring has pages")[which]
    }

    fn node(&mut self, page: Page) -> &mut RingPage {
        self.ring.get_mut(&page).expect("it is in the ring")
    }

    /// Moves a hand to the next page, and returns the one where it was.
    fn step(&mut self, which: usize) -> Page {
        let at = self.hand(which);
        let next = self.node(at).next;
        self.hands.as_mut().unwrap()[which] = next;
        at
    }

    fn insert(&mut self, page: Page, state: PageState, in_test: bool) {
        let (next, before) = match self.hands {
            None => {
                self.hands = Some([page; 3]);
                (page, page)
            }
            Some(hands) => (hands[HOT], self.node(hands[HOT]).before),
        };
        let node = RingPage {
            state,
            used: false,
            in_test,
            next,
            before,
        };
        self.ring.insert(page, node);
        self.node(before).next = page;
        self.node(next).before = page;
    }

    fn remove(&mut self, page: Page) {
        let node = self.ring.remove(&page).expect("it is in the ring");
        if self.ring.is_empty() {
            self.hands = None;
            return;
        }
        self.node(node.before).next = node.next;
        self.node(node.next).before = node.before;
        for hand in self.hands.as_mut().unwrap() {
            if *hand == page {
                *hand = node.next;
            }
        }
    }

    fn fewer_cold(&mut self) {
        self.cold_most = (self.cold_most - 1).max(1);
    }

    fn run_cold(&mut self) {
        if self.cold == 0 {
            return self.run_hot();
        }
        let page = loop {
            let page = self.step(COLD);
            if self.node(page).state == PageState::Cold {
                break page;
            }
        };
        let (used, in_test) = (self.node(page).used, self.node(page).in_test);
        if used {
            self.remove(page);
            if in_test {
                self.insert(page, PageState::Hot, false);
                self.cold -= 1;
                self.hot += 1;
                while self.hot > self.room - self.cold_most {
                    self.run_hot();
                }
            } else {
                self.insert(page, PageState::Cold, true);
            }
            return;
        }
        self.cold -= 1;
        if !in_test {
            return self.remove(page);
        }
        self.node(page).state = PageState::Gone;
        self.gone += 1;
        while self.gone > self.room {
            self.run_test();
        }
    }

    fn run_hot(&mut self) {
        loop {
            let page = self.step(HOT);
            let node = self.node(page);
            match node.state {
                PageState::Hot if std::mem::take(&mut node.used) => {}
                PageState::Hot => {
                    node.state = PageState::Cold;
                    node.in_test = false;
                    self.hot -= 1;
                    self.cold += 1;
                    return;
                }
                PageState::Gone => {
                    self.remove(page);
                    self.gone -= 1;
                    self.fewer_cold();
                }
                PageState::Cold => {
                    if std::mem::take(&mut node.in_test) && !node.used {
                        self.fewer_cold();
                    }
                }
            }
        }
    }

    fn run_test(&mut self) {
        loop {
            let page = self.step(TEST);
            let node = self.node(page);
            match node.state {
                PageState::Gone => {
                    self.remove(page);
                    self.gone -= 1;
                    return self.fewer_cold();
                }
                PageState::Cold if std::mem::take(&mut node.in_test) && !node.used => {
                    self.fewer_cold();
                }
                _ => {}
            }
        }
    }
}

impl Policy for Pro {
    fn access(&mut self, page: Page, counts: bool) -> bool {
        if let Some(node) = self.ring.get_mut(&page)
            && node.state != PageState::Gone
        {
            node.used |= counts;
            return true;
        }
        while self.hot + self.cold >= self.room {
            self.run_cold();
        }
        if self.ring.contains_key(&page) {
            self.cold_most = (self.cold_most + 1).min(self.room - 1);
            self.remove(page);
            self.gone -= 1;
            while self.hot > 0 && self.hot >= self.room - self.cold_most {
                self.run_hot();
            }
            self.insert(page, PageState::Hot, false);
            self.hot += 1;
        } else {
            self.insert(page, PageState::Cold, true);
            self.cold += 1;
        }
        false
    }
}

/// The file system itself.
struct PumiceCache {
    fs: FileSystem,
    files: HashMap<u32, File>,
}

impl PumiceCache {
    fn new(room: usize, pages: &HashSet<Page>) -> PumiceCache {
        let dev = pumice_bdev::open("malloc://2G").unwrap();
        FileSystem::format(std::sync::Arc::clone(&dev), &FormatOptions::default()).unwrap();
        let mut options = MountOptions::default();
        options.cache_bytes = room as u64 * PAGE;
        options.read_ahead_bytes = 0;
        let fs = FileSystem::mount(dev, &options).unwrap();
        let mut lengths: HashMap<u32, u64> = HashMap::new();
        for (file, page) in pages {
            let len = lengths.entry(*file).or_default();
            *len = (*len).max((page + 1) * PAGE);
        }
        let files = lengths.into_iter().map(|(file, len)| {
            let open = fs.open(&format!("/{file}"), OpenOptions::CREATE).unwrap();
            open.truncate(len).unwrap();
            open.sync().unwrap();
            open.advise(Access::Random);
            (file, open)
        });
        let files = files.collect();
        PumiceCache { fs, files }
    }
}

impl Policy for PumiceCache {
    fn access(&mut self, page: Page, counts: bool) -> bool {
        let before = self.fs.cache_stats().misses;
        let file = &self.files[&page.0];
        if counts {
            let mut bytes = [0; PAGE_LEN];
            file.read_at(page.1 * PAGE, &mut bytes).unwrap();
        } else {
            file.prefetch(page.1 * PAGE, PAGE).unwrap();
        }
        self.fs.cache_stats().misses == before
    }
}
