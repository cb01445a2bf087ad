//! Requests and answers (JSON-RPC 2.0).

use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::config::App;
use crate::config::json::{INVALID_REQUEST, MethodError, Object, PARSE_ERROR};

/// Most requests in one batch.
const BATCH_MAX: usize = 64;

/// Answers a request or a batch of them. Returns `None` when no answer is needed.
pub fn handle(app: &App, text: &[u8]) -> Option<String> {
    handle_until(app, text, &|| false)
}

/// Answers as [`handle`] does. A method that waits stops when `gone` returns true.
pub(crate) fn handle_until(app: &App, text: &[u8], gone: &dyn Fn() -> bool) -> Option<String> {
    let error = |code, message: &str| failure(&Value::Null, &MethodError::new(code, message));
    let Ok(text) = std::str::from_utf8(text) else {
        return Some(error(PARSE_ERROR, "not UTF-8").to_string());
    };
    let raw: &RawValue = match serde_json::from_str(text) {
        Ok(raw) => raw,
        Err(e) => return Some(error(PARSE_ERROR, &format!("not JSON: {e}")).to_string()),
    };
    if raw.get().starts_with('[') {
        let Ok(batch) = serde_json::from_str::<Vec<&RawValue>>(raw.get()) else {
            return Some(error(PARSE_ERROR, "not JSON").to_string());
        };
        if batch.is_empty() || batch.len() > BATCH_MAX {
            let message = format!("a batch has 1 to {BATCH_MAX} requests");
            return Some(error(INVALID_REQUEST, &message).to_string());
        }
        let answers: Vec<Value> = batch
            .into_iter()
            .filter_map(|r| request(app, r, gone))
            .collect();
        return (!answers.is_empty()).then(|| Value::from(answers).to_string());
    }
    request(app, raw, gone).map(|answer| answer.to_string())
}

fn failure(id: &Value, e: &MethodError) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "error": { "code": e.code, "message": e.message } })
}

fn request(app: &App, raw: &RawValue, gone: &dyn Fn() -> bool) -> Option<Value> {
    let invalid = |id: &Value, why: &str| {
        let message = format!("Invalid request: {why}");
        Some(failure(id, &MethodError::new(INVALID_REQUEST, message)))
    };
    let Ok(Object(members)) = serde_json::from_str(raw.get()) else {
        return invalid(&Value::Null, "not an object");
    };
    let member = |key: &str| members.iter().find(|(k, _)| k == key).map(|(_, v)| *v);
    let id: Option<Value> = match member("id").map(|raw| serde_json::from_str(raw.get())) {
        None => None,
        Some(Ok(id)) => Some(id),
        // This is not a notification: the client waits for an answer.
        Some(Err(_)) => return invalid(&Value::Null, "`id` is a string or a number"),
    };
    let known = |id: &Value| id.is_string() || id.is_number() || id.is_null();
    let for_answer = id.clone().filter(known).unwrap_or(Value::Null);
    if id.as_ref().is_some_and(|id| !known(id)) {
        return invalid(&Value::Null, "`id` is a string or a number");
    }
    match member("jsonrpc").map(RawValue::get) {
        Some("\"2.0\"") => {}
        _ => return invalid(&for_answer, "`jsonrpc` is \"2.0\""),
    }
    let method: Option<String> =
        member("method").and_then(|raw| serde_json::from_str(raw.get()).ok());
    let Some(method) = method else {
        return invalid(&for_answer, "`method` is a string");
    };
    let result = app.call_until(&method, member("params"), gone);
    if let Err(error) = &result {
        tracing::debug!(method, %error, "call failed");
    }
    // Without an id it is a notification: the client does not wait for an answer.
    let id = id?;
    Some(match result {
        Ok(result) => json!({ "jsonrpc": "2.0", "id": id, "result": result }),
        Err(e) => failure(&id, &e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Value {
        let answer = handle(&App::new(), text.as_bytes()).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    #[test]
    fn requests_and_errors() {
        let ok = answer(r#"{"jsonrpc":"2.0","method":"bdev_get_bdevs","id":7}"#);
        assert_eq!(ok, json!({ "jsonrpc": "2.0", "id": 7, "result": [] }));
        let e = answer(r#"{"jsonrpc":"2.0","method":"bdev_get_bdev","id":"x"}"#);
        assert_eq!(e["error"]["code"], -32601);
        assert_eq!(e["id"], "x");
        assert!(
            e["error"]["message"]
                .as_str()
                .unwrap()
                .contains("`bdev_get_bdevs`")
        );
        let wrong = r#"{"jsonrpc":"2.0","method":"bdev_get_bdevs","params":{"nam":1},"id":1}"#;
        let e = answer(wrong);
        assert_eq!(e["error"]["code"], -32602);
        assert!(
            e["error"]["message"]
                .as_str()
                .unwrap()
                .contains("did you mean `name`")
        );
        assert_eq!(answer("{")["error"]["code"], -32700);
        assert_eq!(answer("[]")["error"]["code"], -32600);
        assert_eq!(answer("3")["error"]["code"], -32600);
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for id in ["1e999", deep.as_str(), "{}"] {
            let text = format!(r#"{{"jsonrpc":"2.0","method":"rpc_get_methods","id":{id}}}"#);
            let e = answer(&text);
            assert_eq!(e["error"]["code"], -32600, "{id}");
            assert_eq!(e["id"], Value::Null);
        }
        assert_eq!(answer(r#"{"method":"x","id":1}"#)["error"]["code"], -32600);
        assert_eq!(
            answer(r#"{"jsonrpc":"2.0","method":"x","id":[]}"#)["error"]["code"],
            -32600
        );
        let notification = br#"{"jsonrpc":"2.0","method":"bdev_get_bdevs"}"#;
        assert_eq!(handle(&App::new(), notification), None);
        let batch = answer(
            r#"[{"jsonrpc":"2.0","method":"rpc_get_methods","id":1},{"jsonrpc":"2.0","id":2}]"#,
        );
        assert!(batch[0]["result"].as_array().unwrap().len() > 40);
        assert_eq!(batch[1]["error"]["code"], -32600);
        let many = |n| {
            let one = r#"{"jsonrpc":"2.0","method":"spdk_get_version","id":1}"#;
            answer(&format!("[{}]", vec![one; n].join(",")))
        };
        assert_eq!(many(BATCH_MAX).as_array().unwrap().len(), BATCH_MAX);
        assert_eq!(many(BATCH_MAX + 1)["error"]["code"], -32600);
    }
}
