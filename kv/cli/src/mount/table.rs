//! The inodes that the kernel knows: their numbers, paths and open handles.
//!
//! The number of a file or directory is the id of its blob, so it is the same after the next mount. A blob's id may be used
//! again while the kernel still knows the number of a deleted file: the new file then gets the id with other high bits.
//! A directory that has no blob, since only the names in it imply it, gets a hash of its path.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// The number of the root directory, as FUSE has it.
pub const ROOT: u64 = 1;
/// Bits of a number that are the blob's id.
const ID_BITS: u32 = 40;
/// The bit of the numbers of directories that have no blob.
const IMPLIED: u64 = 1 << 62;

/// The inodes; see the module. `H` is a handle of an open file.
pub struct Table<H> {
    nodes: HashMap<u64, Node<H>>,
    /// From the ids of blobs of files that have a name to numbers.
    files: HashMap<u64, u64>,
    /// From paths of directories to numbers.
    dirs: HashMap<String, u64>,
}

struct Node<H> {
    /// Number of references that the kernel has.
    lookups: u64,
    /// One of its paths, unless it has none.
    path: Option<String>,
    kind: NodeKind<H>,
}

enum NodeKind<H> {
    Dir,
    File { blob: u64, open: Vec<(u64, H)> },
}

/// The file or directory that a number stands for.
#[derive(Debug, PartialEq, Eq)]
pub enum Resolved<H> {
    Dir {
        path: Option<String>,
    },
    File {
        path: Option<String>,
        /// A handle, if the file is open.
        open: Option<H>,
    },
}

impl<H: Clone> Table<H> {
    /// Makes a table that has the root, which is never forgotten.
    pub fn new() -> Table<H> {
        let root = Node {
            lookups: 1,
            path: Some("/".to_owned()),
            kind: NodeKind::Dir,
        };
        Table {
            nodes: HashMap::from([(ROOT, root)]),
            files: HashMap::new(),
            dirs: HashMap::from([("/".to_owned(), ROOT)]),
        }
    }

    /// Returns what a number stands for.
    pub fn find(&self, number: u64) -> Option<Resolved<H>> {
        let node = self.nodes.get(&number)?;
        let path = node.path.clone();
        Some(match &node.kind {
            NodeKind::Dir => Resolved::Dir { path },
            NodeKind::File { open, .. } => Resolved::File {
                path,
                open: open.first().map(|(_, handle)| handle.clone()),
            },
        })
    }

    /// Returns the number of the file with the blob `blob`, known or not.
    pub fn file_number(&self, blob: u64) -> u64 {
        let known = self.files.get(&blob).copied();
        known.unwrap_or_else(|| self.free_number(blob))
    }

    /// Returns the number of the directory at `path`, known or not.
    pub fn dir_number(&self, path: &str, blob: Option<u64>) -> u64 {
        let known = self.dirs.get(path).copied();
        known.unwrap_or_else(|| match blob {
            Some(blob) => self.free_number(blob),
            None => self.implied_number(path),
        })
    }

    fn implied_number(&self, path: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        let hash = hasher.finish();
        let nth = |n: u64| IMPLIED | hash.wrapping_add(n) & (IMPLIED - 1);
        let mut numbers = (0..).map(nth);
        numbers
            .find(|number| !self.nodes.contains_key(number))
            .unwrap_or(IMPLIED)
    }

    fn free_number(&self, blob: u64) -> u64 {
        let id = blob & ((1 << ID_BITS) - 1);
        let with = |high: u64| id | high << ID_BITS;
        (0..1 << (62 - ID_BITS))
            .map(with)
            .find(|number| *number > ROOT && !self.nodes.contains_key(number))
            .unwrap_or(id)
    }

    /// Counts a reference of the kernel to the file at `path`, and returns its number.
    pub fn enter_file(&mut self, path: &str, blob: u64) -> u64 {
        let number = self.file_number(blob);
        let node = self.nodes.entry(number).or_insert_with(|| Node {
            lookups: 0,
            path: None,
            kind: NodeKind::File {
                blob,
                open: Vec::new(),
            },
        });
        node.lookups += 1;
        node.path.get_or_insert_with(|| path.to_owned());
        self.files.insert(blob, number);
        number
    }

