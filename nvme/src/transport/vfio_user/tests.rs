//! Tests of the client against a server that follows the protocol and servers that do not.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use super::fake::{Fake, Fault};
use super::message::Command;
use super::{VfioUser, socket_path};
use crate::dma::DmaBuf;
use crate::transport::{Transport, TransportError, TransportEvent};

/// Time-out for answers that do not come.
const SOON: Duration = Duration::from_millis(200);
/// Time-out for answers that come, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(120);

fn connect(fake: &Fake) -> Result<Arc<VfioUser>, TransportError> {
    VfioUser::connect_within(&fake.path(), PATIENCE, PATIENCE)
}

fn connect_soon(fake: &Fake) -> Result<Arc<VfioUser>, TransportError> {
    VfioUser::connect_within(&fake.path(), SOON, PATIENCE)
}

#[test]
fn set_up_registers_doorbells_interrupts() {
    let fake = Fake::start(None);
    let buf = DmaBuf::zeroed(4096).expect("memory");
    let device = connect(&fake).expect("connected");
    {
        let seen = fake.seen.lock();
        assert_eq!(
            seen.config[4..6],
            [0x06, 0x04],
            "bus master, memory, no INTx"
        );
        assert_eq!(
            seen.config[0x87] & 0x80,
            0,
            "the stale MSI-X enable is cleared"
        );
        assert!(seen.maps.is_empty(), "nothing is given before it is needed");
    }
    // The controller is given memory of its own, and none of the process's.
    let own = DmaBuf::new_in(device.domain(), 4096).expect("memory");
    let address_of = |b: &DmaBuf| device.addresses().translate(b.region(), b.region_offset());
    assert!(address_of(&own).is_some() && address_of(&buf).is_none());
    let given = {
        let seen = fake.seen.lock();
        let good = |(at, len, file): &(u64, u64, u64)| at % 4096 == 0 && len <= file;
        assert!(seen.maps.iter().all(good));
        seen.maps.len()
    };
    assert_eq!(given, 1);
    let _large = DmaBuf::new(64 << 20).expect("the process's arena grows");
    assert_eq!(fake.seen.lock().maps.len(), given);
    assert_eq!(device.read64(0).expect("CAP"), 0x0020_1e01_00ff);
    device.write32(0x14, 0x0046_0001).expect("CC");
    assert_eq!(device.read32(0x1c).expect("CSTS"), 1);
    assert!(device.read32(0x2000).is_err() && device.read32(2).is_err());

    assert!(device.doorbells.is_some());
    let bell = device.doorbell(0x1008).expect("a doorbell");
    bell.ring(7);
    let mut word = [0; 4];
    fake.bar.read_exact_at(&mut word, 0x1008).expect("read");
    assert_eq!(word, 7u32.to_le_bytes());

    let vectors = device.enable_interrupts(5).expect("interrupts");
    assert_eq!(vectors.len(), 5);
    {
        let seen = fake.seen.lock();
        assert_eq!(
            (seen.vectors.len(), seen.most_fds),
            (5, 3),
            "in parts of max_msg_fds"
        );
        assert_eq!(seen.config[0x87] & 0x80, 0x80);
    }
    device.reset().expect("reset");
    {
        let seen = fake.seen.lock();
        assert_eq!((seen.resets, seen.vectors.len()), (1, 0));
        assert_eq!(seen.config[0x87] & 0x80, 0);
    }
    assert_eq!(device.read32(0x1c).expect("CSTS"), 0);
    assert!(vectors.iter().all(|v| v.drain() > 0), "sleepers are woken");
    let again = device.enable_interrupts(64).expect("interrupts");
    assert_eq!(again.len(), 8);
    let same = vectors.iter().zip(&again).all(|(a, b)| Arc::ptr_eq(a, b));
    assert!(
        same,
        "who sleeps on an interrupt is woken after a reset, too"
    );

    device.write32(0x14, 0x0046_0001).expect("CC");
    device.detach();
    device.detach();
    bell.ring(9);
    fake.bar.read_exact_at(&mut word, 0x1008).expect("read");
    assert_eq!(word, 7u32.to_le_bytes(), "the doorbell is taken away");
    assert_eq!(device.read32(0x1c).expect("all ones"), u32::MAX);
    assert!(device.is_gone());
    let seen = fake.seen.lock();
    assert_eq!(seen.registers[0x14] & 1, 0, "the controller is off");
    assert!(seen.maps.is_empty());
}

