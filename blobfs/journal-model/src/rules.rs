//! The rules of the protocol as switches, and what the protocol is without each of them.

/// The time at which freed clusters and ids may be used again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Release {
    /// When the batch that frees them is composed.
    AtOnce,
    /// When it is durable.
    Durable,
}

/// The time at which a page is journaled as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whole {
    Never,
    /// At its first change since the last checkpoint was complete.
    SinceEnded,
    /// At its first change past what the last checkpoint, complete or under way, covers.
    SinceBegun,
}

/// The time at which other bytes may go in place over carried ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    Free,
    /// When they are in place.
    NotOwed,
    /// When no batch that recovery would replay carries them.
    NotInRing,
}

/// The effect of a data write that fails while its batch does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failed {
    Ignored,
    /// The batch is replaced at its place by one without the failed files, while nothing stands behind it.
    Replaced,
}

/// The protocol, rule by rule.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Batches on their way together.
    pub depth: usize,
    pub one_write_per_block: bool,
    pub vouches: bool,
    pub vouch_unflushed: bool,
    pub upto_before_overwriting: bool,
    pub earlier_writes_flushed: bool,
    pub failed: Failed,
    pub pages_as_of_durable: bool,
    pub pages_before_tail: bool,
    pub pages_flushed: bool,
    pub ring_free_after_tail: bool,
    pub whole: Whole,
    pub covers_composed: bool,
    pub release: Release,
    pub gaps_written: bool,
    pub epoch_checked: bool,
    pub pred_checked: bool,
    pub recovery_flushes_first: bool,
    pub recovery_flushes_last: bool,
    pub new_epoch_at_mount: bool,
    pub late_writes_waited: bool,
    pub owed_pins_ring: bool,
    pub over: Over,
    pub replay_exact: bool,
    pub replay_leaves_out: bool,
    pub allocation_in_batch: bool,
    pub no_retry_in_flight: bool,
    /// An orderly unload puts owed bytes in place.
    pub unload_places_owed: bool,
    /// Damage is a header that cannot be used,
    pub damage_headers: bool,
    /// a block that cannot be read where the ring seems to end,
    pub damage_unreadable: bool,
    /// and a whole batch behind that,
    pub damage_later: bool,
    /// but only one of this epoch.
    pub damage_epoch: bool,
}

impl Rules {
    /// The protocol of the journal.
    pub fn all() -> Rules {
        Rules {
            depth: 1,
            one_write_per_block: true,
            vouches: true,
            vouch_unflushed: true,
            upto_before_overwriting: true,
            earlier_writes_flushed: true,
            failed: Failed::Replaced,
            pages_as_of_durable: true,
            pages_before_tail: true,
            pages_flushed: true,
            ring_free_after_tail: true,
            whole: Whole::SinceBegun,
            covers_composed: true,
            release: Release::Durable,
            gaps_written: true,
            epoch_checked: true,
            pred_checked: true,
            recovery_flushes_first: true,
            recovery_flushes_last: true,
            new_epoch_at_mount: true,
            late_writes_waited: true,
            owed_pins_ring: true,
            over: Over::NotInRing,
            replay_exact: true,
            replay_leaves_out: true,
            allocation_in_batch: true,
            no_retry_in_flight: true,
            unload_places_owed: true,
            damage_headers: true,
            damage_unreadable: true,
            damage_later: true,
            damage_epoch: true,
        }
    }
}

/// Without a rule the promise is broken within so many states.
pub const MOST: u64 = 2_000_000;

/// The protocol without one rule.
pub struct Without {
    pub name: &'static str,
    pub rule: &'static str,
    pub change: fn(&mut Rules),
}

pub fn table() -> Vec<Without> {
    fn row(name: &'static str, rule: &'static str, change: fn(&mut Rules)) -> Without {
        Without { name, rule, change }
    }
    vec![
        row("one-write", "1", |r| r.one_write_per_block = false),
        row("vouch", "2", |r| r.vouches = false),
        row("vouch-unflushed", "2, read as: only bytes in flight", |r| {
            r.vouch_unflushed = false;
        }),
        row("upto", "3", |r| r.upto_before_overwriting = false),
        row("earlier", "4", |r| r.earlier_writes_flushed = false),
        row("failure", "5, a failed data write", |r| {
            r.failed = Failed::Ignored;
        }),
        row(
            "durable-pages",
            "7, pages as of the last durable batch",
            |r| r.pages_as_of_durable = false,
        ),
        row("pages-first", "7, pages before the tail", |r| {
            r.pages_before_tail = false;
        }),
        row("pages-flushed", "7, flush before the tail", |r| {
            r.pages_flushed = false;
        }),
        row(
            "tail-durable",
            "7, the ring is free only after the tail",
            |r| r.ring_free_after_tail = false,
        ),
        row("whole", "8", |r| r.whole = Whole::Never),
        row(
            "whole-ended",
            "8, read as: since the checkpoint ended",
            |r| r.whole = Whole::SinceEnded,
        ),
        row(
            "covers-composed",
            "7 and 20, a checkpoint covers all that was composed when it began",
            |r| {
                r.covers_composed = false;
            },
        ),
        row("release", "9", |r| r.release = Release::AtOnce),
        row("gaps", "10", |r| r.gaps_written = false),
        row("epoch", "12, epoch", |r| r.epoch_checked = false),
        row("epoch-pred", "12, epoch and predecessor's CRC", |r| {
            (r.epoch_checked, r.pred_checked) = (false, false);
        }),
        row("flush-first", "12, flush before the replay", |r| {
            r.recovery_flushes_first = false;
        }),
        row("flush-last", "12, flush after the replay", |r| {
            r.recovery_flushes_last = false;
        }),
        row("mount-epoch", "13, a new epoch with every guard", |r| {
            r.new_epoch_at_mount = false;
        }),
        row("unload", "14, an unload puts owed bytes in place", |r| {
            r.unload_places_owed = false;
        }),
        row("late", "15", |r| r.late_writes_waited = false),
        row("retry", "17", |r| r.no_retry_in_flight = false),
        row("owed", "20, owed bytes keep the ring", |r| {
            r.owed_pins_ring = false;
        }),
        row("over", "21, other bytes over carried ones", |r| {
            r.over = Over::Free;
        }),
        row("over-owed", "21, read as: over owed ones", |r| {
            r.over = Over::NotOwed;
        }),
        row("exact", "12, byte-exact", |r| r.replay_exact = false),
        row("leaves-out", "12, without what was cut", |r| {
            r.replay_leaves_out = false;
        }),
        row("allocation", "22, the allocation with the bytes", |r| {
            r.allocation_in_batch = false;
        }),
        row(
            "damage-headers",
            "12, a header that cannot be used is damage",
            |r| r.damage_headers = false,
        ),
        row(
            "damage-unreadable",
            "12, a block that cannot be read is damage",
            |r| r.damage_unreadable = false,
        ),
        row("damage-later", "12, a batch behind a gap is damage", |r| {
            r.damage_later = false;
        }),
        row("damage-epoch", "12, only one of this epoch", |r| {
            r.damage_epoch = false;
        }),
        row("depth", "2, at most one batch on its way", |r| r.depth = 2),
    ]
}
