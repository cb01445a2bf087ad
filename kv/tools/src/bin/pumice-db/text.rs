//! Bytes as text, and back.

use serde_json::{Map, Value};

/// The form in which bytes are written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Printable ASCII as it is, anything else as `\xNN`, a backslash as `\\`.
    Escaped,
    /// Two hexadecimal digits a byte.
    Hex,
}

impl Form {
    /// The form that `--hex` chooses.
    pub fn of(hex: bool) -> Form {
        if hex { Form::Hex } else { Form::Escaped }
    }

    /// Returns the text of `bytes`, which has neither a tab nor a line end in it.
    pub fn write(self, bytes: &[u8]) -> String {
        match self {
            Form::Hex => bytes.iter().map(|b| format!("{b:02x}")).collect(),
            Form::Escaped => {
                let mut text = String::with_capacity(bytes.len());
                for b in bytes {
                    match b {
                        b'\\' => text.push_str(r"\\"),
                        b' '..=b'~' => text.push(char::from(*b)),
                        b => text.push_str(&format!(r"\x{b:02x}")),
                    }
                }
                text
            }
        }
    }

    /// Returns the bytes that `text` stands for.
    ///
    /// # Errors
    /// Fails with the reason when the text is not in this form.
    pub fn read(self, text: &[u8]) -> Result<Vec<u8>, String> {
        match self {
            Form::Hex => from_hex(text),
            Form::Escaped => unescaped(text),
        }
    }
}

/// Returns the bytes of hexadecimal digits.
fn from_hex(text: &[u8]) -> Result<Vec<u8>, String> {
    if !text.len().is_multiple_of(2) {
        return Err("an odd number of hexadecimal digits; a byte has two".to_owned());
    }
    text.chunks(2).map(byte).collect()
}

fn byte(pair: &[u8]) -> Result<u8, String> {
    let digit = |b: &u8| char::from(*b).to_digit(16);
    match pair.iter().map(digit).collect::<Option<Vec<u32>>>() {
        Some(digits) if digits.len() == 2 => {
            Ok(u8::try_from(digits[0] << 4 | digits[1]).unwrap_or(0))
        }
        _ => Err(format!(
            "`{}` is not two hexadecimal digits",
            String::from_utf8_lossy(pair).escape_debug()
        )),
    }
}

fn unescaped(text: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        rest = more;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        match rest {
            [b'\\', more @ ..] => {
                bytes.push(b'\\');
                rest = more;
            }
            [b'x', a, b, more @ ..] => {
                bytes.push(byte(&[*a, *b])?);
                rest = more;
            }
            _ => return Err(r"a backslash that neither `\\` nor `\xNN` explains".to_owned()),
        }
    }
    Ok(bytes)
}

/// Returns the bytes of a key or value that was given as an argument.
///
/// # Errors
/// Fails with what to do when `--hex` was given and the argument is something else.
pub fn argument(text: &str, hex: bool) -> Result<Vec<u8>, String> {
    if hex {
        from_hex(text.as_bytes()).map_err(|e| format!("\"{}\": {e}", text.escape_debug()))
    } else {
        Ok(text.as_bytes().to_vec())
    }
}

/// Adds bytes to an object: as `name` if they are text, otherwise, and with `--hex`, as `name_hex`.
pub fn insert(object: &mut Map<String, Value>, name: &str, bytes: &[u8], hex: bool) {
    match std::str::from_utf8(bytes) {
        Ok(text) if !hex => object.insert(name.to_owned(), text.into()),
        _ => object.insert(format!("{name}_hex"), Form::Hex.write(bytes).into()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_come_back() {
        let all: Vec<u8> = (0..=255).collect();
        for bytes in [
            &b""[..],
            b"plain",
            br"a\b\\x41",
            "grün\t\n".as_bytes(),
            &all,
        ] {
            for form in [Form::Escaped, Form::Hex] {
                let text = form.write(bytes);
                assert!(text.bytes().all(|b| (b' '..=b'~').contains(&b)), "{text}");
                assert_eq!(form.read(text.as_bytes()).unwrap(), bytes);
            }
        }
        assert_eq!(Form::Escaped.write(b"a\tb\\"), r"a\x09b\\");
    }

    #[test]
    fn what_is_not_in_the_form_is_refused() {
        for text in [r"a\", r"\n", r"\x1", r"\xg0", r"\x"] {
            assert!(Form::Escaped.read(text.as_bytes()).is_err(), "{text}");
        }
        for text in ["a", "zz", "0x10", "+1"] {
            assert!(Form::Hex.read(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(argument("4A4b", true).unwrap(), b"JK");
        assert!(argument("4", true).unwrap_err().contains("odd"));
        assert_eq!(argument(r"\x41", false).unwrap(), br"\x41");
    }
}
