//! I/O virtual addresses: an allocator inside the windows of the IOMMU.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Allocates device addresses from windows (VFIO's `IOVA_RANGE` capability), between which there
/// may be gaps.
#[derive(Debug)]
pub struct IovaSpace {
    windows: Vec<RangeInclusive<u64>>,
    /// The allocated ranges: start and last byte.
    taken: BTreeMap<u64, u64>,
}

impl IovaSpace {
    /// Makes a space of these windows, in any order. The first 2 MiB stay unused, so that no valid
    /// address looks like null.
    pub fn new(mut windows: Vec<RangeInclusive<u64>>) -> IovaSpace {
        windows.retain(|w| !w.is_empty());
        windows.sort_by_key(|w| *w.start());
        IovaSpace {
            windows,
            taken: BTreeMap::from([(0, (2 << 20) - 1)]),
        }
    }

    /// Takes the lowest free range of `len` bytes whose start is a multiple of `align` (a power of
    /// two). Returns `None` when no gap is large enough.
    pub fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        assert!(len > 0 && align.is_power_of_two());
        for window in &self.windows {
            let mut at = *window.start();
            loop {
                let start = at.checked_add(align - 1)? & !(align - 1);
                let Some(last) = start.checked_add(len - 1) else {
                    break;
                };
                if last > *window.end() {
                    break;
                }
                // The taken range with the highest start that is not above `last`.
                match self.taken.range(..=last).next_back() {
                    Some((_, &end)) if end >= start => {
                        let Some(next) = end.checked_add(1) else {
                            break;
                        };
                        at = next;
                    }
                    _ => {
                        self.taken.insert(start, last);
                        return Some(start);
                    }
                }
            }
        }
        None
    }

    /// Frees a range by its start.
    pub fn give(&mut self, start: u64) {
        let known = self.taken.remove(&start);
        assert!(known.is_some(), "I/O address {start:#x} was not taken");
    }

    /// The windows as text, for errors.
    pub fn describe(&self) -> String {
        let list: Vec<String> = self
            .windows
            .iter()
            .map(|w| format!("{:#x}..={:#x}", w.start(), w.end()))
            .collect();
        list.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_in_the_windows_and_out_of_the_holes() {
        // The windows of intel-iommu in a virtual machine: 39 bits with a gap for MSI.
        let mut space = IovaSpace::new(vec![0xfef0_0000..=0x7f_ffff_ffff, 0..=0xfedf_ffff]);
        let first = space.take(2 << 20, 2 << 20).unwrap();
        assert_eq!(first, 2 << 20);
        let mut seen = vec![(first, 2u64 << 20)];
        for n in 1..64 {
            let len = (n % 7 + 1) << 26;
            let at = space.take(len, 2 << 20).unwrap();
            assert_eq!(at % (2 << 20), 0);
            assert!(at + len <= 0xfee0_0000 || at >= 0xfef0_0000, "{at:#x}");
            for (a, l) in &seen {
                assert!(at + len <= *a || a + l <= at);
            }
            seen.push((at, len));
        }
        space.give(first);
        assert_eq!(space.take(2 << 20, 2 << 20), Some(first));
    }

    #[test]
    fn too_large_is_none_not_a_wrap() {
        let mut space = IovaSpace::new(vec![0..=0xff_ffff]);
        assert_eq!(space.take(0x100_0000, 4096), None);
        assert_eq!(space.take(u64::MAX, 1 << 63), None);
        let mut top = IovaSpace::new(vec![u64::MAX - 0xffff..=u64::MAX]);
        assert_eq!(top.take(0x10000, 4096), Some(u64::MAX - 0xffff));
        assert_eq!(top.take(4096, 4096), None);
    }

    use proptest::prelude::*;

    fn any_windows() -> impl Strategy<Value = Vec<RangeInclusive<u64>>> {
        let window = (0u64..1 << 40, 0u64..1 << 34).prop_map(|(at, len)| at..=at + len);
        proptest::collection::vec(window, 0..4)
    }

    proptest! {
        /// Compares with a plain list of the taken ranges: every range lies in a window, is aligned
        /// and was free; freed ranges can be taken again; nothing that would fit is refused.
        #[test]
        fn as_a_list_would(
            windows in any_windows(),
            steps in proptest::collection::vec((any::<bool>(), 12u32..32, 1u64..1 << 32), 1..60),
        ) {
            let mut space = IovaSpace::new(windows.clone());
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (give, align_shift, len) in steps {
                if give && !taken.is_empty() {
                    let at = usize::try_from(len).unwrap_or(0) % taken.len();
                    let (start, _) = taken.swap_remove(at);
                    space.give(start);
                    continue;
                }
                let (len, align) = (len.next_multiple_of(4096), 1u64 << align_shift);
                let free = |start: u64| {
                    let last = start + (len - 1);
                    start >= 2 << 20
                        && start.is_multiple_of(align)
                        && windows.iter().any(|w| *w.start() <= start && last <= *w.end())
                        && taken.iter().all(|(a, n)| last < *a || a + n <= start)
                };
                match space.take(len, align) {
                    Some(start) => {
                        prop_assert!(free(start), "{start:#x} + {len:#x}");
                        taken.push((start, len));
                    }
                    None => {
                        // The lowest free place begins at a window's start or behind a taken range.
                        let starts = windows.iter().map(|w| *w.start());
                        let behind = taken.iter().map(|(a, n)| a + n);
                        for start in starts.chain(behind).chain([2 << 20]) {
                            prop_assert!(!free(start.next_multiple_of(align)), "{start:#x} was free");
                        }
                    }
                }
            }
        }
    }
}
