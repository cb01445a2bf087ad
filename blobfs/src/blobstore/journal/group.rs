//! The changes that one batch holds (rule 2).

use std::collections::VecDeque;

use super::super::carried::{Carried, Patch};
use super::super::format::Page;
use super::super::geometry::Geometry;
use super::format::{BATCH_LEN, Image};

/// A change that waits for its batch.
#[derive(Debug)]
pub(super) struct Waiting {
    pub ticket: u64,
    pub pages: Vec<Image>,
    pub carried: Vec<(Carried, Vec<Patch>)>,
    /// Bytes of its records.
    pub bytes: u64,
    pub guard: Option<Box<Page>>,
    pub geo: Geometry,
}

/// Takes the changes of the next batch, in the order of their arrival. It has at most `most` bytes, unless the first change
/// alone has more.
pub(super) fn take_group(waiting: &mut VecDeque<Waiting>, most: u64) -> Vec<Waiting> {
    let mut bytes = BATCH_LEN as u64;
    let mut group = Vec::new();
    while let Some(next) = waiting.front() {
        bytes += next.bytes;
        if bytes > most && !group.is_empty() {
            break;
        }
        group.extend(waiting.pop_front());
    }
    group
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn geometry() -> Geometry {
        Geometry {
            block_size: 4096,
            cluster_size: 8192,
            io_unit_size: 4096,
            total_clusters: 512,
            front_clusters: 1,
            md_clusters: 1..100,
            md_start: 4,
            md_len: 160,
        }
    }

    /// A change with records of this many bytes.
    fn change(ticket: u64, bytes: u64) -> Waiting {
        Waiting {
            ticket,
            pages: Vec::new(),
            carried: Vec::new(),
            bytes,
            guard: None,
            geo: geometry(),
        }
    }

    /// The changes of each batch in turn, by their tickets.
    fn groups(sizes: &[u64], most: u64) -> Vec<Vec<u64>> {
        let changes = sizes.iter().zip(0..);
        let mut waiting: VecDeque<Waiting> = changes
            .map(|(bytes, ticket)| change(ticket, *bytes))
            .collect();
        let mut groups = Vec::new();
        while !waiting.is_empty() {
            let group = take_group(&mut waiting, most);
            groups.push(group.iter().map(|change| change.ticket).collect());
        }
        groups
    }

    /// A load takes a batch that is longer for the end of the ring.
    #[test]
    fn rule_6_a_batch_of_several_changes_is_not_one_byte_longer_than_it_may_be() {
        const PAGE: u64 = 4112;
        let most = 7 * 4096;
        // What the head of the batch and three pages leave for the fourth change.
        let left = most - BATCH_LEN as u64 - 3 * PAGE;
        for len in (left - 80..=left + 80).step_by(8) {
            // The last change never fits the first batch.
            let sizes = [PAGE, PAGE, PAGE, len, 88];
            let first = if len <= left { 4 } else { 3 };
            let expected: [Vec<u64>; 2] = [(0..first).collect(), (first..5).collect()];
            assert_eq!(groups(&sizes, most), expected, "{sizes:?}");
        }
    }

    #[test]
    fn rule_6_a_change_that_is_too_long_is_a_batch_by_itself() {
        let most = 7 * 4096;
        let expected = [vec![0], vec![1], vec![2], vec![3], vec![4, 5]];
        assert_eq!(groups(&[most, 8, most, most, 8, 8], most), expected);
    }
}
