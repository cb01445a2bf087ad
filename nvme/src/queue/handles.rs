//! The namespaces that the commands of a queue pair are for.

use crate::namespace::{FormatValidity, Namespace};

/// Numbers of the namespaces that I/O was submitted for. Each number is of one namespace in one
/// format for good. There is one more of them only when a namespace is replaced or formatted.
#[derive(Debug, Default)]
pub(super) struct Handles {
    all: Vec<FormatValidity>,
    /// The number of the namespace that was used last.
    last: u32,
}

impl Handles {
    /// Returns the number of a namespace.
    #[inline]
    pub fn number(&mut self, ns: &Namespace) -> u32 {
        match self.all.get(self.last as usize) {
            Some(last) if last.is_shared_with(&ns.validity) => self.last,
            _ => self.find(&ns.validity),
        }
    }

    #[cold]
    fn find(&mut self, validity: &FormatValidity) -> u32 {
        let known = self.all.iter().position(|v| v.is_shared_with(validity));
        let number = known.unwrap_or_else(|| {
            self.all.push(validity.clone());
            self.all.len() - 1
        });
        self.last = u32::try_from(number).unwrap_or(u32::MAX);
        self.last
    }

    /// Whether commands for the namespace of this number may be sent: the controller of the number
    /// `controller` has it under its identifier, in the format that they were made for.
    pub fn are_current(&self, number: u32, controller: u64) -> bool {
        let validity = self.all.get(number as usize);
        validity.is_some_and(|v| v.is_of(controller))
    }
}
