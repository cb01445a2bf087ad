//! Rules about the shape of Rust sources.

use std::collections::BTreeMap;

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::{Findings, Source};

/// The longest function, in lines.
const FUNCTION_LINES: usize = 75;
/// The longest file, in lines.
const FILE_LINES: usize = 600;
/// How many types may share a name; a third one makes the reader ask which.
const SAME_NAME: usize = 2;
/// Words that begin a clause and not a sentence about the item.
const OPENINGS: &[&str] = &[
    "Its", "Of", "Where", "How", "Which", "Who", "Whose", "What", "Why", "Whatever", "Whoever",
];

/// The rules with what they found.
pub fn find(sources: &[Source]) -> Vec<(&'static str, &'static str, Findings)> {
    let mut functions = Findings::new();
    let mut files = Findings::new();
    let mut openings = Findings::new();
    let mut unsafes = Findings::new();
    let mut methods = Findings::new();
    let mut types: BTreeMap<String, Vec<(String, usize)>> = BTreeMap::new();
    for source in sources.iter().filter(|s| s.path.ends_with(".rs")) {
        let lines = source.text.lines().count();
        if lines > FILE_LINES {
            files.insert(
                source.path.clone(),
                vec![format!("{lines} lines, at most {FILE_LINES}")],
            );
        }
        let Ok(file) = syn::parse_file(&source.text) else {
            // rustfmt names what is wrong with it.
            continue;
        };
        let mut reader = Reader::default();
        reader.visit_file(&file);
        let strangers = reader.methods.iter().filter(|(of, _)| {
            let here = reader.types.iter().any(|(name, _)| name == of);
            !here && !source.path.contains("/tests/")
        });
        let strangers = strangers.map(|(of, line)| format!("line {line}: {of}"));
        let strangers: Vec<String> = strangers.collect();
        for (name, types_at) in reader.types {
            if !source.path.contains("/tests/") && !source.path.contains("/examples/") {
                types
                    .entry(name)
                    .or_default()
                    .push((source.path.clone(), types_at));
            }
        }
        let put = |findings: &mut Findings, places: Vec<String>| {
            if !places.is_empty() {
                findings.insert(source.path.clone(), places);
            }
        };
        put(&mut functions, reader.functions);
        put(&mut openings, reader.openings);
        // A program of its own that calls other stores; LMDB is written in C.
        if !source.path.starts_with("bench/others/") {
            put(&mut unsafes, reader.unsafes);
        }
        put(&mut methods, strangers);
    }
    let mut names = Findings::new();
    for (name, places) in types
        .into_iter()
        .filter(|(_, places)| places.len() > SAME_NAME)
    {
        for (path, line) in &places {
            let all = format!(
                "line {line}: {name}, which {} types are called",
                places.len()
            );
            names.entry(path.clone()).or_default().push(all);
        }
    }
    vec![
        ("functions", "has functions that are too long", functions),
        ("files", "is too long", files),
        (
            "openings",
            "has doc comments that are not sentences about their item",
            openings,
        ),
        ("unsafe", "allows unsafe code", unsafes),
        (
            "methods",
            "has methods of types that other files define",
            methods,
        ),
        ("names", "defines types of a name that several have", names),
    ]
}

#[derive(Default)]
struct Reader {
    functions: Vec<String>,
    openings: Vec<String>,
    unsafes: Vec<String>,
    types: Vec<(String, usize)>,
    /// The types of which methods are defined, by blocks.
    methods: Vec<(String, usize)>,
    /// The last line of the doc comment that was seen last.
    doc_line: usize,
}

impl Reader {
    fn function(&mut self, name: &syn::Ident, whole: Span) {
        let lines = whole.end().line - whole.start().line + 1;
        if lines > FUNCTION_LINES {
            let line = whole.start().line;
            self.functions.push(format!(
                "line {line}: {name}, {lines} lines, at most {FUNCTION_LINES}"
            ));
        }
    }

    fn named(&mut self, name: &syn::Ident) {
        self.types
            .push((name.to_string(), name.span().start().line));
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        let line = attribute.span().start().line;
        if let syn::Meta::NameValue(value) = &attribute.meta
            && value.path.is_ident("doc")
            && let syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(text),
                ..
            }) = &value.value
        {
            // Each line of a doc comment is an attribute of its own.
            let begins = self.doc_line + 1 != line;
            self.doc_line = attribute.span().end().line;
            let text = text.value();
            let word = text
                .trim_start()
                .split(|c: char| !c.is_alphanumeric())
                .next();
            if begins && word.is_some_and(|word| OPENINGS.contains(&word)) {
                self.openings.push(format!("line {line}: {}", text.trim()));
            }
        }
        if attribute.path().is_ident("allow")
            && attribute
                .parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("unsafe_code"))
        {
            self.unsafes.push(format!("line {line}"));
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.sig.ident, item.span());
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.sig.ident, item.span());
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if item.trait_.is_none()
            && let syn::Type::Path(path) = &*item.self_ty
            && let Some(last) = path.path.segments.last()
        {
            let line = item.span().start().line;
            self.methods.push((last.ident.to_string(), line));
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.named(&item.ident);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.named(&item.ident);
        visit::visit_item_enum(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_of_a_type_from_another_file_are_found() {
        let source = |path: &str, text: &str| Source {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let sources = [
            source(
                "x/src/a.rs",
                "struct A; impl A { fn f() {} } impl Drop for A {}",
            ),
            source(
                "x/src/b.rs",
                "impl super::A { fn g() {} } impl Drop for super::A {}",
            ),
            source("x/tests/c.rs", "impl A { fn h() {} }"),
        ];
        let all = find(&sources);
        let methods = all.into_iter().find(|(rule, ..)| *rule == "methods");
        let found: Vec<_> = methods.unwrap().2.into_iter().collect();
        assert_eq!(
            found,
            [("x/src/b.rs".to_owned(), vec!["line 1: A".to_owned()])]
        );
    }
}
