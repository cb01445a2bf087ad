//! Devices by URI: `file:///path?size=4G`, `malloc://1G`, `null://1T`.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pumice_nvme::transport::percent_decode;

use crate::device::BlockDevice;
use crate::error::BdevError;
use crate::read_only::ReadOnly;

pub use pumice_nvme::transport::parse_size;

/// A parsed URI. Every option must be asked for before [`Uri::finish`], which names those that
/// nobody knows.
pub(crate) struct Uri<'a> {
    text: &'a str,
    /// Before `://`; `file` for a plain path.
    pub(crate) scheme: &'a str,
    /// Between `://` and `?`, percent-decoded; a plain path as it stands.
    rest: Vec<u8>,
    options: Vec<(String, String)>,
    known: Vec<&'static str>,
}

/// The schemes, for messages.
const SCHEMES: &str = "file:///path?size=4G, malloc://1G, null://1T, \
     nvme://0000:5e:00.0, vfio-user:///path/to/socket";
/// Their names.
const NAMES: [&str; 6] = ["file", "malloc", "null", "nvme", "vfio-user", "soft"];

impl<'a> Uri<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Uri<'a>, BdevError> {
        let invalid = |reason: String| BdevError::InvalidUri {
            uri: text.to_owned(),
            reason,
        };
        let Some((scheme, tail)) = split_scheme(text) else {
            if let Some((name, _)) = text.split_once(':')
                && NAMES.contains(&name)
            {
                return Err(invalid(format!(
                    "`{name}:` is followed by `//`; a file of this name is ./{text}"
                )));
            }
            if !is_path(text) {
                return Err(invalid(format!("not a device URI; one of {SCHEMES}")));
            }
            // A plain path is a path, whatever stands in it.
            return Ok(Uri {
                text,
                scheme: "file",
                rest: text.as_bytes().to_vec(),
                options: Vec::new(),
                known: Vec::new(),
            });
        };
        let (rest, query) = tail.split_once('?').unwrap_or((tail, ""));
        let decode = |s: &str| {
            percent_decode(s).ok_or_else(|| {
                let hint = "write % itself as %25";
                invalid(format!("`{s}`: bad percent-encoding; {hint}"))
            })
        };
        let decode_text = |s: &str| {
            String::from_utf8(decode(s)?).map_err(|_| invalid(format!("`{s}` is not UTF-8")))
        };
        let mut options = Vec::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
            let key = decode_text(key)?;
            if options.iter().any(|(k, _)| *k == key) {
                return Err(invalid(format!("option `{key}` is given twice")));
            }
            options.push((key, decode_text(value)?));
        }
        Ok(Uri {
            text,
            scheme,
            rest: decode(rest)?,
            options,
            known: Vec::new(),
        })
    }

    /// What stands behind the scheme, as text.
    pub(crate) fn rest(&self) -> Result<&str, BdevError> {
        std::str::from_utf8(&self.rest).map_err(|_| self.invalid("not UTF-8"))
    }

    /// What stands behind the scheme, as a path.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.rest.clone()))
    }

    /// A plain path in which somebody has written options, for the hint.
    pub(crate) fn path_with_options(&self) -> bool {
        split_scheme(self.text).is_none() && self.text.contains('?')
    }

    pub(crate) fn invalid(&self, reason: impl Into<String>) -> BdevError {
        BdevError::InvalidUri {
            uri: self.text.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn option(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        self.options
            .iter()
            .find(|(k, _)| k == name)
            .map(|(_, v)| v.clone())
    }

    pub(crate) fn size(&mut self, name: &'static str) -> Result<Option<u64>, BdevError> {
        let Some(text) = self.option(name) else {
            return Ok(None);
        };
        parse_size(&text)
            .map(Some)
            .map_err(|e| self.invalid(format!("{name}={text}: {e}")))
    }

    pub(crate) fn number<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, BdevError> {
        let Some(n) = self.size(name)? else {
            return Ok(None);
        };
        let number = T::try_from(n);
        number
            .map(Some)
            .map_err(|_| self.invalid(format!("{name}={n}: too large")))
    }

    pub(crate) fn flag(&mut self, name: &'static str) -> Result<bool, BdevError> {
        match self.option(name).as_deref() {
            None | Some("0" | "false" | "no" | "off") => Ok(false),
            Some("1" | "true" | "yes" | "on") => Ok(true),
            Some(other) => Err(self.invalid(format!("{name}={other}: use 1 or 0"))),
        }
    }

    /// Refuses options that nobody asked for.
    pub(crate) fn finish(&self) -> Result<(), BdevError> {
        let strange = self
            .options
            .iter()
            .find(|(k, _)| !self.known.contains(&k.as_str()));
        match strange {
            None => Ok(()),
            Some((key, _)) => {
                let known = self.known.join(", ");
                Err(self.invalid(format!("unknown option `{key}`; there are {known}")))
            }
        }
    }
}

/// The scheme and what follows `://`; `None` for a path or a name.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let is_scheme = !scheme.is_empty()
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-'));
    is_scheme.then_some((scheme, rest))
}

