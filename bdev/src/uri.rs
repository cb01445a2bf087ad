//! Devices by URI: `file:///path?size=4G`, `malloc://1G`, `null://1T`.

use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::BdevError;

/// A parsed URI. Every option must be asked for before [`Uri::finish`], which names those that
/// nobody knows.
pub(crate) struct Uri<'a> {
    text: &'a str,
    /// Before `://`; `file` for a plain path.
    pub(crate) scheme: &'a str,
    /// Between `://` and `?`, percent-decoded.
    pub(crate) rest: String,
    options: Vec<(String, String)>,
    known: Vec<&'static str>,
}

/// The schemes, for messages.
const SCHEMES: &str = "file:///path?size=4G, malloc://1G, null://1T, \
     nvme://0000:5e:00.0, vfio-user:///path/to/socket";

impl<'a> Uri<'a> {
    pub(crate) fn parse(text: &'a str) -> Result<Uri<'a>, BdevError> {
        let invalid = |reason: String| BdevError::InvalidUri {
            uri: text.to_owned(),
            reason,
        };
        let (scheme, tail) = match text.split_once("://") {
            Some(parts) => parts,
            None if is_path(text) => ("file", text),
            None => {
                return Err(invalid(format!("not a device URI; one of {SCHEMES}")));
            }
        };
        let (rest, query) = tail.split_once('?').unwrap_or((tail, ""));
        let decode = |s: &str| {
            percent_decode(s).ok_or_else(|| invalid(format!("`{s}`: bad percent-encoding")))
        };
        let mut options = Vec::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
            let key = decode(key)?;
            if options.iter().any(|(k, _)| *k == key) {
                return Err(invalid(format!("option `{key}` is given twice")));
            }
            options.push((key, decode(value)?));
        }
        Ok(Uri {
            text,
            scheme,
            rest: decode(rest)?,
            options,
            known: Vec::new(),
        })
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

/// Whether a text without a scheme is the path of a file rather than the name of a device: it has
/// a slash or a dot in it before its options.
pub(crate) fn is_path(text: &str) -> bool {
    let place = text.split_once('?').map_or(text, |(place, _)| place);
    !place.contains("://") && place.contains(['/', '.'])
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let [high, low, tail @ ..] = rest else {
            return None;
        };
        let digit = |b: u8| char::from(b).to_digit(16);
        bytes.push(u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

/// A size in bytes: a number with an optional unit (K, M, G, T, P, with or without B or iB; powers
/// of 1024).
///
/// # Errors
/// A text that says what is wrong.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` is not a size; write 4G or 512M"))?;
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit)
    {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(format!("`{text}`: unknown unit; use K, M, G, T or P")),
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("`{text}` is too large"))
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
/// A plain path (`/dev/loop0`, `disk.img`: it has a slash or a dot) is a file.
///
/// # Errors
/// A URI that says nothing we know, and whatever the module says.
pub fn open(uri: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
    if let Some(("nvme" | "vfio-user" | "soft", _)) = uri.split_once("://") {
        return crate::nvme::open_uri(uri);
    }
    let mut uri = Uri::parse(uri)?;
    match uri.scheme {
        "malloc" => crate::malloc::open_uri(&mut uri),
        "null" => crate::null::open_uri(&mut uri),
        "file" => crate::file::open_uri(&mut uri),
        other => Err(uri.invalid(format!("unknown scheme `{other}`; one of {SCHEMES}"))),
    }
}

/// The size of `malloc://1G` and `null://1T`, in blocks.
pub(crate) fn size_in_rest(uri: &mut Uri<'_>, block_size: u32) -> Result<u64, BdevError> {
    let size = if uri.rest.is_empty() {
        uri.size("size")?
    } else {
        let size = parse_size(&uri.rest).map_err(|e| uri.invalid(e))?;
        Some(size)
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

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert_eq!(parse_size("2 MiB"), Ok(2 << 20));
        assert_eq!(parse_size("3kb"), Ok(3 << 10));
        assert!(parse_size("").is_err());
        assert!(parse_size("1X").is_err());
        assert!(parse_size("-1").is_err());
        assert!(parse_size("99999999P").is_err());
    }

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
    fn a_plain_path_is_a_file() {
        for path in [
            "/dev/loop0",
            "./image",
            "../image",
            "disk.img",
            "disk.img?size=1M",
        ] {
            assert_eq!(Uri::parse(path).unwrap().scheme, "file", "{path}");
        }
        for name in ["Malloc0", "Nvme0n1", "disk?block_size=5.12"] {
            assert!(Uri::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn paths_are_decoded() {
        let uri = Uri::parse("file:///a%20b?x=%41").unwrap();
        assert_eq!(uri.rest, "/a b");
        assert_eq!(uri.options, [("x".to_owned(), "A".to_owned())]);
    }
}
