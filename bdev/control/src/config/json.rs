//! JSON with its position in the text, so that errors name the line and the key.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// An error in a method's parameters or in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MethodError {
    /// Code of the JSON-RPC error: -32602 for parameters, otherwise a negative errno.
    pub code: i64,
    /// Description of the error.
    pub message: String,
    /// The invalid parameter, if it is one.
    pub key: Option<String>,
    /// Byte offset of the value in the text.
    pub(crate) at: Option<usize>,
}

/// Invalid parameters (JSON-RPC 2.0, section 5.1).
pub(crate) const INVALID_PARAMS: i64 = -32602;
/// The method does not exist.
pub(crate) const METHOD_NOT_FOUND: i64 = -32601;
/// The text is not a request.
pub(crate) const INVALID_REQUEST: i64 = -32600;
/// Most parameters of a call. Each is compared with those before it, and no method has as many.
const PARAMS_MAX: usize = 256;
/// The text is not JSON.
pub(crate) const PARSE_ERROR: i64 = -32700;
/// Not an error: the parameters of a call that is only checked are valid. Clients never see it.
pub(crate) const CHECKED: i64 = i64::MIN;

impl MethodError {
    /// An error with this code.
    pub fn new(code: i64, message: impl Into<String>) -> MethodError {
        MethodError {
            code,
            message: message.into(),
            key: None,
            at: None,
        }
    }

    /// Makes the error of an invalid parameter `key`.
    pub fn param(key: &str, reason: impl fmt::Display) -> MethodError {
        MethodError {
            code: INVALID_PARAMS,
            message: format!("`{key}`: {reason}"),
            key: Some(key.to_owned()),
            at: None,
        }
    }
}

impl fmt::Display for MethodError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for MethodError {}

/// The members of an object, in order, as written.
pub(crate) struct Object<'a>(pub(crate) Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Returns the kind of value that a text holds, for messages.
pub(crate) fn kind(raw: &RawValue) -> &'static str {
    match raw.get().bytes().next() {
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b'"') => "a string",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

/// Parameters of a method. The method must ask for each known one before [`Params::finish`].
pub struct Params<'a> {
    members: Vec<(String, &'a RawValue)>,
    known: Vec<&'static str>,
    /// Whether the call ends at [`Params::finish`], before it does anything.
    only_check: bool,
    /// Returns whether nobody waits for the answer.
    gone: &'a dyn Fn() -> bool,
}