/// Whether a text is a URI rather than a path or the name of a device.
pub(crate) fn is_uri(text: &str) -> bool {
    split_scheme(text).is_some()
}

/// Whether a text without a scheme is the path of a file rather than the name of a device: it has
/// a slash or a dot in it.
pub(crate) fn is_path(text: &str) -> bool {
    split_scheme(text).is_none() && text.contains(['/', '.'])
}

/// The URI of a file, to which options can be added (`?size=4G&create=1`): whatever has a meaning
/// in a URI is encoded.
///
/// ```
/// let uri = pumice_bdev::file_uri("/data/100%?.img");
/// assert_eq!(uri, "file:///data/100%25%3F.img");
/// ```
pub fn file_uri(path: impl AsRef<Path>) -> String {
    let mut uri = "file://".to_owned();
    for byte in path.as_ref().as_os_str().as_bytes() {
        match byte {
            b'%' | b'?' | b'#' | b'&' | b'=' | b' ' | 0..=0x1f | 0x7f..=0xff => {
                uri.push_str(&format!("%{byte:02X}"));
            }
            byte => uri.push(char::from(*byte)),
        }
    }
    uri
}

/// How [`open_with`] opens a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    read_only: bool,
    grow_bytes: Option<u64>,
}

impl OpenOptions {
    /// For reading and writing.
    pub fn new() -> OpenOptions {
        OpenOptions::default()
    }

    /// For reading only, whatever the URI says: no byte, no length and no file is changed, and none
    /// is made. A file or block device need not be writable; several processes may read it at once,
    /// while none has it open for writing.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> OpenOptions {
        self.read_only = read_only;
        self
    }

    /// An image file that is shorter is made this long, durably, if it holds a store of ours or
    /// nothing; what is on it has to be grown then. The step can be done again after a crash. A
    /// file that is longer, and every device that is not a file, is refused.
    #[must_use]
    pub fn grow_to(mut self, bytes: u64) -> OpenOptions {
        self.grow_bytes = Some(bytes);
        self
    }

    pub(crate) fn grow_bytes(self) -> Option<u64> {
        self.grow_bytes
    }

    /// Whether it is for reading only.
    pub fn is_read_only(self) -> bool {
        self.read_only
    }
}

/// Opens the device that a URI names.
///
/// | URI | device |
/// | --- | --- |
/// | `file:///path?size=4G&block_size=512&create=1` | an image file, block device or loop device |
/// | `malloc://1G?block_size=4096` | memory of this process |
/// | `null://1T` | nothing: writes vanish, reads give whatever the buffer held |
/// | `nvme://0000:5e:00.0/1` | namespace 1 of a PCIe function, through VFIO or uio |
/// | `vfio-user:///path/to/socket` | a controller in another process |
/// | `soft://memory?size=1G` | a controller in this process, over memory, nothing or a file |
///
/// A plain path (`/dev/loop0`, `disk.img`: it has a slash or a dot) is the file of that name: it has
/// no options, and a `%` or a `?` in it is itself.
///
/// # Errors
/// A URI that says nothing we know, and whatever the module says.
pub fn open(uri: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
    open_with(uri, OpenOptions::new())
}

