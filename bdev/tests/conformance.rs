//! Runs the conformance suite on every module, and on stacks of them.

use std::path::Path;
use std::sync::Arc;

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::file::{File, FileOptions};
use pumice_bdev::malloc::{Malloc, MallocOptions};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::split::Split;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, IoErrorKind, Op, OpKind, open};
use pumice_bdev_testkit::conformance::{self, ModelOptions};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};

fn malloc(size: &str) -> Arc<dyn BlockDevice> {
    open(&format!("malloc://{size}")).unwrap()
}

#[test]
fn malloc_conforms() {
    conformance::run(&*malloc("8M"));
    conformance::run(&*malloc("8M?block_size=4096"));
    let odd = MallocOptions::default().num_blocks(3001);
    conformance::run(&Malloc::new(&odd).unwrap());
}

/// Memory is allocated in stripes. What lies across the end of one is whole all the same.
#[test]
fn memory_has_no_seams() {
    // More than the caches hold, so that long writes bypass them; and less.
    for size in ["64M", "8M"] {
        let dev = malloc(size);
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let seam = (2 << 20) / 512;
        let mut data = DmaBuf::new(8192).unwrap();
        for (block, byte) in data.chunks_mut(512).zip(1u8..) {
            block.fill(byte);
        }
        let mut data = data.freeze();
        let at_seam = || {
            ch.block_on(ch.read(seam - 8, DmaBuf::new(8192).unwrap()))
                .unwrap()
        };
        ch.block_on(ch.write(seam - 8, data.clone(), false))
            .unwrap();
        assert!(at_seam()[..] == data[..], "{size}");
        for at in [0, 4095, 4096, 8191] {
            let mut other = DmaBuf::copy_from(&data).unwrap();
            other[at] ^= 0x80;
            let op = Op::Compare {
                lba: seam - 8,
                data: other.freeze(),
            };
            let e = ch.block_on(ch.io(op)).1.unwrap_err();
            let offset_bytes = at as u64;
            assert_eq!(e.kind, IoErrorKind::Miscompare { offset_bytes }, "{size}");
        }
        ch.block_on(ch.write_zeroes(seam, 2, false)).unwrap();
        let mut zeroed = DmaBuf::copy_from(&data).unwrap();
        zeroed[4096..5120].fill(0);
        data = zeroed.freeze();
        assert!(at_seam()[..] == data[..], "{size}: the rest stays");
    }
}

#[test]
fn null_conforms() {
    conformance::run(&*open("null://1T").unwrap());
}

#[test]
fn file_conforms() {
    let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    for (no_io_uring, buffered) in [(false, false), (false, true), (true, false)] {
        let options = FileOptions::new(dir.path().join("image"))
            .size(Some(8 << 20))
            .create(true)
            .no_io_uring(no_io_uring)
            .buffered(buffered);
        conformance::run(&File::open(&options).unwrap());
    }
}

#[test]
fn crashsim_conforms() {
    conformance::run(&CrashDevice::new(512, 8192, true, 1));
    let in_order = CrashOptions::default().reorder(false);
    conformance::run(&CrashDevice::with_options(
        &in_order,
        CrashImage::zeroed(4 << 20),
    ));
}

#[test]
fn passthru_conforms() {
    conformance::run(&Passthru::new("PT", malloc("8M")));
}

#[test]
fn delay_conforms() {
    conformance::run(&Delay::new("D", malloc("4M"), Latencies::default()));
    let slow = Latencies::default()
        .avg_read_us(20)
        .p99_read_us(300)
        .avg_write_us(10)
        .p99_write_us(200);
    conformance::run(&Delay::new("D", malloc("4M"), slow));
}

#[test]
fn error_conforms_without_faults() {
    conformance::run(&ErrorDevice::new(None, malloc("4M")));
    let null = open("null://4M").unwrap();
    conformance::run(&ErrorDevice::new(None, null));
}

