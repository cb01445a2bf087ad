//! Circles of imports: files of one crate that need each other.
//!
//! A file needs another if it names something in it by a path that begins with `crate`, `super`
//! or `self`. A name that another file only passes on (`pub use`) counts for the file that defines
//! it. Tests are left out.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use crate::{Findings, Source};

/// How many files a name may be passed through.
const MOST_STEPS: usize = 8;

/// A file as a module of its crate.
struct Module {
    path: String,
    /// Names that the file passes on or imports, with the path that each stands for.
    names: BTreeMap<String, Vec<String>>,
    /// The paths that the file uses, from the top of the crate.
    uses: Vec<Vec<String>>,
}

/// The files that are part of a circle.
pub fn find(sources: &[Source]) -> Findings {
    let mut crates: BTreeMap<String, BTreeMap<Vec<String>, Module>> = BTreeMap::new();
    for source in sources.iter().filter(|s| s.path.ends_with(".rs")) {
        let Some((top, place)) = module_of(&source.path, sources) else {
            continue;
        };
        let Ok(file) = syn::parse_file(&source.text) else {
            continue;
        };
        let mut reader = Reader {
            here: place.clone(),
            names: BTreeMap::new(),
            uses: Vec::new(),
        };
        reader.visit_file(&file);
        let module = Module {
            path: source.path.clone(),
            names: reader.names,
            uses: reader.uses,
        };
        crates.entry(top).or_default().insert(place, module);
    }
    let mut findings = Findings::new();
    for modules in crates.values() {
        let needs: BTreeMap<&Vec<String>, BTreeSet<&Vec<String>>> = modules
            .iter()
            .map(|(place, module)| {
                let needed = module
                    .uses
                    .iter()
                    .filter_map(|path| defined_in(modules, path, 0));
                (place, needed.filter(|other| *other != place).collect())
            })
            .collect();
        for (place, module) in modules {
            if reaches(&needs, place, place) {
                let through: Vec<&str> = needs[place]
                    .iter()
                    .filter(|next| reaches(&needs, next, place))
                    .map(|next| modules[*next].path.as_str())
                    .collect();
                findings.insert(
                    module.path.clone(),
                    vec![format!("by {}", through.join(", "))],
                );
            }
        }
    }
    findings
}

/// Whether a way of one step or more leads from one module to another.
fn reaches(
    needs: &BTreeMap<&Vec<String>, BTreeSet<&Vec<String>>>,
    from: &Vec<String>,
    to: &Vec<String>,
) -> bool {
    let mut seen = BTreeSet::new();
    let mut open: Vec<&Vec<String>> = needs[from].iter().copied().collect();
    while let Some(place) = open.pop() {
        if place == to {
            return true;
        }
        if seen.insert(place) {
            open.extend(needs[place].iter().copied());
        }
    }
    false
}

/// The module that defines what the path names.
fn defined_in<'m>(
    modules: &'m BTreeMap<Vec<String>, Module>,
    path: &[String],
    steps: usize,
) -> Option<&'m Vec<String>> {
    let (len, (place, module)) = (0..=path.len()).rev().find_map(|len| {
        modules
            .get_key_value(&path[..len])
            .map(|found| (len, found))
    })?;
    let next = path.get(len)?;
    match module.names.get(next) {
        Some(stands_for) if steps < MOST_STEPS => {
            let mut full = stands_for.clone();
            full.extend_from_slice(&path[len + 1..]);
            defined_in(modules, &full, steps + 1)
        }
        _ => Some(place),
    }
}

/// The crate that a file belongs to and its module path there.
fn module_of(path: &str, sources: &[Source]) -> Option<(String, Vec<String>)> {
    let (before, inside) = path
        .rsplit_once("/src/")
        .or_else(|| Some(("", path.strip_prefix("src/")?)))?;
    let mut top = before.to_owned();
    let mut parts: Vec<&str> = inside.split('/').collect();
    if parts[0] == "bin" {
        // Each program is a crate: a file, or a folder with `main.rs`.
        let name = *parts.get(1)?;
        top = format!("{before}/bin/{name}");
        parts.drain(..2.min(parts.len() - 1));
        if parts.len() == 1 && parts[0].strip_suffix(".rs") == Some(name) {
            parts[0] = "main.rs";
        }
    } else if !sources.iter().any(|s| {
        s.path == format!("{before}/src/lib.rs") || s.path == format!("{before}/src/main.rs")
    }) {
        return None;
    }
    let last = parts.pop()?;
    let mut place: Vec<String> = parts.into_iter().map(str::to_owned).collect();
    match last {
        "lib.rs" | "main.rs" | "mod.rs" => {}
        other => place.push(other.strip_suffix(".rs")?.to_owned()),
    }
    Some((top, place))
}

