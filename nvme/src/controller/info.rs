//! What a controller says about itself.

use crate::spec::{IdentifyController, IdentifyNvmController, Vs};

/// The controller's abilities, from its Identify data.
#[derive(Debug, Clone)]
pub(crate) struct Info {
    pub identify: Box<IdentifyController>,
    pub nvm: Option<Box<IdentifyNvmController>>,
    pub version: Vs,
    /// Most bytes of one command's data.
    pub transfer_bytes: usize,
    pub sgl: bool,
    pub write_cache: bool,
}
