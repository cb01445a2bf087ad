//! The definitions of the NVM Express specifications that the driver uses.
//!
//! Sources: NVM Express Base Specification 2.0 ("Base"), NVM Command Set Specification 1.0 ("NVM")
//! and NVMe over PCIe Transport Specification 1.0 ("PCIe"). Each type names its section.
//!
//! * Structures have the specification's layout, are little-endian and have their size asserted.
//! * An enumeration whose value a device supplies is an *open* type, an integer with named
//!   constants, so that an unknown value can be represented.
//! * A field that the specification counts from zero ends in `_z`.
//! * Commands and completions print in the usual form of NVMe tools, see [`decode`].

#[cfg(target_endian = "big")]
compile_error!("NVMe structures are little-endian and are used in place");

/// Declares a transparent integer with named values.
macro_rules! open_enum {
    ($(#[$meta:meta])* $name:ident: $int:ty { $($(#[$vmeta:meta])* $variant:ident = $value:literal $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        #[repr(transparent)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vmeta])* pub const $variant: $name = $name($value);)*

            /// The name of the value, if it is one of the constants.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(self, f)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }
    };
}

mod command;
mod completion;
pub mod decode;
mod feature;
mod identify;
mod log;
mod regs;
mod sgl;
mod status;

pub(crate) use command::BlocksIo;
pub use command::{
    AdminOpcode, Cns, Command, DsmRange, FormatNvm, IoFlags, IoOpcode, Opcode, QueuePriority,
    SOURCE_RANGES_MAX, SourceRange,
};
pub use completion::Completion;
pub use feature::{AsyncEvent, AsyncEventType, FeatureId};
pub use identify::{
    IdentifyController, IdentifyNamespace, IdentifyNvmController, LbaFormat, NsDescriptor, Oacs,
    Oncs, ascii, ns_descriptors, ns_list,
};
pub use log::{ErrorLogEntry, FirmwareSlotLog, LogPage, SmartLog};
pub use regs::{Cap, Cc, Cmbloc, Cmbmsc, Cmbsz, Crto, Csts, Reg, Vs, doorbell_offset};
pub use sgl::SglDescriptor;
pub use status::{Status, StatusCodeType, status_name};
