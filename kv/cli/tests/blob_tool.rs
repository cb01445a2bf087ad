//! Tests of `pumice blob` and `pumice fsck` as commands.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::pumice;

/// Returns the standard output of a command that has to succeed, without its last line end.
fn ok(args: &[&str]) -> String {
    tool::ok(args).trim_end().to_owned()
}

/// Returns the standard error of a command that has to fail with this code.
fn fails(code: i32, args: &[&str]) -> String {
    let output = pumice(args);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    String::from_utf8(output.stderr).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&ok(&[args, &["--json"]].concat())).unwrap()
}

/// Makes a store of 64 KiB clusters in an image file and returns its URI.
fn store(dir: &Path) -> String {
    let uri = format!("file://{}", dir.join("store.img").display());
    let device = format!("{uri}?size=32M&create=1");
    ok(&[
        "blob",
        "init",
        &device,
        "--cluster-size",
        "64K",
        "--bstype",
        "LVOLSTORE",
    ]);
    uri
}

fn fsck(uri: &str, repair: bool) -> (Option<i32>, String) {
    let args: &[&str] = if repair {
        &["fsck", uri, "--repair"]
    } else {
        &["fsck", uri]
    };
    let output = pumice(args);
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

#[test]
fn a_life_of_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &store(dir.path());
    let file = dir.path().join("content");
    let content: Vec<u8> = (0..200_000u32)
        .map(|at| (at / 100).to_le_bytes()[0])
        .collect();
    std::fs::write(&file, &content).unwrap();
    let file = file.to_str().unwrap();

    let id = ok(&[
        "blob",
        "create",
        uri,
        "--size",
        "100K",
        "--thin",
        "--xattr",
        "name=first",
    ]);
    assert_eq!(id, "0x100000000");
    ok(&[
        "blob",
        "set-xattr",
        uri,
        &id,
        "length",
        "200000",
        "--form",
        "u64",
    ]);
    ok(&[
        "blob",
        "set-xattr",
        uri,
        &id,
        "bytes",
        "00ff",
        "--form",
        "hex",
    ]);
    let error = fails(
        1,
        &["blob", "set-xattr", uri, &id, "bytes", "0", "--form", "hex"],
    );
    assert!(error.contains("hexadecimal"), "{error}");
    let error = fails(1, &["blob", "import", uri, &id, file]);
    assert!(error.contains("resize it first"), "{error}");
    ok(&["blob", "resize", uri, &id, "200000"]);
    ok(&["blob", "import", uri, &id, file]);
    let exported = pumice(&["blob", "export", uri, &id, "-"]).stdout;
    assert_eq!(exported.len(), 4 * 65536);
    assert_eq!(exported[..content.len()], content);
    assert!(exported[content.len()..].iter().all(|byte| *byte == 0));

    let snapshot = ok(&["blob", "snapshot", uri, &id]);
    let clone = ok(&["blob", "clone", uri, &snapshot]);
    assert!(fails(1, &["blob", "delete", uri, &snapshot]).contains("parent of"));
    ok(&["blob", "inflate", uri, &clone]);
    let shown = json(&["blob", "show", uri, &clone]);
    assert_eq!(shown["allocated"], 4);
    assert_eq!(shown["thin"], false);
    assert_eq!(shown["parent"], Value::Null);
    ok(&["blob", "delete", uri, &snapshot]);
    assert_eq!(pumice(&["blob", "export", uri, &id, "-"]).stdout, exported);
    assert_eq!(
        pumice(&["blob", "export", uri, &clone, "-"]).stdout,
        exported
    );

    let new = ok(&["blob", "import", uri, "new", file]);
    let list = json(&["blob", "list", uri]);
    let blobs = list["blobs"].as_array().unwrap();
    assert_eq!(blobs.len(), 3);
    assert!(
        blobs
            .iter()
            .any(|blob| blob["id"] == new.as_str() && blob["clusters"] == 4)
    );
    assert!(
        blobs
            .iter()
            .any(|blob| blob["id"] == id.as_str() && blob["name"] == "first")
    );
    assert_eq!(list["bstype"], "LVOLSTORE");

    let dump = json(&["blob", "dump", uri]);
    assert_eq!(dump["super_block"]["clean"], 1);
    assert_eq!(dump["masks"].as_array().unwrap().len(), 3);
    let pages = dump["pages"].as_array().unwrap();
    let of_id = pages
        .iter()
        .filter(|page| page["id"] == id.as_str())
        .count();
    assert!(of_id >= 2);
    assert_eq!(
        json(&["blob", "dump", uri, &id])["pages"]
            .as_array()
            .unwrap()
            .len(),
        of_id
    );
    assert!(ok(&["blob", "dump", uri]).contains("extent table: "));
    let shown = ok(&["blob", "show", uri, &id]);
    assert!(
        shown.contains("xattr         bytes (2 bytes): \"\\x00\\xff\""),
        "{shown}"
    );
    assert_eq!(fsck(uri, false).0, Some(0));

    ok(&["blob", "delete", uri, &new]);
    assert!(fails(1, &["blob", "show", uri, &new]).contains("no blob"));
    assert!(fails(1, &["blob", "init", uri]).contains("--force"));
    assert!(fails(2, &["blob", "show", uri, "17"]).contains("blob id"));
    ok(&["blob", "init", uri, "--force"]);
    assert_eq!(json(&["blob", "list", uri])["blobs"], Value::Array(vec![]));
}