#[test]
fn doorbells_without_a_page_are_messages() {
    let fake = Fake::start(Some(Fault::NoDoorbells));
    let device = connect(&fake).expect("connected");
    assert!(device.doorbells.is_none());
    // The fake has registers up to 0x1000 only, of which the last one serves as a doorbell.
    device.doorbell(0xffc).expect("a doorbell").ring(5);
    assert_eq!(fake.seen.lock().registers[0xffc], 5);
}

#[test]
fn refusals_are_errors_not_success() {
    let fake = Fake::start(Some(Fault::Refuse(Command::DmaMap, 22)));
    let device = connect(&fake).expect("connected");
    let error = DmaBuf::new_in(device.domain(), 4096).expect_err("refused");
    let error = error.to_string();
    assert!(
        error.contains("DMA_MAP") && error.contains("refused"),
        "{error}"
    );

    let fake = Fake::start(Some(Fault::Refuse(Command::RegionRead, 5)));
    let error = connect(&fake).expect_err("refused").to_string();
    assert!(error.contains("REGION_READ"), "{error}");
}

#[test]
fn refused_interrupts() {
    let fake = Fake::start(Some(Fault::Refuse(Command::SetIrqs, 22)));
    // The client can do without notices of errors and requests, but not without interrupts.
    let device = connect(&fake).expect("connected");
    let error = device
        .enable_interrupts(2)
        .expect_err("refused")
        .to_string();
    assert!(error.contains("DEVICE_SET_IRQS"), "{error}");
}

#[test]
fn short_answers_do_not_hang() {
    for command in [
        Command::GetInfo,
        Command::GetRegionInfo,
        Command::GetIrqInfo,
        Command::RegionRead,
        Command::Version,
    ] {
        let fake = Fake::start(Some(Fault::Short(command)));
        match connect(&fake) {
            // A device without notices of errors can be used.
            Ok(_) => assert_eq!(command, Command::GetIrqInfo),
            // A short answer is found at once, not after a time-out.
            Err(TransportError::Protocol { detail, .. }) => {
                assert!(detail.contains("answer"), "{command:?}: {detail}");
            }
            Err(TransportError::Io { source, .. }) => {
                assert!(
                    source.to_string().contains("answer"),
                    "{command:?}: {source}"
                );
            }
            Err(e) => panic!("{command:?}: {e}"),
        }
    }
}

#[test]
fn silence_names_the_request() {
    let fake = Fake::start(Some(Fault::Silent(Command::GetInfo)));
    let error = connect_soon(&fake).expect_err("no answer");
    assert!(
        matches!(&error, TransportError::Timeout { what, .. } if what == "DEVICE_GET_INFO"),
        "{error}"
    );

    let fake = Fake::start(Some(Fault::Half(Command::GetInfo)));
    let error = connect_soon(&fake).expect_err("half an answer");
    assert!(matches!(&error, TransportError::Timeout { .. }), "{error}");
}

#[test]
fn a_socket_that_another_client_holds() {
    let dir = tempfile::tempdir().expect("a directory");
    // The server accepts nobody, as one does that is busy with its one client.
    let _listener = UnixListener::bind(dir.path().join("cntrl")).expect("bound");
    let error = VfioUser::connect_within(dir.path(), SOON, SOON).expect_err("held");
    let text = error.to_string();
    assert!(matches!(error, TransportError::InUse { .. }), "{text}");
    assert!(
        text.contains("one client at a time") && text.contains(&std::process::id().to_string()),
        "{text}"
    );
}

#[test]
fn nobody_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let error = VfioUser::connect(dir.path(), SOON)
        .expect_err("nothing there")
        .to_string();
    assert!(error.contains("no such socket"), "{error}");
    drop(UnixListener::bind(dir.path().join("cntrl")).expect("bound"));
    let error = VfioUser::connect(dir.path(), SOON)
        .expect_err("nobody listens")
        .to_string();
    assert!(error.contains("ended"), "{error}");
    assert!(socket_path(dir.path()).ends_with("cntrl"));
}

