//! Rule 14 on a device with blocks of 512 B: a super block is torn between its first 512 B (version, clean,
//! epoch) and its last (CRC). Is every torn one recognised? Every change of the three fields is tried.

const VERSION: u32 = 3;
const GUARD: u32 = 0x8000_0003;

type Fields = (u32, u32, u64);

fn crc32c(fields: Fields) -> u32 {
    let mut crc = u32::MAX;
    let bytes = fields
        .0
        .to_le_bytes()
        .into_iter()
        .chain(fields.1.to_le_bytes())
        .chain(fields.2.to_le_bytes());
    for byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

/// The state that a reader recognises in a super block, if it recognises one.
fn recognise(first: Fields, crc: u32, neighbours: bool) -> Option<Fields> {
    let epochs = if neighbours {
        vec![first.2, first.2 + 1, first.2.wrapping_sub(1)]
    } else {
        vec![first.2]
    };
    for epoch in epochs {
        for (version, clean) in [
            (first.0, first.1),
            (VERSION, 1),
            (VERSION, 0),
            (GUARD, 0),
            (GUARD, 1),
        ] {
            if crc32c((version, clean, epoch)) == crc {
                return Some((version, clean, epoch));
            }
        }
    }
    None
}

/// Prints what is recognised. Returns whether all of it is, with the neighbouring epochs.
pub fn check() -> bool {
    let changes: [(&str, Fields, Fields); 5] = [
        ("guard set, same epoch", (VERSION, 1, 7), (GUARD, 0, 7)),
        ("guard set, new epoch", (VERSION, 1, 7), (GUARD, 0, 8)),
        (
            "guard set on an unclean store, new epoch",
            (VERSION, 0, 7),
            (GUARD, 0, 8),
        ),
        ("new epoch after a recovery", (GUARD, 0, 7), (GUARD, 0, 8)),
        ("unload", (GUARD, 0, 7), (VERSION, 1, 7)),
    ];
    let mut all = true;
    for (name, old, new) in changes {
        let count = |neighbours| {
            let torn = [(old, crc32c(new)), (new, crc32c(old))];
            torn.into_iter()
                .filter(|(first, crc)| {
                    recognise(*first, *crc, neighbours).is_some_and(|f| f == old || f == new)
                })
                .count()
        };
        println!(
            "super block, {name}: {} of 2 torn ones recognised by (version, clean), {} with the epochs beside",
            count(false),
            count(true)
        );
        all &= count(true) == 2;
    }
    all
}