#[test]
fn split_conforms() {
    for part in Split::new(&malloc("9M"), 3, None).unwrap() {
        conformance::run(&part);
    }
}

#[test]
fn raid0_conforms() {
    for n in [1, 2, 3] {
        for strip_kb in [4, 64] {
            let legs = (0..n).map(|_| malloc("4M")).collect();
            conformance::run(&Raid0::new("R", legs, strip_kb, None).unwrap());
        }
    }
}

/// A comparison over several strips compares each of them with its own blocks.
#[test]
fn a_raid0_compares_every_strip() {
    for n in [1, 2, 3] {
        let legs = (0..n).map(|_| malloc("4M")).collect();
        let raid = Raid0::new("R", legs, 4, None).unwrap();
        let ch = AsyncChannel::new(raid.open_channel().unwrap());
        // Each block has bytes of its own.
        let mut data = DmaBuf::new(64 << 10).unwrap();
        for (block, byte) in data.chunks_mut(512).zip(1u8..) {
            block.fill(byte);
        }
        let data = data.freeze();
        ch.block_on(ch.write(3, data.clone(), false)).unwrap();
        let compare = |data| ch.block_on(ch.io(Op::Compare { lba: 3, data })).1;
        compare(data.clone()).unwrap();
        for at in (0..data.len()).step_by(4096) {
            let mut other = DmaBuf::copy_from(&data).unwrap();
            other[at] ^= 0x80;
            let e = compare(other.freeze()).unwrap_err();
            let offset_bytes = at as u64;
            let differs = IoErrorKind::Miscompare { offset_bytes };
            assert_eq!(e.kind, differs, "{n} legs, byte {at}: {e}");
        }
    }
}

struct Stack {
    dev: Arc<dyn BlockDevice>,
    legs: Vec<Arc<ErrorDevice>>,
}

/// Makes delay on raid0 on two error devices.
fn stack(latencies: Latencies) -> Stack {
    let legs: Vec<_> = (0..2)
        .map(|_| Arc::new(ErrorDevice::new(None, malloc("4M"))))
        .collect();
    let bases = legs
        .iter()
        .map(|l| Arc::clone(l) as Arc<dyn BlockDevice>)
        .collect();
    let raid = Raid0::new("R", bases, 8, None).unwrap();
    let dev = Arc::new(Delay::new("D", Arc::new(raid), latencies));
    Stack { dev, legs }
}

#[test]
fn a_stack_conforms() {
    conformance::run(&*stack(Latencies::default()).dev);
}

#[test]
fn a_stack_against_the_model_with_faults() {
    for seed in 0..20 {
        let latencies = Latencies::default().avg_write_us(seed % 3 * 5);
        let Stack { dev, legs } = stack(latencies);
        let kinds = [
            None,
            Some(OpKind::Read),
            Some(OpKind::Write),
            Some(OpKind::WriteZeroes),
        ];
        for (i, leg) in legs.iter().enumerate() {
            for (j, op) in kinds.into_iter().enumerate() {
                let failure = if (i + j) % 2 == 0 {
                    Failure::Fail
                } else {
                    Failure::NoMemory
                };
                let range = Some((seed * 37 + j as u64 * 100, 60));
                leg.inject(Injection::new(failure).op(op).count(5).range(range));
            }
        }
        let options = ModelOptions::default()
            .seed(seed)
            .count(600)
            .span_blocks(6000)
            .depth(16)
            .tolerate_errors(true);
        conformance::against_model(&*dev, &options);
    }
}

