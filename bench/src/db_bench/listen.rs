//! Reads the output of RocksDB's tool: passes it on, and takes the counts of the file system and of
//! the processor when a benchmark begins and ends.

use std::io::Write;

use pumice_io::process::{Rusage, rusage};

use super::report::{BenchResult, IoCount};

/// Counts at one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    io: Option<IoCount>,
    process: Option<Rusage>,
}

/// Receives the tool's output in pieces.
pub struct Listener<'a> {
    out: Box<dyn Write + Send>,
    io: &'a (dyn Fn() -> Option<IoCount> + Sync),
    /// Whether every write is synced.
    sync: bool,
    line: Vec<u8>,
    began: Counts,
    /// The results so far.
    pub results: Vec<BenchResult>,
}

impl<'a> Listener<'a> {
    /// Makes a listener that passes everything to `out` and asks `io` for the number of device
    /// operations so far.
    pub fn new(
        out: Box<dyn Write + Send>,
        io: &'a (dyn Fn() -> Option<IoCount> + Sync),
        sync: bool,
    ) -> Self {
        Listener {
            out,
            io,
            sync,
            line: Vec::new(),
            began: Counts::default(),
            results: Vec::new(),
        }
    }

    fn counts(&self) -> Counts {
        Counts {
            io: (self.io)(),
            process: rusage().ok(),
        }
    }

    /// Receives a piece of text.
    pub fn hear(&mut self, text: &[u8]) {
        // A closed pipe is not a reason to stop in the middle of a benchmark.
        let _ = self.out.write_all(text).and_then(|()| self.out.flush());
        for piece in text.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.hear_line(String::from_utf8_lossy(&line).trim_end());
            }
        }
    }

    fn hear_line(&mut self, line: &str) {
        // The tool prints this line when the database is open, before the benchmark's threads start.
        if line.starts_with("DB path: [") {
            self.began = self.counts();
        } else if let Some(mut result) = parse_result(line) {
            let now = self.counts();
            result.synced = self.sync || result.name == "fillsync";
            result.io = now.io.zip(self.began.io).map(|(now, then)| now.since(then));
            if let (Some(now), Some(then)) = (now.process, self.began.process) {
                spread_over_operations(&mut result, now, then);
            }
            self.results.push(result);
            // A repeated benchmark (`name[X3]`) has its path printed once.
            self.began = now;
        }
    }
}

/// Notes what the process has used since `then` for each operation of the benchmark.
fn spread_over_operations(result: &mut BenchResult, now: Rusage, then: Rusage) {
    let operations = result.operations.max(1) as f64;
    let per_op = |now: f64, then: f64| Some((now - then).max(0.0) / operations);
    let micros = |t: std::time::Duration| t.as_secs_f64() * 1e6;
    let all = |used: Rusage| micros(used.user + used.system);
    result.cpu_us_per_op = per_op(all(now), all(then));
    result.system_us_per_op = per_op(micros(now.system), micros(then.system));
    result.voluntary_switches_per_op = per_op(
        now.voluntary_switches as f64,
        then.voluntary_switches as f64,
    );
}

/// Parses a line as `Stats::Report` of RocksDB's tool prints it:
/// `fillseq      :       2.345 micros/op 426439 ops/sec 2.345 seconds 1000000 operations;   47.2 MB/s (words)`.
fn parse_result(line: &str) -> Option<BenchResult> {
    let (name, rest) = line.split_once(" : ")?;
    let (numbers, words) = rest.split_once(';')?;
    let numbers: Vec<&str> = numbers.split_whitespace().collect();
    let [
        us,
        "micros/op",
        rate,
        "ops/sec",
        seconds,
        "seconds",
        count,
        "operations",
    ] = numbers[..]
    else {
        return None;
    };
    let (mb_per_sec, message) = match words.split_once(" MB/s") {
        Some((rate, words)) => (rate.trim().parse().ok(), words),
        None => (None, words),
    };
    Some(BenchResult {
        name: name.trim().to_owned(),
        micros_per_op: us.parse().ok()?,
        ops_per_sec: rate.parse().ok()?,
        seconds: seconds.parse().ok()?,
        operations: count.parse().ok()?,
        mb_per_sec,
        message: message.trim().to_owned(),
        synced: false,
        cpu_us_per_op: None,
        system_us_per_op: None,
        voluntary_switches_per_op: None,
        io: None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn result_lines_are_read_and_others_are_not() {
        let line = "fillseq      :       2.345 micros/op 426439 ops/sec 2.300 seconds 1000000 operations;   47.2 MB/s";
        let r = parse_result(line).unwrap();
        assert_eq!((&r.name[..], r.operations), ("fillseq", 1_000_000));
        assert_eq!(r.mb_per_sec, Some(47.2));
        assert_eq!((r.micros_per_op, r.seconds), (2.345, 2.3));
        let line = "readrandom   :       3.564 micros/op 280560 ops/sec 1.069 seconds 300000 operations; (189503 of 300000 found)";
        let r = parse_result(line).unwrap();
        assert_eq!(r.message, "(189503 of 300000 found)");
        assert_eq!(r.mb_per_sec, None);
        for other in [
            "",
            "Keys:       16 bytes each (+ 0 bytes user-defined timestamp)",
            "OpenAndCompact() API call : 12.000 micros/op 0.100 seconds/op",
            "readrandom [AVG 3 runs] : 300 (± 299) ops/sec;   47.2 MB/sec",
        ] {
            assert_eq!(parse_result(other), None, "{other}");
        }
    }

    #[test]
    fn time_and_waits_are_spread_over_the_operations() {
        use std::time::Duration;
        let line = "fillsync : 1.0 micros/op 5 ops/sec 1.0 seconds 100 operations;";
        let mut result = parse_result(line).unwrap();
        let then = Rusage {
            user: Duration::from_millis(5),
            system: Duration::from_millis(10),
            voluntary_switches: 50,
            involuntary_switches: 1,
        };
        let now = Rusage {
            user: Duration::from_millis(7),
            system: Duration::from_millis(13),
            voluntary_switches: 250,
            involuntary_switches: 9,
        };
        spread_over_operations(&mut result, now, then);
        let found = [
            result.cpu_us_per_op,
            result.system_us_per_op,
            result.voluntary_switches_per_op,
        ];
        for (found, wanted) in found.into_iter().zip([50.0, 30.0, 2.0]) {
            assert!((found.unwrap() - wanted).abs() < 1e-9, "{found:?}");
        }
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn counts_are_those_between_the_database_and_the_result() {
        let writes = AtomicU64::new(100);
        let io = || {
            Some(IoCount {
                writes: writes.load(Ordering::Relaxed),
                ..IoCount::default()
            })
        };
        let out = Shared::default();
        let mut listener = Listener::new(Box::new(out.clone()), &io, false);
        let text = b"DB path: [/dbbench]\nfillsync     : 1.0 micros/op 5 ops/sec 1.0 seconds 5 operations;\n";
        listener.hear(&text[..40]);
        writes.store(110, Ordering::Relaxed);
        listener.hear(&text[40..]);
        writes.store(113, Ordering::Relaxed);
        listener.hear(b"readseq      : 1.0 micros/op 5 ops/sec 1.0 seconds 5 operations;\n");
        let counted: Vec<_> = listener
            .results
            .iter()
            .map(|r| (r.io.unwrap().writes, r.synced))
            .collect();
        assert_eq!(counted, [(10, true), (3, false)]);
        assert!(
            out.0.lock().unwrap().starts_with(text),
            "passed on as it is"
        );
    }
}
