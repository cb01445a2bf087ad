//! The server of `examples/cpp-server`: its commands, what it answers to nonsense, and kills.

mod common;

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::redis::{Client, Server, Value, program, wait_for};
use common::said;
use pumice_bdev_testkit::images::ImageDir;

/// Starts a server on a new image. `None` without a compiler.
fn started(test: &str, more: &[&str]) -> Option<(ImageDir, Server)> {
    let program = program(test)?;
    let dir = ImageDir::new().unwrap();
    let server = Server::start(program, &dir.path().join("kv.img"), more);
    Some((dir, server))
}

#[test]
fn strings_are_set_read_and_deleted() {
    let Some((_dir, server)) = started("strings_are_set_read_and_deleted", &[]) else {
        return;
    };
    let mut c = server.client();
    assert_eq!(c.call("PING"), Value::Simple("PONG".into()));
    assert_eq!(c.call("ping hello"), Value::bulk("hello"));
    assert_eq!(c.call("ECHO x"), Value::bulk("x"));
    assert_eq!(c.call("GET a"), Value::Null);
    assert_eq!(c.call("SET a 1"), Value::ok());
    assert_eq!(c.call("GET a"), Value::bulk("1"));
    assert_eq!(c.call("SET a 2 NX"), Value::Null);
    assert_eq!(c.call("SET a 3 xx"), Value::ok());
    assert_eq!(c.call("SET b 3 XX"), Value::Null);
    assert_eq!(c.call("SET b 3 NX"), Value::ok());
    assert_eq!(c.call("MSET c 4 d 5"), Value::ok());
    assert_eq!(c.call("EXISTS a b a none"), Value::Integer(3));
    let values = c.call("MGET a none c");
    let want = [Value::bulk("3"), Value::Null, Value::bulk("4")];
    assert_eq!(values, Value::Array(want.to_vec()));
    assert_eq!(c.call("DBSIZE"), Value::Integer(4));
    assert_eq!(c.call("DEL a a none b"), Value::Integer(2));
    assert_eq!(c.call("DBSIZE"), Value::Integer(2));
    // Any bytes are keys and values, and a large value is in a blob file.
    let (key, value) = (b"\0\r\n\xff".as_slice(), vec![0xfe; 1 << 20]);
    c.ask(&[b"SET", key, &value]).unwrap();
    assert_eq!(c.receive().unwrap(), Value::ok());
    c.ask(&[b"GET", key]).unwrap();
    assert_eq!(c.receive().unwrap(), Value::Bulk(value));
}

/// A power cut cannot be simulated here, but the log's syncs are counted.
#[test]
fn each_write_is_synced_if_that_was_asked_for() {
    for (sync, want) in [("--sync=always", 20), ("--sync=os", 0)] {
        let Some((_dir, server)) = started("each_write_is_synced", &[sync]) else {
            return;
        };
        let mut c = server.client();
        let syncs = |c: &mut Client| c.info("log_syncs").parse::<u64>().unwrap();
        let before = syncs(&mut c);
        for n in 0..5 {
            c.call(&format!("SET a {n}"));
            c.call(&format!("MSET a {n} b {n}"));
            c.call("INCR a");
            c.call("DEL a");
        }
        assert_eq!(syncs(&mut c) - before, want, "{sync}");
    }
}

#[test]
fn numbers_and_times_to_live() {
    let Some((_dir, server)) = started("numbers_and_times_to_live", &["--sync=os"]) else {
        return;
    };
    let mut c = server.client();
    let no_integer = Value::Error("ERR value is not an integer or out of range".into());
    assert_eq!(c.call("INCR n"), Value::Integer(1));
    assert_eq!(c.call("INCRBY n 41"), Value::Integer(42));
    assert_eq!(c.call("INCRBY n 9223372036854775807"), no_integer);
    assert_eq!(c.call("INCRBY n x"), no_integer);
    assert_eq!(c.call("GET n"), Value::bulk("42"));
    c.call("SET word one");
    assert_eq!(c.call("INCR word"), no_integer);
    assert_eq!(c.call("TTL n"), Value::Integer(-1));
    assert_eq!(c.call("TTL none"), Value::Integer(-2));
    assert_eq!(c.call("SET n 1 EX 1000"), Value::ok());
    let Value::Integer(left) = c.call("PTTL n") else {
        panic!("PTTL gives a number")
    };
    assert!((900_000..=1_000_000).contains(&left), "{left}");
    // Adding keeps the time.
    assert_eq!(c.call("INCR n"), Value::Integer(2));
    assert_ne!(c.call("TTL n"), Value::Integer(-1));
    c.call("SET n 3");
    assert_eq!(c.call("TTL n"), Value::Integer(-1));
    for wrong in [
        "EX 0",
        "EX -1",
        "EX 9223372036854775807",
        "EX x",
        "EX",
        "EX 1 PX 1",
        "NX XX",
        "KEEP",
    ] {
        let reply = c.call(&format!("SET n 4 {wrong}"));
        assert!(matches!(reply, Value::Error(_)), "{wrong}: {reply:?}");
    }
    assert_eq!(c.call("GET n"), Value::bulk("3"));
    expires(&mut c);
    adds_up(&server);
}

