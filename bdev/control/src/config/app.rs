//! The state that methods change: a registry, and the calls that made its devices.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use pumice_bdev::registry::Registry;
use pumice_bdev::{BdevError, BlockDevice};
use serde_json::{Value, json};

use super::json::{MethodError, Params};
use super::notifications::Notifications;

/// A process's devices with the calls that made them, for configuration files and JSON-RPC.
#[derive(Debug)]
pub struct App {
    /// The registry of the devices.
    pub registry: Registry,
    pub(crate) state: Mutex<AppState>,
    pub(crate) notifications: Arc<Mutex<Notifications>>,
    /// The subject of a process that only answers questions. If it is set, nothing can be changed.
    subject: OnceLock<Subject>,
    /// Whether files and block devices are opened for reading only.
    pub(super) to_read: bool,
}

/// The subject of questions to a process, beside its block devices.
struct Subject {
    methods: &'static [&'static str],
    answer: Box<AnswerFn>,
}

type AnswerFn = dyn Fn(&str, &Value) -> Result<Value, MethodError> + Send + Sync;

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.methods.fmt(f)
    }
}

#[derive(Debug, Default)]
pub(crate) struct AppState {
    /// The calls that made devices, in order.
    pub(crate) created: Vec<Created>,
    /// The calls that set options, by method. A later call replaces an earlier one.
    pub(crate) options: BTreeMap<String, Value>,
    /// The devices that methods change after they were made, by name.
    kept: BTreeMap<String, Arc<dyn Any + Send + Sync>>,
    pub(crate) controllers: BTreeMap<String, Attached>,
}

/// An attached NVMe controller.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(super) trtype: &'static str,
    pub(super) traddr: String,
    pub(super) bdevs: Vec<String>,
    pub(super) controller: Weak<pumice_nvme::Controller>,
}

/// A call and the devices that it made.
#[derive(Debug, Clone)]
pub(crate) struct Created {
    pub(crate) method: &'static str,
    pub(crate) params: Value,
    pub(crate) bdevs: Vec<String>,
}

impl Default for App {
    fn default() -> App {
        let (registry, notifications) = (Registry::new(), Arc::<Mutex<Notifications>>::default());
        let noted = Arc::clone(&notifications);
        registry.listen(move |event| noted.lock().note(event));
        App {
            registry,
            state: Mutex::default(),
            notifications,
            subject: OnceLock::new(),
            to_read: false,
        }
    }
}

impl App {
    /// Makes an `App` with an empty registry.
    pub fn new() -> App {
        App::default()
    }

    /// Makes an `App` whose files and block devices are opened for reading only, which others may do at the same time, whatever
    /// the calls that make them say.
    pub fn to_read() -> App {
        App {
            to_read: true,
            ..App::default()
        }
    }

