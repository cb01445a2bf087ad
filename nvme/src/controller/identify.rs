//! What the controller is and can, and how it is told what the driver wants: steps of bring-up.

use zerocopy::FromBytes;

use super::admin::Admin;
use super::info::Info;
use crate::error::NvmeError;
use crate::spec::{Cns, Command, FeatureId, IdentifyController, IdentifyNvmController, Reg, Vs};

/// Most bytes of one command's data, whatever the controller allows. It bounds the PRP list.
const TRANSFER_MAX: usize = 1 << 20;

/// Identifies the controller.
pub(super) fn controller(admin: &Admin) -> Result<Info, NvmeError> {
    let page = admin.identify_page(Cns::CONTROLLER, 0)?;
    let identify = IdentifyController::read_from_bytes(&page).map_err(|_| {
        admin
            .link
            .protocol("identify controller has a wrong length")
    })?;
    let version = Vs::from(admin.link.transport.read32(Reg::VS)?);
    // SQES and CQES: required entry sizes of 64 and 16 bytes (Base figure 275).
    let sizes = [
        (identify.sqes, 6, "submission"),
        (identify.cqes, 4, "completion"),
    ];
    for (field, want, what) in sizes {
        if field & 15 > want || (field >> 4 != 0 && field >> 4 < want) {
            return Err(admin.link.protocol(format!(
                "{what} queue entries of 2^{want} bytes are not among what the controller \
                 takes ({field:#04x})"
            )));
        }
    }
    let page_bytes = 1usize << admin.link.page_shift;
    let transfer_bytes = match identify.mdts {
        0 => TRANSFER_MAX,
        n => page_bytes
            .checked_shl(u32::from(n))
            .filter(|b| *b >= page_bytes)
            .unwrap_or(TRANSFER_MAX)
            .min(TRANSFER_MAX),
    };
    // Identify of the command set (CNS 06h) came with NVMe 2.0; older devices refuse it.
    let nvm = if version.mjr() >= 2 {
        admin
            .identify_page(Cns::CSI_CONTROLLER, 0)
            .ok()
            .and_then(|p| IdentifyNvmController::read_from_bytes(&p).ok())
            .map(Box::new)
    } else {
        None
    };
    let write_cache = identify.vwc & 1 != 0
        && feature_value(admin, FeatureId::VOLATILE_WRITE_CACHE).is_none_or(|v| v & 1 != 0);
    Ok(Info {
        // SGLS bits 1:0: 1 byte aligned, 2 dword aligned; buffers here are dword aligned.
        sgl: admin.link.options.sgl && matches!(identify.sgls.get() & 3, 1 | 2),
        identify: Box::new(identify),
        nvm,
        version,
        transfer_bytes,
        write_cache,
    })
}

fn feature_value(admin: &Admin, feature: FeatureId) -> Option<u32> {
    admin
        .run(Command::get_feature(feature, 0), None)
        .ok()
        .map(|(completion, _)| completion.dw0)
}

/// Sets up weighted round robin where it was asked for and is supported (Base section
/// 5.27.1.1).
pub(super) fn configure_arbitration(admin: &Admin) {
    let Some(weights) = admin
        .link
        .options
        .arbitration
        .filter(|_| admin.link.cap.ams_wrr())
    else {
        return;
    };
    let z = |w: u16| u32::from(w.clamp(1, 256) - 1);
    // No limit of the burst (7).
    let value = 7 | z(weights.low) << 8 | z(weights.medium) << 16 | z(weights.high) << 24;
    let command = Command::set_feature(FeatureId::ARBITRATION, 0, value, false);
    if let Err(error) = admin.run(command, None) {
        tracing::warn!(device = admin.link.name(), %error, "arbitration weights not set");
    }
}

/// Asks for the events that the driver understands (Base section 5.27.1.9): health and, if
/// the controller has it, namespace changes.
pub(super) fn configure_events(admin: &Admin) {
    let Ok(info) = admin.link.info() else { return };
    let value = 0x1f | (info.identify.oaes.get() & 1 << 8);
    let command = Command::set_feature(FeatureId::ASYNC_EVENT_CONFIG, 0, value, false);
    if let Err(error) = admin.run(command, None) {
        tracing::debug!(device = admin.link.name(), %error, "event configuration refused");
    }
}
