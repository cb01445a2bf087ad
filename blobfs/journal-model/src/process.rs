//! Rule 19: what survives the death of the process. One file, one device that is always durable, one log of
//! appends in shared memory. All sequences of a few operations, with a `kill -9` between any two steps,
//! also during the mount. The promise: after a mount on the same boot the file is as the process had it (an
//! operation in progress: as before or after); and nothing of a log shows on a device that somebody else
//! has written meanwhile.

#[derive(Clone, Copy)]
pub struct Rules {
    /// The log is made valid for the new epoch before that is durable on the device, not after it.
    pub tagged_first: bool,
    /// A truncation stands in the log, in order.
    pub cuts_logged: bool,
    /// An entry that does not begin inside or at the end of the file is dropped.
    pub gaps_dropped: bool,
    pub epoch_checked: bool,
}

#[derive(Clone, Copy)]
enum Entry {
    Put(usize, u16),
    Cut(usize),
}

#[derive(Clone)]
struct ProcessState {
    epoch: u32,
    device: Vec<u16>,
    epochs: Vec<u32>,
    log: Vec<Entry>,
    memory: Vec<u16>,
    next: u16,
}

/// The files that a mount finds.
fn found(s: &ProcessState, r: &Rules) -> Vec<u16> {
    let mut bytes = s.device.clone();
    if r.epoch_checked && !s.epochs.contains(&s.epoch) {
        return bytes;
    }
    for entry in &s.log {
        match *entry {
            Entry::Cut(len) if r.cuts_logged => bytes.truncate(len),
            Entry::Cut(_) => {}
            Entry::Put(at, byte) if at < bytes.len() => bytes[at] = byte,
            Entry::Put(at, byte) if at == bytes.len() => bytes.push(byte),
            Entry::Put(..) if r.gaps_dropped => {}
            Entry::Put(at, byte) => {
                bytes.resize(at, 0);
                bytes.push(byte);
            }
        }
    }
    bytes
}

/// The steps of an operation: the state after each, and whether the next mount may find the old content.
fn steps(s: &ProcessState, op: usize, r: &Rules) -> Vec<ProcessState> {
    let mut steps = vec![s.clone()];
    let mut t = s.clone();
    match op {
        0 if t.memory.len() < 4 => {
            t.next += 1;
            t.log.push(Entry::Put(t.memory.len(), t.next));
            steps.push(t.clone());
            t.memory.push(t.next);
        }
        1 if t.device != t.memory => t.device.clone_from(&t.memory),
        2 | 3 if t.memory.len() > op - 2 => {
            let len = op - 2;
            t.device.truncate(len);
            steps.push(t.clone());
            t.log.push(Entry::Cut(len));
            steps.push(t.clone());
            t.memory.truncate(len);
        }
        4 if t.device == t.memory && !t.log.is_empty() => t.log.clear(),
        5 => {
            // A kill, and a mount.
            t.memory = found(&t, r);
            let epoch = t.epoch + 1;
            if r.tagged_first {
                t.epochs.push(epoch);
                steps.push(t.clone());
            }
            t.epoch = epoch;
            steps.push(t.clone());
            if !r.tagged_first {
                t.epochs = vec![epoch];
                steps.push(t.clone());
            }
        }
        _ => return Vec::new(),
    }
    steps.push(t);
    steps
}

/// Tries everything. Returns the number of states, and the first that breaks the promise.
pub fn search(r: &Rules) -> (u64, Option<String>) {
    fn go(s: &ProcessState, r: &Rules, path: &mut Vec<usize>, states: &mut u64) -> Option<String> {
        const NAMES: [&str; 6] = [
            "append",
            "sync",
            "truncate to 0",
            "truncate to 1",
            "trim the log",
            "kill and mount",
        ];
        let names = |path: &[usize]| {
            path.iter()
                .map(|op| NAMES[*op])
                .collect::<Vec<_>>()
                .join(", ")
        };
        if path.len() == 6 {
            return None;
        }
        for op in 0..6 {
            let all = steps(s, op, r);
            let Some(last) = all.last().cloned() else {
                continue;
            };
            path.push(op);
            for state in &all {
                *states += 1;
                let bytes = found(state, r);
                if bytes != s.memory && bytes != last.memory {
                    return Some(format!(
                        "{}; killed in the last: {bytes:?}, was {:?}",
                        names(path),
                        s.memory
                    ));
                }
                // Somebody else mounts by force without the log, appends, syncs and unmounts.
                let mut other = state.clone();
                other.epoch += 1;
                other.device.push(9999);
                if found(&other, r) != other.device && !state.epochs.contains(&other.epoch) {
                    return Some(format!(
                        "{}; a foreign mount; then {:?}",
                        names(path),
                        found(&other, r)
                    ));
                }
            }
            if let Some(broken) = go(&last, r, path, states) {
                return Some(broken);
            }
            path.pop();
        }
        None
    }
    let start = ProcessState {
        epoch: 1,
        device: Vec::new(),
        epochs: vec![1],
        log: Vec::new(),
        memory: Vec::new(),
        next: 0,
    };
    let mut states = 0;
    let broken = go(&start, r, &mut Vec::new(), &mut states);
    (states, broken)
}

pub fn check() -> bool {
    let all = Rules {
        tagged_first: true,
        cuts_logged: true,
        gaps_dropped: true,
        epoch_checked: true,
    };
    let (states, broken) = search(&all);
    println!(
        "process crash, all rules: {states} states, {}",
        broken.as_deref().unwrap_or("none broken")
    );
    let without: [(&str, Rules); 4] = [
        (
            "valid for the new epoch first",
            Rules {
                tagged_first: false,
                ..all
            },
        ),
        (
            "truncations in the log",
            Rules {
                cuts_logged: false,
                ..all
            },
        ),
        (
            "an entry past the end is dropped",
            Rules {
                gaps_dropped: false,
                ..all
            },
        ),
        (
            "epoch",
            Rules {
                epoch_checked: false,
                ..all
            },
        ),
    ];
    for (name, rules) in without {
        let (states, broken) = search(&rules);
        println!(
            "process crash, without '{name}': after {states} states: {}",
            broken.as_deref().unwrap_or("never")
        );
    }
    broken.is_none()
}
