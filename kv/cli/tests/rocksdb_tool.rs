//! `pumice ldb` and `pumice sst_dump` are programs of their own.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

#[test]
fn rocksdbs_tools_are_found_on_the_path_and_get_their_arguments() {
    let dir = tempfile::tempdir().unwrap();
    // Without the programs that another package may have built beside this one.
    let pumice = dir.path().join("pumice");
    std::fs::copy(env!("CARGO_BIN_EXE_pumice"), &pumice).unwrap();
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let run = |tool: &str| {
        Command::new(&pumice)
            .args([tool, "disk.img", "--db=/", "scan", "--help"])
            .env("PATH", &bin)
            .output()
            .unwrap()
    };
    for tool in ["db", "ldb", "sst_dump"] {
        let missing = run(tool);
        let said = String::from_utf8_lossy(&missing.stderr);
        assert_eq!(missing.status.code(), Some(1), "{said}");
        assert!(said.contains("cargo install --path kv/tools"), "{said}");

        let program = bin.join(format!("pumice-{tool}"));
        std::fs::write(&program, "#!/bin/sh\necho \"$@\"\nexit 3\n").unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let found = run(tool);
        assert_eq!(found.status.code(), Some(3), "{found:?}");
        assert_eq!(
            String::from_utf8_lossy(&found.stdout),
            "disk.img --db=/ scan --help\n"
        );
    }
}