/// Collects the names and uses of a file.
struct Reader {
    here: Vec<String>,
    names: BTreeMap<String, Vec<String>>,
    uses: Vec<Vec<String>>,
}

impl Reader {
    /// The path from the top of the crate, if it begins with a word for it.
    fn resolve(&self, path: &[String]) -> Option<Vec<String>> {
        let mut full = match path.first()?.as_str() {
            "crate" => Vec::new(),
            "self" => self.here.clone(),
            "super" => self.here[..self.here.len().checked_sub(1)?].to_vec(),
            _ => return None,
        };
        for part in &path[1..] {
            if part == "super" {
                full.pop();
            } else {
                full.push(part.clone());
            }
        }
        Some(full)
    }

    fn tree(&mut self, before: &mut Vec<String>, tree: &syn::UseTree, passes_on: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(before, &path.tree, passes_on);
                before.pop();
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.tree(before, tree, passes_on);
                }
            }
            syn::UseTree::Name(name) => {
                let name = name.ident.to_string();
                self.import(before, &name, &name, passes_on);
            }
            syn::UseTree::Rename(rename) => {
                let (name, new) = (rename.ident.to_string(), rename.rename.to_string());
                self.import(before, &name, &new, passes_on);
            }
            syn::UseTree::Glob(_) => self.import(before, "*", "*", passes_on),
        }
    }

    fn import(&mut self, before: &[String], name: &str, new: &str, passes_on: bool) {
        let mut path = before.to_vec();
        if name != "self" {
            path.push(name.to_owned());
        }
        // A `pub use child::Name` names the child without a word for the crate.
        let full = self.resolve(&path).or_else(|| {
            passes_on.then(|| {
                self.here
                    .iter()
                    .cloned()
                    .chain(path.iter().cloned())
                    .collect()
            })
        });
        if let Some(full) = full {
            if !passes_on {
                self.uses.push(full.clone());
            }
            let known_as = if new == "self" {
                before.last().cloned().unwrap_or_default()
            } else {
                new.to_owned()
            };
            self.names.insert(known_as, full);
        }
    }
}

/// Whether the item is compiled for tests only.
fn only_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|a| {
        a.path().is_ident("cfg")
            && a.parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("test"))
    })
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !only_for_tests(&module.attrs) && module.content.is_some() {
            self.here.push(module.ident.to_string());
            visit::visit_item_mod(self, module);
            self.here.pop();
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !only_for_tests(&item.attrs) {
            let passes_on = !matches!(item.vis, syn::Visibility::Inherited);
            self.tree(&mut Vec::new(), &item.tree, passes_on);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !only_for_tests(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if let Some(full) = self.resolve(&parts).filter(|_| parts.len() > 1) {
            self.uses.push(full);
        }
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    #[test]
    fn a_circle_through_a_name_that_is_passed_on() {
        let sources = [
            source("x/src/lib.rs", "mod a; mod b; mod c; pub use b::B;"),
            source("x/src/a.rs", "use crate::B; pub struct A(B);"),
            source("x/src/b.rs", "pub struct B; fn f() { crate::c::g() }"),
            source("x/src/c.rs", "use super::a::A; pub fn g() {}"),
            source("x/src/d.rs", "use super::a::A;"),
        ];
        let found = find(&sources);
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["x/src/a.rs", "x/src/b.rs", "x/src/c.rs"]);
    }

    #[test]
    fn what_only_tests_use_is_left_out() {
        let sources = [
            source("x/src/lib.rs", "mod a; mod b;"),
            source(
                "x/src/a.rs",
                "pub struct A; #[cfg(test)] mod tests { use crate::b::B; }",
            ),
            source("x/src/b.rs", "use crate::a::A; pub struct B;"),
        ];
        assert!(find(&sources).is_empty());
    }
}
