//! Configuration: SPDK's JSON files and the methods that they call, which are those of JSON-RPC.
//!
//! ```json
//! { "subsystems": [ { "subsystem": "bdev", "config": [
//!     { "method": "bdev_malloc_create",
//!       "params": { "name": "Malloc0", "num_blocks": 65536, "block_size": 512 } }
//! ] } ] }
//! ```
//!
//! Methods and parameters have SPDK's names. Files that its scripts wrote (`gen_nvme.sh`,
//! `save_config`) work, whatever other subsystems they configure. As in SPDK, a device may come
//! before its base device.

mod app;
mod by_uri;
mod check;
mod framework_methods;
pub(crate) mod json;
mod methods;
mod modules;
mod named;
mod notifications;
mod process_methods;
mod query_methods;

use std::io::Read as _;
use std::path::Path;

pub use app::App;
pub use check::check_form;
pub use json::MethodError;
use json::{Object, line_of, without_comments};
pub use named::NamedDevices;
use pumice_bdev::BdevError;
use serde_json::value::RawValue;

/// Longest configuration file in bytes.
const MAX_LEN: u64 = 16 << 20;

/// Subsystems of SPDK without block devices, which are skipped.
const OTHER_SUBSYSTEMS: &[&str] = &[
    "accel",
    "fsdev",
    "fuse_dispatcher",
    "iobuf",
    "iscsi",
    "keyring",
    "nbd",
    "nvmf",
    "scheduler",
    "scsi",
    "sock",
    "ublk",
    "vfio_user_target",
    "vhost_blk",
    "vhost_scsi",
    "vmd",
];

/// An error in a configuration, with its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {message}")]
#[non_exhaustive]
pub struct ConfigError {
    /// Name of the file.
    pub file: String,
    /// Line of the error, from 1.
    pub line: usize,
    /// The parameter that is wrong, if it is one.
    pub key: Option<String>,
    /// Description of the error, with the method and the key.
    pub message: String,
}

struct Text<'a> {
    file: &'a str,
    text: &'a str,
}

impl Text<'_> {
    fn error(&self, at: &RawValue, message: impl Into<String>) -> ConfigError {
        self.error_at(at.get().as_ptr().addr(), None, message)
    }

    /// Makes an error at `address`, which points into the text.
    fn error_at(
        &self,
        address: usize,
        key: Option<String>,
        message: impl Into<String>,
    ) -> ConfigError {
        let offset = address.saturating_sub(self.text.as_ptr().addr());
        ConfigError {
            file: self.file.to_owned(),
            line: line_of(self.text, offset),
            key,
            message: message.into(),
        }
    }

    fn object<'b>(&self, raw: &'b RawValue, what: &str) -> Result<Object<'b>, ConfigError> {
        serde_json::from_str(raw.get()).map_err(|_| {
            self.error(
                raw,
                format!("{what} should be an object, not {}", json::kind(raw)),
            )
        })
    }

    fn array<'b>(&self, raw: &'b RawValue, what: &str) -> Result<Vec<&'b RawValue>, ConfigError> {
        if raw.get() == "null" {
            return Ok(Vec::new());
        }
        serde_json::from_str(raw.get()).map_err(|_| {
            self.error(
                raw,
                format!("{what} should be an array, not {}", json::kind(raw)),
            )
        })
    }

    fn string(&self, raw: &RawValue, what: &str) -> Result<String, ConfigError> {
        serde_json::from_str(raw.get()).map_err(|_| {
            self.error(
                raw,
                format!("{what} should be a string, not {}", json::kind(raw)),
            )
        })
    }
}

/// A call in a configuration file.
struct Call<'a> {
    method: String,
    at: &'a RawValue,
    params: Option<&'a RawValue>,
}

/// Loads a configuration file into `app`.
///
/// # Errors
/// Returns the error with file, line and key. Devices that were configured before it stay.
pub fn load_file(app: &App, path: &Path) -> Result<(), ConfigError> {
    let file = path.display().to_string();
    let error = |message: String| ConfigError {
        file: file.clone(),
        line: 1,
        key: None,
        message,
    };
    // Opening a FIFO would wait for somebody who writes, and a device may never end.
    let found = std::fs::metadata(path).map_err(|e| error(e.to_string()))?;
    if !found.is_file() {
        return Err(error("not a regular file".to_owned()));
    }
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|opened| opened.take(MAX_LEN + 1).read_to_string(&mut text))
        .map_err(|e| error(e.to_string()))?;
    if text.len() as u64 > MAX_LEN {
        return Err(error(format!(
            "longer than {MAX_LEN} bytes, which no configuration is"
        )));
    }
    load(app, &file, &text)
}

