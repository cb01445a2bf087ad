//! The functions of `cc/ldb.cc`.

use std::ffi::{OsString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStringExt as _;
use std::ptr;

use super::env;
use crate::Files;

unsafe extern "C" {
    fn pumice_ldb(env: *mut c_void, argc: c_int, argv: *mut *mut c_char) -> c_int;
    fn pumice_sst_dump(env: *mut c_void, argc: c_int, argv: *mut *mut c_char) -> c_int;
}

/// A tool that takes a command line.
#[derive(Clone, Copy)]
pub(crate) enum Tool {
    Ldb,
    SstDump,
}

/// Runs a tool and returns its exit code.
pub(crate) fn tool(tool: Tool, files: &Files, args: &[OsString]) -> Result<c_int, pumice::Error> {
    let name = match tool {
        Tool::Ldb => "ldb",
        Tool::SstDump => "sst_dump",
    };
    // An argument from a command line contains no NUL. One that does is cut there, as in C.
    let mut texts: Vec<Vec<u8>> = std::iter::once(OsString::from(name))
        .chain(args.iter().cloned())
        .map(|arg| {
            let mut bytes = arg.into_vec();
            bytes.push(0);
            bytes
        })
        .collect();
    let mut argv: Vec<*mut c_char> = texts
        .iter_mut()
        .map(|text| text.as_mut_ptr().cast())
        .collect();
    let argc = c_int::try_from(argv.len()).unwrap_or(c_int::MAX);
    argv.push(ptr::null_mut());
    let env = env(files)?;
    // SAFETY: `argv` is an array of `argc` texts that end with a NUL and of a null, and outlives the call; the environment
    // is new and never freed.
    Ok(unsafe {
        match tool {
            Tool::Ldb => pumice_ldb(env, argc, argv.as_mut_ptr()),
            Tool::SstDump => pumice_sst_dump(env, argc, argv.as_mut_ptr()),
        }
    })
}
