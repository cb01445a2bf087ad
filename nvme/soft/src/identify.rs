//! The soft controller's Identify data: Base section 5.17, NVM section 4.1.5.

use pumice_nvme::spec::{
    Cns, IdentifyController, IdentifyNamespace, IdentifyNvmController, Oacs, Oncs, Vs,
};
use zerocopy::{FromZeros, IntoBytes};

use super::SoftConfig;
use super::media::SoftNamespace;

/// Most Aborts at a time.
pub(super) const ABORTS_MAX: u8 = 4;
/// Version 2.0 of the NVMe specification.
pub(super) const VERSION: u32 = 0x2_0000;

fn fill(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let n = text.len().min(field.len());
    field[..n].copy_from_slice(&text.as_bytes()[..n]);
}

pub(super) fn controller(config: &SoftConfig, name: &str) -> IdentifyController {
    let mut id = IdentifyController::new_zeroed();
    fill(&mut id.sn, name);
    fill(&mut id.mn, "Pumice soft controller");
    fill(&mut id.fr, env!("CARGO_PKG_VERSION"));
    id.mdts = config.mdts;
    id.cntlid = 1.into();
    id.ver = u32::from(Vs::from(VERSION)).into();
    id.rtd3e = 1_000_000.into();
    id.oaes = (1 << 8).into();
    id.cntrltype = 1;
    id.crdt = [1.into(), 5.into(), 10.into()];
    let mut oacs = Oacs::FORMAT;
    if config.shadow_doorbells {
        oacs |= Oacs::DOORBELL_BUFFER;
    }
    id.oacs = oacs.into();
    id.acl_z = ABORTS_MAX - 1;
    id.fna = u8::from(config.formats_all) | u8::from(config.formats_one_by_one) << 3;
    id.aerl_z = 7;
    id.frmw = 0x3;
    id.lpa = 1 << 2;
    id.elpe_z = u8::try_from(super::admin::ERROR_LOG_ENTRIES - 1).unwrap_or(0);
    id.wctemp = 343.into();
    id.cctemp = 353.into();
    id.sqes = 0x66;
    id.cqes = 0x44;
    id.nn = u32::try_from(config.namespaces.len())
        .unwrap_or(u32::MAX)
        .max(1)
        .into();
    id.oncs =
        (Oncs::COMPARE | Oncs::DATASET_MANAGEMENT | Oncs::WRITE_ZEROES | Oncs::VERIFY | Oncs::COPY)
            .into();
    id.vwc = u8::from(config.write_cache) | 0b110;
    id.cdfs = 1.into();
    id.sgls = u32::from(config.sgl).into();
    fill(&mut id.subnqn, "");
    let nqn = format!("nqn.2014-08.org.nvmexpress:pumice:{name}");
    id.subnqn = [0; 256];
    let n = nqn.len().min(255);
    id.subnqn[..n].copy_from_slice(&nqn.as_bytes()[..n]);
    id
}

pub(super) fn nvm_controller() -> IdentifyNvmController {
    IdentifyNvmController::new_zeroed()
}

pub(super) fn namespace(ns: Option<&SoftNamespace>) -> IdentifyNamespace {
    let mut id = IdentifyNamespace::new_zeroed();
    let Some(ns) = ns else { return id };
    let blocks = ns.num_blocks();
    id.nsze = blocks.into();
    id.ncap = blocks.into();
    id.nuse = blocks.into();
    id.nlbaf_z = 1;
    id.flbas = u8::from(ns.block_shift == 12);
    // Deallocated blocks read as zeroes; write zeroes may deallocate.
    id.dlfeat = 1 | 1 << 3;
    id.noiob = ns.boundary_blocks.into();
    id.mssrl = 1024.into();
    id.mcl = 4096.into();
    id.msrc_z = 127;
    id.nguid = ns.uuid;
    id.lbaf[0].lbads = 9;
    id.lbaf[1].lbads = 12;
    id
}

/// Makes the namespace identification descriptors: UUID and command set.
pub(super) fn descriptors(ns: &SoftNamespace) -> Vec<u8> {
    let mut page = vec![3, 16, 0, 0];
    page.extend(ns.uuid);
    page.extend([4, 1, 0, 0, 0]);
    page
}

/// Makes the page for an Identify command. `None` stands for Invalid Field.
pub(super) fn page(
    config: &SoftConfig,
    name: &str,
    namespaces: &[SoftNamespace],
    cns: Cns,
    nsid: u32,
) -> Option<Vec<u8>> {
    let ns = (nsid as usize)
        .checked_sub(1)
        .and_then(|n| namespaces.get(n));
    let page = match cns {
        Cns::CONTROLLER => {
            let mut id = controller(config, name);
            id.nn = u32::try_from(namespaces.len())
                .unwrap_or(u32::MAX)
                .max(1)
                .into();
            id.as_bytes().to_vec()
        }
        Cns::CSI_CONTROLLER => nvm_controller().as_bytes().to_vec(),
        Cns::NAMESPACE => namespace(ns).as_bytes().to_vec(),
        Cns::NS_DESCRIPTORS => descriptors(ns?),
        Cns::ACTIVE_NAMESPACES => {
            let count = u32::try_from(namespaces.len()).unwrap_or(u32::MAX);
            (nsid.saturating_add(1)..=count)
                .take(1024)
                .flat_map(u32::to_le_bytes)
                .collect()
        }
        _ => return None,
    };
    Some(page)
}
