//! Tests of `pumice rescue`, and of how `pumice fsck` and the commands that change a file system
//! handle damage.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pumice_blobfs::fs::{FileSystem, MountOptions, OpenOptions};
use serde_json::Value;

#[path = "common/tool.rs"]
mod tool;

use tool::{ok, pumice};

const MIB: usize = 1 << 20;

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let words = u32::try_from(len).unwrap().div_ceil(4);
    let mut bytes: Vec<u8> = (0..words)
        .flat_map(|word| (word.wrapping_mul(2_654_435_761) ^ seed).to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

struct Image {
    dir: tempfile::TempDir,
    uri: String,
}

impl Image {
    /// Makes a file system with a few files: `/db/one` of 5 MiB, `/db/two` of 3 MiB and 77 bytes,
    /// `/db/empty`, an empty directory, and a second name of `/db/two`.
    fn new() -> Image {
        let dir = tempfile::tempdir().unwrap();
        let uri = dir.path().join("disk.img").to_str().unwrap().to_owned();
        ok(&["mkfs", &uri, "--size", "64M"]);
        let mount = FileSystem::mount(pumice_bdev::open(&uri).unwrap(), &MountOptions::default());
        let filesystem = mount.unwrap();
        filesystem.mkdir("/db").unwrap();
        filesystem.mkdir("/void").unwrap();
        let files = [
            ("/db/one", pattern(5 * MIB, 1)),
            ("/db/two", pattern(3 * MIB + 77, 2)),
            ("/db/empty", Vec::new()),
        ];
        for (path, bytes) in files {
            let file = filesystem.open(path, OpenOptions::CREATE).unwrap();
            file.append(&bytes).unwrap();
            file.sync().unwrap();
        }
        filesystem.link("/db/two", "/again").unwrap();
        filesystem.unmount().unwrap();
        Image { dir, uri }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.uri).unwrap()
    }

    /// Returns the output of `blob dump` for the blob with a file's name.
    fn blob_of(&self, path: &str) -> String {
        let stat: Value = serde_json::from_str(&ok(&["stat", &self.uri, "--json", path])).unwrap();
        stat[0]["blob"].as_str().unwrap().to_owned()
    }

    /// Returns the places of a blob's metadata pages in the image: those with a descriptor of a
    /// type.
    fn pages_of(&self, id: &str, kind: &str) -> Vec<u64> {
        let dump: Value =
            serde_json::from_str(&ok(&["blob", "--json", "dump", &self.uri, id])).unwrap();
        let md_start = dump["super_block"]["md_start"].as_u64().unwrap();
        let pages = dump["pages"].as_array().unwrap();
        pages
            .iter()
            .filter(|page| {
                let all = page["descriptors"].as_array().unwrap();
                all.iter().any(|d| d["type"] == kind)
            })
            .map(|page| (md_start + page["page"].as_u64().unwrap()) * 4096)
            .collect()
    }

    fn damage(&self, at: u64) {
        let file = fs::OpenOptions::new().write(true).open(&self.uri).unwrap();
        file.write_all_at(&[0x5a; 512], at + 1000).unwrap();
    }

    /// Runs the command and returns its exit code and all of its output.
    fn run(&self, args: &[&str]) -> (i32, String) {
        let output = pumice(args);
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8(said).unwrap(),
        )
    }

    fn rescue(&self, to: &Path) -> (i32, String) {
        let before = self.bytes();
        let done = self.run(&["rescue", &self.uri, to.to_str().unwrap()]);
        assert!(self.bytes() == before, "rescue changed the image");
        done
    }
}

fn same(path: &Path, bytes: &[u8]) {
    assert!(fs::read(path).unwrap() == bytes, "{}", path.display());
}

