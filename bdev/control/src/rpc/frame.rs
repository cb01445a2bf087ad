//! The end of a JSON message, found in one pass over the bytes as they arrive.

/// The state of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The message is not complete.
    Partial,
    /// The message ends after this many bytes.
    Complete(usize),
    /// No message begins like this.
    Garbage,
}

/// Follows brackets and strings, and looks at every byte once.
#[derive(Debug, Default)]
pub(crate) struct Scanner {
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scanner {
    /// Continues where it stopped. Since then `buf` may only have grown at its end.
    pub(crate) fn scan(&mut self, buf: &[u8]) -> Frame {
        while let Some(byte) = buf.get(self.at) {
            self.at += 1;
            if self.in_string {
                match (self.escaped, byte) {
                    (true, _) => self.escaped = false,
                    (false, b'\\') => self.escaped = true,
                    (false, b'"') => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Frame::Complete(self.at);
                    }
                }
                b' ' | b'\t' | b'\r' | b'\n' => {}
                b'"' if self.depth > 0 => self.in_string = true,
                _ if self.depth > 0 => {}
                _ => return Frame::Garbage,
            }
        }
        Frame::Partial
    }

    /// Starts again, after a message was removed from the buffer.
    pub(crate) fn restart(&mut self) {
        *self = Scanner::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_end_where_they_end() {
        let text = br#" {"a":"}\"]","b":[{}]} {"next":1}"#;
        let end = text.iter().position(|b| *b == b']').unwrap();
        assert!(end < 22);
        for split in 0..text.len() {
            let mut scanner = Scanner::default();
            let first = scanner.scan(&text[..split]);
            let whole = if first == Frame::Partial {
                scanner.scan(text)
            } else {
                first
            };
            assert_eq!(whole, Frame::Complete(22), "split at {split}");
        }
        assert_eq!(Scanner::default().scan(b"  "), Frame::Partial);
        assert_eq!(Scanner::default().scan(b" x"), Frame::Garbage);
        assert_eq!(Scanner::default().scan(b"}"), Frame::Garbage);
    }
}
