//! The grammar of URIs that name devices, and of sizes.

use std::ffi::OsString;
use std::fmt;
use std::ops::RangeInclusive;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// An error in a URI.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{uri}`: {reason}")]
#[non_exhaustive]
pub struct UriError {
    /// The URI as it was given.
    pub uri: String,
    /// The error, and a correct form.
    pub reason: String,
}

/// A parsed URI, `scheme://place?option=value&option`, percent-encoded; or the path of a file,
/// which is not encoded and has no options. An option without a value has the value `1`.
///
/// The caller must ask for each option that it knows before [`Uri::finish`], which refuses the
/// others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    text: String,
    scheme: String,
    place: Vec<u8>,
    options: Vec<(String, String)>,
    known: Vec<&'static str>,
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Uri {
    /// Parses a text. `examples` are URIs for messages. A text that begins with a scheme of theirs
    /// and a colon without slashes is refused as a probable mistake, rather than taken for a path.
    ///
    /// # Errors
    /// Fails for a text that is neither a URI nor a path, for bad percent-encoding, and for an
    /// option that is given twice.
    pub fn parse(text: &str, examples: &[&str]) -> Result<Uri, UriError> {
        let invalid = |reason: String| UriError {
            uri: text.to_owned(),
            reason,
        };
        let uri = |scheme: &str, place| Uri {
            text: text.to_owned(),
            scheme: scheme.to_owned(),
            place,
            options: Vec::new(),
            known: Vec::new(),
        };
        let Some((scheme, tail)) = split_scheme(text) else {
            let mut schemes = examples.iter().filter_map(|uri| split_scheme(uri));
            if let Some((name, _)) = text.split_once(':')
                && schemes.any(|(scheme, _)| scheme == name)
            {
                return Err(invalid(format!(
                    "`{name}:` is followed by `//`; a file of this name is ./{text}"
                )));
            }
            if !is_path(text) {
                let examples = examples.join(", ");
                return Err(invalid(format!(
                    "not a device URI (a file of this name is ./{text}); one of {examples}"
                )));
            }
            return Ok(uri("file", text.as_bytes().to_vec()));
        };
        let (place, query) = tail.split_once('?').unwrap_or((tail, ""));
        let decode = |s: &str| {
            percent_decode(s).ok_or_else(|| {
                invalid(format!(
                    "`{s}`: bad percent-encoding; write % itself as %25"
                ))
            })
        };
        let decode_text = |s: &str| {
            String::from_utf8(decode(s)?).map_err(|_| invalid(format!("`{s}` is not UTF-8")))
        };
        let mut uri = uri(scheme, decode(place)?);
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
            let key = decode_text(key)?;
            if uri.options.iter().any(|(k, _)| *k == key) {
                return Err(invalid(format!("option `{key}` is given twice")));
            }
            uri.options.push((key, decode_text(value)?));
        }
        Ok(uri)
    }

    /// The part before `://`; `file` for a path.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Returns the part behind the scheme as text.
    ///
    /// # Errors
    /// Fails when it is not UTF-8.
    pub fn place(&self) -> Result<&str, UriError> {
        std::str::from_utf8(&self.place).map_err(|_| self.invalid("not UTF-8"))
    }

    /// Returns the part behind the scheme as a path.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.place.clone()))
    }

    /// The part behind the scheme as it was written, options included; all of a path.
    pub fn tail(&self) -> &str {
        split_scheme(&self.text).map_or(&self.text, |(_, tail)| tail)
    }

    /// Whether the text is a path that seems to contain options.
    pub fn is_path_with_options(&self) -> bool {
        !is_uri(&self.text) && self.text.contains('?')
    }

    /// Makes an error about this URI.
    pub fn invalid(&self, reason: impl Into<String>) -> UriError {
        UriError {
            uri: self.text.clone(),
            reason: reason.into(),
        }
    }

    /// Returns the URI as it was written, without an option.
    pub fn without(&self, option: &str) -> String {
        let Some((place, query)) = self.text.split_once('?').filter(|_| is_uri(&self.text)) else {
            return self.text.clone();
        };
        let is_kept = |pair: &&str| {
            let key = pair.split('=').next().unwrap_or(pair);
            percent_decode(key).is_none_or(|key| key != option.as_bytes())
        };
        let kept: Vec<&str> = query.split('&').filter(is_kept).collect();
        match &kept[..] {
            [] => place.to_owned(),
            kept => format!("{place}?{}", kept.join("&")),
        }
    }

    /// Returns the value of an option.
    pub fn option(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        let found = self.options.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone())
    }

    /// Returns the value of an option that is a size such as `64M`, in bytes.
    ///
    /// # Errors
    /// Fails for a value that is not a size.
    pub fn size(&mut self, name: &'static str) -> Result<Option<u64>, UriError> {
        let Some(text) = self.option(name) else {
            return Ok(None);
        };
        parse_size(&text)
            .map(Some)
            .map_err(|e| self.invalid(format!("{name}={text}: {e}")))
    }

    /// Returns the value of an option that is a number, in the grammar of sizes.
    ///
    /// # Errors
    /// Fails for a value that is not a number, or is outside `range`.
    pub fn number<T: TryFrom<u64>>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<T>, UriError> {
        let Some(n) = self.size(name)? else {
            return Ok(None);
        };
        let number = T::try_from(n).ok().filter(|_| range.contains(&n));
        let (first, last) = range.into_inner();
        let refuse = || self.invalid(format!("{name}={n}: not a number from {first} to {last}"));
        number.map(Some).ok_or_else(refuse)
    }

    /// Whether an option is on. A missing one is off.
    ///
    /// # Errors
    /// Fails for a value that is neither on nor off.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, UriError> {
        self.flag_or(name, false)
    }

    /// Whether an option is on. A missing one is as `default` says.
    ///
    /// # Errors
    /// Fails as [`Uri::flag`] does.
    pub fn flag_or(&mut self, name: &'static str, default: bool) -> Result<bool, UriError> {
        match self.option(name).as_deref() {
            None => Ok(default),
            Some("0" | "false" | "no" | "off") => Ok(false),
            Some("1" | "true" | "yes" | "on") => Ok(true),
            Some(other) => Err(self.invalid(format!("{name}={other}: use 1 or 0"))),
        }
    }

    /// Refuses options that the caller did not ask for.
    ///
    /// # Errors
    /// Names the first of them, and those that are known.
    pub fn finish(&self) -> Result<(), UriError> {
        let is_strange = |key: &str| !self.known.contains(&key);
        match self.options.iter().find(|(key, _)| is_strange(key)) {
            None => Ok(()),
            Some((key, _)) if self.known.is_empty() => {
                Err(self.invalid(format!("unknown option `{key}`; there are none")))
            }
            Some((key, _)) => {
                let known = self.known.join(", ");
                Err(self.invalid(format!("unknown option `{key}`; there are {known}")))
            }
        }
    }
}