#[test]
fn a_whole_file_system_is_copied_whole() {
    let image = Image::new();
    let to = image.path("out");
    let (code, said) = image.rescue(&to);
    assert_eq!(code, 0, "{said}");
    same(&to.join("db/one"), &pattern(5 * MIB, 1));
    same(&to.join("db/two"), &pattern(3 * MIB + 77, 2));
    same(&to.join("db/empty"), b"");
    assert!(to.join("void").is_dir());
    let inode = |name: &str| fs::metadata(to.join(name)).unwrap().ino();
    assert_eq!(inode("again"), inode("db/two"), "a hard link is one");
    let mode = fs::metadata(to.join("db/one"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(
        mode & 0o077,
        0,
        "an image is private, and so is what was in it"
    );
}

#[test]
fn nothing_that_is_there_is_overwritten() {
    let image = Image::new();
    let to = image.path("out");
    fs::create_dir_all(to.join("db")).unwrap();
    fs::write(to.join("db/one"), "mine").unwrap();
    let (code, said) = image.rescue(&to);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("lost: /db/one"), "{said}");
    same(&to.join("db/one"), b"mine");
    same(&to.join("db/two"), &pattern(3 * MIB + 77, 2));
    // If nothing can be copied, nothing is created.
    let (code, said) = image.run(&["rescue", "/nowhere/image", to.to_str().unwrap()]);
    assert_eq!(code, 2, "{said}");
    let blank = image.path("blank");
    fs::write(&blank, vec![0; 4 * MIB]).unwrap();
    let dir = image.path("none");
    let (code, said) = image.run(&["rescue", blank.to_str().unwrap(), dir.to_str().unwrap()]);
    assert_eq!(code, 2, "{said}");
    assert!(!dir.exists());
}

#[test]
fn a_damaged_root_costs_its_file_and_no_other() {
    let image = Image::new();
    let id = image.blob_of("/db/one");
    for page in image.pages_of(&id, "flags") {
        image.damage(page);
    }
    let to = image.path("out");
    let (code, said) = image.rescue(&to);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(&id), "{said}");
    same(&to.join("db/two"), &pattern(3 * MIB + 77, 2));
    same(&to.join("again"), &pattern(3 * MIB + 77, 2));
    assert!(!to.join("db/one").exists());
}

#[test]
fn what_undamaged_pages_tell_of_a_damaged_file_is_copied() {
    // With clusters of 4 KiB the file has several extent pages, or many runs.
    let image = Image::new();
    let uri = image.path("small.img").to_str().unwrap().to_owned();
    ok(&[
        "mkfs",
        &uri,
        "--size",
        "64M",
        "--cluster-size",
        "4K",
        "--md-pages",
        "2000",
    ]);
    let image = Image { uri, ..image };
    let bytes = pattern(9 * MIB + 5, 3);
    fs::write(image.path("source"), &bytes).unwrap();
    let source = image.path("source").to_str().unwrap().to_owned();
    ok(&["cp", &image.uri, &source, ":/big"]);
    ok(&["cp", &image.uri, &source, ":/other"]);
    let pages = image.pages_of(&image.blob_of("/big"), "extent page");
    if pages.len() < 3 {
        // The file is described in its root page, so nothing else can be damaged.
        println!("skipped: what_undamaged_pages_tell_of_a_damaged_file_is_copied: no extent pages");
        return;
    }
    image.damage(pages[1]);
    let to = image.path("out");
    let (code, said) = image.rescue(&to);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("in part: /big: bytes "), "{said}");
    same(&to.join("other"), &bytes);
    let copy = fs::read(to.join("damaged/big")).unwrap();
    assert_eq!(copy.len(), bytes.len());
    let differ: Vec<usize> = (0..bytes.len())
        .filter(|at| copy[*at] != bytes[*at])
        .collect();
    let (first, last) = (differ[0], differ[differ.len() - 1]);
    assert!(
        last - first < 2 * MIB,
        "one extent page is lost: {first}..{last}"
    );
    let ranges = said.split("bytes ").nth(1).unwrap();
    let range = ranges.split(' ').next().unwrap();
    let (from, to) = range.split_once("..").unwrap();
    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
    assert!(
        from <= first && last < to,
        "{range} has not {first}..{last}"
    );
    assert!(copy[from..to].iter().all(|byte| *byte == 0), "a hole");
}

