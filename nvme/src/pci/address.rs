//! Addresses of PCI functions, such as `0000:01:00.0`.

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function: domain, bus, device and function number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// The text is not a PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a PCI address: write domain:bus:device.function in hexadecimal, as 0000:01:00.0 (lspci -D shows them)"
)]
pub struct ParseAddressError(pub String);

impl FromStr for PciAddress {
    type Err = ParseAddressError;

    /// Parses an address. The domain may be left out, as `lspci` prints it on most machines.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| ParseAddressError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let hex = |s: &str, digits: usize| {
        let fits = !s.is_empty() && s.len() <= digits && s.bytes().all(|b| b.is_ascii_hexdigit());
        fits.then(|| u32::from_str_radix(s, 16).ok()).flatten()
    };
    let (rest, function) = text.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    let address = PciAddress {
        domain: hex(domain, 8)?,
        bus: u8::try_from(hex(bus, 2)?).ok()?,
        device: u8::try_from(hex(device, 2)?).ok()?,
        function: u8::try_from(hex(function, 1)?).ok()?,
    };
    (address.device < 32 && address.function < 8).then_some(address)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

#[cfg(test)]
mod tests {
    use super::PciAddress;

    #[test]
    fn both_forms_and_nothing_else() {
        let show = |s: &str| s.parse::<PciAddress>().map(|a| a.to_string());
        assert_eq!(show("0000:5E:00.0").as_deref(), Ok("0000:5e:00.0"));
        assert_eq!(show("01:1f.7").as_deref(), Ok("0000:01:1f.7"));
        assert_eq!(show("10000:e1:00.0").as_deref(), Ok("10000:e1:00.0"));
        for bad in [
            "",
            "01",
            "01:00",
            "01:20.0",
            "01:00.8",
            "x:00.0",
            "0:0:0:0.0",
            "+1:00.0",
            "../x:00.0",
            "1.0",
        ] {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }
}
