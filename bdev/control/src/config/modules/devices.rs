//! Steps that the methods of several modules have in common.

use std::sync::Arc;

use pumice_bdev::{BdevError, BlockDevice};

use super::super::app::App;
use super::super::json::{MethodError, Params};
use super::super::methods::Answer;

const NO_METADATA: &str = "devices with metadata or protection information are refused";

/// Refuses parameters about metadata, unless they ask for none.
pub(super) fn no_metadata(params: &mut Params<'_>) -> Result<(), MethodError> {
    for key in ["md_size", "dif_type", "dif_pi_format"] {
        params.neutral(key, &["0"], NO_METADATA)?;
    }
    params.ignore(&["md_interleave", "dif_is_head_of_md"]);
    Ok(())
}

/// Registers a device that stands on no other.
pub(super) fn add(app: &App, dev: Arc<dyn BlockDevice>) -> Result<String, MethodError> {
    Ok(app.registry.register(dev, Vec::new())?.info().name.clone())
}

/// Removes the device that `name` names, which must belong to `module`.
pub(super) fn delete(app: &App, params: &mut Params<'_>, module: &str) -> Answer {
    let name = params.string("name")?;
    params.finish()?;
    app.delete(&name, module)
}

/// Claims `base` for `name`, makes a device on it and registers that.
pub(super) fn stack(
    app: &App,
    name: &str,
    base: &str,
    make: impl FnOnce(Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice>,
) -> Result<String, MethodError> {
    if app.registry.get(name).is_some() {
        return Err(BdevError::Exists {
            name: name.to_owned(),
        }
        .into());
    }
    let claimed = app.registry.claim(base, name)?;
    let below = vec![claimed.info().name.clone()];
    let dev = make(Arc::new(claimed));
    Ok(app.registry.register(dev, below)?.info().name.clone())
}
