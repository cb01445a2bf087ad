//! Tests of DMA memory: buffers, sharing, mappers, threads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::{
    AddressTable, CHUNK_LEN, DmaBuf, DmaDomain, DmaError, DmaMapper, DmaShared, Region, RegionId,
    configure, register_mapper, stats,
};

/// A device whose addresses are the arena's chunk numbers.
struct Model {
    table: AddressTable,
    known: Mutex<HashMap<RegionId, usize>>,
    refuse: bool,
}

impl Model {
    fn new(refuse: bool) -> Arc<Model> {
        Arc::new(Model {
            table: AddressTable::new(),
            known: Mutex::new(HashMap::new()),
            refuse,
        })
    }
}

// SAFETY: no device and nothing else touches the regions.
#[allow(unsafe_code, reason = "the contract of DmaMapper")]
unsafe impl DmaMapper for Model {
    fn map(&self, region: &Region) -> Result<(), DmaError> {
        if self.refuse {
            return Err(DmaError::Map {
                device: "model".into(),
                len: region.len(),
                reason: "refused".into(),
            });
        }
        self.table
            .set_region(region, (1 << 40) + (region.id().index() * CHUNK_LEN) as u64);
        let old = self.known.lock().unwrap().insert(region.id(), region.len());
        assert!(old.is_none(), "told twice of one region");
        Ok(())
    }

    fn unmap(&self, region: &Region) {
        self.table.clear_region(region);
        assert!(self.known.lock().unwrap().remove(&region.id()).is_some());
    }
}

#[test]
fn buffers_are_aligned_and_as_long_as_asked() {
    for len in [1, 511, 512, 513, 4095, 4096, 4097, 65_536, 262_144, 3 << 20] {
        let mut buf = DmaBuf::new(len).unwrap();
        assert_eq!(buf.len(), len);
        assert!(buf.capacity() >= len);
        let align = if len > 2048 { 4096 } else { 512 };
        assert_eq!(buf.as_ptr() as usize % align, 0, "{len}");
        assert_eq!(buf.region_offset() % align, 0);
        buf.fill(0xa5);
        drop(buf);
        assert!(DmaBuf::zeroed(len).unwrap().iter().all(|&b| b == 0));
    }
}

#[test]
fn impossible_lengths_are_errors() {
    assert!(matches!(DmaBuf::new(0), Err(DmaError::Length { .. })));
    assert!(matches!(
        DmaBuf::new(usize::MAX),
        Err(DmaError::Length { .. })
    ));
}

#[test]
fn options_are_fixed_after_the_first_buffer() {
    let _buf = DmaBuf::new(4096).unwrap();
    assert!(matches!(
        configure(Default::default()),
        Err(DmaError::AlreadyInUse)
    ));
}

#[test]
fn slices_share_and_give_the_buffer_back() {
    let slice = DmaBuf::copy_from(b"0123456789").unwrap().freeze();
    let part = slice.slice(2..6);
    assert_eq!(&*part, b"2345");
    assert_eq!(part.region_offset(), slice.region_offset() + 2);
    assert_eq!(&*part.slice(1..3), b"34");
    let slice = slice.try_into_buf().unwrap_err();
    drop(slice);
    assert_eq!(&*part.try_into_buf().unwrap(), b"0123456789");
}

#[test]
fn mappers_learn_of_old_and_new_regions() {
    let early = DmaBuf::new(4096).unwrap();
    let model = Model::new(false);
    let guard = register_mapper(model.clone()).unwrap();
    // The buffer is larger than any region so far, so the arena has to grow.
    let late = DmaBuf::new(stats().total_bytes.next_power_of_two()).unwrap();
    for buf in [&early, &late] {
        let (addr, contiguous) = model
            .table
            .translate(buf.region(), buf.region_offset())
            .unwrap();
        assert_eq!(addr % 4096, 0);
        assert!(contiguous >= 4096);
    }
    let last = late.region_offset() + late.len() - 1;
    assert!(model.table.translate(late.region(), last).is_some());
    drop(guard);
    assert!(model.known.lock().unwrap().is_empty());
    assert!(
        model
            .table
            .translate(early.region(), early.region_offset())
            .is_none()
    );
}

#[test]
fn nothing_goes_back_to_the_system_while_a_device_has_it_mapped() {
    let guard = register_mapper(Model::new(false)).unwrap();
    drop(DmaBuf::zeroed(8 << 20).unwrap());
    assert!(!super::can_release());
    assert_eq!(super::release_free(), 0);
    drop(guard);
}

