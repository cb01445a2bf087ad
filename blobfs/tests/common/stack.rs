//! Stacks of devices, each leg of which fails for itself and can lose its power.

use std::sync::Arc;

use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::passthru::Passthru;
use pumice_bdev::raid0::Raid0;
use pumice_bdev::split::Split;
use pumice_bdev::{BlockDevice, IoErrorKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use rand::prelude::*;

use crate::chaos::{Chaos, Rates};
use crate::plans::Ground;

type Dev = Arc<dyn BlockDevice>;

/// The kind of a stack of devices.
#[derive(Clone, Debug)]
pub struct Kind {
    pub legs: usize,
    pub options: CrashOptions,
    pub strip_kb: u32,
    pub wrapped: u32,
    pub split: bool,
    pub journal: bool,
    pub leg_bytes: u64,
}

/// The devices of a stack.
pub struct Stack {
    disks: Vec<CrashDevice>,
    chaos: Vec<Arc<Chaos>>,
    top: Dev,
    kind: Kind,
}

impl Kind {
    pub fn random(rng: &mut SmallRng, seed: u64) -> Kind {
        let legs = rng.random_range(1..4);
        let journal = rng.random();
        let block_size = [512, 4096][rng.random_range(0..2)];
        // Without a journal nothing makes a torn page whole.
        let tear_bytes = if journal { block_size } else { 4096 };
        let options = CrashOptions::default()
            .block_size(block_size)
            .write_cache(rng.random_range(0..3) > 0)
            .seed(seed)
            .tear_bytes(tear_bytes)
            .unmap_zeroes(rng.random())
            .fua(rng.random_range(0..3) > 0)
            .write_zeroes(rng.random())
            .unmap(rng.random());
        Kind {
            legs,
            options,
            strip_kb: [4, 16, 128][rng.random_range(0..3)],
            wrapped: rng.random_range(0..3),
            split: legs == 1 && rng.random(),
            journal,
            leg_bytes: [12, 24, 40][rng.random_range(0..3)] << 20,
        }
    }

    /// Builds the stack on these images.
    pub fn stack(&self, images: Vec<CrashImage>, seed: u64) -> Stack {
        let (mut disks, mut chaos, mut legs) = (Vec::new(), Vec::new(), Vec::<Dev>::new());
        for (n, image) in (0u64..).zip(images) {
            let options = self.options.clone().seed(self.options.seed ^ n << 40);
            let disk = CrashDevice::with_options(&options, image);
            disks.push(disk.clone());
            let faults = Chaos::new(Arc::new(disk), seed.wrapping_mul(31) ^ n << 32);
            chaos.push(Arc::clone(&faults));
            let latencies = Latencies::default().avg_write_us(1).p99_write_us(80);
            legs.push(match self.wrapped {
                0 => faults,
                1 => Arc::new(Delay::new(&format!("D{n}"), faults, latencies)),
                _ => Arc::new(Passthru::new(&format!("P{n}"), faults)),
            });
        }
        let top: Dev = if self.split {
            let mut parts = Split::new(&legs[0], 2, None).unwrap();
            Arc::new(parts.swap_remove(1))
        } else if legs.len() > 1 {
            Arc::new(Raid0::new("R", legs, self.strip_kb, None).unwrap())
        } else {
            legs.swap_remove(0)
        };
        Stack {
            disks,
            chaos,
            top,
            kind: self.clone(),
        }
    }
}

impl Stack {
    /// Ends the devices. A checkpoint of another thread may be under way: behind the first leg that is gone nothing can
    /// become durable that needs it.
    fn stop(&self) {
        for disk in &self.disks {
            disk.cut_power_after(disk.len_events());
        }
    }
}

impl Ground for Stack {
    fn top(&self) -> Dev {
        Arc::clone(&self.top)
    }

    fn quiet(&self) {
        self.chaos.iter().for_each(|c| c.set(Rates::default()));
    }

    /// One leg fails, or all.
    fn noise(&self, rng: &mut SmallRng) {
        let passing = [
            IoErrorKind::NoMemory,
            IoErrorKind::Busy,
            IoErrorKind::Nvme {
                sct: 0,
                sc: 6,
                dnr: false,
            },
        ];
        let lasting = [
            IoErrorKind::Media,
            IoErrorKind::NoSpace,
            IoErrorKind::Os(5),
            IoErrorKind::Nvme {
                sct: 2,
                sc: 0x80,
                dnr: true,
            },
            IoErrorKind::Short { done_bytes: 512 },
        ];
        let mut kinds = match rng.random_range(0..3) {
            0 => passing.to_vec(),
            1 => lasting.to_vec(),
            _ => [&passing[..], &lasting[..]].concat(),
        };
        if rng.random_range(0..8) == 0 {
            kinds.push(IoErrorKind::TimedOut);
        }
        let often = [1, 3, 12, 40][rng.random_range(0..4)];
        let mut rate = |of: u32| {
            if rng.random_range(0..of) == 0 {
                often
            } else {
                0
            }
        };
        let rates = Rates {
            write: rate(2),
            read: rate(4),
            flush: rate(6),
            clear: rate(4),
            kinds,
            unit: u64::from(self.kind.options.tear_bytes / self.kind.options.block_size),
        };
        let only = rng.random_range(0..=self.chaos.len());
        for (n, chaos) in self.chaos.iter().enumerate() {
            if only == n || only == self.chaos.len() {
                chaos.set(rates.clone());
            }
        }
    }

    fn faults(&self) -> Vec<String> {
        self.chaos.iter().flat_map(|c| c.faults()).collect()
    }

    fn works(&self) -> bool {
        true
    }

    fn next(&self, cut: bool, rng: &mut SmallRng) -> Stack {
        self.stop();
        let all = rng.random_range(0..3);
        let images = self.disks.iter().map(|disk| match cut {
            true => disk.image_after(disk.len_events(), &mut |_| match all {
                0 => false,
                1 => true,
                _ => rng.random(),
            }),
            false => disk.image(),
        });
        let images: Vec<CrashImage> = images.collect();
        self.kind.stack(images, rng.random())
    }
}