fn expires(c: &mut Client) {
    c.call("SET short 1 PX 30");
    wait_for("it expires", || c.call("GET short") == Value::Null);
    assert_eq!(c.call("EXISTS short"), Value::Integer(0));
    assert_eq!(c.call("DEL short"), Value::Integer(0));
    assert_eq!(c.call("SET short 2 NX"), Value::ok());
}

/// Concurrent additions are all there. The requests of a client are sent together, so that the server is busy with them.
fn adds_up(server: &Server) {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut c = server.client();
                c.send("INCR sum\r\n".repeat(5000).as_bytes()).unwrap();
                for _ in 0..5000 {
                    c.receive().unwrap();
                }
            });
        }
    });
    assert_eq!(server.client().call("GET sum"), Value::bulk("20000"));
}

#[test]
fn a_scan_finds_every_key_once() {
    let Some((_dir, server)) = started("a_scan_finds_every_key_once", &["--sync=os"]) else {
        return;
    };
    let mut c = server.client();
    for n in 0..250 {
        c.call(&format!("SET key:{n} x"));
    }
    c.call("SET other x");
    c.call("SELECT 1");
    c.call("SET elsewhere x");
    c.call("SELECT 0");
    let mut scan = |options: &str| {
        let (mut cursor, mut keys, mut count) = ("0".to_owned(), BTreeSet::new(), 0);
        loop {
            let Value::Array(reply) = c.call(&format!("SCAN {cursor}{options}")) else {
                panic!("SCAN gives an array")
            };
            let Value::Array(found) = &reply[1] else {
                panic!("SCAN gives keys")
            };
            count += found.len();
            keys.extend(found.iter().map(Value::text));
            cursor = reply[0].text();
            if cursor == "0" {
                assert_eq!(keys.len(), count, "a key comes once");
                return keys;
            }
        }
    };
    assert_eq!(scan("").len(), 251);
    assert_eq!(scan(" COUNT 1000").len(), 251);
    assert_eq!(scan(" MATCH key:*").len(), 250);
    assert_eq!(scan(" MATCH key:[1-3]? COUNT 7").len(), 30);
    assert_eq!(scan(" MATCH *******************x").len(), 0);
    for wrong in ["x", "-1", "77777", "0 COUNT 0", "0 COUNT", "0 TYPE string"] {
        assert!(
            matches!(c.call(&format!("SCAN {wrong}")), Value::Error(_)),
            "{wrong}"
        );
    }
}

#[test]
fn databases_are_apart_and_cleared_alone() {
    let Some((_dir, server)) = started("databases_are_apart", &[]) else {
        return;
    };
    let mut c = server.client();
    for n in [0, 1, 15] {
        assert_eq!(c.call(&format!("SELECT {n}")), Value::ok());
        assert_eq!(c.call(&format!("MSET a {n} b x")), Value::ok());
    }
    assert!(matches!(c.call("SELECT 16"), Value::Error(_)));
    assert!(matches!(c.call("SELECT -1"), Value::Error(_)));
    c.call("SELECT 1");
    assert_eq!(c.call("FLUSHDB"), Value::ok());
    assert_eq!(c.call("DBSIZE"), Value::Integer(0));
    c.call("SELECT 15");
    assert_eq!(c.call("GET a"), Value::bulk("15"));
    assert_eq!(c.call("FLUSHALL"), Value::ok());
    assert_eq!(c.call("GET a"), Value::Null);
}

