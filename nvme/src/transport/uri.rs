//! URIs that name a controller.

use std::collections::BTreeMap;
use std::fmt;

use super::TransportError;

/// A parsed device URI.
///
/// | form | controller |
/// | --- | --- |
/// | `nvme://0000:00:03.0[/nsid][?…]` | PCIe function, through VFIO or uio |
/// | `vfio-user:///dir-or-socket[/nsid][?nsid=n]` | a controller in another process |
/// | `soft://memory[?…]`, `soft://null[?…]`, `soft:///image-file[?…]` | a controller in this process, see [`crate::soft`] |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeUri {
    text: String,
    /// `nvme`, `vfio-user`, `soft`.
    pub scheme: String,
    /// What stands between `://` and `?`, without a namespace at its end.
    pub address: String,
    /// The namespace, when one is named.
    pub nsid: Option<u32>,
    /// What stands behind `?`.
    pub params: BTreeMap<String, String>,
}

impl fmt::Display for NvmeUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl NvmeUri {
    /// Parses. Only form is checked here; a last path component that is a number is the
    /// namespace, unless `?nsid=` names it or (vfio-user) the full path exists.
    pub fn parse(text: &str) -> Result<NvmeUri, TransportError> {
        let err = |detail: String| TransportError::Uri {
            uri: text.to_owned(),
            detail,
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            err("no scheme; use nvme://0000:00:03.0, vfio-user:///path or soft://memory".into())
        })?;
        let (address, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decode = |s: &str| {
            percent_decode(s)
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or_else(|| {
                    err(format!(
                        "`{s}`: bad percent-encoding; write % itself as %25"
                    ))
                })
        };
        let mut params = BTreeMap::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
            if params.insert(decode(key)?, decode(value)?).is_some() {
                return Err(err(format!("'{key}' is given twice")));
            }
        }
        let mut address = decode(address)?;
        let mut nsid = match params.remove("nsid") {
            Some(n) => Some(parse_nsid(&n).ok_or_else(|| err(format!("'{n}' is no namespace")))?),
            None => None,
        };
        let path_like = scheme == "soft" && address.starts_with('/');
        if nsid.is_none()
            && !path_like
            && !(scheme == "vfio-user" && std::path::Path::new(&address).exists())
            && let Some((head, tail)) = address.rsplit_once('/')
        {
            if let Some(n) = parse_nsid(tail) {
                nsid = Some(n);
                address = head.to_owned();
            } else if tail.is_empty() {
                address = head.to_owned();
            } else if scheme == "nvme" {
                return Err(err(format!("'{tail}' is no namespace number")));
            }
        }
        Ok(NvmeUri {
            text: text.to_owned(),
            scheme: scheme.to_owned(),
            address,
            nsid,
            params,
        })
    }

    /// An error about this URI.
    pub fn error(&self, detail: impl Into<String>) -> TransportError {
        TransportError::Uri {
            uri: self.text.clone(),
            detail: detail.into(),
        }
    }

    /// Refuses parameters that are not among `known`.
    pub fn only(&self, known: &[&str]) -> Result<(), TransportError> {
        for key in self.params.keys() {
            if !known.contains(&key.as_str()) {
                let known = match known {
                    [] => "only nsid is known".to_owned(),
                    known => format!("known here: nsid, {}", known.join(", ")),
                };
                return Err(self.error(format!("unknown parameter '{key}'; {known}")));
            }
        }
        Ok(())
    }

    /// A size parameter such as `64M`, in bytes.
    pub fn size(&self, key: &str, default: u64) -> Result<u64, TransportError> {
        match self.params.get(key) {
            None => Ok(default),
            Some(v) => parse_size(v).map_err(|e| self.error(format!("{key}={v}: {e}"))),
        }
    }

    /// A whole number parameter within bounds.
    pub fn number(&self, key: &str, default: u32, max: u32) -> Result<u32, TransportError> {
        match self.params.get(key) {
            None => Ok(default),
            Some(v) => v
                .parse()
                .ok()
                .filter(|n| *n <= max)
                .ok_or_else(|| self.error(format!("{key}={v}: not a number from 0 to {max}"))),
        }
    }
}

/// The bytes that a part of a URI stands for: `%41` is `A`. `None`: a `%` without two digits.
pub fn percent_decode(text: &str) -> Option<Vec<u8>> {
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

fn parse_nsid(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| *n > 0 && *n < u32::MAX)
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

    #[test]
    fn forms() {
        let u = NvmeUri::parse("nvme://0000:00:03.0/2").unwrap();
        assert_eq!((u.address.as_str(), u.nsid), ("0000:00:03.0", Some(2)));
        let u = NvmeUri::parse("nvme://0000:00:03.0").unwrap();
        assert_eq!((u.address.as_str(), u.nsid), ("0000:00:03.0", None));
        let u = NvmeUri::parse("vfio-user:///run/no-such/cntrl/3").unwrap();
        assert_eq!(
            (u.address.as_str(), u.nsid),
            ("/run/no-such/cntrl", Some(3))
        );
        let u = NvmeUri::parse("vfio-user:///tmp?nsid=7").unwrap();
        assert_eq!((u.address.as_str(), u.nsid), ("/tmp", Some(7)));
        let u = NvmeUri::parse("vfio-user:///run/a%20b%25").unwrap();
        assert_eq!(u.address, "/run/a b%");
        let u = NvmeUri::parse("soft:///data/1?size=64M").unwrap();
        assert_eq!((u.address.as_str(), u.nsid), ("/data/1", None));
        assert_eq!(u.size("size", 0).unwrap(), 64 << 20);
        assert!(u.only(&["block_size"]).is_err());
        for bad in [
            "",
            "nvme",
            "nvme://0000:00:03.0/x",
            "soft://memory?a=1&a=2",
            "nvme://a?nsid=0",
            "soft:///100%",
        ] {
            assert!(NvmeUri::parse(bad).is_err(), "{bad}");
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
