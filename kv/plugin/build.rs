//! Makes the headers of the contract between C++ and Rust, and tells dependents where they are, and
//! where this folder with the C++ sources is: `DEP_PUMICE_FS_INCLUDE`, `DEP_PUMICE_FS_ROOT` and
//! `DEP_PUMICE_FS_ABI`.

use std::env;
use std::ffi::{c_char, c_void};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// The parts of the contract as C and C++ write them.
#[derive(Default)]
struct Declarations {
    constants: String,
    /// Structs and callbacks.
    types: String,
    /// The functions of Rust.
    rust: String,
    /// The functions of the shim.
    cpp: String,
}

/// Makes the C++ side of the contract.
macro_rules! contract {
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

        /// Returns the declarations.
        fn declarations() -> Declarations {
            let mut all = Declarations::default();
            let out = &mut all.constants;
            $({
                $(comment(out, "", $cdoc);)*
                let _ = writeln!(out, "#define {} UINT32_C({})", stringify!($constant), $value);
            })*
            let out = &mut all.types;
            $({
                $(comment(out, "", $sdoc);)*
                let name = stringify!($struct);
                let _ = writeln!(out, "typedef struct {name} {{");
                $({
                    $(comment(out, "  ", $fdoc);)*
                    let _ = writeln!(out, "  {} {};", cpp_type(stringify!($fty)), stringify!($field));
                })*
                let _ = writeln!(out, "}} {name};");
                layout(out, name, size_of::<$struct>(), &[
                    $((stringify!($field), std::mem::offset_of!($struct, $field)),)*
                ]);
            })*
            $({
                $(comment(out, "", $bdoc);)*
                let args = [$(argument(stringify!($barg), stringify!($bty))),*].join(", ");
                let _ = writeln!(out, "typedef void (*{})({args});", stringify!($callback));
            })*
            $({
                let out = &mut all.rust;
                $(comment(out, "", $rdoc);)*
                let args: &[String] = &[$(argument(stringify!($rarg), stringify!($rty))),*];
                prototype(out, stringify!($rust), args, concat!("", $(stringify!($rret))?));
            })*
            $({
                let out = &mut all.cpp;
                $(comment(out, "", $pdoc);)*
                let args: &[String] = &[$(argument(stringify!($parg), stringify!($pty))),*];
                prototype(out, stringify!($cpp), args, concat!("", $(stringify!($pret))?));
            })*
            all
        }

        /// Returns the value of a constant.
        fn constant(name: &str) -> u32 {
            [$((stringify!($constant), $value)),*]
                .into_iter()
                .find_map(|(known, value)| (known == name).then_some(value))
                .expect("the contract has the constant")
        }
    };
}

include!("src/contract.rs");

fn comment(out: &mut String, indent: &str, text: &str) {
    let _ = writeln!(out, "{indent}//{text}");
}

/// Returns a Rust type as C writes it.
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
    let args = match args {
        [] => "void".to_owned(),
        args => args.join(", "),
    };
    let _ = writeln!(out, "{answer} {name}({args});");
}

/// Lets the compiler of C or C++ check the layout that Rust gives a struct, if both compile for the
/// same machine.
fn layout(out: &mut String, name: &str, size: usize, fields: &[(&str, usize)]) {
    if env::var_os("HOST") != env::var_os("TARGET") {
        return;
    }
    let _ = writeln!(
        out,
        "static_assert(sizeof({name}) == {size}, \"as in Rust\");"
    );
    for (field, offset) in fields {
        let _ = writeln!(
            out,
            "static_assert(offsetof({name}, {field}) == {offset}, \"as in Rust\");"
        );
    }
}

/// Returns the text of a header with these parts.
fn header(includes: &[&str], parts: &[&str]) -> String {
    let mut text = String::from(
        "// Made by kv/plugin/build.rs of kv/plugin/src/contract.rs, which says what the functions do.\n\
         #pragma once\n\n",
    );
    for include in includes {
        let _ = writeln!(text, "#include <{include}>");
    }
    text.push_str("\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n\n");
    text.push_str(&parts.join("\n"));
    text.push_str("\n#ifdef __cplusplus\n}  // extern \"C\"\n#endif\n");
    text
}

/// Writes a file unless it has this content: those who depend on it are built again when it changes.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).expect("cargo's output directory can be written");
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/contract.rs");
    let variable = |name: &str| PathBuf::from(env::var_os(name).expect("cargo sets it"));
    let include = variable("OUT_DIR").join("include");
    fs::create_dir_all(&include).expect("cargo's output directory can be written");
    let all = declarations();
    let fs = header(
        &["assert.h", "stddef.h", "stdint.h"],
        &[&all.constants, &all.types, &all.rust],
    );
    write(&include.join("pumice_fs.h"), &fs);
    let embed = header(&["stddef.h", "stdint.h"], &[&all.cpp]);
    write(&include.join("pumice_embed.h"), &embed);

    println!("cargo::metadata=include={}", include.display());
    println!(
        "cargo::metadata=root={}",
        variable("CARGO_MANIFEST_DIR").display()
    );
    println!("cargo::metadata=abi={}", constant("PUMICE_ABI_VERSION"));
}
