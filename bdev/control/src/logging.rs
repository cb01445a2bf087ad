//! Log levels per component, as with SPDK's `-L`. They are set at the start or over JSON-RPC.
//!
//! A component that is switched on logs everything. `name=level` gives it a level of its own.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::sync::OnceLock;

use parking_lot::Mutex;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, Registry, fmt, reload};

/// The components and the targets of their records.
pub const COMPONENTS: &[(&str, &str)] = &[
    ("bdev", "pumice_bdev"),
    ("bdev_io", "pumice_bdev::io"),
    ("bdev_file", "pumice_bdev::file"),
    ("rpc", "pumice_bdev_control::rpc"),
    ("config", "pumice_bdev_control::config"),
    ("io", "pumice_io"),
    ("nvme", "pumice_nvme"),
    ("nvme_io", "pumice_nvme::io"),
    ("blobfs", "pumice_blobfs"),
    ("kv", "pumice"),
];

/// SPDK's names of levels and ours.
const LEVELS: &[(&str, LevelFilter)] = &[
    ("DISABLED", LevelFilter::OFF),
    ("ERROR", LevelFilter::ERROR),
    ("WARNING", LevelFilter::WARN),
    ("NOTICE", LevelFilter::INFO),
    ("INFO", LevelFilter::INFO),
    ("DEBUG", LevelFilter::DEBUG),
    ("TRACE", LevelFilter::TRACE),
];

struct LogState {
    level: &'static str,
    /// The components with a level of their own.
    flags: BTreeMap<&'static str, LevelFilter>,
    handle: Option<reload::Handle<Targets, Registry>>,
}

static STATE: OnceLock<Mutex<LogState>> = OnceLock::new();

fn state() -> &'static Mutex<LogState> {
    STATE.get_or_init(|| {
        Mutex::new(LogState {
            level: "WARNING",
            flags: BTreeMap::new(),
            handle: None,
        })
    })
}

fn targets(state: &LogState) -> Targets {
    let level = LEVELS
        .iter()
        .find(|(n, _)| *n == state.level)
        .map_or(LevelFilter::WARN, |l| l.1);
    // A target includes every name with the same beginning: `pumice` would include the crates
    // below.
    let crates = COMPONENTS.iter().map(|(_, target)| *target);
    let crates = crates.filter(|target| !target.contains("::"));
    let targets = crates.map(|target| (target, level));
    let mut targets: Targets = targets.collect::<Targets>().with_default(level);
    for (flag, level) in &state.flags {
        if let Some((_, target)) = COMPONENTS.iter().find(|(n, _)| n == flag) {
            targets = targets.with_target(*target, *level);
        }
    }
    targets
}

fn apply(state: &LogState) -> Result<(), String> {
    let Some(handle) = &state.handle else {
        return Err("this process has set up logging of its own".to_owned());
    };
    handle.reload(targets(state)).map_err(|e| e.to_string())
}

/// Logs to standard error at `level`. The components in `flags` (as with `-L`) log everything, or
/// what `component=level` says.
///
/// # Errors
/// Fails for unknown names, and when a subscriber is installed already, which then stays.
pub fn init(level: &str, flags: &[String]) -> Result<(), String> {
    let mut state = state().lock();
    state.level = level_named(level)?;
    for flag in flags {
        insert_flag(&mut state, flag)?;
    }
    let (filter, handle) = reload::Layer::new(targets(&state));
    let ansi = std::io::stderr().is_terminal();
    let layer = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_filter(filter);
    if tracing_subscriber::registry()
        .with(layer)
        .try_init()
        .is_ok()
    {
        state.handle = Some(handle);
    }
    Ok(())
}

fn level_named(level: &str) -> Result<&'static str, String> {
    let upper = level.to_ascii_uppercase();
    let found = LEVELS
        .iter()
        .find(|(n, _)| *n == upper || (*n == "WARNING" && upper == "WARN"));
    found.map(|(n, _)| *n).ok_or_else(|| {
        let known: Vec<&str> = LEVELS.iter().map(|(n, _)| *n).collect();
        format!(
            "`{level}` is not a log level; use one of {}",
            known.join(", ")
        )
    })
}

fn filter_named(level: &str) -> Result<LevelFilter, String> {
    let name = level_named(level)?;
    let found = LEVELS.iter().find(|(n, _)| *n == name);
    Ok(found.map_or(LevelFilter::WARN, |l| l.1))
}