    /// Counts a reference of the kernel to the directory at `path`, and returns its number.
    pub fn enter_dir(&mut self, path: &str, blob: Option<u64>) -> u64 {
        let number = self.dir_number(path, blob);
        let node = self.nodes.entry(number).or_insert_with(|| Node {
            lookups: 0,
            path: Some(path.to_owned()),
            kind: NodeKind::Dir,
        });
        node.lookups += 1;
        self.dirs.insert(path.to_owned(), number);
        number
    }

    /// Takes back `count` references of the kernel.
    pub fn forget(&mut self, number: u64, count: u64) {
        if number == ROOT {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.drop_unused(number);
    }

    fn drop_unused(&mut self, number: u64) {
        let unused = |node: &Node<H>| {
            let is_open = matches!(&node.kind, NodeKind::File { open, .. } if !open.is_empty());
            node.lookups == 0 && !is_open
        };
        if !self.nodes.get(&number).is_some_and(unused) {
            return;
        }
        let Some(node) = self.nodes.remove(&number) else {
            return;
        };
        match (node.kind, node.path) {
            (NodeKind::File { blob, .. }, _) => {
                if self.files.get(&blob) == Some(&number) {
                    self.files.remove(&blob);
                }
            }
            (NodeKind::Dir, Some(path)) => {
                self.dirs.remove(&path);
            }
            (NodeKind::Dir, None) => {}
        }
    }

    /// Records that a file was opened as `id`.
    pub fn opened(&mut self, number: u64, id: u64, handle: H) {
        if let Some(Node {
            kind: NodeKind::File { open, .. },
            ..
        }) = self.nodes.get_mut(&number)
        {
            open.push((id, handle));
        }
    }

    /// Records that a handle was closed, and returns it, since dropping it may take long.
    pub fn closed(&mut self, number: u64, id: u64) -> Option<H> {
        let NodeKind::File { open, .. } = &mut self.nodes.get_mut(&number)?.kind else {
            return None;
        };
        let at = open.iter().position(|(known, _)| *known == id)?;
        let (_, handle) = open.swap_remove(at);
        self.drop_unused(number);
        Some(handle)
    }

    /// Records that a file lost the name `path`. `other` is one that it still has.
    pub fn file_lost(&mut self, blob: u64, path: &str, other: Option<&str>) {
        let Some(number) = self.files.get(&blob).copied() else {
            return;
        };
        if let Some(node) = self.nodes.get_mut(&number)
            && (other.is_none() || node.path.as_deref() == Some(path))
        {
            node.path = other.map(str::to_owned);
        }
        if other.is_none() {
            // The id may soon be another file's.
            self.files.remove(&blob);
        }
    }

    /// Records that a file has the name `to` in place of `from`.
    pub fn file_moved(&mut self, blob: u64, from: &str, to: &str) {
        self.file_lost(blob, from, Some(to));
    }

    /// Records that a directory was removed.
    pub fn dir_removed(&mut self, path: &str) {
        if let Some(number) = self.dirs.remove(path)
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.path = None;
        }
    }

    /// Records that a directory, with everything in it, was moved. One at `to` is gone.
    pub fn dir_moved(&mut self, from: &str, to: &str) {
        self.dir_removed(to);
        for (number, node) in &mut self.nodes {
            let Some(path) = &mut node.path else {
                continue;
            };
            let Some(rest) = path.strip_prefix(from) else {
                continue;
            };
            if !rest.is_empty() && !rest.starts_with('/') {
                continue;
            }
            let moved = format!("{to}{rest}");
            if matches!(node.kind, NodeKind::Dir) {
                self.dirs.remove(path.as_str());
                self.dirs.insert(moved.clone(), *number);
            }
            *path = moved;
        }
    }

    /// Number of inodes that the kernel knows.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The id of a blob, as they are.
    const A: u64 = 1 << 32 | 5;
    const B: u64 = 1 << 32 | 6;