#[test]
fn import_from_a_pipe_skips_zeroes_of_a_thin_blob() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &store(dir.path());
    let mut child = Command::new(env!("CARGO_BIN_EXE_pumice"))
        .args(["blob", "import", uri, "new", "-", "--thin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut content = vec![0; 10 * 65536];
    content[5 * 65536] = 1;
    child.stdin.take().unwrap().write_all(&content).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let id = String::from_utf8(output.stdout).unwrap();
    let shown = json(&["blob", "show", uri, id.trim()]);
    assert_eq!(shown["clusters"], 10);
    assert_eq!(shown["allocated"], 1);
    assert_eq!(
        pumice(&["blob", "export", uri, id.trim(), "-"]).stdout,
        content
    );
}

#[test]
fn fsck_finds_mends_and_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &store(dir.path());
    let path = dir.path().join("store.img");
    ok(&["blob", "create", uri, "--size", "1M"]);
    let second = ok(&["blob", "create", uri, "--size", "1M"]);
    let pristine = std::fs::read(&path).unwrap();
    assert_eq!(fsck(uri, false).0, Some(0));

    // Used clusters are marked free in the mask.
    let mut image = pristine.clone();
    let mask = u32::from_le_bytes(image[40..44].try_into().unwrap()) as usize * 4096;
    image[mask + 5 + 5] ^= 0xff;
    std::fs::write(&path, &image).unwrap();
    let (code, text) = fsck(uri, false);
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains("--repair corrects"), "{text}");
    assert_eq!(
        std::fs::read(&path).unwrap(),
        image,
        "a check does not write"
    );
    assert_eq!(fsck(uri, true).0, Some(1));
    assert_eq!(fsck(uri, true).0, Some(0));
    assert!(std::fs::read(&path).unwrap() == pristine);

    // A page is damaged: a repair first prints what it removes, and afterwards the store has no
    // errors.
    let md_start = u32::from_le_bytes(image[48..52].try_into().unwrap()) as usize;
    let root = usize::from_str_radix(second.trim_start_matches("0x1"), 16).unwrap();
    let mut image = pristine.clone();
    image[(md_start + root) * 4096 + 100] ^= 1;
    std::fs::write(&path, &image).unwrap();
    let (code, text) = fsck(uri, false);
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains(&second), "{text}");
    let list = json(&["blob", "list", uri]);
    assert_eq!(list["damaged"][0]["id"], second.as_str());
    assert_eq!(list["blobs"].as_array().unwrap().len(), 1);
    let (code, text) = fsck(uri, true);
    assert_eq!(code, Some(1), "{text}");
    let plan = text.find(&format!("plan: remove blob {second}"));
    assert!(plan.is_some() && plan < text.find("removed: "), "{text}");
    assert_eq!(fsck(uri, false).0, Some(0));
    let list = json(&["blob", "list", uri]);
    assert!(list["damaged"].as_array().unwrap().is_empty());

    std::fs::write(&path, vec![0; pristine.len()]).unwrap();
    assert!(fails(8, &["fsck", uri]).contains("no blobstore signature"));
    fails(8, &["fsck", "file:///nonexistent/image"]);
    fails(16, &["fsck"]);
    fails(16, &["fsck", uri, "--no-such-option"]);
}

/// Importing a short file of zeroes into a thin blob keeps the bytes behind its end.
#[test]
fn import_leaves_what_is_behind_the_end_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &store(dir.path());
    let file = dir.path().join("file");
    let import = |id: &str, content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        ok(&["blob", "import", uri, id, file.to_str().unwrap()])
    };
    let id = ok(&["blob", "create", uri, "--size", "128K", "--thin"]);
    import(&id, &vec![7; 131_072]);
    import(&id, &[0; 70_000]);
    let content = pumice(&["blob", "export", uri, &id, "-"]).stdout;
    assert_eq!(content.len(), 131_072);
    assert!(content[..70_000].iter().all(|byte| *byte == 0));
    assert!(content[70_000..].iter().all(|byte| *byte == 7));
}

/// A super block whose checksum is wrong still leads to the pages.
#[test]
fn dump_of_a_store_with_a_damaged_super_block() {
    let dir = tempfile::tempdir().unwrap();
    let uri = &store(dir.path());
    let path = dir.path().join("store.img");
    let id = ok(&[
        "blob",
        "create",
        uri,
        "--size",
        "1M",
        "--xattr",
        "name=seek",
    ]);
    let mut image = std::fs::read(&path).unwrap();
    image[3000] ^= 1;
    std::fs::write(&path, &image).unwrap();
    for as_json in [false, true] {
        let mut args = vec!["blob", "dump", uri];
        args.extend(as_json.then_some("--json"));
        let output = pumice(&args);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("checksum"));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&id) && text.contains("seek"), "{text}");
        if as_json {
            let value: Value = serde_json::from_str(&text).unwrap();
            assert!(value["problem"].as_str().unwrap().contains("checksum"));
        }
    }
    // The positions in the super block lead nowhere.
    image[48] ^= 0x80;
    image[51] ^= 0x80;
    std::fs::write(&path, &image).unwrap();
    let text = String::from_utf8(pumice(&["blob", "dump", uri]).stdout).unwrap();
    assert!(
        text.contains("md_start") && !text.contains("seek"),
        "{text}"
    );
    assert_eq!(pumice(&["fsck", uri]).status.code(), Some(8));
}