impl<'a> Params<'a> {
    /// Reads the `params` of a request; without any they are an empty object.
    pub(crate) fn new(raw: Option<&'a RawValue>) -> Result<Params<'a>, MethodError> {
        let none = Params {
            members: Vec::new(),
            known: Vec::new(),
            only_check: false,
            gone: &|| false,
        };
        let Some(raw) = raw else { return Ok(none) };
        if raw.get() == "null" {
            return Ok(none);
        }
        if raw.get() == "[]" {
            return Ok(none);
        }
        let Ok(Object(members)) = serde_json::from_str(raw.get()) else {
            let message = format!("params must be an object, not {}", kind(raw));
            return Err(MethodError::new(INVALID_PARAMS, message));
        };
        if members.len() > PARAMS_MAX {
            let message = format!("{} params; a call has at most {PARAMS_MAX}", members.len());
            return Err(MethodError::new(INVALID_PARAMS, message));
        }
        for (i, (key, _)) in members.iter().enumerate() {
            if members.iter().take(i).any(|(k, _)| k == key) {
                return Err(MethodError::param(key, "given twice"));
            }
        }
        Ok(Params { members, ..none })
    }

    /// Reads parameters of a call that must end with [`CHECKED`] instead of doing something.
    pub(crate) fn only_check(raw: Option<&'a RawValue>) -> Result<Params<'a>, MethodError> {
        let params = Params::new(raw)?;
        Ok(Params {
            only_check: true,
            ..params
        })
    }

    /// Returns the parameters of a call that ends early when `gone` returns true.
    pub(crate) fn until<'b>(self, gone: &'b dyn Fn() -> bool) -> Params<'b>
    where
        'a: 'b,
    {
        Params { gone, ..self }
    }

    /// Whether nobody waits for the answer.
    pub(crate) fn is_gone(&self) -> bool {
        (self.gone)()
    }

    /// Returns the members as they are, to be saved.
    pub(crate) fn to_value(&self) -> serde_json::Value {
        let parse = |raw: &RawValue| -> serde_json::Value {
            serde_json::from_str(raw.get()).unwrap_or_default()
        };
        self.members
            .iter()
            .map(|(k, raw)| (k.clone(), parse(raw)))
            .collect()
    }

    fn raw(&mut self, key: &'static str) -> Option<&'a RawValue> {
        self.known.push(key);
        let (_, raw) = self.members.iter().find(|(k, _)| k == key)?;
        (raw.get() != "null").then_some(*raw)
    }

    /// Makes an error about a parameter, at its place.
    pub(crate) fn error(&self, key: &str, reason: impl fmt::Display) -> MethodError {
        let mut e = MethodError::param(key, reason);
        let member = self.members.iter().find(|(k, _)| k == key);
        e.at = member.map(|(_, raw)| raw.get().as_ptr().addr());
        e
    }

    fn get<T: Deserialize<'a>>(
        &mut self,
        key: &'static str,
        expected: &str,
    ) -> Result<Option<T>, MethodError> {
        let Some(raw) = self.raw(key) else {
            return Ok(None);
        };
        let parsed = serde_json::from_str(raw.get());
        parsed.map(Some).map_err(|_| {
            let shown: String = raw.get().chars().take(60).collect();
            self.error(
                key,
                format!("should be {expected}, not {} ({shown})", kind(raw)),
            )
        })
    }

    fn must<T>(&self, key: &'static str, value: Option<T>) -> Result<T, MethodError> {
        value.ok_or_else(|| MethodError::param(key, "missing"))
    }

    pub(crate) fn opt_string(&mut self, key: &'static str) -> Result<Option<String>, MethodError> {
        self.get(key, "a string")
    }

    pub(crate) fn string(&mut self, key: &'static str) -> Result<String, MethodError> {
        let value = self.opt_string(key)?;
        let value = self.must(key, value)?;
        if value.is_empty() {
            return Err(self.error(key, "empty"));
        }
        Ok(value)
    }

    pub(crate) fn opt_u64(&mut self, key: &'static str) -> Result<Option<u64>, MethodError> {
        self.get(key, "a whole number, not negative")
    }

    pub(crate) fn u64(&mut self, key: &'static str) -> Result<u64, MethodError> {
        let value = self.opt_u64(key)?;
        self.must(key, value)
    }

    pub(crate) fn opt_u32(&mut self, key: &'static str) -> Result<Option<u32>, MethodError> {
        self.get(key, "a whole number below 2^32, not negative")
    }

    pub(crate) fn u32(&mut self, key: &'static str) -> Result<u32, MethodError> {
        let value = self.opt_u32(key)?;
        self.must(key, value)
    }

    pub(crate) fn opt_flag(&mut self, key: &'static str) -> Result<Option<bool>, MethodError> {
        self.get(key, "true or false")
    }

    pub(crate) fn flag(&mut self, key: &'static str) -> Result<bool, MethodError> {
        Ok(self.opt_flag(key)?.unwrap_or(false))
    }

    pub(crate) fn opt_strings(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Vec<String>>, MethodError> {
        self.get(key, "an array of strings")
    }

    /// Names as an array, or as one string with spaces between them, as users of rpc.py write them.
    pub(crate) fn opt_names(
        &mut self,
        key: &'static str,
    ) -> Result<Option<Vec<String>>, MethodError> {
        self.opt_strings(key).or_else(|e| {
            let text = self.opt_string(key).ok().flatten().ok_or(e)?;
            Ok(Some(
                text.split_whitespace().map(ToOwned::to_owned).collect(),
            ))
        })
    }

    pub(crate) fn opt_uuid(&mut self, key: &'static str) -> Result<Option<[u8; 16]>, MethodError> {
        let Some(text) = self.opt_string(key)? else {
            return Ok(None);
        };
        let uuid = pumice_bdev::uuid::parse(&text);
        uuid.map(Some)
            .ok_or_else(|| self.error(key, format!("`{text}` is not a UUID")))
    }

    /// Accepts a parameter only with its neutral value, because it asks for an ability that does
    /// not exist here.
    pub(crate) fn neutral(
        &mut self,
        key: &'static str,
        neutral: &[&str],
        why: &str,
    ) -> Result<(), MethodError> {
        let Some(raw) = self.raw(key) else {
            return Ok(());
        };
        if neutral.contains(&raw.get()) {
            return Ok(());
        }
        Err(self.error(key, format!("{} is not supported: {why}", raw.get())))
    }

    /// Accepts parameters that have no effect here, whatever their values.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        self.known.extend_from_slice(keys);
    }

    /// Refuses parameters that the method did not ask for. A method calls it before it does
    /// anything.
    pub(crate) fn finish(&self) -> Result<(), MethodError> {
        let strange = self
            .members
            .iter()
            .find(|(k, _)| !self.known.contains(&k.as_str()));
        let Some((key, _)) = strange else {
            return self.done();
        };
        let known: Vec<String> = self.known.iter().map(|k| (*k).to_owned()).collect();
        let hint = match pumice_bdev::registry::nearest(key, &known) {
            Some(near) => format!("; did you mean `{near}`?"),
            None if known.is_empty() => "; the method takes none".to_owned(),
            None => format!("; there are {}", known.join(", ")),
        };
        Err(self.error(key, format!("unknown parameter{hint}")))
    }

    /// Finishes as [`Params::finish`] does, for options of which later versions have more. Refuses
    /// only unknown parameters that resemble a known one, and returns the others.
    pub(crate) fn finish_open(&self) -> Result<Vec<&str>, MethodError> {
        let known: Vec<String> = self.known.iter().map(|k| (*k).to_owned()).collect();
        let mut others = Vec::new();
        for (key, _) in &self.members {
            if self.known.contains(&key.as_str()) {
                continue;
            }
            if let Some(near) = pumice_bdev::registry::nearest(key, &known) {
                let reason = format!("unknown parameter; did you mean `{near}`?");
                return Err(self.error(key, reason));
            }
            others.push(key.as_str());
        }
        self.done()?;
        Ok(others)
    }

    fn done(&self) -> Result<(), MethodError> {
        if self.only_check {
            return Err(MethodError::new(CHECKED, "checked"));
        }
        Ok(())
    }
}

/// Returns the text with comments (`//` and `/* */`, which SPDK's parser accepts in configuration
/// files) replaced by spaces. Everything else keeps its place.
pub(crate) fn without_comments(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    let mut in_string = false;
    while let [first, tail @ ..] = rest {
        match (in_string, first, tail) {
            (true, b'\\', [next, after @ ..]) => {
                out.extend([*first, *next]);
                rest = after;
                continue;
            }
            (_, b'"', _) => in_string = !in_string,
            (false, b'/', [b'/', ..]) => {
                let n = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
                out.resize(out.len() + n, b' ');
                rest = &rest[n..];
                continue;
            }
            (false, b'/', [b'*', ..]) => {
                let end = rest.windows(2).skip(2).position(|w| w == b"*/");
                let n = end.map_or(rest.len(), |n| n + 4);
                out.extend(
                    rest[..n]
                        .iter()
                        .map(|b| if *b == b'\n' { b'\n' } else { b' ' }),
                );
                rest = &rest[n..];
                continue;
            }
            _ => {}
        }
        out.push(*first);
        rest = tail;
    }
    // Only whole comments, which begin and end with ASCII, were replaced.
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

/// Returns the line of a byte offset, from 1.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    let upto = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    upto.iter().filter(|b| **b == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_become_blank() {
        let text = "{ // one\n \"a//b\": /* x\n y */ 1, \"c\\\"//\": 2 }";
        let clean = without_comments(text);
        assert_eq!(clean.len(), text.len());
        let value: serde_json::Value = serde_json::from_str(&clean).unwrap();
        assert_eq!(value, serde_json::json!({ "a//b": 1, "c\"//": 2 }));
        assert_eq!(line_of(&clean, clean.find("\"c").unwrap()), 3);
        assert_eq!(without_comments("/*"), "  ");
        assert_eq!(without_comments("/* é"), "     ");
    }

