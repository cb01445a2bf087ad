//! The checkpoint that is under way, and what the last one has put in place.

use crate::device::{Cell, Device, HEADS, Owner};
use crate::format::{Head, Page, page_cells};

#[derive(Clone, Debug)]
enum Checkpoint {
    None,
    /// It waits for batches and owed bytes.
    Waiting {
        upto: u32,
    },
    /// The pages are on their way.
    Begun {
        upto: u32,
        pages: Vec<Page>,
        waiting: usize,
        head: Head,
    },
}

#[derive(Clone, Debug)]
pub struct Checkpoints {
    current: Checkpoint,
    in_place: Vec<Page>,
    head: Head,
    slot: usize,
}

impl Checkpoints {
    /// After a mount: `head` is the header at `slot`.
    pub fn new(in_place: Vec<Page>, head: Head, slot: usize) -> Checkpoints {
        Checkpoints {
            current: Checkpoint::None,
            in_place,
            head,
            slot,
        }
    }

    pub fn in_place(&self) -> &[Page] {
        &self.in_place
    }

    /// The turn of the next header.
    pub fn next_turn(&self) -> u32 {
        self.head.turn + 1
    }

    /// The batch up to which the one under way covers everything.
    pub fn upto(&self) -> Option<u32> {
        match self.current {
            Checkpoint::None => None,
            Checkpoint::Waiting { upto } | Checkpoint::Begun { upto, .. } => Some(upto),
        }
    }

    pub fn has_begun(&self) -> bool {
        matches!(self.current, Checkpoint::Begun { .. })
    }

    /// Fixes the batch up to which the next one covers everything.
    pub fn wait_for(&mut self, upto: u32) {
        self.current = Checkpoint::Waiting { upto };
    }

    /// Sends the pages that have changed. Returns whether there are none.
    pub fn begin(&mut self, dev: &mut Device, upto: u32, pages: Vec<Page>, head: Head) -> bool {
        let mut waiting = 0;
        for (id, page) in pages.iter().enumerate() {
            if *page != self.in_place[id] {
                let cells = page_cells(id, page).to_vec();
                dev.write(cells, false, Owner::CheckPages, Vec::new());
                waiting += 1;
            }
        }
        self.current = Checkpoint::Begun {
            upto,
            pages,
            waiting,
            head,
        };
        waiting == 0
    }

    /// A page has arrived. Returns whether it was the last one.
    pub fn page_arrived(&mut self) -> bool {
        let Checkpoint::Begun { waiting, .. } = &mut self.current else {
            unreachable!("a page without a checkpoint");
        };
        *waiting -= 1;
        *waiting == 0
    }

    pub fn write_head(&self, dev: &mut Device) {
        let Checkpoint::Begun { head, .. } = &self.current else {
            unreachable!("a header without a checkpoint");
        };
        let cells = vec![(HEADS + self.slot, Cell::Head(*head))];
        dev.write(cells, true, Owner::CheckHead, Vec::new());
    }

    /// Ends it if all of its pages have arrived, and returns its header.
    pub fn end(&mut self) -> Option<Head> {
        let Checkpoint::Begun {
            waiting: 0, head, ..
        } = self.current
        else {
            return None;
        };
        let ended = std::mem::replace(&mut self.current, Checkpoint::None);
        if let Checkpoint::Begun { pages, .. } = ended {
            self.in_place = pages;
        }
        self.head = head;
        self.slot = 1 - self.slot;
        Some(head)
    }
}
