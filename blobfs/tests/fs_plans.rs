//! Random fault plans on mixed stacks: a file system on split, striped, passed-through or delayed devices, each leg of which
//! fails for itself; then a kill or a power cut, a mount that meets faults too, and a comparison with what was promised.
//! `PUMICE_SEED=n` runs one seed alone, and `PUMICE_ROUNDS=n` runs more of them.

#[path = "common/chaos.rs"]
mod chaos;
mod common;
#[path = "killed/named.rs"]
mod named;
#[path = "common/plans.rs"]
mod plans;
#[path = "common/promises.rs"]
mod promises;
#[path = "common/stack.rs"]
mod stack;

use pumice_bdev_testkit::crashsim::CrashImage;
use pumice_blobfs::fs::FileSystem;
use rand::prelude::*;
use stack::{Kind, Stack};

use plans::{Ground as _, format_options, run, seeds};

/// Makes a file system on a new stack. The format may meet faults, and is repeated.
fn formatted(kind: &Kind, rng: &mut SmallRng, seed: u64) -> Stack {
    let images = (0..kind.legs).map(|_| CrashImage::zeroed(kind.leg_bytes));
    let mut stack = kind.stack(images.collect(), seed);
    let mut format = format_options(kind.journal, rng);
    for attempt in 0..4 {
        stack.quiet();
        if attempt < 3 && rng.random_range(0..3) == 0 {
            stack.noise(rng);
        }
        let result = FileSystem::format(stack.top(), &format);
        // Only later events count, and a device whose flush has failed is opened again.
        stack = stack.next(false, rng);
        match result {
            Ok(_) => break,
            Err(e) => assert!(attempt < 3, "seed {seed}: format: {e}"),
        }
        format.force = true;
    }
    stack
}

#[test]
fn what_was_promised_is_there_after_any_plan() {
    for seed in seeds(8) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let kind = Kind::random(&mut rng, seed);
        let stack = formatted(&kind, &mut rng, seed);
        let what = format!("{kind:?}");
        run(seed, stack, kind.journal, rng, &what);
    }
}