#[test]
fn the_server_tells_of_itself() {
    let Some((_dir, server)) = started("the_server_tells_of_itself", &["--max-clients=3"]) else {
        return;
    };
    let mut c = server.client();
    assert_eq!(c.info("role"), "master");
    let two = c.call("INFO clients REPLICATION").text();
    assert!(
        two.starts_with("# Clients\r\n") && two.contains("# Replication\r\nrole:"),
        "{two}"
    );
    assert!(
        !two.contains("# Server") && !two.contains("# RocksDB"),
        "{two}"
    );
    assert_eq!(c.call("INFO nothing"), Value::bulk(""));
    assert_eq!(c.info("tcp_port"), server.port.to_string());
    assert_eq!(
        c.call("CONFIG GET appendfsync"),
        Value::array(&["appendfsync", "always"])
    );
    assert_eq!(c.call("CONFIG GET nothing"), Value::Array(vec![]));
    assert!(matches!(c.call("CONFIG SET save x"), Value::Error(_)));
    let Value::Integer(count) = c.call("COMMAND COUNT") else {
        panic!("COMMAND COUNT gives a number")
    };
    let Value::Array(all) = c.call("COMMAND") else {
        panic!("COMMAND gives names")
    };
    assert_eq!(all.len(), usize::try_from(count).unwrap());
    assert_eq!(c.call("COMMAND DOCS"), Value::Array(vec![]));
    assert_eq!(c.call("CLIENT SETNAME me"), Value::ok());
    assert_eq!(c.call("CLIENT GETNAME"), Value::bulk("me"));
    assert!(matches!(c.call("CLIENT ID"), Value::Integer(1..)));
    assert!(c.call("CLIENT KILL").text().contains("only CLIENT"));
    for (wrong, why) in [
        ("NONSENSE", "unknown command"),
        ("GET", "wrong number"),
        ("GET a b", "wrong number"),
        ("MSET a", "wrong number"),
        ("MSET a 1 b", "wrong number"),
    ] {
        let said = c.call(wrong).text();
        assert!(said.contains(why), "{wrong}: {said}");
    }
    // Two more connections are served, and the next one is told why not.
    let (mut second, mut third) = (server.client(), server.client());
    second.call("PING");
    third.call("PING");
    let mut fourth = server.client();
    assert!(
        fourth
            .receive()
            .unwrap()
            .text()
            .contains("max number of clients")
    );
    assert_eq!(second.call("QUIT"), Value::ok());
    assert!(second.is_over());
    wait_for("a place is free", || {
        server.client().ask(&[b"PING"]).is_ok() && c.info("connected_clients") == "2"
    });
    assert!(server.stop().success());
}

#[test]
fn requests_are_understood_however_they_arrive() {
    let Some((_dir, server)) = started("requests_are_understood", &["--sync=os"]) else {
        return;
    };
    let mut c = server.client();
    c.send(b"\r\nPING\r\nSET a 'b c'\r\nget a\nECHO \"\"\r\n")
        .unwrap();
    for want in [
        Value::Simple("PONG".into()),
        Value::ok(),
        Value::bulk("b c"),
        Value::bulk(""),
    ] {
        assert_eq!(c.receive().unwrap(), want);
    }
    // Byte by byte.
    for byte in b"*2\r\n$4\r\nECHO\r\n$3\r\na\r\n\r\n*0\r\n*-1\r\nPING\r\n" {
        c.send(&[*byte]).unwrap();
    }
    assert_eq!(c.receive().unwrap(), Value::bulk("a\r\n"));
    assert_eq!(c.receive().unwrap(), Value::Simple("PONG".into()));
    // Many at once, in order.
    let many: String = (0..5000)
        .map(|n| format!("*2\r\n$4\r\nECHO\r\n$4\r\n{n:04}\r\n"))
        .collect();
    c.send(many.as_bytes()).unwrap();
    for n in 0..5000 {
        assert_eq!(c.receive().unwrap(), Value::bulk(&format!("{n:04}")));
    }
}

/// Pseudorandom numbers.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((self.0 >> 33) % below as u64).unwrap()
    }
}

