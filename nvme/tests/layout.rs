//! The layouts and numbers of the specifications, in digits. The soft controller speaks through the driver's own structures, so
//! that a field at a wrong place would be wrong on both sides, and no other test would see it.

use std::mem::{offset_of, size_of};

use pumice_nvme::spec::{
    AdminOpcode, AsyncEvent, AsyncEventType, Cap, Cc, Cmbloc, Cmbmsc, Cmbsz, Cns, Command,
    Completion, Crto, Csts, ErrorLogEntry, FeatureId, FirmwareSlotLog, FormatNvm,
    IdentifyController, IdentifyNamespace, IdentifyNvmController, IoFlags, IoOpcode, LbaFormat,
    LogPage, Oacs, Oncs, QueuePriority, Reg, SglDescriptor, SmartLog, Status, Vs, doorbell_offset,
};

/// Compares the offsets of a structure's fields.
macro_rules! offsets {
    ($type:ident: $($field:ident $at:literal,)*) => {
        for (field, is, at) in [$((stringify!($field), offset_of!($type, $field), $at),)*] {
            assert_eq!(is, at, concat!(stringify!($type), ".{}"), field);
        }
    };
}

/// Compares the numbers of an enumeration's names.
macro_rules! numbers {
    ($type:ident: $($name:ident $value:literal,)*) => {
        for (name, is, value) in [$((stringify!($name), $type::$name.0, $value),)*] {
            assert_eq!(is, value, concat!(stringify!($type), "::{}"), name);
        }
    };
}

/// Base figure 275.
#[test]
fn identify_controller() {
    offsets!(IdentifyController:
        vid 0, ssvid 2, sn 4, mn 24, fr 64, rab 72, ieee 73, cmic 76, mdts 77, cntlid 78, ver 80,
        rtd3r 84, rtd3e 88, oaes 92, ctratt 96, rrls 100, cntrltype 111, fguid 112, crdt 128,
        nvmsr 253, vwci 254, mec 255, oacs 256, acl_z 258, aerl_z 259, frmw 260, lpa 261,
        elpe_z 262, npss_z 263, avscc 264, apsta 265, wctemp 266, cctemp 268, mtfa 270, hmpre 272,
        hmmin 276, tnvmcap 280, unvmcap 296, rpmbs 312, edstt 316, dsto 318, fwug 319, kas 320,
        hctma 322, mntmt 324, mxtmt 326, sanicap 328, hmminds 332, hmmaxd 336, nsetidmax 338,
        endgidmax 340, anatt 342, anacap 343, anagrpmax 344, nanagrpid 348, pels 352,
        domain_id 356, megcap 368, sqes 512, cqes 513, maxcmd 514, nn 516, oncs 520, fuses 522,
        fna 524, vwc 525, awun_z 526, awupf_z 528, icsvscc 530, nwpc 531, acwu_z 532, cdfs 534,
        sgls 536, mnan 540, maxdna 544, maxcna 560, subnqn 768, psd 2048, vendor 3072,
    );
    let bits = [
        Oacs::SECURITY,
        Oacs::FORMAT,
        Oacs::FIRMWARE,
        Oacs::NS_MANAGEMENT,
        Oacs::DOORBELL_BUFFER,
    ];
    assert_eq!(bits, [1, 2, 4, 8, 0x100]);
    let bits = [
        Oncs::COMPARE,
        Oncs::WRITE_UNCORRECTABLE,
        Oncs::DATASET_MANAGEMENT,
        Oncs::WRITE_ZEROES,
        Oncs::FEATURE_SAVE,
        Oncs::RESERVATIONS,
        Oncs::TIMESTAMP,
        Oncs::VERIFY,
        Oncs::COPY,
    ];
    assert_eq!(bits, [1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0x100]);
}

/// NVM figures 97, 98 and 102.
#[test]
fn identify_namespace_and_command_set() {
    offsets!(IdentifyNamespace:
        nsze 0, ncap 8, nuse 16, nsfeat 24, nlbaf_z 25, flbas 26, mc 27, dpc 28, dps 29, nmic 30,
        rescap 31, fpi 32, dlfeat 33, nawun_z 34, nawupf_z 36, nacwu_z 38, nabsn_z 40, nabo 42,
        nabspf_z 44, noiob 46, nvmcap 48, npwg_z 64, npwa_z 66, npdg_z 68, npda_z 70, nows_z 72,
        mssrl 74, mcl 76, msrc_z 80, anagrpid 92, nsattr 99, nvmsetid 100, endgid 102, nguid 104,
        eui64 120, lbaf 128, vendor 384,
    );
    offsets!(LbaFormat: ms 0, lbads 2, rp 3,);
    offsets!(IdentifyNvmController: vsl 0, wzsl 1, wusl 2, dmrl 3, dmrsl 4, dmsl 8,);
}

