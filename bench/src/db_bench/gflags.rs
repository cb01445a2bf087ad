//! A command line in the style of gflags, as RocksDB's `db_bench` takes it.
//!
//! `--name=value`, `-name=value`, `--name value`, `--switch`, `--noswitch`; a dash and an underscore
//! in a name are the same; `--flagfile=PATH` reads more flags, one a line; `--undefok=NAMES` lets unknown flags of these
//! names pass. The program's own flags are one struct made by the [`flags!`](crate::flags) macro, so that a flag has a type,
//! a default and a line of help in one place.

use std::fmt::Write as _;
use std::path::Path;

use pumice_rocksdb_tools::db_bench::Flag;

/// A value that a flag can have: parsed from text, shown in `--help`.
pub trait FlagValue: Sized {
    /// The word for the type in help and errors.
    const KIND: &'static str;
    /// Reads the text after `=`.
    ///
    /// # Errors
    /// Returns a description of what was expected, for the message.
    fn parse(text: &str) -> Result<Self, String>;
    /// Returns the value as `--help` shows it.
    fn show(&self) -> String;
}

macro_rules! integer_flag {
    ($($t:ty),*) => {$(
        impl FlagValue for $t {
            const KIND: &'static str = stringify!($t);
            fn parse(text: &str) -> Result<Self, String> {
                let parsed = match text.strip_prefix("0x") {
                    Some(hex) => <$t>::from_str_radix(hex, 16),
                    None => text.parse::<$t>(),
                };
                parsed.map_err(|_| format!("a number from {} to {}", <$t>::MIN, <$t>::MAX))
            }
            fn show(&self) -> String { self.to_string() }
        }
    )*};
}
integer_flag!(i32, i64, u32, u64);

