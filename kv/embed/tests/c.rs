//! Programs in C: the examples of `examples/c`, and the tests of `kv/c/tests`.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{C, CPP, Compiler, compile, repository, said};

/// Compiles one source to `program`, or says that the test is skipped.
fn made(test: &str, compiler: &Compiler, source: &str, program: &Path) -> bool {
    let made = compile(compiler, &[repository(source)], program).is_some();
    if !made {
        println!("skipped: {test}: there is no `{}`", compiler.program);
    }
    made
}

/// Runs a program, which must succeed, and returns what it has printed.
fn says(program: &Path, args: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("600")
        .arg(program)
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program:?} {args:?}: {}: {}",
        output.status,
        said(&output)
    );
    said(&output)
}

fn in_dir() -> (tempfile::TempDir, PathBuf, String) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    let uri = format!(
        "blobfs://{}?size:256M&create",
        dir.path().join("kv.img").display()
    );
    (dir, program, uri)
}

#[test]
fn the_example_with_files_runs_in_memory_and_on_an_image() {
    let (_dir, program, uri) = in_dir();
    if !made("the_example_with_files", &C, "examples/c/files.c", &program) {
        return;
    }
    for args in [&[][..], &[&uri[..]], &[&uri[..]]] {
        let text = says(&program, args);
        assert!(text.contains("/greeting says: hello from C\n"), "{text}");
        assert!(
            text.contains("greeting, 13 bytes\n") && !text.contains("new,"),
            "{text}"
        );
    }
    refuses_what_is_not_there(&program);
}

fn refuses_what_is_not_there(program: &Path) {
    let output = Command::new(program)
        .arg("blobfs:///nowhere/x")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("No such file or directory"),
        "{}",
        said(&output)
    );
}

#[test]
fn the_example_with_a_database_runs_in_memory_and_on_an_image() {
    let (_dir, program, uri) = in_dir();
    if !made(
        "the_example_with_a_database",
        &C,
        "examples/c/database.c",
        &program,
    ) {
        return;
    }
    for args in [&[][..], &[&uri[..]]] {
        let text = says(&program, args);
        let want = "apple is eaten\nfruits is 1\nin the checkpoint:\napple is red\nfruits is 1\n";
        assert_eq!(text, want);
    }
    refuses_what_is_not_there(&program);
}

/// Runs a program of `kv/c/tests` in an empty directory.
fn holds(test: &str, name: &str, says_at_the_end: &str) {
    let (dir, program, _) = in_dir();
    if made(test, &C, &format!("kv/c/tests/{name}.c"), &program) {
        let text = says(&program, &[dir.path().to_str().unwrap()]);
        assert!(text.contains(says_at_the_end), "{text}");
    }
}

/// In C++: a database makes many of these calls only rarely.
#[test]
fn every_call_of_rocksdb_is_answered() {
    let (_dir, program, _) = in_dir();
    let source = "kv/plugin/tests/calls.cc";
    if made("every_call_of_rocksdb_is_answered", &CPP, source, &program) {
        let text = says(&program, &[]);
        assert!(text.contains("as RocksDB expects"), "{text}");
    }
}

#[test]
fn what_the_header_says_holds() {
    holds("what_the_header_says_holds", "hostile", "every claim holds");
}

#[test]
fn the_c_api_of_rocksdb_works() {
    holds(
        "the_c_api_of_rocksdb_works",
        "engine",
        "RocksDB's C API works",
    );
}

#[test]
fn wrong_arguments_are_refused_in_c_and_in_cpp() {
    let cpp = Compiler {
        program: CPP.program,
        // A string has no conversion to `const uint8_t *` in C++, so this one is C with a C++ compiler.
        flags: &[
            "-x",
            "c++",
            "-std=c++20",
            "-Wall",
            "-Werror",
            "-g",
            "-x",
            "c++",
        ],
    };
    for compiler in [&C, &cpp] {
        let (dir, program, _) = in_dir();
        let object = dir.path().join("errors.o");
        let mut compile_only = Command::new(compiler.program);
        compile_only
            .args(compiler.flags)
            .arg("-c")
            .arg("-o")
            .arg(&object);
        compile_only.arg("-I").arg(repository("kv/c/include"));
        match compile_only.arg(repository("kv/c/tests/errors.c")).output() {
            Ok(output) => assert!(output.status.success(), "{}", said(&output)),
            Err(e) => {
                println!(
                    "skipped: wrong_arguments_are_refused: {}: {e}",
                    compiler.program
                );
                continue;
            }
        }
        compile(&C, &[object], &program).expect("there is a compiler");
        let text = says(&program, &[dir.path().to_str().unwrap()]);
        assert!(text.contains("every refusal is as it should be"), "{text}");
    }
}
