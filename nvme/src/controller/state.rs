//! The controller's state in one word, which a queue pair checks with one load.
//!
//! The low two bits are the phase and the others the generation, which every reset increments. A
//! queue pair's rings are valid for the word under which its queues were created.

/// The phase of a controller's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Commands are accepted.
    Live,
    /// The controller is being reset.
    Resetting,
    /// A reset did not bring the controller back.
    Failed,
    /// The controller was removed.
    Removed,
}

pub(crate) fn phase(word: u64) -> Phase {
    match word & 3 {
        0 => Phase::Live,
        1 => Phase::Resetting,
        2 => Phase::Failed,
        _ => Phase::Removed,
    }
}

pub(crate) fn generation(word: u64) -> u64 {
    word >> 2
}

/// Whether a reset that was requested in the state `asked` is done in the state `now`, because the
/// state has changed since.
pub(crate) fn is_due(now: u64, asked: u64) -> bool {
    now == asked && phase(now) == Phase::Live
}

pub(crate) fn word(generation: u64, phase: Phase) -> u64 {
    let bits = match phase {
        Phase::Live => 0,
        Phase::Resetting => 1,
        Phase::Failed => 2,
        Phase::Removed => 3,
    };
    generation << 2 | bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_done_once_for_all_who_asked() {
        let (mut now, asked) = (word(3, Phase::Live), word(3, Phase::Live));
        let mut resets = 0;
        for _ in 0..3 {
            if is_due(now, asked) {
                now = word(generation(now) + 1, Phase::Live);
                resets += 1;
            }
        }
        assert_eq!(resets, 1);
        for phase in [Phase::Resetting, Phase::Failed, Phase::Removed] {
            assert!(!is_due(word(3, phase), word(3, phase)));
        }
    }
}