#[test]
fn a_mapper_that_refuses_is_not_registered() {
    let _buf = DmaBuf::new(4096).unwrap();
    let error = register_mapper(Model::new(true)).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    // The arena still works.
    DmaBuf::new(1 << 20).unwrap();
}

#[test]
fn shared_memory_is_words() {
    let shared = DmaShared::zeroed(4096).unwrap();
    shared.as_u64()[1].store(0x1122_3344_5566_7788, std::sync::atomic::Ordering::Relaxed);
    let low = shared.as_u32()[2].load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(u32::from_le(low), 0x5566_7788);
    shared.clear();
    assert_eq!(
        shared.as_u64()[1].load(std::sync::atomic::Ordering::Relaxed),
        0
    );
}

/// Buffers are passed between threads in both directions. Two live buffers never share a byte.
#[test]
fn threads_allocate_and_free_each_others_buffers() {
    let (tx, rx) = std::sync::mpsc::sync_channel::<(u8, DmaBuf)>(64);
    let rx = Arc::new(Mutex::new(rx));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let rx = Arc::clone(&rx);
            scope.spawn(move || {
                loop {
                    let next = rx.lock().unwrap().recv();
                    let Ok((mark, buf)) = next else { break };
                    assert!(buf.iter().all(|&b| b == mark), "another buffer's bytes");
                }
            });
        }
        for t in 0..2u8 {
            let tx = tx.clone();
            scope.spawn(move || {
                for n in 0..2000u32 {
                    let len = 512usize << ((n + u32::from(t)) % 7);
                    let mark = u8::try_from(n % 125).unwrap() * 2 + t;
                    let mut buf = DmaBuf::new(len).unwrap();
                    buf.fill(mark);
                    tx.send((mark, buf)).unwrap();
                }
            });
        }
        drop(tx);
    });
}

#[test]
fn threads_that_empty_a_new_region_grow_another() {
    // The buffers are large, two to a region at first: threads take from each other's new regions.
    let threads: Vec<_> = (0..8)
        .map(|_| {
            std::thread::spawn(|| {
                let held: Vec<DmaBuf> = (0..24).map(|_| DmaBuf::new(1 << 20).unwrap()).collect();
                assert!(held.iter().all(|b| b.len() == 1 << 20));
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("every thread gets its buffers");
    }
}

/// Buffers of a domain lie in regions that only its own mapper is told of.
#[test]
fn a_domain_is_apart() {
    let domain = DmaDomain::new();
    let inside = Arc::new(Model {
        table: domain.address_table(),
        known: Mutex::new(HashMap::new()),
        refuse: false,
    });
    let guard = domain.register_mapper(inside.clone()).unwrap();
    let outside = Model::new(false);
    let other = register_mapper(outside.clone()).unwrap();
    let of_process = DmaBuf::new(4096).unwrap();
    let mut bufs: Vec<_> = (0..700)
        .map(|_| DmaBuf::new_in(Some(&domain), 8192).unwrap())
        .collect();
    for buf in &mut bufs {
        buf.fill(3);
        let at = (buf.region(), buf.region_offset());
        assert!(inside.table.translate(at.0, at.1).is_some());
        assert!(outside.table.translate(at.0, at.1).is_none());
    }
    let at = (of_process.region(), of_process.region_offset());
    assert!(inside.table.translate(at.0, at.1).is_none());
    assert!(outside.table.translate(at.0, at.1).is_some());
    // Memory freed to a domain serves the domain and not the process.
    let regions = inside.known.lock().unwrap().len();
    drop(bufs);
    let again = DmaBuf::new_in(Some(&domain), 8192).unwrap();
    assert_eq!(inside.known.lock().unwrap().len(), regions);
    assert!(
        inside
            .table
            .translate(again.region(), again.region_offset())
            .is_some()
    );
    drop((guard, other));
    assert!(inside.known.lock().unwrap().is_empty());
    assert!(
        inside
            .table
            .translate(again.region(), again.region_offset())
            .is_none()
    );
}

/// A domain's memory is freed with its last buffer, not before.
#[test]
fn a_domain_outlives_its_handle_as_long_as_it_is_used() {
    let mapped = |address: usize| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .any(|line| line.starts_with(&format!("{address:x}-")))
    };
    let domain = DmaDomain::new();
    // The buffer takes all of a region, so that it begins where the region does.
    let mut buf = DmaBuf::new_in(Some(&domain), CHUNK_LEN).unwrap();
    let address = buf.as_ptr() as usize;
    drop(domain);
    buf.fill(9);
    assert!(buf.iter().all(|b| *b == 9) && mapped(address));
    drop(buf);
    assert!(!mapped(address));
}
