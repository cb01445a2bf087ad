//! Durable data is there after a power cut, through every device that is built on others: flushes
//! reach every base, and force unit access is passed down with its write.

use std::sync::Arc;

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::registry::Registry;
use pumice_bdev::split::Split;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, DmaSlice, Limits, Op, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BS: usize = 512;
/// Number of blocks of each simulated disk.
const DISK: u64 = 256;

type Dev = Arc<dyn BlockDevice>;
/// Builds a device on simulated disks.
type Build = fn(&[Dev]) -> Dev;

fn stacks() -> Vec<(&'static str, usize, Build)> {
    vec![
        ("passthru", 1, |d| {
            Arc::new(Passthru::new("P", d[0].clone()))
        }),
        ("delay", 1, |d| {
            let slow = Latencies::default().avg_write_us(3).p99_write_us(50);
            Arc::new(Delay::new("D", d[0].clone(), slow))
        }),
        ("error", 1, |d| {
            Arc::new(ErrorDevice::new(None, d[0].clone()))
        }),
        ("split", 1, |d| {
            let mut parts = Split::new(&d[0], 2, None).unwrap();
            Arc::new(parts.swap_remove(1))
        }),
        ("raid0", 3, |d| {
            Arc::new(Raid0::new("R", d.to_vec(), 4, None).unwrap())
        }),
        ("a registered raid0", 2, |d| {
            let registry = Registry::new();
            let mut legs: Vec<Dev> = Vec::new();
            let mut below = Vec::new();
            for (i, disk) in d.iter().enumerate() {
                let name = format!("leg{i}");
                let leg = Passthru::new(&name, disk.clone());
                registry.register(Arc::new(leg), Vec::new()).unwrap();
                legs.push(Arc::new(registry.claim(&name, "R").unwrap()));
                below.push(name);
            }
            let raid = Raid0::new("R", legs, 8, None).unwrap();
            Arc::new(registry.register(Arc::new(raid), below).unwrap())
        }),
        ("delay on raid0 on error", 2, |d| {
            let error = |d: &Dev| Arc::new(ErrorDevice::new(None, d.clone())) as Dev;
            let raid = Raid0::new("R", d.iter().map(error).collect(), 4, None).unwrap();
            Arc::new(Delay::new("D", Arc::new(raid), Latencies::default()))
        }),
    ]
}

/// After one leg has failed a flush, the next flush fails too, although it would succeed on all
/// legs.
#[test]
fn a_stripe_remembers_the_failed_flush_of_one_leg() {
    let leg = || pumice_bdev::open("malloc://1M").unwrap();
    let failing = Arc::new(ErrorDevice::new(None, leg()));
    let raid = Raid0::new("R", vec![leg(), failing.clone()], 4, None).unwrap();
    let ch = AsyncChannel::new(raid.open_channel().unwrap());
    let other = AsyncChannel::new(raid.open_channel().unwrap());
    let inject = |failure| {
        failing.inject(Injection::new(failure).op(Some(OpKind::Flush)));
    };
    // A flush that was not carried out has lost nothing.
    inject(Failure::NoMemory);
    ch.block_on(ch.flush()).unwrap_err();
    ch.block_on(ch.flush()).unwrap();
    inject(Failure::Fail);
    ch.block_on(ch.flush()).unwrap_err();
    for ch in [&ch, &other] {
        ch.block_on(ch.flush()).unwrap_err();
        ch.block_on(ch.write(0, blocks(1, 1), true)).unwrap_err();
        ch.block_on(ch.write(0, blocks(1, 1), false)).unwrap();
    }
}

/// The flush of one leg was not carried out, and that of another failed: what counts is the latter,
/// whichever of them the submitter is told.
#[test]
fn a_stripe_remembers_a_failed_flush_beside_one_that_passes() {
    for failures in [
        [Failure::NoMemory, Failure::Fail],
        [Failure::Fail, Failure::NoMemory],
    ] {
        let legs = failures.map(|failure| {
            let leg = ErrorDevice::new(None, pumice_bdev::open("malloc://1M").unwrap());
            leg.inject(Injection::new(failure).op(Some(OpKind::Flush)));
            Arc::new(leg) as Dev
        });
        let raid = Raid0::new("R", legs.to_vec(), 4, None).unwrap();
        let ch = AsyncChannel::new(raid.open_channel().unwrap());
        ch.block_on(ch.flush()).unwrap_err();
        ch.block_on(ch.flush())
            .expect_err("one leg has lost something");
        ch.block_on(ch.write(0, blocks(1, 1), true)).unwrap_err();
    }
}

fn blocks(n: u64, byte: u8) -> DmaSlice {
    let mut buf = DmaBuf::new(usize::try_from(n).unwrap() * BS).unwrap();
    buf.fill(byte);
    buf.freeze()
}

/// Returns the first byte of each block.
fn contents(dev: &Dev) -> Vec<u8> {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let len = usize::try_from(dev.info().len_bytes()).unwrap();
    let back = ch.block_on(ch.read(0, DmaBuf::new(len).unwrap())).unwrap();
    back.chunks(BS).map(|block| block[0]).collect()
}