#[test]
fn a_repair_says_first_what_it_gives_up() {
    let image = Image::new();
    let id = image.blob_of("/db/one");
    image.damage(image.pages_of(&id, "flags")[0]);
    let before = image.bytes();
    assert_eq!(image.run(&["fsck", &image.uri]).0, 4);
    let (code, said) = image.run(&["fsck", "--dry-run", &image.uri]);
    assert_eq!(code, 4, "{said}");
    assert!(said.contains(&format!("plan: remove blob {id}")), "{said}");
    // Changes are refused, and the error names the options to continue.
    let empty = tempfile::tempdir().unwrap();
    let mount = ["mount", &image.uri, empty.path().to_str().unwrap()];
    let mut commands = vec![vec!["rm", &image.uri, "/again"]];
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
    {
        Ok(_) => commands.push(mount.to_vec()),
        Err(e) => {
            println!("skipped: mount in a_repair_says_first_what_it_gives_up: /dev/fuse: {e}");
        }
    }
    for command in commands {
        let (code, said) = image.run(&command);
        assert_eq!(code, 1, "{said}");
        assert!(
            said.contains("--accept-damage") && said.contains("pumice rescue"),
            "{said}"
        );
    }
    assert!(
        image.bytes() == before,
        "a refused or reading command wrote"
    );
    ok(&["rm", &image.uri, "/again", "--accept-damage"]);
    let (code, said) = image.run(&["fsck", "--repair", &image.uri]);
    assert_eq!(code, 1, "{said}");
    let plan = said.find("plan: remove blob").expect("a plan");
    assert!(
        plan < said.find("removed: ").expect("what was done"),
        "{said}"
    );
    let (code, said) = image.run(&["fsck", &image.uri]);
    assert_eq!(code, 0, "{said}");
    let names = ok(&["ls", &image.uri, "-R"]);
    assert!(
        names.contains("/db/two") && !names.contains("/db/one"),
        "{names}"
    );
}

/// A process was killed, and then the super block was damaged, so that nothing can be mounted. What only the journal has is
/// copied too: the newest file, and the end of another.
#[test]
fn what_the_journal_has_of_a_store_that_cannot_be_mounted_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let uri = path("disk.img").to_str().unwrap().to_owned();
    ok(&["mkfs", &uri, "--size", "64M"]);
    let mut options = MountOptions::default();
    options.volatile = true;
    let filesystem = FileSystem::mount(pumice_bdev::open(&uri).unwrap(), &options).unwrap();
    let log = filesystem.open("/log", OpenOptions::CREATE).unwrap();
    for bytes in [b"first", b" last"] {
        log.append(bytes).unwrap();
        log.sync().unwrap();
    }
    drop(filesystem.open("/late", OpenOptions::CREATE).unwrap());
    let late = filesystem.open("/late", OpenOptions::READ).unwrap();
    late.append(&pattern(70_000, 3)).unwrap();
    late.sync().unwrap();
    let killed = path("killed.img");
    fs::copy(&uri, &killed).unwrap();
    drop((log, late));
    filesystem.unmount().unwrap();
    let image = fs::OpenOptions::new().write(true).open(&killed).unwrap();
    image.write_all_at(&[1], 4000).unwrap();
    let (uri, to) = (killed.to_str().unwrap(), path("saved"));
    let run = pumice(&["rescue", uri, to.to_str().unwrap()]);
    assert!(!run.status.success(), "the super block is whole");
    same(&to.join("damaged/log"), b"first last");
    same(&to.join("damaged/late"), &pattern(70_000, 3));
    assert!(!to.join("damaged/pumice.journal").exists());
}
