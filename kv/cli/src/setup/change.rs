//! Giving controllers to Pumice and back. Everything that can be refused is refused before anything
//! is changed.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::{fs, io};

use pumice_nvme::pci::{Claims, Function, Group, Host, PciAddress};

use super::{BindDriver, SetupError, is_ours};

/// Earlier drivers, one file for each function. It is gone after a reboot, as bindings are.
const STATE_DIR: &str = "/run/pumice/setup";

/// A user to whom controllers are handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    name: String,
    uid: u32,
    gid: u32,
}

/// A checked request to bind.
pub struct Plan<'a> {
    addresses: &'a [PciAddress],
    way: BindDriver,
    user: Option<User>,
}

/// Checks the user and every controller. If one controller has to stay with its driver, none is
/// bound.
pub fn plan<'a>(
    host: &Host,
    addresses: &'a [PciAddress],
    way: BindDriver,
    user: Option<&str>,
) -> Result<Plan<'a>, SetupError> {
    let user = user.map(|name| find_user(host, name)).transpose()?;
    if user.is_some() && way == BindDriver::Uio {
        return Err(SetupError::Refused(
            "uio needs root (physical addresses), so there is nothing to hand over to a user"
                .to_owned(),
        ));
    }
    let plan = Plan {
        addresses,
        way,
        user,
    };
    for address in addresses {
        let function = host.nvme_function(*address)?;
        if plan.user.is_some() {
            guarded_group(&function)?;
        }
        if function.driver.as_deref() != Some(way.driver()) {
            plan.check(host, &function)?;
        }
    }
    Ok(plan)
}

/// Returns the group of a function whose memory accesses an IOMMU confines.
fn guarded_group(function: &Function) -> Result<&Group, SetupError> {
    let group = function.group.as_ref().filter(|g| !g.no_iommu);
    group.ok_or_else(|| {
        SetupError::Refused(format!(
            "{} has no IOMMU behind it; only root may use it",
            function.address
        ))
    })
}

impl Plan<'_> {
    /// Checks whether a function can be given away, without changing anything. The claims keep its
    /// disks unused while they live.
    fn check(&self, host: &Host, function: &Function) -> Result<Claims, SetupError> {
        let address = function.address;
        let claims = host.claim(function).map_err(|uses| {
            let list: Vec<String> = uses.iter().map(|u| format!("  {u}")).collect();
            SetupError::Refused(format!(
                "{address} is in use, and its users would lose access to their data:\n{}",
                list.join("\n")
            ))
        })?;
        refuse_if_open(host, function)?;
        if self.way == BindDriver::Uio {
            return Ok(claims);
        }
        let unsafe_mode = host
            .read("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")?
            .is_some_and(|v| v == "Y" || v == "1");
        if function.group.is_none() && !unsafe_mode {
            return Err(SetupError::Refused(format!(
                "{address} has no IOMMU group, so vfio-pci cannot take it: turn the IOMMU on (pumice doctor says how), or do without its protection with: pumice setup bind {address} --driver uio"
            )));
        }
        let rivals: Vec<String> = host
            .group_rivals(function)
            .into_iter()
            .filter(|(a, _)| !self.addresses.contains(a))
            .map(|(a, driver)| format!("{a} ({driver})"))
            .collect();
        if !rivals.is_empty() {
            return Err(SetupError::Refused(format!(
                "the IOMMU group of {address} also holds {}: a group is given away as a whole, so name all its controllers in one command, or move the card to another slot",
                rivals.join(", ")
            )));
        }
        Ok(claims)
    }

    /// Binds one controller, and returns a description of what was done.
    pub fn bind(&self, host: &Host, address: PciAddress) -> Result<String, SetupError> {
        let function = host.nvme_function(address)?;
        let driver = self.way.driver();
        let mut text = if function.driver.as_deref() == Some(driver) {
            format!("{address}: bound to {driver} already")
        } else {
            let claims = self.check(host, &function)?;
            load_driver(host, driver)?;
            // A controller that was bound to Pumice by another driver keeps its recorded driver.
            if !is_ours(&function) {
                remember(host, address, function.driver.as_deref())?;
            }
            let bound = host.bind(address, Some(driver));
            drop(claims);
            if let Err(error) = bound {
                let back = give_back(host, address, function.driver.as_deref());
                return Err(SetupError::Refused(format!(
                    "{error}; {}",
                    back.unwrap_or_else(|e| format!("and it could not be given back: {e}"))
                )));
            }
            let was = function.driver.as_deref().unwrap_or("no driver");
            format!("{address}: {was} -> {driver}; pumice setup unbind {address} gives it back")
        };
        if let Some(user) = &self.user {
            text.push_str(&hand_over(host, address, user)?);
        }
        Ok(text)
    }
}

