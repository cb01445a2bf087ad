//! Man pages and shell completions, made by a program from the definition of its own command line.
//!
//! Every program of Pumice that calls [`asked`] first accepts these command lines, which its help
//! does not list:
//!
//! ```text
//! pumice --generate man DIRECTORY     writes pumice.1, and a page for each subcommand
//! pumice --generate bash              prints completions; also elvish, fish, powershell, zsh
//! ```
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;

use clap::Command;
use clap_complete::Shell;

/// The option that asks for a description.
const OPTION: &str = "--generate";

/// Does what `--generate` asks for, if the program was called with it, and returns the exit code to
/// end with.
#[must_use]
pub fn asked(command: impl FnOnce() -> Command) -> Option<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (option, rest) = arguments.split_first()?;
    if option != OPTION {
        return None;
    }
    let command = command();
    let name = command.get_name().to_owned();
    Some(match generate(command, rest, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{name}: {error}");
            ExitCode::from(2)
        }
    })
}

fn generate(mut command: Command, what: &[OsString], out: &mut dyn Write) -> Result<(), String> {
    let words: Vec<&str> = what.iter().filter_map(|word| word.to_str()).collect();
    match words[..] {
        ["man", directory] => {
            clap_mangen::generate_to(command, Path::new(directory)).map_err(|e| {
                format!("the man pages in {directory}: {e}; the directory has to be there")
            })
        }
        [shell] if Shell::from_str(shell).is_ok() => {
            let name = command.get_name().to_owned();
            let shell = Shell::from_str(shell)?;
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut command, name, &mut text);
            out.write_all(&text)
                .map_err(|e| format!("standard output: {e}"))
        }
        _ => Err(format!(
            "{OPTION} takes `man DIRECTORY`, bash, elvish, fish, powershell or zsh"
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn program() -> Command {
        let level = Arg::new("level").long("level").help("How much is said");
        Command::new("tool").subcommand(Command::new("look").about("Looks").arg(level))
    }

    fn said(words: &[&str]) -> Result<String, String> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        let mut out = Vec::new();
        generate(program(), &words, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn completions_name_subcommands_and_options() {
        for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
            let text = said(&[shell]).unwrap();
            assert!(text.contains("look") && text.contains("level"), "{shell}");
        }
    }

    #[test]
    fn every_subcommand_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        said(&["man", dir.path().to_str().unwrap()]).unwrap();
        let page = std::fs::read_to_string(dir.path().join("tool-look.1")).unwrap();
        assert!(page.contains("How much is said"), "{page}");
        assert!(dir.path().join("tool.1").exists());
    }

    #[test]
    fn what_cannot_be_generated_is_an_error() {
        for words in [&[][..], &["csh"], &["man"], &["man", "/no/such/directory"]] {
            assert!(said(words).is_err(), "{words:?}");
        }
    }
}
