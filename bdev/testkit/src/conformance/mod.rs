//! The conformance suite, which checks a block device against the contract in one call.
//!
//! ```
//! let dev = pumice_bdev::open("malloc://4M")?;
//! pumice_bdev_testkit::conformance::run(&*dev);
//! # Ok::<(), pumice_bdev::BdevError>(())
//! ```
//!
//! It overwrites everything on the device. The device should have at least 1 MiB. Of a larger one
//! the ends and the first 8 MiB are used.

mod driver;
mod model;
mod rules;

use pumice_bdev::BlockDevice;

pub use model::ModelOptions;

/// Runs the whole suite.
///
/// # Panics
/// Panics when the device breaks the contract. The message says where and how.
pub fn run(dev: &dyn BlockDevice) {
    rules::info(dev);
    rules::refusals(dev);
    rules::idle(dev);
    rules::round_trips(dev);
    rules::vectors(dev);
    rules::zeroes_and_unmap(dev);
    rules::compares(dev);
    rules::copies(dev);
    rules::queue_full(dev);
    rules::reset_and_abort(dev);
    rules::two_channels(dev);
    rules::dropped_channel(dev);
    if dev.info().keeps_data {
        against_model(dev, &ModelOptions::default());
    }
}

/// Runs random operations against the device and a byte array, and compares.
///
/// # Panics
/// Panics when they differ. The message has the seed and the operation.
pub fn against_model(dev: &dyn BlockDevice, options: &ModelOptions) {
    model::run(dev, options);
}
