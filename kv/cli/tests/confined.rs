//! Tests of the `pumice` command in the environment of a container: it works, or the error says
//! what to do.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use pumice_confine::Confinement;

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the command, confined. Returns `None` and prints a line if this machine cannot do that.
fn pumice(confinement: &Confinement, name: &str, args: &[&str]) -> Option<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pumice"));
    match confinement.run(command.args(args), PATIENCE) {
        Ok(output) => Some(output),
        Err(reason) => {
            println!("skipped: {name}: {reason}");
            None
        }
    }
}

/// Returns what it prints when it succeeds.
fn says(confinement: &Confinement, name: &str, args: &[&str]) -> Option<String> {
    let output = pumice(confinement, name, args)?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{name}: {args:?}: {}: {errors}",
        output.status
    );
    Some(String::from_utf8(output.stdout).unwrap())
}

fn complains(confinement: &Confinement, name: &str, args: &[&str]) -> Option<String> {
    let output = pumice(confinement, name, args)?;
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{name}: {args:?}: {errors}");
    Some(errors)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Makes a file that everybody may read.
fn source(dir: &Path) -> String {
    let source = dir.join("source");
    std::fs::write(&source, "text").unwrap();
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(dir, everybody.clone()).unwrap();
    std::fs::set_permissions(&source, everybody).unwrap();
    text(&source)
}

#[test]
fn the_tools_work_in_any_surroundings() {
    let (dir, sources) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = source(sources.path());
    let image = text(&dir.path().join("disk.img"));
    let fetched = dir.path().join("fetched");
    for (name, confinement) in pumice_confine::surroundings(dir.path()) {
        let says = |args: &[&str]| says(&confinement, name, args);
        if says(&["mkfs", &image, "--size", "64M"]).is_none() {
            continue;
        }
        says(&["cp", &image, &source, ":/file"]);
        assert_eq!(says(&["cat", &image, "/file"]).as_deref(), Some("text"));
        assert!(says(&["ls", &image]).is_some_and(|said| said.contains("file")));
        says(&["df", &image]);
        says(&["stat", &image, "/file"]);
        says(&["fsck", &image]);
        says(&["cp", &image, ":/file", &text(&fetched)]);
        assert_eq!(std::fs::read(&fetched).unwrap(), b"text", "{name}");
        says(&["rm", &image, "/file"]);
        std::fs::remove_file(&image).unwrap();
        std::fs::remove_file(&fetched).unwrap();
    }
}

#[test]
fn an_image_of_another_user_can_be_read() {
    let (dir, writable) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = source(dir.path());
    let image = dir.path().join("disk.img");
    let root = Confinement::new();
    let uri = text(&image);
    says(&root, "root", &["mkfs", &uri, "--size", "64M"]);
    says(&root, "root", &["cp", &uri, &source, ":/file"]);
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o644)).unwrap();
    let fetched = writable.path().join("fetched");
    let other = Confinement::new()
        .read_only_root(writable.path())
        .other_user();
    let name = "another user's image";
    for args in [
        &["cat", &uri, "/file"][..],
        &["ls", &uri],
        &["df", &uri],
        &["stat", &uri, "/file"],
        &["fsck", &uri],
        &["cp", &uri, ":/file", &text(&fetched)],
    ] {
        if says(&other, name, args).is_none() {
            return;
        }
    }
    assert_eq!(std::fs::read(&fetched).unwrap(), b"text");
    let error = complains(&other, name, &["rm", &uri, "/file"]).unwrap();
    assert!(error.contains("read_only=1"), "{error}");
    let new = text(&dir.path().join("new.img"));
    let error = complains(&other, name, &["mkfs", &new, "--size", "64M"]).unwrap();
    assert!(error.contains("choose a directory other than"), "{error}");
    let nowhere = text(&writable.path().join("no/such/dir/x.img"));
    let error = complains(&other, name, &["mkfs", &nowhere, "--size", "64M"]).unwrap();
    assert!(error.contains("make its directory"), "{error}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn an_older_processor_gets_one_line() {
    pumice_confine::assert_refused_by_older_processor(
        "an_older_processor_gets_one_line",
        pumice_io::cpu::has_fast_crc32c(),
        &[env!("CARGO_BIN_EXE_pumice")],
    );
}
