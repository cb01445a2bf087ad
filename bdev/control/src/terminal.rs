//! Printing for command-line tools. Characters that a terminal would interpret are made visible,
//! whether they come from an image, a device, a socket or another process. A reader that stops
//! early (`| head`) is not a failure.
//!
//! [`say!`](crate::say) and [`complain!`](crate::complain) replace `println!` and `eprintln!`,
//! which panic when the reader has gone.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Whether the reader of standard output has gone.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// The first failure of standard output that is not a closed pipe.
static FAILED: Mutex<Option<io::Error>> = Mutex::new(None);

/// Whether a terminal interprets a character instead of showing it in its place: control characters
/// (C0, DEL, C1), line separators, and marks that change the direction of the text.
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns a text with every such character, including line ends, written as `\u{9b}` or `
/// `: for names, serial numbers and messages of one line.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Makes a text visible as [`visible`] does, but keeps line ends and tabs.
fn visible_lines(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) && !matches!(c, '\n' | '\t') {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Returns indented JSON, in which such characters are JSON's own escapes.
pub fn json_text(value: &serde_json::Value) -> String {
    let mut shown = String::new();
    for c in format!("{value:#}").chars() {
        if c != '\n' && is_obeyed(c) {
            // All of them are below U+10000.
            shown.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Prints text to standard output. Failures are kept for [`outcome`].
pub fn print(text: &str) {
    write_out(visible_lines(text).as_bytes());
}

/// Prints a value as JSON, with a line end.
pub fn print_json(value: &serde_json::Value) {
    write_out(format!("{}\n", json_text(value)).as_bytes());
}

/// Prints a line to standard output, for [`say!`](crate::say).
#[doc(hidden)]
pub fn say_line(line: fmt::Arguments<'_>) {
    print(&format!("{line}\n"));
}

/// Prints a line to standard error, for [`complain!`](crate::complain). Ignores a failure, since
/// there is nobody to tell.
#[doc(hidden)]
pub fn complain_line(line: fmt::Arguments<'_>) {
    let text = visible_lines(&format!("{line}\n"));
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

fn write_out(bytes: &[u8]) {
    if CLOSED.load(Ordering::Relaxed) {
        return;
    }
    if let Err(e) = io::stdout().lock().write_all(bytes) {
        failed(e);
    }
}

fn failed(e: io::Error) {
    CLOSED.store(true, Ordering::Relaxed);
    if e.kind() != io::ErrorKind::BrokenPipe {
        *FAILED.lock() = Some(e);
    }
}

/// Standard output as a writer of text, for `writeln!`. It never fails, like [`print`](fn@print).
#[derive(Debug, Default)]
pub struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        print(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether everything printed was written, or its reader has gone.
///
/// # Errors
/// Fails when standard output failed for another reason (a full disk, for example).
pub fn outcome() -> io::Result<()> {
    if !CLOSED.load(Ordering::Relaxed)
        && let Err(e) = io::stdout().lock().flush()
    {
        failed(e);
    }
    FAILED.lock().take().map_or(Ok(()), Err)
}

/// Returns a tool's exit code: `code`, or that of a failure, which it reports, when the output
/// could not be written.
pub fn finished(tool: &str, code: std::process::ExitCode) -> std::process::ExitCode {
    match outcome() {
        Ok(()) => code,
        Err(e) => {
            complain_line(format_args!("{tool}: standard output: {e}"));
            std::process::ExitCode::FAILURE
        }
    }
}

/// Prints as `println!` does, for tools: control characters are made visible, and a closed pipe
/// does not cause a panic.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { $crate::terminal::say_line(::std::format_args!($($arg)*)) };
}

/// Prints as `eprintln!` does, for tools: control characters are made visible, and a closed pipe
/// does not cause a panic.
#[macro_export]
macro_rules! complain {
    ($($arg:tt)*) => { $crate::terminal::complain_line(::std::format_args!($($arg)*)) };
}

#[cfg(test)]
mod tests {
    use super::{json_text, visible, visible_lines};

    const HOSTILE: &str = "a\u{1b}[2J\u{9b}31m\u{202e}gpj\u{7f}\nb\tc";

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(
            visible(HOSTILE),
            "a\\u{1b}[2J\\u{9b}31m\\u{202e}gpj\\u{7f}\\nb\\tc"
        );
        assert!(visible_lines(HOSTILE).ends_with("\nb\tc"));
        assert_eq!(visible("/db/größe 日本"), "/db/größe 日本");
    }

    #[test]
    fn json_stays_json() {
        let value = serde_json::json!({ "name": HOSTILE });
        let text = json_text(&value);
        assert!(
            !text.contains(['\u{1b}', '\u{9b}', '\u{202e}', '\u{7f}']),
            "{text}"
        );
        let back: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(back, value);
    }
}
