//! Writer of "newc" cpio archives, the format that the kernel unpacks as an initramfs (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeMap;
use std::io::{self, Write};

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

struct Entry {
    mode: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// An archive in memory. Missing parent directories are added.
#[derive(Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a directory and its parents.
    pub fn dir(&mut self, path: &str) {
        let path = path.trim_matches('/');
        let mut upto = String::new();
        for part in path.split('/').filter(|p| !p.is_empty()) {
            if !upto.is_empty() {
                upto.push('/');
            }
            upto.push_str(part);
            self.entries.entry(upto.clone()).or_insert(Entry {
                mode: S_IFDIR | 0o755,
                device: (0, 0),
                data: Vec::new(),
            });
        }
    }

    fn add(&mut self, path: &str, mode: u32, device: (u32, u32), data: Vec<u8>) {
        let path = path.trim_matches('/');
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
        self.entries
            .insert(path.to_owned(), Entry { mode, device, data });
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, permissions: u32, data: Vec<u8>) {
        self.add(path, S_IFREG | permissions, (0, 0), data);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.add(path, S_IFLNK | 0o777, (0, 0), target.as_bytes().to_vec());
    }

    /// Adds a character device node.
    pub fn chardev(&mut self, path: &str, major: u32, minor: u32) {
        self.add(path, S_IFCHR | 0o600, (major, minor), Vec::new());
    }

    /// Writes the whole archive with its trailer.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        for (inode, (name, entry)) in (1u32..).zip(&self.entries) {
            record(out, inode, name, entry)?;
        }
        let trailer = Entry {
            mode: 0,
            device: (0, 0),
            data: Vec::new(),
        };
        record(out, 0, "TRAILER!!!", &trailer)
    }
}

fn record(out: &mut impl Write, inode: u32, name: &str, entry: &Entry) -> io::Result<()> {
    let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{name}: over 4 GiB"));
    let data_len = u32::try_from(entry.data.len()).map_err(too_long)?;
    let name_len = u32::try_from(name.len() + 1).map_err(too_long)?;
    let fields = [
        inode,
        entry.mode,
        0, // uid
        0, // gid
        1, // links
        0, // mtime
        data_len,
        0,
        0, // device that holds the file
        entry.device.0,
        entry.device.1,
        name_len,
        0, // check, unused in this form
    ];
    let mut head = b"070701".to_vec();
    for field in fields {
        write!(head, "{field:08X}")?;
    }
    head.extend_from_slice(name.as_bytes());
    head.push(0);
    pad(&mut head);
    out.write_all(&head)?;
    out.write_all(&entry.data)?;
    let tail = entry.data.len().next_multiple_of(4) - entry.data.len();
    out.write_all(&[0u8; 3][..tail])
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn parents_come_first_and_records_are_aligned() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", 0o755, b"hello".to_vec());
        archive.symlink("a/l", "b/c");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).expect("written");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |s: &str| text.find(s).unwrap_or_else(|| panic!("{s} is missing"));
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0"));
        // The size field of the file is the seventh of eight hexadecimal digits after the magic
        // number.
        let head = at("a/b/c\0") - 110;
        assert_eq!(&text[head..head + 6], "070701");
        assert_eq!(&text[head + 6 + 6 * 8..head + 6 + 7 * 8], "00000005");
        assert!(text.contains("TRAILER!!!\0"));
    }
}
