//! Controllers that deviate from the specification.
//!
//! Source of the identifiers: the table of the Linux driver (`drivers/nvme/host/pci.c`), compared
//! in November 2026.

use std::num::NonZeroU32;
use std::time::Duration;

use crate::namespace::CommandLimits;
use crate::spec::IdentifyController;

/// The deviations of a controller that the driver takes into account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Quirks {
    /// The status register must not be read for a while after the controller was disabled.
    late_status: bool,
    /// Write Zeroes is offered and does not work.
    no_write_zeroes: bool,
    /// A vendor specific byte of Identify has the boundary that I/O should not cross.
    stripe: bool,
}

/// Vendor and device identifiers.
type PciId = (u16, u16);

const LATE_STATUS: &[PciId] = &[
    (0x1bb1, 0x0100), // Seagate Nytro
    (0x1c58, 0x0003), // HGST SN100
    (0x1c58, 0x0023), // WDC SN200
    (0x1c5f, 0x0540), // Memblaze PBlaze4
    (0x144d, 0xa821), // Samsung PM1725
    (0x144d, 0xa822), // Samsung PM1725a
];
const NO_WRITE_ZEROES: &[PciId] = &[
    (0x8086, 0x5845), // QEMU before 6.0
    (0x8086, 0xf1a5), // Intel 600p, P3100
    (0x144d, 0xa809), // Samsung MZALQ256HBJD
    (0x144d, 0xa80b), // Samsung PM9B1
    (0x144d, 0xa822), // Samsung PM1725a
    (0x15b7, 0x2001), // SanDisk Skyhawk
    (0x1987, 0x5019), // Phison E19
    (0x1987, 0x5021), // Phison E21
    (0x1c5c, 0x1504), // SK hynix PC400
    (0x1c5c, 0x1d59), // SK hynix BC901
    (0x1cc4, 0x6302), // UMIS RPJTJ256MGE1QDY
    (0x1cc4, 0x6303), // UMIS RPJTJ512MGE1QDY
    (0x1d97, 0x2263), // SPCC
    (0x2646, 0x5016), // Kingston OM3PGP4, OS21011
    (0x2646, 0x5018), // Kingston OM8SFP4
    (0x2646, 0x501a), // Kingston OM8PGP4, OS21005
    (0x2646, 0x501b), // Kingston OM8PGP4, OS21005
    (0x2646, 0x501e), // Kingston OM3PGP4, OS21011
];
const STRIPE: &[PciId] = &[
    (0x8086, 0x0953), // Intel P3500, P3600, P3700
    (0x8086, 0x0a53), // Intel P3520
    (0x8086, 0x0a54), // Intel P4500, P4600
    (0x8086, 0x0a55), // Dell's P4600
];

impl Quirks {
    /// Returns the deviations of a PCI function. Other devices have none.
    pub fn of(pci_id: Option<PciId>) -> Quirks {
        let is_in = |list: &[PciId]| pci_id.is_some_and(|id| list.contains(&id));
        Quirks {
            late_status: is_in(LATE_STATUS),
            no_write_zeroes: is_in(NO_WRITE_ZEROES),
            stripe: is_in(STRIPE),
        }
    }

    /// The time for which the status register is left alone after the controller was disabled.
    pub fn quiet_after_disable(self) -> Duration {
        match self.late_status {
            true => Duration::from_millis(2300),
            false => Duration::ZERO,
        }
    }

    /// Corrects the limits of a namespace's commands.
    pub fn adjust(self, limits: &mut CommandLimits, id: &IdentifyController, page_shift: u32) {
        if self.no_write_zeroes {
            limits.supports.write_zeroes = false;
        }
        // The boundary is 2^n of the smallest pages, as MDTS is.
        let stripe_shift = page_shift + u32::from(id.vendor[3]);
        if self.stripe && id.vendor[3] != 0 && limits.data.boundary_blocks.is_none() {
            let blocks = 1u32.checked_shl(stripe_shift.saturating_sub(limits.block_shift));
            limits.data.boundary_blocks = blocks.and_then(NonZeroU32::new);
        }
    }
}
