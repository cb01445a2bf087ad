//! The controller's state in one word, so that a queue pair checks it with one load.
//!
//! Low two bits: phase; the rest: generation, counted up by every reset. A queue pair's rings
//! belong to the word under which its queues were created.

/// What can be done with the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Commands are accepted.
    Live,
    /// A reset is under way.
    Resetting,
    /// A reset did not bring it back.
    Failed,
    /// It is gone.
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

/// Whether a reset that was asked for in the state `asked` is done in the state `now`: what has changed since has served the
/// request.
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