    /// From now on this answers questions only: `methods`, with what `answer` gives, and those of its own that change
    /// nothing. Only the first call counts.
    pub fn answer_only(
        &self,
        methods: &'static [&'static str],
        answer: impl Fn(&str, &Value) -> Result<Value, MethodError> + Send + Sync + 'static,
    ) {
        let answer = Box::new(answer);
        let _ = self.subject.set(Subject { methods, answer });
    }

    /// Whether this process takes no changes: see [`App::answer_only`].
    pub(crate) fn only_answers(&self) -> bool {
        self.subject.get().is_some()
    }

    /// The names of the methods that can be called.
    pub(crate) fn methods(&self) -> Vec<&'static str> {
        let all = super::methods::all();
        let mut names: Vec<&str> = all
            .filter(|method| !self.only_answers() || method.only_looks())
            .map(|method| method.name)
            .collect();
        names.sort_unstable();
        if let Some(subject) = self.subject.get() {
            names.extend(subject.methods);
        }
        names
    }

    /// Calls a method by name. `params` are those of JSON-RPC.
    ///
    /// # Errors
    /// Fails for an unknown method, for invalid parameters and with the method's own errors.
    pub fn call(&self, method: &str, params: &Value) -> Result<Value, MethodError> {
        let text = params.to_string();
        let raw = serde_json::from_str(&text).map_err(|e| MethodError::param("params", e))?;
        self.call_raw(method, Some(raw))
    }

    pub(crate) fn call_raw(
        &self,
        method: &str,
        params: Option<&serde_json::value::RawValue>,
    ) -> Result<Value, MethodError> {
        self.call_until(method, params, &|| false)
    }

    /// Calls a method as [`App::call_raw`] does. A method that waits stops when `gone` says that
    /// nobody waits for its answer.
    pub(crate) fn call_until(
        &self,
        method: &str,
        params: Option<&serde_json::value::RawValue>,
        gone: &dyn Fn() -> bool,
    ) -> Result<Value, MethodError> {
        if let Some(subject) = self.subject.get()
            && subject.methods.contains(&method)
        {
            let params = params.map_or(Ok(Value::Null), |raw| serde_json::from_str(raw.get()));
            let params = params.map_err(|e| MethodError::param("params", e))?;
            return (subject.answer)(method, &params);
        }
        let Some(found) = super::methods::find(method) else {
            return Err(super::methods::unknown(method, &self.methods()));
        };
        if self.only_answers() && !found.only_looks() {
            let message = format!(
                "`{method}`: this process answers questions only; rpc_get_methods lists them"
            );
            return Err(MethodError::new(-i64::from(libc::EPERM), message));
        }
        let mut params = Params::new(params)?.until(gone);
        tracing::debug!(method, "call");
        (found.run)(self, &mut params)
    }

    /// Records which devices a call has made, for [`App::config`].
    pub(crate) fn note(&self, method: &'static str, params: &Params<'_>, bdevs: &[String]) {
        let mut params = params.to_value();
        let makes = super::methods::makes(method);
        if let (Value::Object(map), [name], Some(makes)) = (&mut params, bdevs, makes)
            && let Some(bdev) = self.registry.get(name)
        {
            // A name or UUID that was chosen here is saved, so that it is the same next time.
            for key in makes.chosen {
                let value = match *key {
                    "uuid" => pumice_bdev::uuid::format(&bdev.info().uuid),
                    _ => name.clone(),
                };
                map.insert((*key).to_owned(), json!(value));
            }
        }
        let bdevs = bdevs.to_vec();
        self.record(Created {
            method,
            params,
            bdevs,
        });
    }

    /// Records a call. An earlier one that made a device of the same name is forgotten: that device
    /// had gone, and its name would be made twice.
    pub(super) fn record(&self, made: Created) {
        let mut state = self.state.lock();
        state.created.retain_mut(|earlier| {
            let before = earlier.bdevs.len();
            earlier.bdevs.retain(|name| !made.bdevs.contains(name));
            earlier.bdevs.len() == before || !earlier.bdevs.is_empty()
        });
        state.created.push(made);
    }

    /// Keeps a device that methods change later.
    pub(super) fn keep(&self, name: &str, device: Arc<dyn Any + Send + Sync>) {
        self.state.lock().kept.insert(name.to_owned(), device);
    }

    /// Returns the device of this name, alias or UUID, if it was kept and is a `T`.
    pub(super) fn kept<T: Any + Send + Sync>(&self, name: &str) -> Option<Arc<T>> {
        let there = self.registry.get(name)?;
        let found = self.state.lock().kept.get(&there.info().name).cloned()?;
        // The one that was kept may have gone by itself, and another has its name.
        let same = std::ptr::addr_eq(Arc::as_ptr(there.device()), Arc::as_ptr(&found));
        found.downcast().ok().filter(|_| same)
    }

    /// Removes a device and those on top of it. The device must belong to `module`.
    pub(crate) fn delete(&self, name: &str, module: &str) -> Result<Value, MethodError> {
        let bdev = self
            .registry
            .get(name)
            .ok_or_else(|| self.registry.not_found(name))?;
        if bdev.info().module != module {
            let message = format!(
                "`{name}` is a {} bdev, not a {module} bdev",
                bdev.info().module
            );
            return Err(MethodError::new(-i64::from(libc::ENODEV), message));
        }
        bdev.remove();
        self.forget_removed();
        Ok(json!(true))
    }

    /// Makes a device again with parameters that `change` has changed, which is how it gets another
    /// size, since the size of an open device is fixed. It must have been made by one of `methods`
    /// and be unused. If it cannot be made with the new parameters, it is made again with the old
    /// ones.
    pub(crate) fn remake(
        &self,
        name: &str,
        methods: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> Result<Value, MethodError> {
        let bdev = self
            .registry
            .get(name)
            .ok_or_else(|| self.registry.not_found(name))?;
        let name = bdev.info().name.clone();
        let busy = |why: String| MethodError::new(-i64::from(libc::EBUSY), why);
        if let Some(by) = bdev.claimed_by() {
            return Err(busy(format!(
                "`{name}` is claimed by {by}: remove that first"
            )));
        }
        if !bdev.channel_stats().is_empty() {
            return Err(busy(format!(
                "`{name}` has open channels: close them first"
            )));
        }
        let made = |c: &Created| methods.contains(&c.method) && c.bdevs == [name.clone()];
        let taken = {
            // Another client may change the list between two looks at it.
            let mut state = self.state.lock();
            let found = state.created.iter().position(made);
            found.map(|at| state.created.remove(at))
        };
        let Some(before) = taken else {
            let message = format!("`{name}` was not made by {}", methods.join(" or "));
            return Err(MethodError::new(-i64::from(libc::ENODEV), message));
        };
        let mut params = before.params.clone();
        change(&mut params);
        bdev.remove();
        drop(bdev);
        let result = self.call(before.method, &params);
        if let Err(e) = result {
            let again = self.call(before.method, &before.params);
            let note = again.map_or_else(|e| format!("; it is gone: {e}"), |_| String::new());
            return Err(MethodError::new(e.code, format!("{}{note}", e.message)));
        }
        Ok(json!(true))
    }

    pub(crate) fn forget_removed(&self) {
        let mut state = self.state.lock();
        let there = |name: &String| self.registry.get(name).is_some();
        state.created.retain(|c| c.bdevs.iter().any(there));
        state.kept.retain(|name, _| there(name));
    }

    /// Returns the calls of the subsystem `bdev` that make these devices again.
    pub fn bdev_config(&self) -> Vec<Value> {
        self.forget_removed();
        let state = self.state.lock();
        let call = |method: &str, params: &Value| json!({ "method": method, "params": params });
        let mut config: Vec<Value> = state
            .options
            .iter()
            .map(|(method, params)| call(method, params))
            .collect();
        config.extend(state.created.iter().map(|c| call(c.method, &c.params)));
        config.push(json!({ "method": "bdev_wait_for_examine" }));
        config
    }

    /// Returns the whole configuration, as a file has it.
    pub fn config(&self) -> Value {
        json!({ "subsystems": [{ "subsystem": "bdev", "config": self.bdev_config() }] })
    }
}

impl From<BdevError> for MethodError {
    fn from(e: BdevError) -> MethodError {
        MethodError::new(-i64::from(e.errno()), e.to_string())
    }
}