/// Returns the scheme and the part behind `://`, or `None` for a path or a name.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let is_scheme = !scheme.is_empty()
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-'));
    is_scheme.then_some((scheme, rest))
}

/// Whether a text is a URI and not a path or the name of a device.
pub fn is_uri(text: &str) -> bool {
    split_scheme(text).is_some()
}

/// Whether a text without a scheme is the path of a file and not the name of a device: it contains
/// a slash or a dot.
pub fn is_path(text: &str) -> bool {
    !is_uri(text) && text.contains(['/', '.'])
}

/// Returns the URI of a file, to which options can be added (`?size=4G&create=1`). Characters with
/// a meaning in a URI are encoded.
///
/// ```
/// let uri = pumice_io::uri::file_uri("/data/100%?.img");
/// assert_eq!(uri, "file:///data/100%25%3F.img");
/// ```
pub fn file_uri(path: impl AsRef<Path>) -> String {
    uri_of("file", path)
}

/// Returns the URI of a path with this scheme, encoded as by [`file_uri`].
pub fn uri_of(scheme: &str, path: impl AsRef<Path>) -> String {
    let mut uri = format!("{scheme}://");
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

/// Decodes percent-encoding: `%41` is `A`. Returns `None` when a `%` has no two digits behind it.
fn percent_decode(text: &str) -> Option<Vec<u8>> {
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
    Some(bytes)
}

/// Parses a size in bytes: a number with an optional unit (K, M, G, T, P, with or without B or iB;
/// powers of 1024).
///
/// # Errors
/// Returns a text that says what is wrong.
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
        "" if unit != "ib" => 0,
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

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLES: &[&str] = &["file:///path?size=4G", "malloc://1G"];

    fn parse(text: &str) -> Result<Uri, UriError> {
        Uri::parse(text, EXAMPLES)
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
            let uri = parse(path).unwrap();
            assert_eq!(uri.scheme(), "file", "{path}");
            assert_eq!(uri.path(), Path::new(path));
            assert!(uri.options.is_empty());
            assert_eq!(uri.is_path_with_options(), path.contains('?'));
            assert_eq!(uri.without("size"), path);
        }
        for name in [
            "Malloc0",
            "Nvme0n1",
            "file:rel.img?size=32M&create=1",
            "malloc:1.5",
        ] {
            let error = parse(name).unwrap_err().to_string();
            assert!(error.contains(&format!("./{name}")), "{error}");
        }
        assert!(parse("other:1.5").is_ok(), "a scheme of nobody's");
    }

    #[test]
    fn uris_are_decoded_and_paths_encoded() {
        let uri = parse("file:///a%20b?x=%41").unwrap();
        assert_eq!(uri.path(), Path::new("/a b"));
        assert_eq!(uri.options, [("x".to_owned(), "A".to_owned())]);
        let strange = OsString::from_vec(b"/d/a b%20?#&=\xff\n.img".to_vec());
        let uri = parse(&file_uri(&strange)).unwrap();
        assert_eq!(uri.path(), Path::new(&strange));
        assert!(uri.place().is_err(), "not UTF-8");
        // A question mark ends the path of a URI, and a percent sign is an escape.
        assert!(parse("file:///100%").is_err());
    }

    #[test]
    fn options_are_asked_for_once_and_all() {
        let mut uri = parse("malloc://1G?size=4K&on&off=0&n=300&m=7&colour=red").unwrap();
        assert_eq!(uri.place(), Ok("1G"));
        assert_eq!(uri.size("size"), Ok(Some(4096)));
        assert_eq!(
            (uri.flag("on"), uri.flag("off"), uri.flag("not")),
            (Ok(true), Ok(false), Ok(false))
        );
        assert_eq!(uri.number::<u16>("n", 0..=300), Ok(Some(300)));
        assert!(uri.number::<u8>("n", 0..=1000).is_err());
        assert!(
            uri.number::<u64>("m", 8..=9)
                .unwrap_err()
                .reason
                .contains("from 8 to 9")
        );
        assert!(uri.flag("colour").is_err());
        assert_eq!(uri.finish(), Ok(()));
        let mut uri = parse("malloc://1G?size=4K&colour=red").unwrap();
        assert!(uri.finish().unwrap_err().reason.contains("none"));
        uri.option("size");
        let error = uri.finish().unwrap_err().to_string();
        assert!(error.contains("`colour`; there are size"), "{error}");
        assert!(parse("malloc://1G?a=1&a=1").is_err());
    }

    #[test]
    fn an_option_can_be_left_out() {
        for (uri, want) in [
            ("malloc://1G?create=1&x=2", "malloc://1G?x=2"),
            ("malloc://1G?create", "malloc://1G"),
            ("malloc://1G?x=2&%63reate=1", "malloc://1G?x=2"),
            ("malloc://1G", "malloc://1G"),
        ] {
            assert_eq!(parse(uri).unwrap().without("create"), want);
        }
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("4096", 4096),
            ("512b", 512),
            ("1G", 1 << 30),
            ("2 MiB", 2 << 20),
            ("3kb", 3 << 10),
            ("1P", 1 << 50),
        ] {
            assert_eq!(parse_size(text), Ok(want), "{text}");
        }
        for bad in ["", "1X", "-1", "99999999P", "G", "1ib", "1.5G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
