//! Tests of `pumice df`, `ls`, `stat` and `top` on what this process has mounted.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use pumice::{Db, DbOptions};
use pumice_confine::Terminal;
use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    _dir: tempfile::TempDir,
    image: String,
    socket: PathBuf,
    db: Db,
}

fn running() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("kv.img"), dir.path().join("rpc.sock"));
    let uri = format!("file://{}?size=64M&create=1", image.display());
    let db = DbOptions::new().rpc_socket(&socket).open(&uri).unwrap();
    db.put(b"key", b"value").unwrap();
    db.flush().unwrap();
    Running {
        image: image.to_str().unwrap().to_owned(),
        socket,
        db,
        _dir: dir,
    }
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&ok(args)).unwrap()
}

#[test]
fn a_process_is_asked_for_what_it_has_mounted() {
    let running = running();
    let image = running.image.as_str();
    let output = pumice(&["ls", image]);
    let errors = String::from_utf8(output.stderr).unwrap();
    let pid = std::process::id();
    assert!(
        errors.contains(&format!("process {pid} has it and answers")),
        "{errors}"
    );
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("CURRENT")
    );
    let df = json(&["df", image, "--json"]);
    let total = running.db.file_system().statfs().total;
    assert_eq!(df["total_bytes"], total);
    let stat = json(&["stat", image, "/CURRENT", "--json"]);
    let held = json(&["ls", image, "--json", "-R"]);
    // This is another name of the same file.
    let linked = running.socket.with_file_name("link.img");
    std::os::unix::fs::symlink(image, &linked).unwrap();
    assert_eq!(
        json(&["ls", linked.to_str().unwrap(), "--json", "-R"]),
        held
    );
    let output = pumice(&["stat", image, "/nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    // The answers are the same as when nobody has it.
    running.db.close().unwrap();
    assert_eq!(json(&["stat", image, "/CURRENT", "--json"]), stat);
    assert_eq!(json(&["df", image, "--json"])["total_bytes"], total);
}

#[test]
fn a_process_that_answers_nothing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img").to_str().unwrap().to_owned();
    let db = Db::open(&format!("file://{image}?size=64M&create=1")).unwrap();
    for command in ["ls", "top"] {
        let output = pumice(&[command, &image]);
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(
            errors.contains(&std::process::id().to_string()) && errors.contains("rpc_socket"),
            "{errors}"
        );
    }
    db.close().unwrap();
    let output = pumice(&["top", &image]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("no process writes to it"), "{errors}");
}

#[test]
fn top_asks_a_process_that_only_reads() {
    let running = running();
    running.db.close().unwrap();
    let socket = running.socket.as_path();
    let reader = DbOptions::new().read_only(true).rpc_socket(socket);
    let db = reader.open(&format!("file://{}", running.image)).unwrap();
    let once = json(&["top", &running.image, "--once", "--json"]);
    assert_eq!(once["rocksdb"]["estimate_num_keys"], 1);
    db.close().unwrap();
}

#[test]
fn top_prints_lines_where_there_is_no_terminal() {
    let running = running();
    let socket = running.socket.to_str().unwrap();
    for target in [socket, running.image.as_str()] {
        let text = ok(&["top", target, "--once"]);
        assert!(
            text.contains("writes/s") && text.lines().count() == 2,
            "{text}"
        );
        let once = json(&["top", target, "--once", "--json"]);
        assert!(once["writes_per_s"].as_f64() > Some(0.0), "{once}");
        assert_eq!(once["rocksdb"]["estimate_num_keys"], 1);
    }
    for wrong in ["0", "-1", "3601", "x"] {
        let output = pumice(&["top", socket, "-i", wrong]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

fn top(running: &Running) -> Terminal {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pumice"));
    command
        .args(["top", &running.image, "-i", "0.1"])
        .env("TERM", "xterm");
    Terminal::run(&mut command, 30, 100)
}

#[test]
fn top_refreshes_and_resizes_and_quits() {
    for keys in ["q", "\x1b", "\x03"] {
        let running = running();
        let mut terminal = top(&running);
        terminal.wait_for("quits", PATIENCE);
        assert!(!terminal.is_cooked().unwrap());
        for n in 0..20_000_u32 {
            running.db.put(n.to_be_bytes(), b"").unwrap();
        }
        // Only what differs is drawn, but everything after a change of the size: the number is then
        // shown as a whole, once the figures are those after the last put.
        let started = Instant::now();
        for columns in [120, 119].into_iter().cycle() {
            terminal.resize(40, columns);
            terminal.wait_for("quits", PATIENCE);
            if terminal.shown().contains("20001") {
                break;
            }
            assert!(started.elapsed() < PATIENCE, "{:?}", terminal.shown());
        }
        terminal.resize(12, 40);
        terminal.wait_for("quits", PATIENCE);
        terminal.type_keys(keys);
        let status = terminal.end(PATIENCE);
        assert!(status.success(), "{keys:?}: {status}");
        assert!(terminal.is_cooked().unwrap(), "{keys:?}");
        // The screen that was there before is restored.
        terminal.wait_for("\x1b[?1049l", PATIENCE);
    }
}

#[test]
fn top_leaves_the_terminal_in_order_when_it_is_ended() {
    let running = running();
    let mut terminal = top(&running);
    terminal.wait_for("quits", PATIENCE);
    let killed = Command::new("kill").arg(terminal.id().to_string()).status();
    assert!(killed.unwrap().success());
    assert_eq!(terminal.end(PATIENCE).code(), Some(128 + 15));
    assert!(terminal.is_cooked().unwrap());
    // The process that `top` shows ends.
    let mut terminal = top(&running);
    terminal.wait_for("quits", PATIENCE);
    running.db.close().unwrap();
    assert_eq!(terminal.end(PATIENCE).code(), Some(1));
    assert!(terminal.is_cooked().unwrap());
    assert!(
        terminal.shown().contains("pumice top:"),
        "{}",
        terminal.shown()
    );
}