/// Loads the driver's module if the driver is missing. `modprobe` knows where modules are.
fn load_driver(host: &Host, driver: &str) -> Result<(), SetupError> {
    let there = || {
        host.path(&format!("/sys/bus/pci/drivers/{driver}"))
            .exists()
    };
    if there() {
        return Ok(());
    }
    let output = Command::new("modprobe").arg(driver).output();
    if there() {
        return Ok(());
    }
    let why = match output {
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(e) => e.to_string(),
    };
    Err(SetupError::Refused(format!(
        "the kernel has no driver {driver} (modprobe {driver}: {why})"
    )))
}

fn hand_over(host: &Host, address: PciAddress, user: &User) -> Result<String, SetupError> {
    let function = host.function(address)?;
    let node = guarded_group(&function)?.node();
    let path = host.path(&node);
    std::os::unix::fs::chown(&path, Some(user.uid), Some(user.gid))
        .map_err(|source| SetupError::Io { path, source })?;
    Ok(format!("\n{node} belongs to {} now", user.name))
}

/// Finds a user by name, wherever this machine has its users, or by number.
fn find_user(host: &Host, name: &str) -> Result<User, SetupError> {
    let none = |why: &str| SetupError::Refused(format!("there is no user {name:?}{why}"));
    if name.is_empty() || name.starts_with('-') || name.contains([':', '\n', '\0']) {
        return Err(none(": that is not a user's name"));
    }
    let passwd = host.read("/etc/passwd")?.unwrap_or_default();
    let found = user_ids(&passwd, name).or_else(|| {
        // Users of LDAP and similar services are in no file. A machine made of files has none of
        // them.
        if !host.is_this_machine() {
            return None;
        }
        let output = Command::new("getent")
            .args(["passwd", name])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().find_map(fields_of)
    });
    match found {
        Some((uid, gid)) => Ok(User {
            name: name.to_owned(),
            uid,
            gid,
        }),
        None => Err(none("")),
    }
}

/// Returns the user and group identifier in a line of passwd(5).
fn fields_of(line: &str) -> Option<(u32, u32)> {
    let mut fields = line.split(':').skip(2);
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn user_ids(passwd: &str, user: &str) -> Option<(u32, u32)> {
    let by_name = |line: &&str| line.split(':').next() == Some(user);
    let by_number = |line: &&str| line.split(':').nth(2) == Some(user);
    let line = passwd.lines().find(by_name);
    fields_of(line.or_else(|| passwd.lines().find(by_number))?)
}

fn state_path(host: &Host, address: PciAddress) -> PathBuf {
    host.path(&format!("{STATE_DIR}/{address}"))
}

pub fn remember(host: &Host, address: PciAddress, driver: Option<&str>) -> Result<(), SetupError> {
    let path = state_path(host, address);
    let dir = host.path(STATE_DIR);
    let write = || {
        fs::create_dir_all(&dir)?;
        // The file's content becomes the name of a module: nobody else may write there, whatever
        // the umask was.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let whole = path.with_extension("new");
        let _ = fs::remove_file(&whole);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&whole)?;
        io::Write::write_all(&mut file, driver.unwrap_or("").as_bytes())?;
        fs::set_permissions(&whole, fs::Permissions::from_mode(0o644))?;
        fs::rename(&whole, &path)
    };
    write().map_err(|source| SetupError::Io {
        path: dir.clone(),
        source,
    })
}

