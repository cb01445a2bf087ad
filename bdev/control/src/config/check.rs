//! Checks of a configuration that carry out none of it.

use std::collections::{BTreeMap, BTreeSet};

use pumice_bdev::registry::nearest;

use super::json::{CHECKED, MethodError, Params};
use super::methods::Given;
use super::{App, Call, ConfigError, Text, blame, methods, parse};

/// Most devices of a configuration that is checked: a split of a few words makes thousands.
const NAMES_MAX: usize = 1 << 16;

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
    given: BTreeSet<String>,
    /// The NVMe controllers, whose namespaces only the devices know.
    controllers: BTreeSet<String>,
    /// The words of the devices that are called a word and a number.
    numbered: BTreeSet<&'static str>,
    /// Base devices with the devices on top of them.
    taken: BTreeMap<String, String>,
}

impl Names {
    fn give(&mut self, call: &Call<'_>) -> Result<(), MethodError> {
        let Some(makes) = methods::makes(&call.method) else {
            return Ok(());
        };
        let mut params = Params::new(call.params)?;
        let given = match (makes.names)(&mut params)? {
            Given::Names(names) => names,
            Given::Numbered(word) => {
                self.numbered.insert(word);
                return Ok(());
            }
            Given::Namespaces(controller) => {
                self.controllers.insert(controller);
                return Ok(());
            }
        };
        for name in given {
            if self.given.contains(&name) {
                let key = match params.opt_string("name") {
                    Ok(Some(_)) => "name",
                    _ => makes.on.unwrap_or("name"),
                };
                return Err(params.error(key, format!("there is a bdev `{name}` already")));
            }
            if self.given.len() == NAMES_MAX {
                let key = makes.on.unwrap_or("name");
                return Err(params.error(key, format!("more than {NAMES_MAX} bdevs in all")));
            }
            self.given.insert(name);
        }
        Ok(())
    }

    fn take(&mut self, call: &Call<'_>) -> Result<(), MethodError> {
        let Some((makes, key)) = methods::makes(&call.method).and_then(|m| Some((m, m.on?))) else {
            return Ok(());
        };
        let mut params = Params::new(call.params)?;
        let by = params.opt_string("name")?;
        let by = by.unwrap_or_else(|| call.method.clone());
        let bases = match makes.several {
            true => params.opt_names(key)?.unwrap_or_default(),
            false => params.opt_string(key)?.into_iter().collect(),
        };
        for base in bases {
            self.take_one(&params, key, &base, &by)?;
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
        let of_controller = |(controller, nsid): (&str, &str)| {
            self.controllers.contains(controller) && nsid.parse::<u32>().is_ok()
        };
        let known = self.given.contains(base)
            || self.numbered.iter().any(|word| base.starts_with(word))
            || pumice_bdev::uuid::parse(base).is_some()
            || base.rsplit_once('n').is_some_and(of_controller);
        if !known {
            let given: Vec<String> = self.given.iter().cloned().collect();
            let hint = nearest(base, &given)
                .map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
            let reason = format!("there is no bdev `{base}` in this configuration{hint}");
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