/// Base figures 206, 207 and section 5.16.1.4.
#[test]
fn log_pages() {
    offsets!(SmartLog:
        critical_warning 0, composite_temperature 1, available_spare 3, available_spare_threshold 4,
        percentage_used 5, endurance_group_warning 6, data_units_read 32, data_units_written 48,
        host_reads 64, host_writes 80, controller_busy_time 96, power_cycles 112,
        power_on_hours 128, unsafe_shutdowns 144, media_errors 160, error_log_entries 176,
        warning_temperature_time 192, critical_temperature_time 196, temperature_sensors 200,
        thermal_transitions 216, thermal_time 224,
    );
    offsets!(ErrorLogEntry:
        error_count 0, sq_id 8, cid 10, status_phase 12, parameter_location 14, lba 16, nsid 24,
        vendor 28, transport 29, command_specific 32, transport_specific 40,
    );
    offsets!(FirmwareSlotLog: active 0, revisions 8,);
}

/// Base section 3.1.3, PCIe section 3.1.2.
#[test]
fn registers() {
    let places = [
        Reg::CAP,
        Reg::VS,
        Reg::INTMS,
        Reg::INTMC,
        Reg::CC,
        Reg::CSTS,
        Reg::NSSR,
        Reg::AQA,
        Reg::ASQ,
        Reg::ACQ,
        Reg::CMBLOC,
        Reg::CMBSZ,
        Reg::CMBMSC,
        Reg::CMBSTS,
        Reg::CRTO,
        Reg::DOORBELLS,
    ];
    let want = [
        0x00, 0x08, 0x0c, 0x10, 0x14, 0x1c, 0x20, 0x24, 0x28, 0x30, 0x38, 0x3c, 0x50, 0x58, 0x68,
        0x1000,
    ];
    assert_eq!(places, want);
    // Stride 2 is 16 bytes for each doorbell: queue 3's head is the eighth.
    assert_eq!(doorbell_offset(3, true, 2), 0x1070);
    for (field, bits) in [
        (Cap::new().with_mqes_z(0xffff), 0xffff),
        (Cap::new().with_cqr(true), 1 << 16),
        (Cap::new().with_ams_wrr(true), 1 << 17),
        (Cap::new().with_ams_vendor(true), 1 << 18),
        (Cap::new().with_to(0xff), 0xff << 24),
        (Cap::new().with_dstrd(15), 15 << 32),
        (Cap::new().with_nssrs(true), 1 << 36),
        (Cap::new().with_css(0xff), 0xff << 37),
        (Cap::new().with_bps(true), 1 << 45),
        (Cap::new().with_cps(3), 3 << 46),
        (Cap::new().with_mpsmin(15), 15 << 48),
        (Cap::new().with_mpsmax(15), 15 << 52),
        (Cap::new().with_pmrs(true), 1 << 56),
        (Cap::new().with_cmbs(true), 1 << 57),
        (Cap::new().with_nsss(true), 1 << 58),
        (Cap::new().with_crwms(true), 1 << 59),
        (Cap::new().with_crims(true), 1 << 60),
    ] {
        assert_eq!(u64::from(field), bits, "{field:?}");
    }
}