/// As [`open`], with options that count more than those of the URI.
///
/// # Errors
/// As [`open`].
pub fn open_with(uri: &str, options: OpenOptions) -> Result<Arc<dyn BlockDevice>, BdevError> {
    if options.grow_bytes.is_some() && options.read_only {
        return Err(BdevError::InvalidUri {
            uri: uri.to_owned(),
            reason: "open for reading only, it cannot grow".to_owned(),
        });
    }
    let is_file = split_scheme(uri).is_none_or(|(scheme, _)| scheme == "file");
    if options.grow_bytes.is_some() && !is_file {
        return Err(BdevError::InvalidUri {
            uri: uri.to_owned(),
            reason: "only an image file can be made longer".to_owned(),
        });
    }
    let dev = if let Some(("nvme" | "vfio-user" | "soft", _)) = split_scheme(uri) {
        if options.read_only {
            crate::nvme::open_uri(&without_create(uri))?
        } else {
            crate::nvme::open_uri(uri)?
        }
    } else {
        let mut uri = Uri::parse(uri)?;
        match uri.scheme {
            "malloc" => crate::malloc::open_uri(&mut uri)?,
            "null" => crate::null::open_uri(&mut uri)?,
            "file" => crate::file::open_uri(&mut uri, options)?,
            other => {
                return Err(uri.invalid(format!("unknown scheme `{other}`; one of {SCHEMES}")));
            }
        }
    };
    Ok(if options.read_only {
        ReadOnly::of(dev)
    } else {
        dev
    })
}

/// The URI without the parameter that lets a file be made.
fn without_create(uri: &str) -> String {
    let Some((place, query)) = uri.split_once('?') else {
        return uri.to_owned();
    };
    let kept: Vec<&str> = query
        .split('&')
        .filter(|pair| pair.split('=').next() != Some("create"))
        .collect();
    format!("{place}?{}", kept.join("&"))
}

/// The size of `malloc://1G` and `null://1T`, in blocks.
pub(crate) fn size_in_rest(uri: &mut Uri<'_>, block_size: u32) -> Result<u64, BdevError> {
    let size = match uri.rest()? {
        "" => uri.size("size")?,
        text => Some(parse_size(text).map_err(|e| uri.invalid(e))?),
    };
    let Some(size) = size else {
        return Err(uri.invalid(format!("no size; write {}://1G", uri.scheme)));
    };
    if block_size == 0 || !size.is_multiple_of(u64::from(block_size)) {
        return Err(uri.invalid(format!("{size} bytes are not whole blocks of {block_size}")));
    }
    Ok(size / u64::from(block_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(uri: &str) -> String {
        open(uri).unwrap_err().to_string()
    }

    #[test]
    fn errors_say_what_would_be_right() {
        assert!(error("nonsense").contains("malloc://1G"));
        assert!(error("ftp://x").contains("unknown scheme `ftp`"));
        assert!(error("malloc://").contains("no size"));
        assert!(error("malloc://1G?colour=red").contains("unknown option `colour`"));
        assert!(error("malloc://1G?block_size=513").contains("513"));
        assert!(error("malloc://1G?block_size=512&block_size=512").contains("twice"));
        assert!(error("malloc://1%zzG").contains("percent"));
        assert!(error("malloc://1000").contains("whole blocks"));
    }

    #[test]
    fn a_plain_path_is_the_file_of_that_name() {
        for path in [
            "/dev/loop0",
            "./image",
            "../image",
            "disk.img",
            "a%20b.img",
            "disk100%.img",
            "disk.img?size=1M",
            "./x://y",
        ] {
            let uri = Uri::parse(path).unwrap();
            assert_eq!(uri.scheme, "file", "{path}");
            assert_eq!(uri.path(), Path::new(path));
            assert!(uri.options.is_empty());
        }
        for name in [
            "Malloc0",
            "Nvme0n1",
            "file:rel.img?size=32M&create=1",
            "malloc:1.5",
        ] {
            assert!(Uri::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn uris_are_decoded_and_paths_encoded() {
        let uri = Uri::parse("file:///a%20b?x=%41").unwrap();
        assert_eq!(uri.path(), Path::new("/a b"));
        assert_eq!(uri.options, [("x".to_owned(), "A".to_owned())]);
        let strange = OsString::from_vec(b"/d/a b%20?#&=\xff\n.img".to_vec());
        let uri = file_uri(&strange);
        assert_eq!(Uri::parse(&uri).unwrap().path(), Path::new(&strange));
        // A question mark ends the path of a URI, a percent sign is an escape.
        assert!(Uri::parse("file:///100%").is_err());
    }

    #[test]
    fn read_only_makes_no_file_of_the_soft_controller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let uri = format!("soft://{}?size=1M&create=1", path.display());
        assert!(open_with(&uri, OpenOptions::new().read_only(true)).is_err());
        assert!(!path.exists());
    }
}