#[test]
fn a_fault_hits_what_it_names_and_no_more() {
    let dev = ErrorDevice::new(Some("E"), malloc("4M"));
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Read))
            .count(2)
            .range(Some((10, 5))),
    );
    let read = |lba| ch.block_on(ch.read(lba, DmaBuf::zeroed(1024).unwrap()));
    assert!(read(0).is_ok());
    assert!(read(15).is_ok());
    let e = read(9).unwrap_err();
    assert_eq!(e.kind, IoErrorKind::Media);
    assert_eq!(
        e.to_string(),
        "E: read of 1024 bytes at LBA 9 (byte offset 4608): media error: injected"
    );
    assert!(read(14).is_err());
    assert!(read(14).is_ok());
    assert!(dev.injections().is_empty());
}

#[test]
fn corrupt_data_both_ways() {
    let dev = ErrorDevice::new(None, malloc("4M"));
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let corrupt = |op| {
        Injection::new(Failure::Corrupt {
            offset: 100,
            value: 0xff,
        })
        .op(Some(op))
    };
    dev.inject(corrupt(OpKind::Write));
    let data = DmaBuf::zeroed(512).unwrap().freeze();
    let (op, result) = ch.block_on(ch.io(Op::Write {
        lba: 0,
        data,
        fua: false,
    }));
    result.unwrap();
    let Op::Write { data, .. } = op else {
        panic!("{op:?}")
    };
    assert!(
        data.iter().all(|b| *b == 0),
        "the submitter's data is untouched"
    );
    let back = ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    assert_eq!(back.iter().position(|b| *b != 0), Some(100));
    dev.inject(corrupt(OpKind::Read));
    let back = ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    assert_eq!(back[100], 0, "0xff with 0xff");
    // The byte of a read in parts is counted through all of them.
    let bufs = [0, 1].map(|_| DmaBuf::zeroed(512).unwrap()).into();
    let far = Injection::new(Failure::Corrupt {
        offset: 612,
        value: 1,
    })
    .op(Some(OpKind::Read));
    dev.replace(far);
    let (op, result) = ch.block_on(ch.io(Op::ReadV { lba: 8, bufs }));
    result.unwrap();
    let Op::ReadV { bufs, .. } = op else {
        panic!("{op:?}")
    };
    assert!(bufs[0].iter().all(|b| *b == 0));
    assert_eq!(bufs[1].iter().position(|b| *b != 0), Some(100));
    // A fault that corrupts data leaves operations without data alone, and stays in the list.
    dev.inject(corrupt(OpKind::Read).op(None));
    ch.block_on(ch.flush()).unwrap();
    assert_eq!(dev.injections().len(), 1);
}

#[test]
fn a_fault_in_place_of_another() {
    let dev = ErrorDevice::new(None, malloc("4M"));
    let of = |op, count| Injection::new(Failure::Fail).op(op).count(count);
    dev.replace(of(Some(OpKind::Read), 3));
    dev.replace(of(Some(OpKind::Write), 2));
    dev.replace(of(Some(OpKind::Read), 1));
    assert_eq!(dev.injections().len(), 2);
    dev.replace(of(Some(OpKind::Write), 0));
    assert_eq!(dev.injections(), [of(Some(OpKind::Read), 1)]);
    dev.replace(of(None, 5));
    assert_eq!(dev.injections(), [of(None, 5)]);
    dev.inject(of(None, 0));
    dev.replace(of(None, 0));
    assert!(dev.injections().is_empty());
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
}

#[test]
fn a_device_larger_than_memory_fails_its_writes_and_lives_on() {
    // A stripe of it is a terabyte: more than the machine has, less than it can address.
    let dev = open("malloc://65536T").unwrap();
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let data = || DmaBuf::zeroed(512).unwrap().freeze();
    match ch.block_on(ch.write(7, data(), false)) {
        // Some kernels promise any amount of memory.
        Ok(()) => {}
        Err(e) => {
            assert_eq!(e.kind, IoErrorKind::NoSpace);
            assert!(e.to_string().contains("make the device smaller"), "{e}");
        }
    }
    let back = ch.block_on(ch.read(7, DmaBuf::new(512).unwrap())).unwrap();
    assert!(back.iter().all(|b| *b == 0));
}

