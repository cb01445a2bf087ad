//! Tests of what a device tells of its namespace, and of the count of queue pairs.

use pumice_nvme::ControllerOptions;
use pumice_nvme::spec::{AdminOpcode, Cns, Command};
use pumice_nvme_soft::{
    Fault, FaultRule, MemoryBackend, SoftConfig, SoftController, SoftNamespace,
};

use super::*;
use crate::DmaBuf;

fn rig(queues: u16) -> (SoftController, Arc<Controller>) {
    let disk = || SoftNamespace::new(Box::new(MemoryBackend::new(1 << 20)), 512);
    let mut config = SoftConfig::new(vec![disk(), disk()]);
    config.queues = queues;
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
    (soft, controller)
}

fn opened(controller: &Arc<Controller>) -> Vec<Arc<Nvme>> {
    devices("N", controller, controller.namespaces(), "soft://memory").unwrap()
}

#[test]
fn a_device_tells_what_its_namespace_does() {
    let (soft, controller) = rig(4);
    let before = opened(&controller);
    assert!(before[0].info().unmap_zeroes);
    assert_eq!(before[0].info().atomic_unit_blocks, 1);
    assert_eq!(before[0].info().uuid, before[0].namespace().uuid());

    let command = Command::identify(Cns::NAMESPACE, 1);
    let page = DmaBuf::zeroed(4096).unwrap();
    let (_, page) = controller.admin_command(command, Some(page)).unwrap();
    let mut page = page.unwrap().to_vec();
    page[24] |= 2; // NSFEAT: what a power cut does not tear is the namespace's own
    page[33] = 0; // DLFEAT: what deallocated blocks read as is not told
    page[36] = 31; // NAWUPF: 32 blocks
    page[46] = 8; // NOIOB
    page[104..128].fill(0); // NGUID and EUI-64
    // It begins with a zero, so that it is an empty list of names, too.
    assert_eq!(page[0], 0);
    let rule = FaultRule::admin(AdminOpcode::IDENTIFY, Fault::Data(page));
    soft.faults().add(rule.namespace(1));
    controller.rescan().unwrap();
    let after = opened(&controller);
    let info = after[0].info();
    assert!(!info.unmap_zeroes);
    assert_eq!(info.atomic_unit_blocks, 8);
    assert_eq!(after[0].namespace().uuid(), [0; 16]);
    assert_ne!(info.uuid, [0; 16], "it has one all the same");
    assert_eq!(info.uuid, opened(&controller)[0].info().uuid);
    assert_ne!(info.uuid, after[1].info().uuid);
}

/// Once the last of the channels that share a queue pair has gone, the queue pair is free for others.
#[test]
fn the_last_queue_pair_is_shared_and_given_back() {
    for (queues, own) in [(1, 0), (3, 2)] {
        let (_soft, controller) = rig(queues);
        let dev = opened(&controller).remove(0);
        assert_eq!(dev.own_channels(), Some(own));
        let channels: Vec<_> = (0..own + 2).map(|_| dev.open_channel().unwrap()).collect();
        let pair = || controller.queue_pair(&QueueOptions::default());
        assert!(matches!(pair(), Err(NvmeError::NoQueues { .. })));
        drop(channels);
        let pairs: Vec<_> = (0..queues).map(|_| pair().unwrap()).collect();
        assert_eq!(pairs.len(), own + 1);
    }
}
