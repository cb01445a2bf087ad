//! What a queue pair must not do while its controller is being reset: seen from inside, since
//! from outside it is a race.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::controller::state::{self, Phase};
use crate::dma::DmaBuf;
use crate::soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};
use crate::{
    Controller, ControllerEvent, ControllerOptions, Io, Namespace, QueueOptions, QueuePair,
};

fn controller() -> (SoftController, Arc<Controller>, Arc<Namespace>) {
    let disk = SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
    let mut config = SoftConfig::new(vec![disk]);
    config.shadow_doorbells = false;
    let soft = SoftController::new(config).expect("a controller");
    let controller =
        Controller::new(soft.transport(), ControllerOptions::default()).expect("enabled");
    let ns = controller.namespace(1).expect("a namespace");
    (soft, controller, ns)
}

fn read() -> Io {
    Io::Read {
        lba: 0,
        buf: DmaBuf::new(512).expect("memory"),
    }
}

fn settle(q: &mut QueuePair) {
    let mut out = Vec::new();
    while q.in_flight() > 0 {
        q.poll(&mut out);
    }
    assert!(out.iter().all(|done| done.result.is_ok()));
}

/// The registers belong to the queues of after the reset: not one of either doorbell is written.
#[test]
fn no_doorbell_is_written_once_a_reset_has_begun() {
    let (_soft, controller, ns) = controller();
    let mut q = controller
        .queue_pair(&QueueOptions::depth(8))
        .expect("a pair");
    for tag in 0..3 {
        q.submit(&ns, tag, read()).expect("accepted");
        settle(&mut q);
    }
    q.submit(&ns, 9, read()).expect("accepted");
    let before = q.stats();
    let core = Arc::clone(&controller.core);
    let word = core.state.load(Ordering::Acquire);
    let resetting = state::word(state::generation(word) + 1, Phase::Resetting);
    core.state.store(resetting, Ordering::SeqCst);
    q.ring();
    q.ring_all();
    let during = q.stats();
    core.state.store(word, Ordering::SeqCst);
    assert!(q.sq.is_dirty(), "the command was announced");
    assert_eq!(
        (during.sq_doorbells, during.cq_doorbells),
        (before.sq_doorbells, before.cq_doorbells)
    );
    settle(&mut q);
}

/// A request that was made in an earlier state has been served by the reset that ended it.
#[test]
fn a_reset_is_done_once_for_all_who_asked() {
    let (_soft, controller, ns) = controller();
    let mut q = controller
        .queue_pair(&QueueOptions::depth(8))
        .expect("a pair");
    let core = Arc::clone(&controller.core);
    let word = core.state.load(Ordering::Acquire);
    for _ in 0..3 {
        core.reset(word, "asked for");
    }
    let events = controller.take_events();
    let is_reset = |event: &&ControllerEvent| matches!(event, ControllerEvent::Reset(_));
    assert_eq!(events.iter().filter(is_reset).count(), 1);
    q.submit(&ns, 1, read()).expect("accepted");
    settle(&mut q);
    assert_eq!(q.stats().resets, 1);
}
