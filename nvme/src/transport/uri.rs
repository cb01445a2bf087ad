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
        let mut params = BTreeMap::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "1"));
            if params.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(err(format!("'{key}' is given twice")));
            }
        }
        let mut address = address.to_owned();
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
                return Err(self.error(format!(
                    "unknown parameter '{key}'; known here: {}",
                    known.join(", ")
                )));
            }
        }
        Ok(())
    }

    /// A size parameter such as `64M`, in bytes.
    pub fn size(&self, key: &str, default: u64) -> Result<u64, TransportError> {
        match self.params.get(key) {
            None => Ok(default),
            Some(v) => parse_size(v)
                .ok_or_else(|| self.error(format!("{key}={v}: not a size such as 64M or 1G"))),
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

fn parse_nsid(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| *n > 0 && *n < u32::MAX)
}

/// A number of bytes with an optional binary suffix K, M, G or T (also `KiB`, `MB`, …).
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
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
        ] {
            assert!(NvmeUri::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("4KiB"), Some(4096));
        assert_eq!(parse_size("1g"), Some(1 << 30));
        assert_eq!(parse_size(""), None);
        assert_eq!(parse_size("99999999999T"), None);
        assert_eq!(parse_size("-1"), None);
    }
}
