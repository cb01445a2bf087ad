//! Tests of the container file and its page: the example runs under the restrictions that the
//! page's command names.
#![cfg(feature = "db")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pumice_confine::Confinement;

fn file(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("container")
        .join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn example() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.extend(["examples", "hello_kv"]);
    path
}

/// Returns the restrictions of `docker run` with these arguments. `data` is the volume's directory.
fn confinement(arguments: &[&str], data: &Path) -> Confinement {
    let mut confinement = Confinement::new().docker_seccomp();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        confinement = match *argument {
            // Every confined program runs without new privileges.
            "--rm" | "--security-opt=no-new-privileges" => confinement,
            "--read-only" => confinement.read_only_root(data),
            "--cap-drop=ALL" => confinement.without_capabilities(),
            "--user=65534:65534" => confinement.other_user(),
            "--memory=128m" => confinement.memory(128 << 20),
            "--ulimit=nofile=64" => confinement.open_files(64),
            "--ulimit=memlock=0" => confinement.without_locked_memory(),
            "-v" => {
                assert_eq!(rest.next(), Some(&"hello-kv:/data"));
                confinement
            }
            "hello-kv" => confinement,
            other => panic!("the page's command has {other}, which this test does not know"),
        };
    }
    confinement
}

#[test]
fn the_command_of_the_page_works() {
    let page = file("README.md");
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix("docker run "));
    let arguments: Vec<&str> = line.expect("the page has the command").split(' ').collect();
    let data = tempfile::tempdir().unwrap();
    let mut command = Command::new(example());
    command.env("TMPDIR", data.path());
    let confinement = confinement(&arguments, data.path());
    match confinement.run(&mut command, Duration::from_secs(60)) {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && said.contains("plum is blue"),
                "{}: {said}{errors}",
                output.status
            );
        }
        Err(reason) => println!("skipped: the_command_of_the_page_works: {reason}"),
    }
}

/// The second stage of the container file installs nothing, so the program may need no library that
/// the base image lacks.
#[test]
fn the_base_image_has_the_libraries() {
    let stages = file("Containerfile");
    let last = stages.rsplit("FROM ").next().unwrap();
    assert!(last.starts_with("debian:bookworm-slim\n") && !last.contains("apt"));
    let output = Command::new("ldd").arg(example()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    for line in said.lines() {
        let name = line.trim().split(' ').next().unwrap();
        let file = name.rsplit('/').next().unwrap();
        // These are the libraries that Debian's own package manager is linked with.
        let there = [
            "linux-vdso.so.1",
            "libstdc++.so.6",
            "libgcc_s.so.1",
            "libm.so.6",
            "libc.so.6",
            "ld-linux-x86-64.so.2",
        ];
        assert!(there.contains(&file), "{name} is not in the base image");
    }
}