#[test]
fn nonsense_ends_its_connection_and_nothing_else() {
    let Some((_dir, server)) = started("nonsense_ends_its_connection", &["--sync=os"]) else {
        return;
    };
    let nonsense: [&[u8]; 12] = [
        b"*99999999999999999999\r\n",
        b"*65537\r\n",
        b"*x\r\n",
        b"*1\r\nPING\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$16777217\r\n",
        b"*1\r\n$9223372036854775807\r\n",
        b"*1\r\n$4\r\nPINGxx",
        b"*1\r\n$\r\n",
        b"*1\r\n$4 \r\n",
        b"SET a 'b\r\n",
        &[b'x'; 70_000],
    ];
    for bytes in nonsense {
        let mut c = server.client();
        c.send(bytes).unwrap();
        let reply = c.receive().unwrap();
        assert!(reply.text().starts_with("ERR Protocol error"), "{reply:?}");
        assert!(c.is_over());
    }
    // Of 5 bulks of 16 MiB the last is more than a request may have, before its bytes are there.
    let mut c = server.client();
    c.send(b"*5\r\n").unwrap();
    for _ in 0..4 {
        c.send(b"$16777216\r\n").unwrap();
        c.send(&vec![b'x'; 16 << 20]).unwrap();
        c.send(b"\r\n").unwrap();
    }
    c.send(b"$1\r\n").unwrap();
    assert!(c.receive().unwrap().text().contains("too big request"));
    // A length that was only announced costs nothing.
    let before = server.memory_kib("VmRSS");
    let announced: Vec<_> = (0..200)
        .map(|_| {
            let mut c = server.client();
            c.send(b"*3\r\n$3\r\nSET\r\n$16777216\r\nx").unwrap();
            c
        })
        .collect();
    let mut c = server.client();
    wait_for("all are served", || c.info("connected_clients") == "201");
    let after = server.memory_kib("VmRSS");
    assert!(
        after < before + (200 << 10),
        "{before} KiB, then {after} KiB"
    );
    drop(announced);
    throw_pieces(&server);
    wait_for("they are over", || c.info("connected_clients") == "1");
    assert_eq!(c.call("PING"), Value::Simple("PONG".into()));
    assert!(server.stop().success());
}

/// Sends pieces of requests in any order, on many connections.
fn throw_pieces(server: &Server) {
    let mut random = Random(7);
    let pieces: [&[u8]; 12] = [
        b"*",
        b"$",
        b"\r\n",
        b"3",
        b"-1",
        b"SET",
        b"GET a",
        b" ",
        b"\0\xff",
        b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n",
        b"'",
        b"PING\r\n",
    ];
    for _ in 0..300 {
        let mut c = server.client();
        let bytes: Vec<u8> = (0..random.next(60))
            .flat_map(|_| pieces[random.next(pieces.len())].to_vec())
            .collect();
        // The server may close before all is sent.
        let _ = c.send(&bytes);
    }
}

#[test]
fn a_checkpoint_is_a_database_of_its_own() {
    let Some((dir, server)) = started("a_checkpoint", &[]) else {
        return;
    };
    let mut c = server.client();
    c.call("SET a old");
    for wrong in [
        "BGSAVE ../x",
        "BGSAVE a/b",
        &format!("BGSAVE {}", "x".repeat(65)),
    ] {
        assert!(matches!(c.call(wrong), Value::Error(_)), "{wrong}");
    }
    assert_eq!(c.call("LASTSAVE"), Value::Integer(0));
    c.call("BGSAVE first");
    wait_for("it is made", || c.call("LASTSAVE") != Value::Integer(0));
    assert_eq!(c.info("rdb_last_bgsave_status"), "ok");
    c.call("SET a new");
    c.call("BGSAVE first");
    wait_for("the name is taken", || {
        c.info("rdb_last_bgsave_status") == "err"
    });
    drop(c);
    assert!(server.stop().success());
    let image = dir.path().join("kv.img");
    for (path, want) in [("/db-checkpoints/first", "old"), ("/db", "new")] {
        let program = program("a_checkpoint").unwrap();
        let server = Server::start(program, &image, &[&format!("--db={path}")]);
        assert_eq!(server.client().call("GET a"), Value::bulk(want));
        assert!(server.stop().success());
    }
}

#[test]
fn wrong_options_are_refused_and_help_tells_of_durability() {
    let Some(program) = program("wrong_options_are_refused") else {
        return;
    };
    for wrong in [
        "--sync=never",
        "--port=65536",
        "--port",
        "x",
        "--max-clients=0",
    ] {
        let output = Command::new(program).arg(wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}: {}", said(&output));
    }
    let output = Command::new(program)
        .arg("--fs_uri=blobfs:///nowhere/x")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("/nowhere/x"), "{}", said(&output));
    let help = Command::new(program).arg("--help").output().unwrap();
    assert!(said(&help).contains("kill -9") && said(&help).contains("power cut"));
}