    #[test]
    fn parameters_are_typed_and_known() {
        let raw: Box<RawValue> =
            serde_json::from_str(r#"{"name":"x","n":-1,"flag":true,"odd":[]}"#).unwrap();
        let mut params = Params::new(Some(&raw)).unwrap();
        assert_eq!(params.string("name").unwrap(), "x");
        assert!(params.u64("n").unwrap_err().message.contains("`n`"));
        assert!(params.flag("flag").unwrap());
        assert!(
            params
                .string("none")
                .unwrap_err()
                .message
                .contains("missing")
        );
        assert!(params.finish().unwrap_err().message.contains("`odd`"));
        assert!(Params::new(Some(&serde_json::from_str::<Box<RawValue>>("3").unwrap())).is_err());
        let many: serde_json::Map<String, serde_json::Value> = (0..=PARAMS_MAX)
            .map(|i| (format!("p{i}"), i.into()))
            .collect();
        let many = serde_json::value::to_raw_value(&many).unwrap();
        let e = Params::new(Some(&many)).err().unwrap();
        assert!(e.message.contains("257 params"), "{e}");
        let twice: Box<RawValue> = serde_json::from_str(r#"{"a":1,"a":2}"#).unwrap();
        assert!(Params::new(Some(&twice)).is_err());
    }

    /// SPDK's tools write `null` for what is not given, and an empty array for no parameters.
    #[test]
    fn what_is_null_is_not_given() {
        let raw = |text: &str| serde_json::from_str::<Box<RawValue>>(text).unwrap();
        let given = raw(r#"{"name":null,"n":null,"empty":""}"#);
        let mut params = Params::new(Some(&given)).unwrap();
        assert_eq!(params.opt_string("name").unwrap(), None);
        assert_eq!(params.opt_u64("n").unwrap(), None);
        assert!(
            params
                .string("name")
                .unwrap_err()
                .message
                .contains("missing")
        );
        assert!(
            params
                .string("empty")
                .unwrap_err()
                .message
                .contains("empty")
        );
        params.finish().unwrap();
        for none in ["null", "[]", "{}"] {
            Params::new(Some(&raw(none))).unwrap().finish().unwrap();
        }
    }

    /// A call that is only checked ends before it does anything, also one that takes later versions' options.
    #[test]
    fn a_call_that_is_only_checked_ends_early() {
        let raw: Box<RawValue> = serde_json::from_str(r#"{"name":"x"}"#).unwrap();
        let mut params = Params::only_check(Some(&raw)).unwrap();
        params.string("name").unwrap();
        assert_eq!(params.finish().unwrap_err().code, CHECKED);
        assert_eq!(params.finish_open().unwrap_err().code, CHECKED);
    }
}
