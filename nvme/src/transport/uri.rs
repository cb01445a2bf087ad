//! URIs that name a controller.

use std::fmt;

use pumice_io::uri::{Uri, UriError};

/// A URI of each scheme, for messages.
const EXAMPLES: &[&str] = &["nvme://0000:00:03.0", "vfio-user:///path", "soft://memory"];

/// A parsed device URI.
///
/// | form | controller |
/// | --- | --- |
/// | `nvme://0000:00:03.0[/nsid][?…]` | PCIe function, through VFIO or uio |
/// | `vfio-user:///dir-or-socket[/nsid][?nsid=n]` | a controller in another process |
/// | `soft://memory[?…]`, `soft://null[?…]`, `soft:///image-file[?…]` | a controller in this process, which the crate `pumice-nvme-soft` opens |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmeUri {
    uri: Uri,
    /// The part between `://` and `?`, without a namespace at its end.
    pub address: String,
    /// The namespace, if the URI names one.
    pub nsid: Option<u32>,
}

impl fmt::Display for NvmeUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

impl NvmeUri {
    /// Parses a URI and checks its form only. A last path component that is a number is the
    /// namespace, unless `?nsid=` names it or (vfio-user) the full path exists.
    ///
    /// # Errors
    /// Fails for a text that is not a URI, and for an invalid namespace.
    pub fn parse(text: &str) -> Result<NvmeUri, UriError> {
        let mut uri = Uri::parse(text, EXAMPLES)?;
        let mut address = uri.place()?.to_owned();
        let mut nsid = match uri.option("nsid") {
            Some(n) => {
                let bad = || uri.invalid(format!("'{n}' is not a namespace"));
                Some(parse_nsid(&n).ok_or_else(bad)?)
            }
            None => None,
        };
        let scheme = uri.scheme();
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
                return Err(uri.invalid(format!("'{tail}' is not a namespace number")));
            }
        }
        Ok(NvmeUri { uri, address, nsid })
    }

    /// The scheme: `nvme`, `vfio-user` or `soft`.
    pub fn scheme(&self) -> &str {
        self.uri.scheme()
    }

    /// Makes an error about this URI.
    pub fn invalid(&self, reason: impl Into<String>) -> UriError {
        self.uri.invalid(reason)
    }

    /// Returns the URI's options, of which the namespace's is known already.
    pub fn options(&self) -> Uri {
        self.uri.clone()
    }
}

fn parse_nsid(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|n| *n > 0 && *n < u32::MAX)
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
        assert!(u.options().finish().is_ok());
        let u = NvmeUri::parse("vfio-user:///run/a%20b%25").unwrap();
        assert_eq!(u.address, "/run/a b%");
        let u = NvmeUri::parse("soft:///data/1?size=64M").unwrap();
        assert_eq!((u.address.as_str(), u.nsid), ("/data/1", None));
        assert_eq!(u.options().size("size"), Ok(Some(64 << 20)));
        assert!(u.options().finish().is_err());
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

    /// A socket may have a number for its name, as a directory may.
    #[test]
    fn a_path_that_is_there_is_all_of_the_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("7");
        let uri = format!("vfio-user://{}", path.display());
        assert_eq!(NvmeUri::parse(&uri).unwrap().nsid, Some(7));
        std::fs::create_dir(&path).unwrap();
        let there = NvmeUri::parse(&uri).unwrap();
        assert_eq!(
            (there.address, there.nsid),
            (path.display().to_string(), None)
        );
    }
}