/// Writes `WRITER:N` = N, counting in `acknowledged`, until the server is gone.
fn write_until_the_end(port: u16, writer: usize, from: u64, acknowledged: &AtomicU64) {
    let Ok(mut c) = Client::connect(port) else {
        return;
    };
    for n in from.. {
        let (key, value) = (format!("{writer}:{n}"), n.to_string());
        let sent = c.ask(&[b"SET", key.as_bytes(), value.as_bytes()]);
        match sent.and_then(|()| c.receive()) {
            Ok(reply) => assert_eq!(reply, Value::ok()),
            Err(_) => return,
        }
        acknowledged.store(n, Ordering::SeqCst);
    }
}

/// Kills a server twenty times under load. What it had acknowledged is there each time.
fn survives_kills(test: &str, sync: &str) {
    const WRITERS: usize = 4;
    let Some(program) = program(test) else {
        return;
    };
    let dir = ImageDir::new().unwrap();
    let image = dir.path().join("kv.img");
    let acknowledged: [AtomicU64; WRITERS] = [const { AtomicU64::new(0) }; WRITERS];
    let mut checked = [0; WRITERS];
    for round in 0..=20 {
        let server = Server::start(program, &image, &[sync]);
        let mut c = server.client();
        for (writer, checked) in checked.iter_mut().enumerate() {
            let last = acknowledged[writer].load(Ordering::SeqCst);
            for n in *checked + 1..=last {
                let value = c.call(&format!("GET {writer}:{n}"));
                assert_eq!(
                    value,
                    Value::bulk(&n.to_string()),
                    "round {round}: {writer}:{n} of {last}"
                );
            }
            *checked = last;
        }
        if round == 20 {
            break;
        }
        let server = Mutex::new(Some(server));
        let port = server.lock().unwrap().as_ref().unwrap().port;
        std::thread::scope(|scope| {
            for (writer, count) in acknowledged.iter().enumerate() {
                let from = checked[writer] + 1;
                scope.spawn(move || write_until_the_end(port, writer, from, count));
            }
            // Under load: each writer has written some more, a number of its own in each round.
            wait_for("the writers write", || {
                let many = |(count, from): (&AtomicU64, &u64)| {
                    count.load(Ordering::SeqCst) > from + 20 + 7 * round
                };
                acknowledged.iter().zip(&checked).all(many)
            });
            server.lock().unwrap().take().unwrap().kill();
        });
    }
}

#[test]
fn no_synced_write_is_lost_in_twenty_kills() {
    survives_kills("no_synced_write_is_lost_in_twenty_kills", "--sync=always");
}

#[test]
fn no_unsynced_write_is_lost_in_twenty_kills() {
    survives_kills("no_unsynced_write_is_lost_in_twenty_kills", "--sync=os");
}

/// The programs of the package `redis-tools`.
#[test]
fn the_tools_of_redis_work() {
    let Some((_dir, server)) = started("the_tools_of_redis_work", &["--sync=os"]) else {
        return;
    };
    let port = server.port.to_string();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new("timeout")
            .args(["120", program, "-p", &port])
            .args(args)
            .output();
        let output = output.unwrap();
        (output.status.code() != Some(127)).then(|| {
            assert!(
                output.status.success(),
                "{program} {args:?}: {}",
                said(&output)
            );
            said(&output)
        })
    };
    let Some(pong) = run("redis-cli", &["PING"]) else {
        println!("skipped: the_tools_of_redis_work: there is no redis-cli (Debian: redis-tools)");
        return;
    };
    assert_eq!(pong, "PONG\n");
    assert_eq!(
        run("redis-cli", &["-n", "3", "SET", "a", "b c"]).unwrap(),
        "OK\n"
    );
    assert_eq!(run("redis-cli", &["-n", "3", "--scan"]).unwrap(), "a\n");
    assert!(
        run("redis-cli", &["INFO", "replication"])
            .unwrap()
            .contains("role:master")
    );
    for pipeline in ["1", "16"] {
        let args = [
            "-t",
            "ping,set,get,incr,mset",
            "-n",
            "2000",
            "-c",
            "10",
            "-r",
            "1000",
            "-q",
            "-P",
            pipeline,
        ];
        let text = run("redis-benchmark", &args).unwrap();
        for test in ["SET", "GET", "INCR", "MSET"] {
            assert!(
                text.contains(test) && text.contains("requests per second"),
                "{text}"
            );
        }
        assert!(!text.contains("Error"), "{text}");
    }
}