fn insert_flag(state: &mut LogState, flag: &str) -> Result<(), String> {
    let (flag, level) = match flag.split_once('=') {
        Some((flag, level)) => (flag, filter_named(level)?),
        None => (flag, LevelFilter::TRACE),
    };
    if flag == "all" {
        state
            .flags
            .extend(COMPONENTS.iter().map(|(n, _)| (*n, level)));
        return Ok(());
    }
    let Some((name, _)) = COMPONENTS.iter().find(|(n, _)| *n == flag) else {
        let known: Vec<&str> = COMPONENTS.iter().map(|(n, _)| *n).collect();
        return Err(format!(
            "`{flag}` is not a component; use one of all, {}",
            known.join(", ")
        ));
    };
    state.flags.insert(name, level);
    Ok(())
}

/// Returns the level of the components that are not switched on.
pub fn level() -> &'static str {
    state().lock().level
}

/// Sets the level of the components that are not switched on.
///
/// # Errors
/// Fails for an unknown level, and in a process that has set up its own logging.
pub fn set_level(level: &str) -> Result<(), String> {
    let mut state = state().lock();
    state.level = level_named(level)?;
    apply(&state)
}

/// Switches a component, or `all`, to log everything (or as `component=level` says), or back to the
/// level of the others.
///
/// # Errors
/// Fails for an unknown component, and in a process that has set up its own logging.
pub fn set_flag(flag: &str, on: bool) -> Result<(), String> {
    let mut state = state().lock();
    if on {
        insert_flag(&mut state, flag)?;
    } else {
        remove_flag(&mut state, flag);
    }
    apply(&state)
}

fn remove_flag(state: &mut LogState, flag: &str) {
    if flag == "all" {
        state.flags.clear();
    } else {
        state.flags.remove(flag);
    }
}

/// Returns the components, and whether they log everything.
pub fn flags() -> Vec<(&'static str, bool)> {
    let state = state().lock();
    COMPONENTS
        .iter()
        .map(|(name, _)| (*name, state.flags.contains_key(name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    fn with(level: &'static str, flags: &[&str]) -> Targets {
        let mut state = LogState {
            level,
            flags: BTreeMap::new(),
            handle: None,
        };
        for flag in flags {
            insert_flag(&mut state, flag).unwrap();
        }
        targets(&state)
    }

    #[test]
    fn a_component_has_a_level_of_its_own() {
        let t = with("WARNING", &["nvme=debug", "bdev_io"]);
        assert!(t.would_enable("pumice_nvme::queue", &Level::DEBUG));
        assert!(!t.would_enable("pumice_nvme::queue", &Level::TRACE));
        assert!(t.would_enable("pumice_bdev::io", &Level::TRACE));
        assert!(!t.would_enable("pumice_bdev::raid0", &Level::INFO));
        assert!(t.would_enable("pumice_bdev::raid0", &Level::WARN));
    }

    #[test]
    fn the_crate_whose_name_begins_all_others_is_one_component() {
        let t = with("ERROR", &["kv"]);
        assert!(t.would_enable("pumice::db", &Level::TRACE));
        assert!(!t.would_enable("pumice_bdev::io", &Level::WARN));
        assert!(!t.would_enable("pumice_blobfs", &Level::WARN));
        let all = with("ERROR", &["all=info", "nvme"]);
        assert!(all.would_enable("pumice_bdev::io", &Level::INFO));
        assert!(!all.would_enable("pumice_bdev::io", &Level::DEBUG));
        assert!(all.would_enable("pumice_nvme", &Level::TRACE));
    }

    #[test]
    fn wrong_names_say_which_are_right() {
        let mut state = LogState {
            level: "WARNING",
            flags: BTreeMap::new(),
            handle: None,
        };
        assert!(
            insert_flag(&mut state, "nmve")
                .unwrap_err()
                .contains("nvme")
        );
        assert!(
            insert_flag(&mut state, "nvme=loud")
                .unwrap_err()
                .contains("DEBUG")
        );
    }

    #[test]
    fn one_component_is_switched_off_or_all_of_them() {
        let mut state = LogState {
            level: "WARNING",
            flags: BTreeMap::new(),
            handle: None,
        };
        insert_flag(&mut state, "all").unwrap();
        remove_flag(&mut state, "nvme");
        assert_eq!(state.flags.len(), COMPONENTS.len() - 1);
        assert!(!state.flags.contains_key("nvme"));
        remove_flag(&mut state, "all");
        assert!(state.flags.is_empty());
    }
}
