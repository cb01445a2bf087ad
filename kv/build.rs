//! Makes the header of the contract between C++ and Rust, and compiles the C++ shim against the
//! headers of the RocksDB that librocksdb-sys builds.

use std::env;
use std::ffi::{c_char, c_void};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The shim's translation units, in `shim/`.
const UNITS: [&str; 6] = [
    "status.cc",
    "readers.cc",
    "async.cc",
    "writers.cc",
    "blob_file_system.cc",
    "env.cc",
];

/// Makes the C++ side of the contract.
macro_rules! contract {
    ($($all:tt)*) => {
        const WORD: u64 = word_of(stringify!($($all)*));
        declarations! { $($all)* }
    };
}

macro_rules! declarations {
    (
        constants { $($(#[doc = $cdoc:literal])* $constant:ident = $value:literal;)* }
        structs { $($(#[doc = $sdoc:literal])* struct $struct:ident {
            $($(#[doc = $fdoc:literal])* $field:ident: $fty:ty,)*
        })* }
        callbacks { $($(#[doc = $bdoc:literal])* fn $callback:ident($($barg:ident: $bty:ty),*);)* }
        rust { $($(#[doc = $rdoc:literal])* fn $rust:ident($($rarg:ident: $rty:ty),*) $(-> $rret:ty)?;)* }
        cpp { $($(#[doc = $pdoc:literal])* fn $cpp:ident($($parg:ident: $pty:ty),*) $(-> $pret:ty)?;)* }
    ) => {
        $(
            #[repr(C)]
            #[allow(dead_code, non_camel_case_types, reason = "only its layout is asked for")]
            struct $struct { $($field: $fty,)* }
        )*

        /// Returns the text of the header.
        fn header() -> String {
            let mut out = String::new();
            $({
                $(comment(&mut out, "", $cdoc);)*
                let _ = writeln!(out, "constexpr uint32_t {} = {};", stringify!($constant), $value);
            })*
            out.push_str("\nextern \"C\" {\n");
            $({
                $(comment(&mut out, "", $sdoc);)*
                let _ = writeln!(out, "struct {} {{", stringify!($struct));
                $({
                    $(comment(&mut out, "  ", $fdoc);)*
                    let _ = writeln!(out, "  {} {};", cpp_type(stringify!($fty)), stringify!($field));
                })*
                out.push_str("};\n");
                layout(&mut out, stringify!($struct), size_of::<$struct>(), &[
                    $((stringify!($field), std::mem::offset_of!($struct, $field)),)*
                ]);
            })*
            $({
                $(comment(&mut out, "", $bdoc);)*
                let args = [$(argument(stringify!($barg), stringify!($bty))),*].join(", ");
                let _ = writeln!(out, "typedef void (*{})({args});", stringify!($callback));
            })*
            out.push_str("// Rust gives these.\n");
            $({
                $(comment(&mut out, "", $rdoc);)*
                let args: &[String] = &[$(argument(stringify!($rarg), stringify!($rty))),*];
                prototype(&mut out, stringify!($rust), args, concat!("", $(stringify!($rret))?));
            })*
            out.push_str("// C++ gives these.\n");
            $({
                $(comment(&mut out, "", $pdoc);)*
                let args: &[String] = &[$(argument(stringify!($parg), stringify!($pty))),*];
                prototype(&mut out, stringify!($cpp), args, concat!("", $(stringify!($pret))?));
            })*
            out.push_str("}  // extern \"C\"\n");
            out
        }
    };
}

include!("src/plugin/contract.rs");

fn comment(out: &mut String, indent: &str, text: &str) {
    let _ = writeln!(out, "{indent}//{text}");
}

/// Returns a Rust type as C++ writes it.
fn cpp_type(rust: &str) -> String {
    let rust = rust
        .replace("* const ", "*const ")
        .replace("* mut ", "*mut ");
    if let Some(pointee) = rust.strip_prefix("*const ") {
        return format!("{} const*", cpp_type(pointee));
    }
    if let Some(pointee) = rust.strip_prefix("*mut ") {
        return format!("{}*", cpp_type(pointee));
    }
    match &rust[..] {
        "c_char" => "char".to_owned(),
        "c_void" => "void".to_owned(),
        "usize" => "size_t".to_owned(),
        "u8" | "u32" | "u64" => format!("uint{}_t", &rust[1..]),
        "i32" | "i64" => format!("int{}_t", &rust[1..]),
        // The type is a struct or a callback of the contract.
        name => name.to_owned(),
    }
}

fn argument(name: &str, rust: &str) -> String {
    format!("{} {name}", cpp_type(rust))
}

fn prototype(out: &mut String, name: &str, args: &[String], answer: &str) {
    let answer = match answer {
        "" => "void".to_owned(),
        rust => cpp_type(rust),
    };
    let _ = writeln!(out, "{answer} {name}({});", args.join(", "));
}

/// Lets the C++ compiler check the layout that Rust gives a struct, if both compile for the same
/// machine.
fn layout(out: &mut String, name: &str, size: usize, fields: &[(&str, usize)]) {
    if env::var_os("HOST") != env::var_os("TARGET") {
        return;
    }
    let _ = writeln!(out, "static_assert(sizeof({name}) == {size});");
    for (field, offset) in fields {
        let _ = writeln!(out, "static_assert(offsetof({name}, {field}) == {offset});");
    }
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-changed=src/plugin/contract.rs");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    // docs.rs has no RocksDB and links nothing.
    if env::var_os("DOCS_RS").is_some() {
        return;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let text = format!(
        "// Made by kv/build.rs of kv/src/plugin/contract.rs, which says what the functions do.\n\
         #pragma once\n#include <cstddef>\n#include <cstdint>\n\n\
         constexpr uint64_t PUMICE_CONTRACT = {WORD:#x}ULL;\n{}",
        header()
    );
    fs::write(out.join("pumice_fs.h"), text).expect("the header can be written");

    let sys = env::var_os("DEP_ROCKSDB_CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .expect("librocksdb-sys tells its dependents' build scripts where its sources are");
    let include = sys.join("rocksdb").join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .define("NDEBUG", None)
        .include(&out)
        .flag("-isystem")
        .flag(&include)
        .flag_if_supported("-Woverloaded-virtual")
        .flag_if_supported("-Wno-unused-parameter")
        // A put crosses the shim five times, in whatever profile the application is built.
        .opt_level(3);
    for unit in UNITS {
        build.file(PathBuf::from("shim").join(unit));
    }
    build.compile("pumice_shim");
    check_version(&build, &include, &out);
}

/// A library from elsewhere (`ROCKSDB_LIB_DIR`) must be the RocksDB that these headers describe: with another one the
/// shim's classes would not have the layout that the library expects. A program is linked with the library and asked.
fn check_version(build: &cc::Build, include: &Path, out: &Path) {
    println!("cargo::rerun-if-env-changed=ROCKSDB_LIB_DIR");
    let Some(library) = env::var_os("ROCKSDB_LIB_DIR") else {
        return;
    };
    let (source, program) = (out.join("version.cc"), out.join("version"));
    let text = "#include <cstdio>\n#include <rocksdb/version.h>\nint main() {\n  std::printf(\"%d.%d.%d %s\", \
                ROCKSDB_MAJOR, ROCKSDB_MINOR, ROCKSDB_PATCH, \
                rocksdb::GetRocksVersionAsString(true).c_str());\n}\n";
    fs::write(&source, text).expect("the output directory can be written");
    let mut compiler = build.get_compiler().to_command();
    compiler.arg(&source).arg("-o").arg(&program);
    compiler
        .arg("-I")
        .arg(include)
        .arg("-L")
        .arg(&library)
        .arg("-lrocksdb");
    // Where such a program cannot be linked or run (another machine's library), the check at start remains.
    if !compiler.output().is_ok_and(|made| made.status.success()) {
        return;
    }
    let Ok(said) = Command::new(&program)
        .env("LD_LIBRARY_PATH", &library)
        .output()
    else {
        return;
    };
    let said = String::from_utf8_lossy(&said.stdout);
    if let Some((headers, linked)) = said.split_once(' ')
        && headers != linked
    {
        let library = Path::new(&library).display();
        println!(
            "cargo::error=ROCKSDB_LIB_DIR={library} has RocksDB {linked}, but the headers of librocksdb-sys describe {headers}: \
             name a library of RocksDB {headers}, or unset ROCKSDB_LIB_DIR and let cargo compile it"
        );
    }
}
