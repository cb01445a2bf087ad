//! Tests of the simulated device's power cuts.

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, DmaSlice, IoErrorKind, Op};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions, Event};

fn block(byte: u8, blocks: usize) -> DmaSlice {
    let mut buf = DmaBuf::new(512 * blocks).unwrap();
    buf.fill(byte);
    buf.freeze()
}

fn at(image: &CrashImage, lba: u64) -> u8 {
    let mut bytes = [0; 512];
    image.read(lba * 512, &mut bytes);
    assert!(
        bytes.iter().all(|b| *b == bytes[0]),
        "a block is never torn"
    );
    bytes[0]
}

#[test]
fn only_flush_and_fua_settle_with_a_cache() {
    let dev = CrashDevice::new(512, 64, true, 1);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(async {
        ch.write(0, block(1, 1), false).await.unwrap();
        ch.write(1, block(2, 1), true).await.unwrap();
    });
    let n = dev.len_events();
    let none = dev.image_after(n, &mut |_| false);
    assert_eq!((at(&none, 0), at(&none, 1)), (0, 2));
    let all = dev.image_after(n, &mut |_| true);
    assert_eq!((at(&all, 0), at(&all, 1)), (1, 2));
    ch.block_on(ch.flush()).unwrap();
    assert_eq!(
        at(&dev.image_after(dev.len_events() - 1, &mut |_| false), 0),
        0
    );
    assert_eq!(at(&dev.image_after(dev.len_events(), &mut |_| false), 0), 1);
}

#[test]
fn without_a_cache_a_completion_settles() {
    let dev = CrashDevice::new(512, 64, false, 1);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.write(0, block(1, 1), false)).unwrap();
    assert_eq!(at(&dev.image_after(1, &mut |_| false), 0), 0);
    assert_eq!(at(&dev.image_after(2, &mut |_| false), 0), 1);
}

#[test]
fn a_flush_does_not_cover_what_was_in_flight() {
    let options = CrashOptions::default().reorder(false);
    let dev = CrashDevice::with_options(&options, CrashImage::zeroed(64 * 512));
    let mut ch = dev.open_channel().unwrap();
    ch.submit(
        0,
        Op::Write {
            lba: 0,
            data: block(1, 1),
            fua: false,
        },
    )
    .unwrap();
    ch.submit(1, Op::Flush).unwrap();
    let mut out = Vec::new();
    ch.poll(&mut out);
    assert_eq!(out.len(), 2);
    assert_eq!(at(&dev.image_after(dev.len_events(), &mut |_| false), 0), 0);
}

#[test]
fn an_older_cached_write_never_comes_back_over_a_settled_one() {
    let dev = CrashDevice::new(512, 64, true, 3);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(async {
        ch.write(0, block(1, 4), false).await.unwrap();
        ch.write(1, block(2, 1), true).await.unwrap();
    });
    for keep in [false, true] {
        let image = dev.image_after(dev.len_events(), &mut |_| keep);
        assert_eq!(at(&image, 1), 2);
        assert_eq!(at(&image, 0), u8::from(keep));
    }
}

#[test]
fn pieces_are_torn_at_the_unit() {
    let options = CrashOptions::default().tear_bytes(4096);
    let dev = CrashDevice::with_options(&options, CrashImage::zeroed(64 * 512));
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.write(4, block(9, 16), false)).unwrap();
    let mut points = dev.crash_points();
    while points.advance().is_some() {}
    let pieces: Vec<_> = points
        .unsettled()
        .iter()
        .map(|p| (p.lba, p.len_blocks))
        .collect();
    assert_eq!(pieces, [(4, 4), (8, 8), (16, 4)]);
    let image = points.image(&mut |p| p.lba == 8);
    assert_eq!(
        (at(&image, 4), at(&image, 8), at(&image, 15), at(&image, 16)),
        (0, 9, 9, 0)
    );
}

#[test]
fn power_goes_and_comes_back() {
    let dev = CrashDevice::new(512, 64, true, 5);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    dev.cut_power_after(3);
    let errors = ch.block_on(async {
        let mut errors = Vec::new();
        for i in 0..4 {
            dev.mark(i);
            errors.push(ch.write(i, block(1, 1), true).await.err().map(|e| e.kind));
        }
        errors
    });
    assert_eq!(
        errors,
        [
            None,
            Some(IoErrorKind::Removed),
            Some(IoErrorKind::Removed),
            Some(IoErrorKind::Removed)
        ]
    );
    let again = dev.reopen_after(usize::MAX, &mut |_| false);
    assert_eq!(again.len_events(), 0);
    assert_eq!(at(&again.image(), 0), 1);
    assert_eq!(at(&again.image(), 1), 0);
}

#[test]
fn the_same_seed_gives_the_same_log() {
    let run = |seed| {
        let dev = CrashDevice::new(512, 64, true, seed);
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let ops = (0..20)
            .map(|i| Op::Write {
                lba: i,
                data: block(1, 1),
                fua: false,
            })
            .collect();
        ch.block_on(ch.io_all(ops));
        let log = dev.log().into_iter();
        log.filter_map(|e| match e {
            Event::Completed { id } => Some(id),
            _ => None,
        })
        .collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