/// Base sections 3.1.3.2 to 3.1.3.23.
#[test]
fn fields_of_registers() {
    for (field, bits) in [
        (u32::from(Cc::new().with_en(true)), 1),
        (Cc::new().with_css(7).into(), 7 << 4),
        (Cc::new().with_mps(15).into(), 15 << 7),
        (Cc::new().with_ams(7).into(), 7 << 11),
        (Cc::new().with_shn(3).into(), 3 << 14),
        (Cc::new().with_iosqes(15).into(), 15 << 16),
        (Cc::new().with_iocqes(15).into(), 15 << 20),
        (Cc::new().with_crime(true).into(), 1 << 24),
        (Csts::new().with_rdy(true).into(), 1),
        (Csts::new().with_cfs(true).into(), 2),
        (Csts::new().with_shst(3).into(), 3 << 2),
        (Csts::new().with_nssro(true).into(), 1 << 4),
        (Csts::new().with_pp(true).into(), 1 << 5),
        (Csts::new().with_st(true).into(), 1 << 6),
        (
            Vs::new().with_mjr(2).with_mnr(1).with_ter(3).into(),
            0x2_0103,
        ),
        (Crto::new().with_crwmt(0xffff).into(), 0xffff),
        (Crto::new().with_crimt(0xffff).into(), 0xffff << 16),
        (Cmbloc::new().with_bir(7).into(), 7),
        (Cmbloc::new().with_ofst(0xf_ffff).into(), 0xf_ffff << 12),
        (Cmbsz::new().with_sqs(true).into(), 1),
        (Cmbsz::new().with_cqs(true).into(), 2),
        (Cmbsz::new().with_lists(true).into(), 4),
        (Cmbsz::new().with_rds(true).into(), 8),
        (Cmbsz::new().with_wds(true).into(), 16),
        (Cmbsz::new().with_szu(15).into(), 15 << 8),
        (Cmbsz::new().with_sz(0xf_ffff).into(), 0xf_ffff << 12),
    ] {
        assert_eq!(field, bits, "{field:#x}");
    }
    // Units of 64 KiB (Base figure 47).
    assert_eq!(Cmbsz::new().with_szu(1).with_sz(3).len(), 3 << 16);
    assert_eq!(u64::from(Cmbmsc::new().with_cre(true)), 1);
    assert_eq!(u64::from(Cmbmsc::new().with_cmse(true)), 2);
    assert_eq!(u64::from(Cmbmsc::new().with_cba(5)), 5 << 12);
}

/// Base figures 138, 145, 202, 273 and 317, NVM figure 26.
#[test]
fn numbers_of_names() {
    numbers!(AdminOpcode:
        DELETE_SQ 0x00, CREATE_SQ 0x01, GET_LOG_PAGE 0x02, DELETE_CQ 0x04, CREATE_CQ 0x05,
        IDENTIFY 0x06, ABORT 0x08, SET_FEATURES 0x09, GET_FEATURES 0x0a, ASYNC_EVENT_REQUEST 0x0c,
        NS_MANAGEMENT 0x0d, FIRMWARE_COMMIT 0x10, FIRMWARE_DOWNLOAD 0x11, DEVICE_SELF_TEST 0x14,
        NS_ATTACHMENT 0x15, KEEP_ALIVE 0x18, DIRECTIVE_SEND 0x19, DIRECTIVE_RECEIVE 0x1a,
        VIRTUALIZATION 0x1c, DOORBELL_BUFFER_CONFIG 0x7c, FORMAT_NVM 0x80, SECURITY_SEND 0x81,
        SECURITY_RECEIVE 0x82, SANITIZE 0x84,
    );
    numbers!(IoOpcode:
        FLUSH 0x00, WRITE 0x01, READ 0x02, WRITE_UNCORRECTABLE 0x04, COMPARE 0x05,
        WRITE_ZEROES 0x08, DATASET_MANAGEMENT 0x09, VERIFY 0x0c, RESERVATION_REGISTER 0x0d,
        RESERVATION_REPORT 0x0e, RESERVATION_ACQUIRE 0x11, RESERVATION_RELEASE 0x15, COPY 0x19,
    );
    numbers!(Cns:
        NAMESPACE 0x00, CONTROLLER 0x01, ACTIVE_NAMESPACES 0x02, NS_DESCRIPTORS 0x03,
        CSI_NAMESPACE 0x05, CSI_CONTROLLER 0x06, ALLOCATED_NAMESPACES 0x10, CONTROLLERS 0x13,
    );
    numbers!(FeatureId:
        ARBITRATION 0x01, POWER_MANAGEMENT 0x02, TEMPERATURE_THRESHOLD 0x04, ERROR_RECOVERY 0x05,
        VOLATILE_WRITE_CACHE 0x06, NUMBER_OF_QUEUES 0x07, INTERRUPT_COALESCING 0x08,
        INTERRUPT_VECTOR 0x09, WRITE_ATOMICITY 0x0a, ASYNC_EVENT_CONFIG 0x0b, KEEP_ALIVE 0x0f,
        HOST_BEHAVIOR 0x16,
    );
    numbers!(LogPage:
        ERROR 0x01, SMART 0x02, FIRMWARE_SLOTS 0x03, CHANGED_NAMESPACES 0x04, COMMAND_EFFECTS 0x05,
    );
    numbers!(QueuePriority: URGENT 0, HIGH 1, MEDIUM 2, LOW 3,);
    numbers!(AsyncEventType: ERROR 0, HEALTH 1, NOTICE 2, IMMEDIATE 3, COMMAND_SET 6, VENDOR 7,);
    // Namespaces changed: type 2, information 0, log page 4.
    let event = AsyncEvent::new(AsyncEventType::HEALTH, 2, 4);
    assert_eq!(event.0, 0x04_0201);
    assert_eq!(
        (event.kind(), event.info(), event.log_page()),
        (AsyncEventType::HEALTH, 2, 4)
    );
}