/// Loads a configuration from a text. Errors call it `file`.
///
/// # Errors
/// Fails as [`load_file`] does.
pub fn load(app: &App, file: &str, text: &str) -> Result<(), ConfigError> {
    let clean = without_comments(text);
    let text = Text { file, text: &clean };
    let calls = parse(&text)?;
    // Devices may come before their base devices: a call that finds no base is tried again.
    let mut waiting: Vec<(Call<'_>, MethodError)> = Vec::new();
    for call in calls {
        match app.call_raw(&call.method, call.params) {
            Ok(_) => {}
            Err(e) if is_waiting(&call, &e) => waiting.push((call, e)),
            Err(e) => return Err(blame(&text, &call, e)),
        }
    }
    loop {
        let before = waiting.len();
        for (call, _) in std::mem::take(&mut waiting) {
            match app.call_raw(&call.method, call.params) {
                Ok(_) => {}
                Err(e) if is_waiting(&call, &e) => waiting.push((call, e)),
                Err(e) => return Err(blame(&text, &call, e)),
            }
        }
        match waiting.len() {
            0 => return Ok(()),
            n if n == before => break,
            _ => {}
        }
    }
    let (call, e) = waiting.swap_remove(0);
    Err(blame(&text, &call, e))
}

fn is_waiting(call: &Call<'_>, e: &MethodError) -> bool {
    e.code == -i64::from(libc::ENODEV) && methods::stands_on_another(&call.method)
}

fn blame(text: &Text<'_>, call: &Call<'_>, e: MethodError) -> ConfigError {
    let address = e.at.unwrap_or(call.at.get().as_ptr().addr());
    text.error_at(address, e.key, format!("{}: {}", call.method, e.message))
}

fn parse<'a>(text: &Text<'a>) -> Result<Vec<Call<'a>>, ConfigError> {
    let root: &RawValue = serde_json::from_str(text.text).map_err(|e| ConfigError {
        file: text.file.to_owned(),
        line: e.line().max(1),
        key: None,
        message: format!("not JSON: {e}"),
    })?;
    let Object(root_members) = text.object(root, "a configuration")?;
    let mut calls = Vec::new();
    let subsystems = root_members.iter().find(|(k, _)| k == "subsystems");
    match subsystems {
        Some((_, list)) => {
            for subsystem in text.array(list, "`subsystems`")? {
                parse_subsystem(text, subsystem, &mut calls)?;
            }
        }
        // `gen_nvme.sh` writes a single subsystem.
        None if root_members.iter().any(|(k, _)| k == "subsystem") => {
            parse_subsystem(text, root, &mut calls)?;
        }
        None => {
            let message = "no `subsystems`: a configuration is {\"subsystems\": [{\"subsystem\": \
                           \"bdev\", \"config\": […]}]}";
            return Err(text.error(root, message));
        }
    }
    Ok(calls)
}

fn parse_subsystem<'a>(
    text: &Text<'a>,
    raw: &'a RawValue,
    calls: &mut Vec<Call<'a>>,
) -> Result<(), ConfigError> {
    let Object(members) = text.object(raw, "a subsystem")?;
    let member = |key: &str| members.iter().find(|(k, _)| k == key).map(|(_, v)| *v);
    let Some(name) = member("subsystem") else {
        return Err(text.error(raw, "`subsystem`: missing"));
    };
    let name_text = text.string(name, "`subsystem`")?;
    let config = member("config").map_or(Ok(Vec::new()), |c| text.array(c, "`config`"))?;
    if name_text != "bdev" {
        if OTHER_SUBSYSTEMS.contains(&name_text.as_str()) {
            tracing::debug!(subsystem = name_text, calls = config.len(), "skipped");
            return Ok(());
        }
        let message = format!("unknown subsystem `{name_text}`; block devices are in `bdev`");
        return Err(text.error(name, message));
    }
    for call in config {
        let Object(members) = text.object(call, "a call")?;
        let member = |key: &str| members.iter().find(|(k, _)| k == key).map(|(_, v)| *v);
        let Some(method) = member("method") else {
            return Err(text.error(call, "`method`: missing"));
        };
        let strange = members.iter().find(|(k, _)| k != "method" && k != "params");
        if let Some((key, value)) = strange {
            return Err(text.error(value, format!("`{key}`: a call has `method` and `params`")));
        }
        let name = text.string(method, "`method`")?;
        calls.push(Call {
            method: name,
            at: method,
            params: member("params"),
        });
    }
    Ok(())
}

impl From<ConfigError> for BdevError {
    fn from(e: ConfigError) -> BdevError {
        BdevError::InvalidOption {
            name: format!("{}:{}", e.file, e.line),
            reason: e.message,
        }
    }
}
