//! What crossing into Rust costs a put: the same RocksDB on its own memory environment and on a
//! Rust file system in memory behind the plugin, in turn. Prints CPU time per put of the writing
//! thread, which the machine's other work disturbs less than the clock.
//!
//! `cargo run --release -p pumice --example shim_cost -- [PUTS] [ROUNDS]`

use std::fs;

use pumice::EnvOptions;
use pumice::plugin::MemoryFs;
use pumice::rocksdb::{DB, DBCompressionType, Env, Options};

/// Nanoseconds that this thread has been on a CPU.
fn cpu_ns() -> f64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|ns| ns.parse().ok())
        .unwrap_or(0.0)
}

/// A directory that the kernel has, since `DB::open` would make it there; no file goes into it.
const PATH: &str = "/tmp";

fn fillseq(env: &Env, puts: u64) -> f64 {
    let mut options = Options::default();
    options.set_env(env);
    options.create_if_missing(true);
    options.set_compression_type(DBCompressionType::None);
    let db = DB::open(&options, PATH).expect("a database in memory");
    let value = [b'v'; 100];
    let before = cpu_ns();
    for n in 0..puts {
        db.put(format!("{n:016}"), value).expect("put");
    }
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let per_put = (cpu_ns() - before) / puts as f64;
    drop(db);
    DB::destroy(&options, PATH).expect("destroy");
    per_put
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let number = |at, otherwise| {
        std::env::args()
            .nth(at)
            .and_then(|text| text.parse().ok())
            .unwrap_or(otherwise)
    };
    let (puts, rounds) = (number(1, 500_000), number(2, 7));
    let (mut rocksdb, mut rust) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let a = fillseq(&Env::mem_env().expect("RocksDB's memory environment"), puts);
        let b = fillseq(
            &EnvOptions::new()
                .build(MemoryFs::new(4 << 30))
                .expect("the root is `/`"),
            puts,
        );
        println!("round {round}: RocksDB's memory env {a:.0} ns, Rust behind the plugin {b:.0} ns");
        rocksdb.push(a);
        rust.push(b);
    }
    let (a, b) = (median(rocksdb), median(rust));
    println!("median: {a:.0} ns and {b:.0} ns per put: {:+.0} ns", b - a);
}