impl FlagValue for f64 {
    const KIND: &'static str = "double";
    fn parse(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(v) if v.is_finite() => Ok(v),
            _ => Err("a finite number".to_owned()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl FlagValue for bool {
    const KIND: &'static str = "bool";
    fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "1" | "t" | "true" | "y" | "yes" => Ok(true),
            "0" | "f" | "false" | "n" | "no" => Ok(false),
            _ => Err("true or false".to_owned()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl FlagValue for String {
    const KIND: &'static str = "string";
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
    fn show(&self) -> String {
        format!("\"{self}\"")
    }
}

/// One flag, for help and suggestions.
#[derive(Debug, Clone)]
pub struct FlagInfo {
    /// Name with underscores.
    pub name: &'static str,
    /// Type as [`FlagValue::KIND`] gives it.
    pub kind: &'static str,
    /// Default as text.
    pub default: String,
    /// One line of help.
    pub help: &'static str,
}

/// A struct of flags, made by the [`flags!`](crate::flags) macro.
pub trait FlagSet: Default {
    /// Returns every flag in the order of its definition.
    fn table() -> Vec<FlagInfo>;
    /// Sets a flag by name.
    ///
    /// # Errors
    /// Returns a description of what was expected if the text is not a value of the flag's type.
    /// The name must be in the table.
    fn set(&mut self, name: &str, text: &str) -> Result<(), String>;
}

/// An error in a command line. The text says what to do next.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagError {
    /// There is no such flag.
    #[error("unknown flag --{name}{hint}")]
    Unknown {
        /// The name as given.
        name: String,
        /// The nearest flag, or the reason why there is none.
        hint: String,
    },
    /// The value does not parse.
    #[error("--{name}={value}: expected {expected}")]
    Value {
        /// The flag.
        name: String,
        /// The value as given.
        value: String,
        /// A description of what was expected.
        expected: String,
    },
    /// The last flag needs a value.
    #[error("--{name} needs a value: --{name}=<{kind}>")]
    Missing {
        /// The flag.
        name: String,
        /// The type of the flag.
        kind: &'static str,
    },
    /// The flag file cannot be read.
    #[error("--flagfile={path}: {cause}")]
    File {
        /// The path as given.
        path: String,
        /// The system's error.
        cause: String,
    },
}

/// The result of parsing a command line.
#[derive(Debug)]
pub enum Parsed<F> {
    /// Flags to run with.
    Run {
        /// The program's own flags.
        own: F,
        /// The other tool's flags that were given, with their values, in order.
        others: Vec<(String, String)>,
        /// Words that are not flags. gflags ignores them too.
        ignored: Vec<String>,
    },
    /// The command line asks for the help.
    Help,
    /// The command line asks for the version.
    Version,
}

/// Parses `args` (without the program's name). Flags that are not in the set `F` are looked up
/// among `others`, the flags of the tool that the program wraps. Those are not set but returned.
///
/// # Errors
/// Returns the first error.
pub fn parse<F: FlagSet>(
    args: impl IntoIterator<Item = String>,
    others: &[Flag],
) -> Result<Parsed<F>, FlagError> {
    let table = F::table();
    let mut own = F::default();
    let mut given = Vec::new();
    let mut ignored = Vec::new();
    let mut unknown: Vec<String> = Vec::new();
    let mut undefok: Vec<String> = Vec::new();
    let mut queue: Vec<String> = args.into_iter().collect();
    queue.reverse();
    let mut files_left = 16_u32;
    // Returns the kind of a flag, if there is one of that name.
    let kind = |name: &str| {
        let ours = table.iter().find(|f| f.name == name).map(|f| f.kind);
        ours.or_else(|| {
            others
                .iter()
                .find(|f| f.name == name)
                .map(|f| f.kind.name())
        })
    };
    while let Some(arg) = queue.pop() {
        if arg == "--" {
            ignored.extend(queue.drain(..).rev());
            break;
        }
        let Some(body) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            ignored.push(arg);
            continue;
        };
        let (raw_name, value) = match body.split_once('=') {
            Some((n, v)) => (n, Some(v.to_owned())),
            None => (body, None),
        };
        let name = raw_name.replace('-', "_");
        match name.as_str() {
            "help" | "h" | "helpfull" | "helpshort" => return Ok(Parsed::Help),
            "version" => return Ok(Parsed::Version),
            "undefok" | "flagfile" => {
                let text = value
                    .or_else(|| queue.pop())
                    .ok_or_else(|| FlagError::Missing {
                        name: name.clone(),
                        kind: "string",
                    })?;
                if name == "undefok" {
                    undefok.extend(text.split(',').map(|n| n.trim().replace('-', "_")));
                    continue;
                }
                let path = text;
                if files_left == 0 {
                    let cause = "too many flag files, or one that names itself".to_owned();
                    return Err(FlagError::File { path, cause });
                }
                files_left -= 1;
                let mut more = read_flagfile(Path::new(&path))
                    .map_err(|cause| FlagError::File { path, cause })?;
                more.reverse();
                queue.append(&mut more);
                continue;
            }
            _ => {}
        }
        if let Some(kind) = kind(&name) {
            let text = match value {
                Some(v) => v,
                None if kind == bool::KIND => "true".to_owned(),
                None => queue.pop().ok_or_else(|| FlagError::Missing {
                    name: name.clone(),
                    kind,
                })?,
            };
            given.push((name, text));
            continue;
        }
        let negated = name.strip_prefix("no").filter(|_| value.is_none());
        let switch = negated
            .map(|n| n.strip_prefix('_').unwrap_or(n))
            .filter(|n| kind(n) == Some(bool::KIND));
        match switch {
            Some(switch) => given.push((switch.to_owned(), "false".to_owned())),
            None => unknown.push(name),
        }
    }
    if let Some(name) = unknown.into_iter().find(|name| !undefok.contains(name)) {
        let known = table
            .iter()
            .map(|f| f.name)
            .chain(others.iter().map(|f| &f.name[..]));
        let hint = nearest(&name, known).map_or(" (see --help)".to_owned(), |n| {
            format!("; did you mean --{n}?")
        });
        return Err(FlagError::Unknown { name, hint });
    }
    let mut rest = Vec::new();
    for (name, value) in given {
        if !table.iter().any(|f| f.name == name) {
            rest.push((name, value));
        } else if let Err(expected) = own.set(&name, &value) {
            return Err(FlagError::Value {
                name,
                value,
                expected,
            });
        }
    }
    Ok(Parsed::Run {
        own,
        others: rest,
        ignored,
    })
}

fn read_flagfile(path: &Path) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let lines = text.lines().map(str::trim);
    Ok(lines
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(str::to_owned)
        .collect())
}

/// Returns the help page: the program's own flags, then the other tool's.
#[must_use]
pub fn help<F: FlagSet>(intro: &str, others: &[Flag]) -> String {
    let mut out =
        format!("{intro}\n\nFlags that choose the file system, and what is told about it:\n");
    for f in F::table() {
        let _ = writeln!(
            out,
            "  --{} ({})\n      type: {}  default: {}",
            f.name, f.help, f.kind, f.default
        );
    }
    out.push_str("\nRocksDB's own flags:\n");
    for f in others {
        let _ = writeln!(
            out,
            "  --{} ({})\n      type: {}  default: {}",
            f.name,
            f.help,
            f.kind.name(),
            f.value
        );
    }
    out
}

/// Returns the flags as a command, for the man page and the completions of shells. Its texts stay in memory.
#[cfg(feature = "compare")]
#[must_use]
pub fn command<F: FlagSet>(
    name: &'static str,
    intro: &'static str,
    others: &[Flag],
) -> clap::Command {
    let text = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
    let arg = |name: &str, help: String, kind: &str| {
        let name = text(name);
        clap::Arg::new(name)
            .long(name)
            .help(help)
            .value_name(text(kind))
            .require_equals(true)
    };
    let own = F::table().into_iter().map(|f| {
        let help = format!("{} (default: {})", f.help, f.default);
        arg(f.name, help, f.kind)
    });
    let others = others.iter().map(|f| {
        let help = format!("{} (default: {})", f.help, f.value);
        arg(&f.name, help, f.kind.name())
    });
    clap::Command::new(name).about(intro).args(own).args(others)
}

/// Returns the name in `known` that is closest to `name`, if one is close enough.
pub fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.len() / 3).max(1) + 1;
    known
        .map(|k| {
            let d = distance(name, k);
            let contained = k.starts_with(name) || name.starts_with(k);
            (if contained { d.min(limit) } else { d }, k)
        })
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, k)| (*d, k.len()))
        .map(|(_, k)| k)
}

