use super::super::elastic::{Bound, Bounded as _};
use super::*;
use pumice_bdev::DmaBuf;

fn page_frame(fc: &Arc<FileCache>, off: u64, pages: usize, byte: u8) -> Arc<Frame> {
    let mut buf = DmaBuf::new(pages * PAGE).unwrap();
    buf.fill(byte);
    let (region, start) = split(off);
    let fill = Arc::new(FillBuf::from_buf(buf, pages * PAGE));
    Frame::new(fc, region, start, fill, false)
}

#[test]
fn regions_have_a_place_each() {
    let mut seen = std::collections::HashSet::new();
    for r in 0..10_000 {
        let (k, i) = segment_of(r);
        assert!(i < SEGMENT0 << k);
        assert!(seen.insert((k, i)));
    }
    assert_eq!(segment_of(7), (0, 7));
    assert_eq!(segment_of(8), (1, 0));
    assert_eq!(segment_of(24), (2, 0));
}

#[test]
fn pages_are_found_missed_and_replaced() {
    let cache = Cache::new(Bound::new(64 << 20, 0));
    let fc = FileCache::new(&cache);
    let off = 9 * REGION as u64 + 8192;
    assert_eq!(fc.first_missing(off + 5, off + 10), Some(off..off + 4096));
    assert!(fc.install(0, &page_frame(&fc, off, 2, 1)));
    let mut out = [0u8; 6000];
    assert_eq!(fc.copy(off + 3000, &mut out), 5192);
    assert_eq!(fc.first_missing(off, off + 8192), None);
    assert_eq!(
        fc.first_missing(off, off + 12000),
        Some(off + 8192..off + 12288)
    );
    assert_eq!(fc.first_missing(off - 4096, off + 1), Some(off - 4096..off));
    fc.replace_pages(&page_frame(&fc, off + 4096, 1, 2));
    let mut two = [0u8; 2];
    assert_eq!(
        fc.copy(off + 4095, &mut two),
        0,
        "the overlapped frame is gone as a whole"
    );
    assert_eq!(fc.copy(off + 4096, &mut two), 2);
    assert_eq!(two, [2, 2]);
    assert!(
        !fc.install(0, &page_frame(&fc, off + 16384, 1, 9)),
        "stale generation"
    );
    fc.remove_from(9);
    assert_eq!(fc.copy(off, &mut two), 0);
    assert_eq!(cache.used(), 0);
}

#[test]
fn a_page_that_was_cut_short_is_missing_once_the_file_has_grown_and_is_replaced() {
    let fc = FileCache::new(&Cache::new(Bound::new(1 << 20, 0)));
    let short = Arc::new(FillBuf::from_buf(DmaBuf::new(PAGE).unwrap(), 1000));
    assert!(fc.install(0, &Frame::new(&fc, 0, 0, short, false)));
    assert_eq!(fc.first_missing(0, 1000), None);
    assert_eq!(fc.first_missing(0, 1001), Some(0..4096));
    assert!(fc.install(0, &page_frame(&fc, 0, 1, 7)));
    assert_eq!(fc.first_missing(0, 4096), None);
    let mut out = [0; PAGE];
    assert_eq!((fc.copy(0, &mut out), out[PAGE - 1]), (PAGE, 7));
}

#[test]
fn a_miss_never_crosses_a_region() {
    let fc = FileCache::new(&Cache::new(Bound::new(1 << 20, 0)));
    let edge = REGION as u64;
    assert_eq!(
        fc.first_missing(edge - 1, edge + 1),
        Some(edge - 4096..edge)
    );
    assert_eq!(fc.first_missing(edge, edge + 1), Some(edge..edge + 4096));
}

#[test]
fn the_clean_frame_of_a_short_last_region_is_dropped() {
    let fc = FileCache::new(&Cache::new(Bound::new(64 << 20, 0)));
    let buf = DmaBuf::new(REGION).unwrap();
    let short = Frame::new(&fc, 0, 0, Arc::new(FillBuf::from_buf(buf, 5000)), true);
    fc.install_whole(&short);
    let mut byte = [0u8; 1];
    fc.drop_clean(0, 5000);
    assert_eq!(fc.copy(0, &mut byte), 1, "it is dirty");
    short.release_dirty();
    fc.drop_clean(0, 4999);
    assert_eq!(fc.copy(0, &mut byte), 1, "a byte of it is to stay");
    fc.drop_clean(0, 5000);
    assert_eq!(fc.copy(0, &mut byte), 0);
}

#[test]
fn a_whole_frame_hides_pages_and_thins_out() {
    let cache = Cache::new(Bound::new(64 << 20, 0));
    let fc = FileCache::new(&cache);
    assert!(fc.install(0, &page_frame(&fc, 0, 1, 1)));
    let whole = page_frame(&fc, 0, PAGES, 2);
    fc.install_whole(&whole);
    cache.admit(&whole);
    let mut b = [0u8; 1];
    fc.copy(0, &mut b);
    assert_eq!(b[0], 2);
    whole.take_hot();
    fc.copy(8192, &mut b);
    let kept = fc.thin_out(&whole, whole.take_hot());
    assert_eq!(kept.len(), 1);
    for f in &kept {
        cache.admit(f);
    }
    drop((kept, whole));
    assert_eq!(cache.used(), PAGE as u64);
    assert_eq!(fc.copy(8192, &mut b), 1);
    assert_eq!(fc.copy(0, &mut b), 0);
}
