//! Checks of a configuration that carry out none of it.

use std::collections::BTreeMap;

use pumice_bdev::registry::nearest;

use super::json::{CHECKED, MethodError, Params};
use super::{App, Call, ConfigError, Text, blame, methods, parse};

/// Checks a configuration without carrying it out: its form, that the methods exist, that their
/// parameters are known and valid, and that each device's base is made by the configuration and
/// used by no other. Returns the number of calls.
///
/// # Errors
/// Returns the first error.
pub fn check_form(file: &str, text: &str) -> Result<usize, ConfigError> {
    let clean = super::without_comments(text);
    let text = Text { file, text: &clean };
    let calls = parse(&text)?;
    let nothing = App::new();
    let mut names = Names::default();
    for call in &calls {
        let Some(method) = methods::find(&call.method) else {
            return Err(blame(
                &text,
                call,
                methods::unknown(&call.method, &nothing.methods()),
            ));
        };
        let checked =
            Params::only_check(call.params).and_then(|mut p| (method.run)(&nothing, &mut p));
        match checked {
            Err(e) if e.code != CHECKED => return Err(blame(&text, call, e)),
            _ => {}
        }
    }
    // A removal makes names free again, so only loading can tell.
    let removes = |c: &Call<'_>| c.method.contains("_delete") || c.method.contains("_detach");
    if calls.iter().any(removes) {
        return Ok(calls.len());
    }
    for call in &calls {
        names.give(call).map_err(|e| blame(&text, call, e))?;
    }
    for call in &calls {
        names.take(call).map_err(|e| blame(&text, call, e))?;
    }
    Ok(calls.len())
}

/// The names that a configuration's calls give to devices, and the devices on top of others.
#[derive(Default)]
struct Names {
    given: Vec<String>,
    /// The NVMe controllers, whose namespaces only the devices know.
    controllers: Vec<String>,
    /// Whether there are devices called `Malloc` and a number.
    unnamed: bool,
    /// Base devices with the devices on top of them.
    taken: BTreeMap<String, String>,
}

impl Names {
    fn give(&mut self, call: &Call<'_>) -> Result<(), MethodError> {
        let mut params = Params::new(call.params)?;
        let given: Vec<String> = match call.method.as_str() {
            "bdev_nvme_attach_controller" => {
                self.controllers.extend(params.opt_string("name")?);
                return Ok(());
            }
            "bdev_malloc_create" => {
                let name = params.opt_string("name")?;
                self.unnamed |= name.is_none();
                name.into_iter().collect()
            }
            "bdev_null_create"
            | "bdev_aio_create"
            | "bdev_uring_create"
            | "bdev_passthru_create"
            | "bdev_delay_create"
            | "bdev_raid_create" => params.opt_string("name")?.into_iter().collect(),
            "bdev_error_create" => {
                let base = params.opt_string("base_name")?;
                base.map(|base| format!("EE_{base}")).into_iter().collect()
            }
            "bdev_split_create" => {
                let base = params.opt_string("base_bdev")?.unwrap_or_default();
                let count = params.opt_u64("split_count")?.unwrap_or(0).min(4096);
                (0..count).map(|i| format!("{base}p{i}")).collect()
            }
            _ => return Ok(()),
        };
        for name in given {
            if self.given.contains(&name) {
                let key = if call.method == "bdev_error_create" {
                    "base_name"
                } else {
                    "name"
                };
                return Err(params.error(key, format!("there is a bdev `{name}` already")));
            }
            self.given.push(name);
        }
        Ok(())
    }

    fn take(&mut self, call: &Call<'_>) -> Result<(), MethodError> {
        if !methods::stands_on_another(&call.method) {
            return Ok(());
        }
        let mut params = Params::new(call.params)?;
        let by = params.opt_string("name")?;
        let by = by.unwrap_or_else(|| call.method.clone());
        for key in ["base_bdev_name", "base_name", "base_bdev"] {
            if let Some(base) = params.opt_string(key)? {
                self.take_one(&params, key, &base, &by)?;
            }
        }
        for base in params
            .opt_strings("base_bdevs")
            .ok()
            .flatten()
            .into_iter()
            .flatten()
        {
            self.take_one(&params, "base_bdevs", &base, &by)?;
        }
        Ok(())
    }

    fn take_one(
        &mut self,
        params: &Params<'_>,
        key: &str,
        base: &str,
        by: &str,
    ) -> Result<(), MethodError> {
        let of_controller = |c: &String| {
            let nsid = base
                .strip_prefix(c.as_str())
                .and_then(|r| r.strip_prefix('n'));
            nsid.is_some_and(|n| n.parse::<u32>().is_ok())
        };
        let known = self.given.iter().any(|n| n == base)
            || (self.unnamed && base.starts_with("Malloc"))
            || pumice_bdev::uuid::parse(base).is_some()
            || self.controllers.iter().any(of_controller);
        if !known {
            let hint = nearest(base, &self.given)
                .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let reason = format!("no bdev `{base}` in this configuration{hint}");
            return Err(params.error(key, reason));
        }
        match self.taken.insert(base.to_owned(), by.to_owned()) {
            None => Ok(()),
            Some(other) => {
                Err(params.error(key, format!("`{base}` is taken by `{other}` already")))
            }
        }
    }
}
