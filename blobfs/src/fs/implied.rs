//! Directories that have no blob and are there because a file's name has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::names::{Dir, Entry};
use super::path;
use crate::blobstore::BlobId;

/// Most bytes of the paths of directories that are only implied by the names of files. An image
/// must not take unbounded memory; a database has a few directories.
const MAX_IMPLIED_BYTES: usize = 32 << 20;

/// Cost of an implied directory besides its path.
const IMPLIED_COST: usize = 128;

/// Adds the directories that names imply. Passes on a problem for each name below a file, and for
/// each name that is left out because it would need too many directories.
pub(crate) fn imply_dirs(
    map: &mut BTreeMap<String, Entry>,
    mut problem: impl FnMut(BlobId, String),
) {
    let names: Vec<String> = map.keys().cloned().collect();
    let mut implied_bytes = 0;
    for name in names {
        // A name in directories that are left out is left out itself, or a listing would not
        // find it.
        if implied_bytes > MAX_IMPLIED_BYTES {
            let parent = path::parent(&name);
            let missing = parent != "/" && !map.contains_key(parent);
            let blob = map.get(&name).and_then(|entry| match entry {
                Entry::File(ino) => Some(ino.id),
                Entry::Dir(dir) => *dir.marker.lock(),
            });
            if missing && let Some(id) = blob {
                problem(
                    id,
                    format!("{name}: more directories than a mount makes up; left out"),
                );
                map.remove(&name);
                continue;
            }
        }
        let mut dir = path::parent(&name);
        while dir != "/" {
            match map.get(dir) {
                Some(Entry::Dir(_)) => break,
                Some(Entry::File(ino)) => {
                    let id = ino.id;
                    problem(id, format!("{dir} is a file, and yet there is {name}"));
                    break;
                }
                None => {
                    let implied = Dir::new(None, 0, None);
                    implied_bytes += dir.len() + IMPLIED_COST;
                    map.insert(dir.to_owned(), Entry::Dir(Arc::new(implied)));
                }
            }
            dir = path::parent(dir);
        }
    }
}