    fn path(table: &Table<u32>, number: u64) -> Option<String> {
        match table.find(number).expect("known") {
            Resolved::Dir { path } | Resolved::File { path, .. } => path,
        }
    }

    #[test]
    fn a_number_stays_until_the_kernel_forgets_all_references() {
        let mut table = Table::<u32>::new();
        let number = table.enter_file("/a", A);
        assert_eq!(number, A);
        assert_eq!(table.enter_file("/a", A), number);
        table.forget(number, 1);
        assert_eq!(path(&table, number).as_deref(), Some("/a"));
        table.forget(number, 1);
        assert_eq!(table.find(number), None);
        table.forget(number, 1);
        table.forget(ROOT, 9);
        assert_eq!(path(&table, ROOT).as_deref(), Some("/"));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn links_share_a_number_and_a_lost_name_is_replaced() {
        let mut table = Table::<u32>::new();
        let number = table.enter_file("/a", A);
        assert_eq!(table.enter_file("/b", A), number);
        table.file_lost(A, "/a", Some("/b"));
        assert_eq!(path(&table, number).as_deref(), Some("/b"));
        table.file_lost(A, "/c", Some("/b"));
        assert_eq!(path(&table, number).as_deref(), Some("/b"));
        table.file_moved(A, "/b", "/d/e");
        assert_eq!(path(&table, number).as_deref(), Some("/d/e"));
        table.file_lost(A, "/d/e", None);
        assert_eq!(path(&table, number), None);
    }

    #[test]
    fn a_blob_id_that_is_used_again_gets_another_number() {
        let mut table = Table::<u32>::new();
        let old = table.enter_file("/a", A);
        table.opened(old, 7, 70);
        table.file_lost(A, "/a", None);
        let new = table.enter_file("/a", A);
        assert_ne!(old, new);
        assert_eq!(table.file_number(A), new);
        // The kernel forgets the old one, which stays while it is open.
        table.forget(old, 1);
        let found = table.find(old);
        assert!(matches!(
            found,
            Some(Resolved::File {
                path: None,
                open: Some(70)
            })
        ));
        assert_eq!(table.closed(old, 7), Some(70));
        assert_eq!(table.closed(old, 7), None);
        assert_eq!(table.find(old), None);
        assert_eq!(table.file_number(A), new);
    }

    #[test]
    fn directories_move_with_what_is_in_them() {
        let mut table = Table::<u32>::new();
        let dir = table.enter_dir("/d", Some(B));
        let implied = table.enter_dir("/d/i", None);
        let second = table.enter_dir("/d/j", None);
        assert_ne!(implied, second);
        let file = table.enter_file("/d/i/f", A);
        let beside = table.enter_dir("/dd", None);
        let replaced = table.enter_dir("/e", None);
        table.dir_moved("/d", "/e");
        assert_eq!(path(&table, dir).as_deref(), Some("/e"));
        assert_eq!(path(&table, implied).as_deref(), Some("/e/i"));
        assert_eq!(path(&table, file).as_deref(), Some("/e/i/f"));
        assert_eq!(path(&table, beside).as_deref(), Some("/dd"));
        assert_eq!(path(&table, replaced), None);
        assert_eq!(table.dir_number("/e/i", None), implied);
        assert_eq!(table.enter_dir("/e", Some(B)), dir);
        table.dir_removed("/dd");
        assert_eq!(path(&table, beside), None);
        for (number, count) in [(dir, 2), (implied, 1), (second, 1), (file, 1)] {
            table.forget(number, count);
        }
        table.forget(beside, 1);
        table.forget(replaced, 1);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn directories_without_a_blob_have_different_numbers_before_the_kernel_knows_them() {
        let mut table = Table::<u32>::new();
        let listed = [table.dir_number("/a", None), table.dir_number("/b", None)];
        assert_ne!(listed[0], listed[1]);
        assert_eq!(table.enter_dir("/b", None), listed[1]);
        assert_eq!(table.enter_dir("/a", None), listed[0]);
        // A new one at the path of one that the kernel still knows is another.
        table.dir_removed("/a");
        assert_ne!(table.enter_dir("/a", None), listed[0]);
    }
}
