//! The promise: what a recovery may find, given what was asked and what was acknowledged.
//!
//! - The names are as after some prefix of the operations on names, no shorter than the acknowledged ones.
//! - A file is at least as long as its last acknowledged sync (or what an acknowledged truncation left of
//!   it), and each byte is one that the file had there at or after that, and after the last truncation
//!   below it: no other file's bytes, no zeroes in place of bytes, nothing older than what was synced.

use std::collections::BTreeMap;

type Names = BTreeMap<u8, u32>;

#[derive(Clone, Copy, Debug)]
pub enum Ack {
    /// The n-th state of the names.
    Name(usize),
    /// File, version.
    Sync(u32, usize),
    /// File, number of its truncation.
    Cut(u32, usize),
}

impl Ack {
    pub fn file(&self) -> Option<u32> {
        match self {
            Ack::Name(_) => None,
            Ack::Sync(generation, _) | Ack::Cut(generation, _) => Some(*generation),
        }
    }
}

#[derive(Clone, Debug)]
struct Version {
    cuts: usize,
    bytes: Vec<u16>,
}

#[derive(Clone, Debug)]
struct History {
    versions: Vec<Version>,
    /// Length after the n-th truncation.
    cut: Vec<usize>,
    /// Longest synced length, by number of truncations before it.
    synced: Vec<usize>,
    acked_version: usize,
    acked_cut: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Oracle {
    names: Vec<Names>,
    acked_name: usize,
    files: BTreeMap<u32, History>,
}

/// The files that a recovery found: generation, name and bytes of each file.
pub type Found = Vec<(u32, u8, Vec<u16>)>;

impl Oracle {
    /// Makes the promise about what was found now.
    pub fn rebase(found: &Found) -> Oracle {
        let mut oracle = Oracle {
            names: vec![found.iter().map(|(g, n, _)| (*n, *g)).collect()],
            ..Oracle::default()
        };
        for (generation, _, bytes) in found {
            let history = History {
                versions: vec![Version {
                    cuts: 0,
                    bytes: bytes.clone(),
                }],
                cut: vec![usize::MAX],
                synced: vec![bytes.len()],
                acked_version: 0,
                acked_cut: 0,
            };
            oracle.files.insert(*generation, history);
        }
        oracle
    }

    fn push_names(&mut self, change: impl FnOnce(&mut Names)) -> usize {
        let mut names = self.names.last().cloned().unwrap_or_default();
        change(&mut names);
        self.names.push(names);
        self.names.len() - 1
    }

    pub fn create(&mut self, generation: u32, name: u8) -> usize {
        let history = History {
            versions: vec![Version {
                cuts: 0,
                bytes: Vec::new(),
            }],
            cut: vec![usize::MAX],
            synced: vec![0],
            acked_version: 0,
            acked_cut: 0,
        };
        self.files.insert(generation, history);
        self.push_names(|n| {
            n.insert(name, generation);
        })
    }

    pub fn unlink(&mut self, generation: u32, by: Option<u32>) -> usize {
        self.push_names(|n| {
            let name = *n
                .iter()
                .find(|(_, g)| **g == generation)
                .expect("it has a name")
                .0;
            n.remove(&name);
            if let Some(by) = by {
                n.retain(|_, g| *g != by);
                n.insert(name, by);
            }
        })
    }

    pub fn version(&mut self, generation: u32, bytes: &[u16]) {
        let history = self.files.get_mut(&generation).expect("known");
        let cuts = history.cut.len() - 1;
        history.versions.push(Version {
            cuts,
            bytes: bytes.to_vec(),
        });
    }

    pub fn newest(&self, generation: u32) -> usize {
        self.files[&generation].versions.len() - 1
    }

    pub fn truncate(&mut self, generation: u32, bytes: &[u16]) -> Ack {
        let history = self.files.get_mut(&generation).expect("known");
        history.cut.push(bytes.len());
        history.synced.push(0);
        let cuts = history.cut.len() - 1;
        self.version(generation, bytes);
        Ack::Cut(generation, cuts)
    }

    pub fn acked(&mut self, ack: Ack) {
        match ack {
            Ack::Name(n) => self.acked_name = self.acked_name.max(n),
            Ack::Sync(generation, version) => {
                let history = self.files.get_mut(&generation).expect("known");
                let (cuts, len) = (
                    history.versions[version].cuts,
                    history.versions[version].bytes.len(),
                );
                history.synced[cuts] = history.synced[cuts].max(len);
                history.acked_version = history.acked_version.max(version);
                history.acked_cut = history.acked_cut.max(cuts);
            }
            Ack::Cut(generation, cuts) => {
                let history = self.files.get_mut(&generation).expect("known");
                history.acked_cut = history.acked_cut.max(cuts);
            }
        }
    }

    /// Checks that the promise allows this outcome.
    pub fn check(&self, found: &Found) -> Result<(), String> {
        let names: Names = found.iter().map(|(g, n, _)| (*n, *g)).collect();
        if names.len() != found.len() || !self.names[self.acked_name..].contains(&names) {
            return Err(format!(
                "names {names:?}, allowed {:?}",
                &self.names[self.acked_name..]
            ));
        }
        for (generation, _, bytes) in found {
            let history = &self.files[generation];
            if !(history.acked_cut..history.cut.len()).any(|cuts| history.allows(cuts, bytes)) {
                return Err(format!("file {generation} has {bytes:?}; {history:?}"));
            }
        }
        Ok(())
    }
}

impl History {
    /// Returns the shortest length that is allowed after this many truncations.
    fn floor(&self, cuts: usize) -> usize {
        let before = if cuts == 0 {
            0
        } else {
            self.floor(cuts - 1).min(self.cut[cuts])
        };
        before.max(self.synced[cuts])
    }

    fn allows(&self, cuts: usize, bytes: &[u16]) -> bool {
        let of_this = self.versions.iter().filter(|v| v.cuts == cuts);
        let longest = of_this.map(|v| v.bytes.len()).max().unwrap_or(0);
        bytes.len() >= self.floor(cuts)
            && bytes.len() <= longest
            && bytes.iter().enumerate().all(|(i, byte)| {
                let since = (0..=cuts).rev().find(|c| self.cut[*c] <= i).unwrap_or(0);
                // A byte that the last sync did not cover may be of an older version.
                let covered = self.versions[self.acked_version].bytes.len() > i
                    && self.versions[self.acked_version].cuts >= since;
                let first = if covered { self.acked_version } else { 0 };
                self.versions[first..]
                    .iter()
                    .any(|v| v.cuts >= since && v.cuts <= cuts && v.bytes.get(i) == Some(byte))
            })
    }
}