/// Returns the contents after a power cut now, with all or nothing of what the caches held.
fn after_a_cut(disks: &[Arc<CrashDevice>], build: Build, keep: bool) -> Vec<u8> {
    let reopened: Vec<Dev> = disks
        .iter()
        .map(|d| {
            let image: CrashImage = d.image_after(d.len_events(), &mut |_| keep);
            Arc::new(CrashDevice::from_image(512, image, true, 1)) as Dev
        })
        .collect();
    contents(&build(&reopened))
}

#[test]
fn flushes_and_fua_pass_through_every_device() {
    for (name, n_disks, build) in stacks() {
        let seed = 7;
        let mut rng = SmallRng::seed_from_u64(seed);
        let disks: Vec<Arc<CrashDevice>> = (0..n_disks)
            .map(|i| Arc::new(CrashDevice::new(512, DISK, true, i as u64)))
            .collect();
        let bases: Vec<Dev> = disks.iter().map(|d| d.clone() as Dev).collect();
        let dev = build(&bases);
        assert!(dev.info().write_cache, "{name}: the cache below is its own");
        let span = dev.info().num_blocks;
        let at = |lba: u64| usize::try_from(lba).unwrap();
        let (mut latest, mut durable) = (vec![0; at(span)], vec![0; at(span)]);
        let channels = [0, 1].map(|_| AsyncChannel::new(dev.open_channel().unwrap()));
        for step in 0..400 {
            let what = format!("{name}, seed {seed}, step {step}");
            // A flush on one channel covers the writes that the other has completed.
            let ch = &channels[rng.random_range(0..2)];
            let len = rng.random_range(1..=40.min(span));
            let lba = rng.random_range(0..=span - len);
            let fua = rng.random_ratio(1, 3);
            let byte = rng.random();
            let op = match rng.random_range(0..8) {
                0 => Op::Flush,
                1 => Op::WriteZeroes {
                    lba,
                    len_blocks: len,
                    fua,
                },
                2 => {
                    let data = (0..len).map(|_| blocks(1, byte)).collect();
                    Op::WriteV { lba, data, fua }
                }
                _ => Op::Write {
                    lba,
                    data: blocks(len, byte),
                    fua,
                },
            };
            let flush = matches!(op, Op::Flush);
            let byte = if matches!(op, Op::WriteZeroes { .. }) {
                0
            } else {
                byte
            };
            ch.block_on(ch.io(op)).1.unwrap();
            if flush {
                durable.clone_from(&latest);
            } else {
                latest[at(lba)..at(lba + len)].fill(byte);
                if fua {
                    durable[at(lba)..at(lba + len)].fill(byte);
                }
            }
            if step % 10 == 9 {
                assert!(after_a_cut(&disks, build, false) == durable, "{what}: lost");
                assert!(after_a_cut(&disks, build, true) == latest, "{what}: kept");
            }
        }
    }
}

/// A stripe has a cache if one leg has one, whichever it is, and a flush or FUA makes what that leg
/// holds durable.
#[test]
fn a_stripe_with_one_cache_is_flushed() {
    let build: Build = |d| Arc::new(Raid0::new("R", d.to_vec(), 4, None).unwrap());
    for cached in 0..2 {
        let disks: Vec<Arc<CrashDevice>> = (0..2)
            .map(|i| Arc::new(CrashDevice::new(512, DISK, i == cached, i)))
            .collect();
        let bases: Vec<Dev> = disks.iter().map(|d| d.clone() as Dev).collect();
        let dev = build(&bases);
        assert!(dev.info().write_cache, "leg {cached} has one");
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        ch.block_on(ch.write(0, blocks(32, 1), false)).unwrap();
        ch.block_on(ch.flush()).unwrap();
        ch.block_on(ch.write(32, blocks(32, 2), true)).unwrap();
        let left = after_a_cut(&disks, build, false);
        assert!(left[..32].iter().all(|b| *b == 1), "flushed, leg {cached}");
        assert!(left[32..64].iter().all(|b| *b == 2), "FUA, leg {cached}");
    }
    let disk = |i| Arc::new(CrashDevice::new(512, DISK, false, i)) as Dev;
    assert!(!build(&[disk(0), disk(1)]).info().write_cache);
}

/// A stripe promises only what each of its legs promises.
#[test]
fn a_stripe_promises_what_every_leg_does() {
    let disk = |unmap_zeroes| {
        let options = CrashOptions::default().unmap_zeroes(unmap_zeroes);
        Arc::new(CrashDevice::with_options(
            &options,
            CrashImage::zeroed(DISK * 512),
        )) as Dev
    };
    let opened = |uri: &str| pumice_bdev::open(uri).unwrap();
    for (other, promises) in [
        (disk(true), [true, true, true]),
        (disk(false), [true, true, false]),
        (opened("malloc://128K?block_size=512"), [true, false, true]),
        (opened("null://128K?block_size=512"), [false, false, false]),
    ] {
        for legs in [[disk(true), other.clone()], [other.clone(), disk(true)]] {
            let raid = Raid0::new("R", legs.to_vec(), 4, None).unwrap();
            let info = raid.info();
            assert_eq!(
                [info.keeps_data, info.outlives_process, info.unmap_zeroes],
                promises,
                "with a leg of {}",
                other.info().module
            );
        }
    }
}

