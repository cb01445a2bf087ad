//! Log pages: Base section 5.16.1.

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::status::Status;

open_enum! {
    /// Log page identifiers: Base figure 202.
    LogPage: u8 {
        /// Error information.
        ERROR = 0x01 "error information",
        /// SMART / health information.
        SMART = 0x02 "SMART / health",
        /// Firmware slots.
        FIRMWARE_SLOTS = 0x03 "firmware slots",
        /// Changed namespaces.
        CHANGED_NAMESPACES = 0x04 "changed namespaces",
        /// Commands supported and effects.
        COMMAND_EFFECTS = 0x05 "command effects",
    }
}

/// SMART / health information: Base section 5.16.1.3 (figure 207).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Bits: spare low, temperature, reliability degraded, read only, backup failed, PMR.
    pub critical_warning: u8,
    /// In kelvins.
    pub composite_temperature: U16,
    /// In percent.
    pub available_spare: u8,
    /// In percent.
    pub available_spare_threshold: u8,
    /// In percent; it may exceed 100.
    pub percentage_used: u8,
    /// Critical warnings of the endurance groups.
    pub endurance_group_warning: u8,
    /// Reserved.
    pub reserved0: [u8; 25],
    /// In thousands of 512-byte units.
    pub data_units_read: U128,
    /// In thousands of 512-byte units.
    pub data_units_written: U128,
    /// Number of commands.
    pub host_reads: U128,
    /// Number of commands.
    pub host_writes: U128,
    /// In minutes.
    pub controller_busy_time: U128,
    /// Number of power cycles.
    pub power_cycles: U128,
    /// In hours.
    pub power_on_hours: U128,
    /// Number of unsafe shutdowns.
    pub unsafe_shutdowns: U128,
    /// Number of media errors.
    pub media_errors: U128,
    /// Number of entries over the life of the controller.
    pub error_log_entries: U128,
    /// In minutes.
    pub warning_temperature_time: U32,
    /// In minutes.
    pub critical_temperature_time: U32,
    /// In kelvins; 0 where there is no sensor.
    pub temperature_sensors: [U16; 8],
    /// Number of transitions.
    pub thermal_transitions: [U32; 2],
    /// In seconds.
    pub thermal_time: [U32; 2],
    /// Reserved.
    pub reserved1: [u8; 280],
}

const _: () = assert!(size_of::<SmartLog>() == 512);

/// Error information entry: Base section 5.16.1.2 (figure 206).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ErrorLogEntry {
    /// Number of the error; 0 where there is no entry.
    pub error_count: U64,
    /// Submission queue identifier.
    pub sq_id: U16,
    /// Command identifier.
    pub cid: U16,
    /// Status field with the phase tag.
    pub status_phase: U16,
    /// Byte and bit of the parameter at fault.
    pub parameter_location: U16,
    /// First block that failed.
    pub lba: U64,
    /// Namespace identifier.
    pub nsid: U32,
    /// A vendor specific log page with more information.
    pub vendor: u8,
    /// Transport type.
    pub transport: u8,
    /// Reserved.
    pub reserved0: [u8; 2],
    /// Command specific information.
    pub command_specific: U64,
    /// Transport specific information.
    pub transport_specific: U16,
    /// Reserved.
    pub reserved1: [u8; 22],
}

const _: () = assert!(size_of::<ErrorLogEntry>() == 64);

impl ErrorLogEntry {
    /// The status, without the phase tag.
    pub fn status(&self) -> Status {
        Status(self.status_phase.get() >> 1)
    }
}

/// Firmware slot information: Base section 5.16.1.4.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// Active slot (bits 2:0), next slot (bits 6:4).
    pub active: u8,
    /// Reserved.
    pub reserved0: [u8; 7],
    /// Revision in each slot, ASCII.
    pub revisions: [[u8; 8]; 7],
    /// Reserved.
    pub reserved1: [u8; 448],
}

const _: () = assert!(size_of::<FirmwareSlotLog>() == 512);
