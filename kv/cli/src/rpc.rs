//! `pumice rpc`: calls a method of a running process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use pumice_bdev_control::complain;
use pumice_bdev_control::rpc::RpcClient;
use pumice_bdev_control::terminal::{print_json, visible};
use serde_json::Value;

/// Call a method of a running process over its JSON-RPC socket
#[derive(Args)]
pub struct Rpc {
    /// Socket of `pumice bdev serve`, or of a process with --rpc-socket
    #[arg(short = 's', long = "socket", default_value = "/var/tmp/spdk.sock")]
    socket: PathBuf,
    /// Seconds to wait for the answer
    #[arg(short = 't', long = "timeout", default_value_t = 60)]
    timeout_s: u64,
    /// Method, such as bdev_get_bdevs; rpc_get_methods lists them
    method: String,
    /// Parameters: a JSON object, or key=value pairs
    params: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Rpc) -> ExitCode {
    match call(args) {
        Ok(answer) => {
            print_json(&answer);
            ExitCode::SUCCESS
        }
        Err(e) => {
            complain!("pumice rpc: {}: {}", args.method, visible(&e));
            ExitCode::FAILURE
        }
    }
}

fn call(args: &Rpc) -> Result<Value, String> {
    let params = params(&args.params)?;
    let timeout = Duration::from_secs(args.timeout_s.max(1));
    let mut client = RpcClient::connect(&args.socket, timeout).map_err(|e| e.to_string())?;
    client
        .call(&args.method, &params)
        .map_err(|e| e.to_string())
}

/// Parses one JSON object, or pairs whose values are JSON if they can be parsed and otherwise text.
fn params(words: &[String]) -> Result<Value, String> {
    if words.is_empty() {
        return Ok(Value::Null);
    }
    if let [one] = words
        && one.trim_start().starts_with('{')
    {
        return serde_json::from_str(one).map_err(|e| format!("parameters: {e}"));
    }
    let mut map = serde_json::Map::new();
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!(
                "`{word}`: parameters are a JSON object or key=value"
            ));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        map.insert(key.to_owned(), value);
    }
    Ok(Value::Object(map))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parameters_in_both_forms() {
        let words = |w: &[&str]| params(&w.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(words(&[]), Ok(Value::Null));
        assert_eq!(words(&[r#"{"a":1}"#]), Ok(json!({ "a": 1 })));
        assert_eq!(
            words(&["name=M", "n=4", "on=true"]),
            Ok(json!({ "name": "M", "n": 4, "on": true }))
        );
        assert!(words(&["x"]).is_err());
        assert!(words(&["{"]).is_err());
    }
}