#[test]
fn what_a_base_cannot_do_durably_is_not_promised_above() {
    // The base does not support FUA, so no device built on it accepts a write with it.
    let disk = || Arc::new(CrashDevice::new(512, DISK, true, 1)) as Dev;
    let mut info = disk().info().clone();
    info.ops = info.ops.without(pumice_bdev::OpKind::Fua);
    for (name, n_disks, build) in stacks() {
        let bases: Vec<Dev> = (0..n_disks)
            .map(|_| {
                Arc::new(Described {
                    info: info.clone(),
                    base: disk(),
                }) as Dev
            })
            .collect();
        let dev = build(&bases);
        let ch = AsyncChannel::new(dev.open_channel().unwrap());
        let (_, result) = ch.block_on(ch.io(Op::Write {
            lba: 0,
            data: blocks(20, 1),
            fua: true,
        }));
        let e = result.expect_err(name);
        assert_eq!(e.kind, pumice_bdev::IoErrorKind::Unsupported, "{name}: {e}");
        ch.block_on(ch.write(0, blocks(20, 1), false)).unwrap();
        ch.block_on(ch.flush()).unwrap();
    }
}

/// A part that begins inside of a group of blocks that its base writes whole promises no such groups.
#[test]
fn a_part_promises_what_its_base_writes_whole() {
    let options = CrashOptions::default().tear_bytes(4096);
    for (blocks, groups) in [(85, [8, 1, 1]), (88, [8, 8, 8])] {
        let image = CrashImage::zeroed(3 * blocks * BS as u64);
        let disk: Dev = Arc::new(CrashDevice::with_options(&options, image));
        let parts = Split::new(&disk, 3, None).unwrap();
        let promised = parts.iter().map(|part| part.info().atomic_unit_blocks);
        assert!(promised.eq(groups), "parts of {blocks} blocks: {parts:?}");
    }
}

/// A stripe takes what each of its legs takes, and has room for what the shortest of them has.
#[test]
fn a_stripe_keeps_to_the_limits_of_every_leg() {
    let leg = |blocks: u64, buf_align, max_blocks| {
        let base = pumice_bdev::open(&format!("malloc://{}?block_size=512", blocks * 512)).unwrap();
        let mut info = base.info().clone();
        info.buf_align = buf_align;
        info.limits = Limits::new(max_blocks, 0);
        Arc::new(Described { info, base }) as Dev
    };
    let (long, short) = (leg(100, 1, 0), leg(85, 64, 12));
    for legs in [[long.clone(), short.clone()], [short, long]] {
        let raid: Dev = Arc::new(Raid0::new("R", legs.to_vec(), 4, None).unwrap());
        let info = raid.info();
        assert_eq!((info.num_blocks, info.buf_align), (160, 64));
        assert_eq!(info.limits.at_most(1000), 12);
        let ch = AsyncChannel::new(raid.open_channel().unwrap());
        for lba in 0..info.num_blocks {
            let byte = u8::try_from(lba).unwrap();
            ch.block_on(ch.write(lba, blocks(1, byte), false)).unwrap();
        }
        for lba in 0..info.num_blocks {
            let back = ch.block_on(ch.read(lba, DmaBuf::new(BS).unwrap())).unwrap();
            assert_eq!(u64::from(back[0]), lba, "each block has a place of its own");
        }
    }
}

/// A device with another description than its base.
#[derive(Debug)]
struct Described {
    info: pumice_bdev::DeviceInfo,
    base: Dev,
}

impl BlockDevice for Described {
    fn info(&self) -> &pumice_bdev::DeviceInfo {
        &self.info
    }

    fn open_channel(&self) -> Result<Box<dyn pumice_bdev::IoChannel>, pumice_bdev::BdevError> {
        Ok(Box::new(DescribedChannel {
            info: self.info.clone(),
            base: self.base.open_channel()?,
        }))
    }
}

struct DescribedChannel {
    info: pumice_bdev::DeviceInfo,
    base: Box<dyn pumice_bdev::IoChannel>,
}

impl pumice_bdev::IoChannel for DescribedChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), pumice_bdev::SubmitError> {
        match self.info.check(&op) {
            Ok(()) => self.base.submit(tag, op),
            Err(e) => Err(pumice_bdev::SubmitError::Refused(op, e)),
        }
    }

    fn poll(&mut self, out: &mut Vec<pumice_bdev::Completion>) -> usize {
        self.base.poll(out)
    }

    fn wait(&mut self, timeout: std::time::Duration) -> Result<(), pumice_bdev::BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }
}