/// Returns the earlier driver: `None` if none is recorded, `Some(None)` if there was no driver. A
/// file that another user may have written is ignored.
pub fn remembered(host: &Host, address: PciAddress) -> Option<Option<String>> {
    let path = state_path(host, address);
    let meta = fs::symlink_metadata(&path).ok()?;
    if !meta.is_file() || meta.mode() & 0o022 != 0 {
        return None;
    }
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    if text.is_empty() {
        return Some(None);
    }
    is_driver_name(text).then(|| Some(text.to_owned()))
}

/// Whether a text can be a driver's name, since it becomes an argument of `modprobe`.
fn is_driver_name(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    !text.starts_with('-') && text.len() <= 64 && text.bytes().all(word)
}

/// Refuses while processes drive the function: the kernel would wait for them, or they would go on
/// using a device that has another owner.
fn refuse_if_open(host: &Host, function: &Function) -> Result<(), SetupError> {
    let address = function.address;
    let dir = format!("/sys/bus/pci/devices/{address}");
    let mut paths: Vec<String> = function.group.iter().map(Group::node).collect();
    for resource in ["resource0", "resource0_wc"] {
        let file = fs::canonicalize(host.path(&format!("{dir}/{resource}")));
        paths.extend(file.ok().map(|p| p.display().to_string()));
    }
    for name in host.names(&format!("{dir}/vfio-dev")) {
        paths.push(format!("/dev/vfio/devices/{name}"));
    }
    for name in host.names(&format!("{dir}/uio")) {
        paths.push(format!("/dev/{name}"));
    }
    let mut users: Vec<String> = paths
        .iter()
        .flat_map(|path| host.openers(path))
        .map(|(pid, name)| format!("process {pid} ({name})"))
        .collect();
    users.sort();
    users.dedup();
    if users.is_empty() {
        return Ok(());
    }
    Err(SetupError::Refused(format!(
        "{address} is in use by {}: stop it first (the kernel would wait for it)",
        users.join(", ")
    )))
}

/// Gives one controller back, and returns a description of what was done.
pub fn unbind(host: &Host, address: PciAddress) -> Result<String, SetupError> {
    let function = host.nvme_function(address)?;
    if !is_ours(&function) {
        let driver = function.driver.as_deref().unwrap_or("no driver");
        return Ok(format!(
            "{address}: is not Pumice's: its driver is {driver}"
        ));
    }
    refuse_if_open(host, &function)?;
    let before = remembered(host, address).unwrap_or_else(|| Some("nvme".to_owned()));
    let text = give_back(host, address, before.as_deref())?;
    if let Some(group) = &function.group {
        take_node_back(host, group);
    }
    let _ = fs::remove_file(state_path(host, address));
    Ok(text)
}

/// Gives the group's node back to root, unless another function of the group belongs to Pumice.
fn take_node_back(host: &Host, group: &Group) {
    let left = group
        .members
        .iter()
        .any(|member| host.function(*member).is_ok_and(|f| is_ours(&f)));
    if !left {
        let _ = std::os::unix::fs::chown(host.path(&group.node()), Some(0), Some(0));
    }
}

fn give_back(host: &Host, address: PciAddress, driver: Option<&str>) -> Result<String, SetupError> {
    host.unbind(address)?;
    let Some(driver) = driver else {
        return Ok(format!("{address}: has no driver again"));
    };
    load_driver(host, driver)?;
    host.bind(address, None)?;
    match host.function(address)?.driver {
        Some(now) if now == driver => Ok(format!("{address}: {driver} has it again")),
        now => Err(SetupError::Refused(format!(
            "{address}: {driver} did not take it back (now: {}); dmesg tells why",
            now.as_deref().unwrap_or("no driver")
        ))),
    }
}

#[cfg(test)]
mod tests;