#[test]
fn hang_resume_reset_abort() {
    let dev = ErrorDevice::new(None, malloc("4M"));
    let hang = Injection::new(Failure::Hang).op(Some(OpKind::Read));
    let mut ch = dev.open_channel().unwrap();
    let mut out = Vec::new();
    let read = || Op::Read {
        lba: 0,
        buf: DmaBuf::new(512).unwrap(),
    };
    let wait = std::time::Duration::from_millis(3);

    dev.inject(hang.clone());
    ch.submit(1, read()).unwrap();
    ch.wait(wait).unwrap();
    assert_eq!(ch.poll(&mut out), 0);
    dev.resume();
    while ch.poll(&mut out) == 0 {
        ch.wait(wait).unwrap();
    }
    assert!(out.pop().unwrap().result.is_ok());

    for (tag, end) in [(2, Op::Reset), (3, Op::Abort { tag: 3 })] {
        dev.inject(hang.clone());
        ch.submit(tag, read()).unwrap();
        assert_eq!(ch.poll(&mut out), 0);
        ch.submit(99, end).unwrap();
        while out.len() < 2 {
            ch.poll(&mut out);
        }
        assert_eq!(out[0].tag, tag);
        assert_eq!(
            out[0].result.as_ref().unwrap_err().kind,
            IoErrorKind::Aborted
        );
        assert_eq!(out[1].tag, 99);
        out[1].result.as_ref().unwrap();
        out.clear();
    }
}

#[test]
fn delays_are_kept() {
    let slow = Latencies::default().avg_read_us(3000).p99_read_us(3000);
    let dev = Delay::new("D", malloc("4M"), slow);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let start = std::time::Instant::now();
    ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
    assert!(start.elapsed().as_micros() >= 3000);
    dev.set_latencies(Latencies::default());
    assert_eq!(dev.latencies(), Latencies::default());
}

#[test]
fn reads_and_writes_have_each_their_tail() {
    // The kinds alternate strictly, which must not give one of them all the tails.
    let tails = Latencies::default().p99_read_us(2000).p99_write_us(3000);
    let dev = Delay::new("D", malloc("4M"), tails);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let (mut reads, mut writes) = (0, 0);
    for _ in 0..100 {
        let start = std::time::Instant::now();
        ch.block_on(ch.read(0, DmaBuf::new(512).unwrap())).unwrap();
        reads += start.elapsed().as_micros();
        let start = std::time::Instant::now();
        let data = DmaBuf::zeroed(512).unwrap().freeze();
        ch.block_on(ch.write(0, data, false)).unwrap();
        writes += start.elapsed().as_micros();
    }
    assert!(reads >= 2000, "{reads}");
    assert!(writes >= 3000, "{writes}");
}

#[test]
fn what_cannot_be_stacked_says_why() {
    let e = Raid0::new(
        "R",
        vec![malloc("1M"), malloc("1M?block_size=4096")],
        64,
        None,
    );
    assert!(e.unwrap_err().to_string().contains("4096"));
    assert!(Raid0::new("R", vec![malloc("1M")], 3, None).is_err());
    assert!(Raid0::new("R", vec![malloc("4K")], 64, None).is_err());
    // Together they would have more bytes than a device can count.
    let huge = || open("null://1024P").unwrap();
    assert!(Raid0::new("R", vec![huge()], 64, None).is_ok());
    let legs = (0..16).map(|_| huge()).collect();
    let e = Raid0::new("R", legs, 64, None).unwrap_err();
    assert!(e.to_string().contains("at most 1 EiB"), "{e}");
    assert!(Raid0::new("R", Vec::new(), 64, None).is_err());
    assert!(Split::new(&malloc("1M"), 0, None).is_err());
    assert!(Split::new(&malloc("1M"), 2, Some(1)).is_err());
    assert!(Split::new(&malloc("2M"), 2, Some(1)).is_ok());
}