#[test]
fn the_other_side_ends() {
    let fake = Fake::start(Some(Fault::HangUp(Command::Reset)));
    let device = connect(&fake).expect("connected");
    let vectors = device.enable_interrupts(2).expect("interrupts");
    assert_eq!(device.take_event(), None);
    let error = device.reset().expect_err("it hung up");
    assert!(matches!(error, TransportError::Removed { .. }), "{error}");
    assert_eq!(device.take_event(), Some(TransportEvent::Removed));
    assert!(device.is_gone());
    assert!(vectors.iter().all(|v| v.drain() > 0), "sleepers are woken");
    assert_eq!(device.read32(0).expect("all ones"), u32::MAX);
}

#[test]
fn strays_between_request_and_answer() {
    let fake = Fake::start(Some(Fault::Chatty));
    let device = connect(&fake).expect("connected");
    assert_eq!(device.read64(0).expect("CAP"), 0x0020_1e01_00ff);
}

#[test]
fn what_cannot_be_a_controller_is_refused() {
    for (fault, why) in [
        (Fault::NotPci, "not a PCI device"),
        (Fault::NoConfig, "7 regions"),
        (Fault::SmallBar, "too few for doorbells"),
        (Fault::NextVersion, "speaks vfio-user 1.0"),
    ] {
        let fake = Fake::start(Some(fault));
        let error = connect(&fake).expect_err("refused").to_string();
        assert!(error.contains(why), "{error}");
    }
}

/// A controller that is still on may still write to the memory that it was given (Base section 3.1.3.6, RDY).
#[test]
fn memory_is_taken_back_when_the_controller_is_off() {
    let fake = Fake::start(Some(Fault::SlowOff(5)));
    let device = connect(&fake).expect("connected");
    let own = DmaBuf::new_in(device.domain(), 4096).expect("memory");
    device.write32(0x14, 0x0046_0001).expect("CC");
    device.reset().expect("it is off in time");
    {
        let seen = fake.seen.lock();
        assert_eq!((seen.registers[0x1c], seen.looks, seen.resets), (0, 0, 1));
    }
    device.write32(0x14, 0x0046_0001).expect("CC");
    let address = || {
        let (region, offset) = (own.region(), own.region_offset());
        device.addresses().translate(region, offset)
    };
    assert!(address().is_some());
    device.detach();
    assert!(address().is_none(), "it has no address any longer");
    let seen = fake.seen.lock();
    assert!(seen.maps.is_empty() && !seen.taken_early);
}

/// No part of a list may lie in two regions, which are two files for the controller's process.
#[test]
fn regions_do_not_touch_each_other() {
    let fake = Fake::start(None);
    let device = connect(&fake).expect("connected");
    let mut bufs = Vec::new();
    while fake.seen.lock().maps.len() < 3 {
        bufs.push(DmaBuf::new_in(device.domain(), 1 << 20).expect("memory"));
    }
    let seen = fake.seen.lock();
    for (start, len, _) in &seen.maps {
        assert!(seen.maps.iter().all(|(other, ..)| *other != start + len));
    }
}

#[test]
fn a_doorbell_page_behind_the_end_of_its_file() {
    let fake = Fake::start(Some(Fault::ShortFile));
    let error = connect(&fake).expect_err("refused").to_string();
    assert!(error.contains("outside its file"), "{error}");
}

#[test]
fn a_socket_whose_queue_is_full_does_not_hang() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("cntrl");
    let listener = UnixListener::bind(&path).expect("bound");
    // The server does not accept. Its queue has about 128 places.
    let waiting: Vec<_> = (0..5000)
        .map_while(|_| pumice_io::sys::socket::connect(&path, Duration::from_millis(1)).ok())
        .collect();
    assert!(waiting.len() < 5000);
    let error = VfioUser::connect_within(dir.path(), SOON, SOON).expect_err("full");
    assert!(error.to_string().contains("does not accept"), "{error}");
    drop(listener);
}