/// Returns the number of edits (insert, delete, replace, swap of neighbours) from `a` to `b`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, cb) in b.iter().enumerate() {
            let mut d = (last[j] + usize::from(ca != cb))
                .min(last[j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && *ca == b[j - 1] && a[i - 1] == *cb {
                d = d.min(before[j - 1] + 1);
            }
            row.push(d);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

/// Makes a struct of flags: `name: type = default, "help";`.
#[macro_export]
macro_rules! flags {
    ($(#[$meta:meta])* $struct:ident { $($name:ident : $t:ty = $default:expr, $help:literal;)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $struct {
            $(#[doc = $help] pub $name: $t,)*
        }
        impl Default for $struct {
            fn default() -> Self {
                Self { $($name: <$t>::from($default),)* }
            }
        }
        impl $crate::db_bench::gflags::FlagSet for $struct {
            fn table() -> Vec<$crate::db_bench::gflags::FlagInfo> {
                use $crate::db_bench::gflags::{FlagInfo, FlagValue};
                let d = Self::default();
                vec![$(FlagInfo {
                    name: stringify!($name),
                    kind: <$t as FlagValue>::KIND,
                    default: d.$name.show(),
                    help: $help,
                },)*]
            }
            fn set(&mut self, name: &str, text: &str) -> Result<(), String> {
                use $crate::db_bench::gflags::FlagValue;
                match name {
                    $(stringify!($name) => { self.$name = <$t as FlagValue>::parse(text)?; })*
                    _ => return Err("a flag of the table".to_owned()),
                }
                Ok(())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use pumice_rocksdb_tools::db_bench::Kind;

    use super::*;

    flags! {
        /// Flags for the tests.
        T {
            num: i64 = 1_000_000, "how many";
            sync: bool = false, "sync";
            db: String = "", "path";
            compression_ratio: f64 = 0.5, "ratio";
            use_existing_db: bool = false, "keep";
        }
    }

    fn run(args: &[&str]) -> Result<T, FlagError> {
        Ok(both(args)?.0)
    }

    /// Returns our flags, and those of the other tool that were given.
    #[allow(clippy::type_complexity, reason = "a pair of lists in a test")]
    fn both(args: &[&str]) -> Result<(T, Vec<(String, String)>, Vec<String>), FlagError> {
        let other = |name: &str, kind| Flag {
            name: name.to_owned(),
            kind,
            value: String::new(),
            help: "theirs".to_owned(),
        };
        let others = [
            other("reads", Kind::Value("int64")),
            other("histogram", Kind::Bool),
        ];
        match parse::<T>(args.iter().map(|s| (*s).to_owned()), &others)? {
            Parsed::Run {
                own,
                others,
                ignored,
            } => Ok((own, others, ignored)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_other_tools_flags_are_handed_on() {
        let args = [
            "--reads",
            "5",
            "--num=7",
            "--histogram",
            "--nohistogram",
            "left",
        ];
        let (own, others, ignored) = both(&args).unwrap();
        assert_eq!(own.num, 7);
        let others: Vec<_> = others.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        assert_eq!(
            others,
            [
                ("reads", "5"),
                ("histogram", "true"),
                ("histogram", "false")
            ]
        );
        assert_eq!(ignored, ["left"]);
    }

    #[test]
    fn undefok_lets_a_flag_of_another_version_pass() {
        let args = ["--use_cache=1", "--num=3", "--undefok=use_cache,other"];
        assert_eq!(run(&args).unwrap().num, 3);
        let e = run(&["--undefok=other", "--use_cache=1"]).unwrap_err();
        assert!(e.to_string().contains("unknown flag --use_cache"), "{e}");
    }

    #[test]
    fn every_spelling_of_a_value() {
        for a in [
            &["--num=5"][..],
            &["-num=5"],
            &["--num", "5"],
            &["-num", "0x5"],
        ] {
            assert_eq!(run(a).unwrap().num, 5, "{a:?}");
        }
        assert_eq!(
            run(&["--compression-ratio=0.25"])
                .unwrap()
                .compression_ratio,
            0.25
        );
        assert_eq!(run(&["--db="]).unwrap().db, "");
        assert_eq!(run(&["--db=/a=b"]).unwrap().db, "/a=b");
    }

    #[test]
    fn every_spelling_of_a_switch() {
        for a in ["--sync", "-sync", "--sync=1", "--sync=true", "--sync=yes"] {
            assert!(run(&[a]).unwrap().sync, "{a}");
        }
        for a in ["--nosync", "-nosync", "--sync=0", "--sync=false"] {
            assert!(!run(&["--sync", a]).unwrap().sync, "{a}");
        }
        assert!(
            !run(&["--use-existing-db", "--no-use-existing-db"])
                .unwrap()
                .use_existing_db
        );
    }

    #[test]
    fn errors_say_what_to_do() {
        let say = |a: &[&str]| run(a).unwrap_err().to_string();
        assert_eq!(
            say(&["--use_existing_bd"]),
            "unknown flag --use_existing_bd; did you mean --use_existing_db?"
        );
        assert_eq!(
            say(&["--histogramm"]),
            "unknown flag --histogramm; did you mean --histogram?"
        );
        assert_eq!(say(&["--zzzzzz"]), "unknown flag --zzzzzz (see --help)");
        assert!(say(&["--num=many"]).contains("expected a number from"));
        assert!(say(&["--num=99999999999999999999"]).contains("expected a number"));
        assert!(say(&["--sync=maybe"]).contains("true or false"));
        assert!(say(&["--compression_ratio=nan"]).contains("finite"));
        assert_eq!(say(&["--num"]), "--num needs a value: --num=<i64>");
        assert!(say(&["--flagfile=/nowhere/at/all"]).starts_with("--flagfile=/nowhere/at/all: "));
    }

    #[test]
    fn a_flag_file_is_read_in_place_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flags");
        std::fs::write(&path, "# a comment\n--num=7\n\n  --sync\n").unwrap();
        let arg = format!("--flagfile={}", path.display());
        let t = run(&["--num=1", &arg]).unwrap();
        assert_eq!((t.num, t.sync), (7, true));
        assert_eq!(run(&[&arg, "--num=9"]).unwrap().num, 9);
        std::fs::write(&path, &arg).unwrap();
        assert!(run(&[&arg]).unwrap_err().to_string().contains("itself"));
    }

    #[test]
    fn help_lists_every_flag() {
        let theirs = Flag {
            name: "reads".to_owned(),
            kind: Kind::Value("int64"),
            value: "-1".to_owned(),
            help: "how many".to_owned(),
        };
        let page = help::<T>("intro", &[theirs]);
        for f in T::table() {
            assert!(page.contains(&format!("--{} (", f.name)), "{}", f.name);
        }
        assert!(
            page.contains("--reads (how many)\n      type: int64  default: -1"),
            "{page}"
        );
    }
}
