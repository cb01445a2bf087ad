//! The readable parts of damaged blobs, for messages.

use std::collections::BTreeMap;

use super::format::{
    BlobId, Content, Descriptor, Descriptors, Page, PageError, TYPE_XATTR, page_crc, stored_crc,
};

/// The readable parts of a damaged blob.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Remains {
    /// The xattr `name`, which is the path of a file.
    pub name: Option<String>,
}

impl Remains {
    /// Makes the remains of a blob of which the xattr `name` was read, if it has one.
    pub fn named(name: Option<&[u8]>) -> Remains {
        Remains {
            name: name.and_then(printable),
        }
    }

    /// Reads a root. A page whose checksum is right has no remains, since its blob names itself.
    pub fn of_page(page: &Page) -> Remains {
        if stored_crc(page) == page_crc(page) {
            return Remains::default();
        }
        let name = Descriptors::new(page)
            .map_while(Result::ok)
            .filter(|descriptor| descriptor.kind == TYPE_XATTR)
            .find_map(|descriptor| name_xattr(&descriptor));
        Remains { name }
    }
}

/// Returns one line for each damaged blob.
pub(crate) fn describe(
    damaged: &BTreeMap<u32, PageError>,
    remains: &BTreeMap<u32, Remains>,
) -> Vec<String> {
    let line = |(root, error): (&u32, &PageError)| {
        let id = BlobId::from_page(*root);
        match remains.get(root).and_then(|r| r.name.as_deref()) {
            Some(name) => format!("blob {id} (\"{name}\"): {error}"),
            None => format!("blob {id}: {error}"),
        }
    };
    damaged.iter().map(line).collect()
}

/// Returns the value of an xattr descriptor if the xattr is `name`.
fn name_xattr(descriptor: &Descriptor<'_>) -> Option<String> {
    let Content::Xattr(xattr) = descriptor.content()? else {
        return None;
    };
    let (name, value) = xattr.name_and_value()?;
    (name == b"name").then(|| printable(value)).flatten()
}

/// Converts arbitrary bytes to text for a message.
fn printable(value: &[u8]) -> Option<String> {
    let text = value.strip_suffix(&[0]).unwrap_or(value);
    (!text.is_empty()).then(|| text.escape_ascii().to_string())
}
