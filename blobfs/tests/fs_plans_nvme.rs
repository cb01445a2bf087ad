//! Random fault plans below the NVMe driver: commands fail by status, late or never, aborts fail, the controller reports a fatal
//! status in the middle of writes, its volatile cache loses what was not flushed; then the comparison of `fs_plans.rs`.
//! `PUMICE_SEED=n` runs one seed alone, and `PUMICE_ROUNDS=n` runs more of them.

mod common;
#[path = "killed/named.rs"]
mod named;
#[path = "common/plans.rs"]
mod plans;
#[path = "common/promises.rs"]
mod promises;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use plans::{Ground, format_options, run, seeds};
use pumice_bdev::BlockDevice;
use pumice_bdev::registry::{Registry, TimeoutAction};
use pumice_blobfs::fs::FileSystem;
use pumice_nvme::controller::Phase;
use pumice_nvme::spec::{AdminOpcode, IoOpcode, Status};
use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{
    Fault, FaultRule, MemoryBackend, SoftConfig, SoftController, SoftNamespace,
};
use rand::prelude::*;

/// The time limit of operations while nothing fails, which no machine is too slow for, and while something does.
const LONG: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(20);

/// The properties of a controller.
#[derive(Clone, Copy, Debug)]
struct Kind {
    block_size: u32,
    write_cache: bool,
    entries: u16,
    queues: u16,
    mdts: u8,
    /// The action for an operation that takes longer than the limit.
    action: TimeoutAction,
    journal: bool,
}

struct Soft {
    kind: Kind,
    soft: SoftController,
    controller: Arc<Controller>,
    registry: Registry,
    top: Arc<dyn BlockDevice>,
    log: Mutex<Vec<String>>,
    struck: Mutex<u64>,
}

impl Soft {
    fn new(kind: Kind, namespaces: Vec<SoftNamespace>) -> Soft {
        let mut config = SoftConfig::new(namespaces);
        config.write_cache = kind.write_cache;
        config.entries = kind.entries;
        config.queues = kind.queues;
        config.mdts = kind.mdts;
        let soft = SoftController::new(config).unwrap();
        let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
        let namespaces = controller.namespaces();
        let mut devices = pumice_bdev::nvme::devices("N", &controller, namespaces, "soft").unwrap();
        let registry = Registry::new();
        registry.register(devices.remove(0), Vec::new()).unwrap();
        registry.set_timeout(LONG, kind.action);
        let top = registry.open("Nn1").unwrap();
        Soft {
            kind,
            soft,
            controller,
            registry,
            top,
            log: Mutex::default(),
            struck: Mutex::default(),
        }
    }
}

impl Ground for Soft {
    fn top(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.top)
    }

    fn quiet(&self) {
        self.soft.faults().clear();
        self.registry.set_timeout(LONG, self.kind.action);
    }

    fn noise(&self, rng: &mut SmallRng) {
        let faults = self.soft.faults();
        self.registry.set_timeout(SHORT, self.kind.action);
        for _ in 0..rng.random_range(1..4) {
            let codes = [
                Status::INTERNAL,
                Status::NAMESPACE_NOT_READY,
                Status::WRITE_FAULT,
                Status::UNRECOVERED_READ,
                Status::CAPACITY_EXCEEDED,
                Status::DATA_TRANSFER,
                Status::ABORTED_BY_REQUEST,
            ];
            let code = codes[rng.random_range(0..codes.len())];
            let status = if rng.random() { code.dnr() } else { code };
            let opcodes = [
                IoOpcode::WRITE,
                IoOpcode::WRITE,
                IoOpcode::READ,
                IoOpcode::FLUSH,
                IoOpcode::WRITE_ZEROES,
                IoOpcode::DATASET_MANAGEMENT,
            ];
            let opcode = opcodes[rng.random_range(0..opcodes.len())];
            let fault = match rng.random_range(0..16) {
                0 => Fault::Delay(Duration::from_millis(rng.random_range(1..80))),
                1 => Fault::Drop,
                2 => Fault::DropCompletion,
                3 => Fault::UnknownStatus,
                4 => Fault::Fatal,
                _ => Fault::Status(status),
            };
            let lasting = matches!(fault, Fault::Status(_));
            let times = if lasting {
                [1, 3, 12, 100][rng.random_range(0..4)]
            } else {
                1
            };
            let after = [0, 0, 3, 20][rng.random_range(0..4)];
            self.log
                .lock()
                .push(format!("{opcode:?} {fault:?}, {times} after {after}"));
            faults.add(FaultRule::io(opcode, fault).times(times).after(after));
        }
        if rng.random_range(0..3) == 0 {
            let fault = [Fault::Status(Status::INTERNAL), Fault::DropCompletion];
            let fault = fault[rng.random_range(0..2)].clone();
            self.log.lock().push(format!("abort {fault:?}"));
            faults.add(FaultRule::admin(AdminOpcode::ABORT, fault).times(1));
        }
    }

    fn faults(&self) -> Vec<String> {
        let mut told = std::mem::take(&mut *self.log.lock());
        let now = self.soft.faults().struck();
        let before = std::mem::replace(&mut *self.struck.lock(), now);
        if now > before {
            told.push(format!("{} struck", now - before));
        }
        told
    }

    fn works(&self) -> bool {
        !matches!(self.controller.phase(), Phase::Failed | Phase::Removed)
    }

    fn next(&self, cut: bool, rng: &mut SmallRng) -> Soft {
        let all = rng.random_range(0..3);
        let namespaces = self
            .soft
            .power_cut(|_, _| !cut || all == 1 || (all == 2 && rng.random()));
        Soft::new(self.kind, namespaces)
    }
}

fn formatted(kind: Kind, rng: &mut SmallRng) -> Soft {
    let backend = Box::new(MemoryBackend::new([24, 48][rng.random_range(0..2)] << 20));
    let soft = Soft::new(kind, vec![SoftNamespace::new(backend, kind.block_size)]);
    let format = format_options(kind.journal, rng);
    FileSystem::format(soft.top(), &format).unwrap();
    soft
}

#[test]
fn what_was_promised_is_there_after_any_plan_of_a_controller() {
    for seed in seeds(2) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let block_size = [512, 4096][rng.random_range(0..2)];
        let kind = Kind {
            block_size,
            write_cache: rng.random(),
            entries: [4, 64][rng.random_range(0..2)],
            queues: [1, 2, 8][rng.random_range(0..3)],
            mdts: [1, 5][rng.random_range(0..2)],
            action: [TimeoutAction::Abort, TimeoutAction::Reset][rng.random_range(0..2)],
            // Without a journal nothing makes a torn page whole.
            journal: block_size == 512 || rng.random(),
        };
        let soft = formatted(kind, &mut rng);
        let what = format!("{kind:?}");
        run(seed, soft, kind.journal, rng, &what);
    }
}