/// Base figures 93 to 102, NVM figures 17 to 20.
#[test]
fn statuses() {
    numbers!(Status:
        SUCCESS 0x000, INVALID_OPCODE 0x001, INVALID_FIELD 0x002, ID_CONFLICT 0x003,
        DATA_TRANSFER 0x004, POWER_LOSS 0x005, INTERNAL 0x006, ABORTED_BY_REQUEST 0x007,
        ABORTED_SQ_DELETION 0x008, INVALID_NAMESPACE 0x00b, SGL_LENGTH 0x00f, SGL_TYPE 0x011,
        PRP_OFFSET 0x013, LBA_OUT_OF_RANGE 0x080, CAPACITY_EXCEEDED 0x081,
        NAMESPACE_NOT_READY 0x082, CQ_INVALID 0x100, QID_INVALID 0x101, QUEUE_SIZE 0x102,
        ABORT_LIMIT 0x103, AER_LIMIT 0x105, INVALID_VECTOR 0x108, INVALID_LOG_PAGE 0x109,
        INVALID_FORMAT 0x10a, QUEUE_DELETION 0x10c, FEATURE_NOT_SAVEABLE 0x10d,
        FEATURE_NOT_CHANGEABLE 0x10e, SIZE_LIMIT 0x183, WRITE_FAULT 0x280, UNRECOVERED_READ 0x281,
        COMPARE_FAILURE 0x285,
    );
    // The word of a completion has the phase tag below the status.
    let word = |bit: u16| Completion {
        status_phase: 1 << bit,
        ..Completion::default()
    };
    let of = |bit: u16| word(bit).status();
    assert!(word(0).phase() && of(0).is_success());
    assert_eq!(
        (of(1).sc(), of(8).sc(), of(9).sct().0, of(11).sct().0),
        (1, 128, 1, 4)
    );
    assert_eq!((of(12).crd(), of(13).crd()), (1, 2));
    assert!(of(14).more() && !of(14).do_not_retry());
    assert!(of(15).do_not_retry() && !of(15).more());
    assert_eq!(of(15), Status::SUCCESS.dnr());
    for bit in 1..12 {
        assert!(
            !of(bit).is_success() && of(bit).code() == of(bit),
            "bit {bit}"
        );
    }
    for bit in 12..16 {
        assert!(
            of(bit).is_success() && of(bit).code() == Status::SUCCESS,
            "bit {bit}"
        );
    }
}

/// A failed command may be sent again unless it has caused the error itself (Base section 3.3.3.2.1).
#[test]
fn statuses_that_may_pass() {
    for (status, passes, waits) in [
        (Status::SUCCESS, false, false),
        (Status::INTERNAL, true, false),
        (Status::INTERNAL.dnr(), false, false),
        (Status::of(3, 0x03), true, false),
        (Status::INVALID_FORMAT, false, false),
        (Status::UNRECOVERED_READ, false, false),
        (Status::of(7, 0), false, false),
        (Status::NAMESPACE_NOT_READY, true, true),
        (Status::NAMESPACE_NOT_READY.dnr(), false, false),
        (Status::of(0, 0x84), true, true),
        (Status::of(0, 0x24), true, true),
        // The same codes of another type say something else.
        (Status::of(3, 0x82), true, false),
        // A retry delay is named.
        (Status(Status::INTERNAL.0 | 1 << 11), true, true),
        (Status(Status::INTERNAL.0 | 1 << 12), true, true),
    ] {
        assert_eq!(status.may_pass(), passes, "{status}");
        assert_eq!(status.says_not_ready(), waits, "{status}");
    }
}

