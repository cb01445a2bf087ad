//! The check that the code that calls the C ABI was compiled for this version of it.

use std::fmt::Write as _;

use crate::contract::{
    PUMICE_ABI_VERSION, PUMICE_CAN_ASYNC, PUMICE_CAN_PIN, PUMICE_CAN_PREFETCH, PUMICE_CAN_REREAD,
    pumice_abi, pumice_fault, pumice_read, pumice_stat,
};

/// The abilities of this library.
const FEATURES: u64 =
    (PUMICE_CAN_ASYNC | PUMICE_CAN_PIN | PUMICE_CAN_PREFETCH | PUMICE_CAN_REREAD) as u64;

/// Returns why the library is not what `needed` asks for, if it is not.
pub(crate) fn misfit(needed: &pumice_abi) -> Option<String> {
    let mut differences = Vec::new();
    if needed.version != PUMICE_ABI_VERSION {
        differences.push("the versions differ".to_owned());
    }
    let missing = needed.features & !FEATURES;
    if missing != 0 {
        differences.push(format!("the library lacks the abilities {missing:#x}"));
    }
    for (name, theirs, ours) in [
        ("pumice_fault", needed.fault_size, size_of::<pumice_fault>()),
        ("pumice_read", needed.read_size, size_of::<pumice_read>()),
        ("pumice_stat", needed.stat_size, size_of::<pumice_stat>()),
    ] {
        if theirs as usize != ours {
            differences.push(format!("{name} has {theirs} bytes there and {ours} here"));
        }
    }
    if differences.is_empty() {
        return None;
    }
    let mut text = String::new();
    let _ = write!(
        text,
        "the RocksDB plugin was compiled for version {} of Pumice's C ABI with the abilities {:#x}, but this is libpumice_fs {} \
         with version {PUMICE_ABI_VERSION} and the abilities {FEATURES:#x} ({}): compile the plugin again with the header \
         pumice_fs.h of this library, or install the library that the header came with",
        needed.version,
        needed.features,
        env!("CARGO_PKG_VERSION"),
        differences.join("; "),
    );
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::DECLARATIONS;

    fn ours() -> pumice_abi {
        pumice_abi {
            size: size(size_of::<pumice_abi>()),
            version: PUMICE_ABI_VERSION,
            features: FEATURES,
            fault_size: size(size_of::<pumice_fault>()),
            read_size: size(size_of::<pumice_read>()),
            stat_size: size(size_of::<pumice_stat>()),
            reserved: 0,
        }
    }

    fn size(bytes: usize) -> u32 {
        u32::try_from(bytes).unwrap()
    }

    #[test]
    fn another_abi_is_refused_by_a_text_that_names_both() {
        assert_eq!(misfit(&ours()), None);
        // A plugin that needs less is served.
        assert_eq!(
            misfit(&pumice_abi {
                features: 0,
                ..ours()
            }),
            None
        );
        let next = PUMICE_ABI_VERSION + 1;
        let text = misfit(&pumice_abi {
            version: next,
            ..ours()
        })
        .unwrap();
        assert!(
            text.contains(&format!("for version {next} of Pumice's C ABI")),
            "{text}"
        );
        assert!(
            text.contains(&format!("with version {PUMICE_ABI_VERSION} and")),
            "{text}"
        );
        let text = misfit(&pumice_abi {
            features: FEATURES | 1 << 40,
            ..ours()
        })
        .unwrap();
        assert!(text.contains("lacks the abilities 0x10000000000"), "{text}");
        let text = misfit(&pumice_abi {
            read_size: 1,
            ..ours()
        })
        .unwrap();
        assert!(text.contains("pumice_read has 1 bytes there"), "{text}");
    }

    /// FNV-1a of a text without its spaces, which compilers set differently.
    fn word_of(text: &str) -> u64 {
        text.bytes()
            .filter(|byte| *byte != b' ')
            .fold(0xcbf2_9ce4_8422_2325, |word, byte| {
                (word ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
    }

    /// A plugin that was compiled before would call other functions than there are, or read other
    /// structs.
    #[test]
    fn the_declarations_change_only_with_the_version() {
        let now = (PUMICE_ABI_VERSION, word_of(DECLARATIONS));
        assert_eq!(
            now,
            (1, 0x65d3_e6fa_1c22_4660),
            "the C ABI is another one. If functions were added and nothing else, give them an ability (FEATURES here, kAbilities in \
             shim/register.h), leave the version, and write the word here. Otherwise raise PUMICE_ABI_VERSION in src/contract.rs, \
             and write both numbers"
        );
    }
}