/// Base section 3.3.3 and figure 108.
#[test]
fn queue_entries() {
    offsets!(Command:
        opcode 0, flags 1, cid 2, nsid 4, cdw2 8, cdw3 12, mptr 16, prp1 24, prp2 32, cdw10 40,
        cdw11 44, cdw12 48, cdw13 52, cdw14 56, cdw15 60,
    );
    offsets!(Completion: dw0 0, dw1 4, sq_head 8, sq_id 10, cid 12, status_phase 14,);
    offsets!(SglDescriptor: address 0, len 8, kind 15,);
    assert_eq!(size_of::<SglDescriptor>(), 16);
    assert_eq!(Command::SGL, 0x40);
    let kinds = [
        SglDescriptor::DATA_BLOCK,
        SglDescriptor::BIT_BUCKET,
        SglDescriptor::SEGMENT,
        SglDescriptor::LAST_SEGMENT,
    ];
    assert_eq!(kinds, [0x00, 0x10, 0x20, 0x30]);
    let last = SglDescriptor::last_segment(0x1234_5000, 0x40);
    assert_eq!(last.words(), [0x1234_5000, 0x3000_0000_0000_0040]);
    let flags = [IoFlags::DEALLOCATE, IoFlags::FUA, IoFlags::LIMITED_RETRY];
    assert_eq!(flags.map(|f| f.0), [1 << 25, 1 << 30, 1 << 31]);
}

/// The dwords of the commands: Base section 5, NVM sections 3.2 and 4.1.
#[test]
fn commands() {
    let dwords = |c: Command| [c.cdw10, c.cdw11, c.cdw12, c.cdw13, c.cdw14, c.cdw15];
    let lba = 0x0123_4567_89ab_cdef;
    let fua = IoFlags::fua(true);
    for (command, opcode, want) in [
        (
            Command::blocks_io(IoOpcode::WRITE, 9, lba, 65_536, fua),
            0x01,
            [0x89ab_cdef, 0x0123_4567, 0x4000_ffff, 0, 0, 0],
        ),
        // Attribute deallocate, 256 ranges.
        (Command::deallocate(9, 256), 0x09, [255, 4, 0, 0, 0, 0]),
        (
            Command::copy(9, lba, 3, fua),
            0x19,
            [0x89ab_cdef, 0x0123_4567, 0x4000_0002, 0, 0, 0],
        ),
        (
            Command::identify(Cns::CONTROLLERS, 9),
            0x06,
            [0x13, 0, 0, 0, 0, 0],
        ),
        // 0x40001 dwords from a wide offset, the events of the page kept.
        (
            Command::get_log(LogPage::ERROR, 9, lba & !3, 0x10_0004, true),
            0x02,
            [0x0000_8001, 4, 0x89ab_cdec, 0x0123_4567, 0, 0],
        ),
        (
            Command::get_feature(FeatureId::HOST_BEHAVIOR, 9),
            0x0a,
            [0x16, 0, 0, 0, 0, 0],
        ),
        (
            Command::set_feature(FeatureId::NUMBER_OF_QUEUES, 9, 0x3_0004, true),
            0x09,
            [0x8000_0007, 0x3_0004, 0, 0, 0, 0],
        ),
    ] {
        assert_eq!((command.opcode, command.nsid), (opcode, 9), "{command:?}");
        assert_eq!(dwords(command), want, "{command:?}");
    }
    assert_eq!(
        Command::blocks_io(IoOpcode::READ, 9, lba, 7, fua).blocks(),
        7
    );
    assert_eq!(
        Command::blocks_io(IoOpcode::READ, 9, lba, 7, fua).lba(),
        lba
    );
}

/// Base sections 5.1 and 5.4 to 5.7, NVM section 4.1.
#[test]
fn commands_of_queues_and_formats() {
    for (command, opcode, want) in [
        // Contiguous; with an interrupt and its vector.
        (
            Command::create_cq(5, 127, 0x7000, Some(3)),
            0x05,
            [0x7f_0005, 0x3_0003],
        ),
        (
            Command::create_cq(5, 127, 0x7000, None),
            0x05,
            [0x7f_0005, 1],
        ),
        (
            Command::create_sq(6, 255, 0x7000, 5, QueuePriority::LOW),
            0x01,
            [0xff_0006, 0x5_0007],
        ),
        (
            Command::create_sq(6, 255, 0x7000, 5, QueuePriority::HIGH),
            0x01,
            [0xff_0006, 0x5_0003],
        ),
    ] {
        assert_eq!(
            (command.opcode, command.prp1),
            (opcode, 0x7000),
            "{command:?}"
        );
        assert_eq!([command.cdw10, command.cdw11], want, "{command:?}");
    }
    assert_eq!(Command::delete_queue(AdminOpcode::DELETE_CQ, 7).cdw10, 7);
    // The queue is in the lower half.
    assert_eq!(Command::abort(2, 0xfedc).cdw10, 0xfedc_0002);
    let format = FormatNvm {
        lbaf: 0x25,
        secure_erase: 2,
    };
    // LBAFL 5, SES 2, LBAFU 2.
    assert_eq!(Command::format(9, format).cdw10, 0x2405);
}
