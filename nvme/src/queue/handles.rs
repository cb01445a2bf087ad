//! The namespaces that the commands of a queue pair are for.

use crate::namespace::FormatValidity;

/// Numbers of the namespaces that I/O was submitted for. Each number is of one namespace in one
/// format for good. There is one more of them only when a namespace is replaced or formatted.
#[derive(Debug, Default)]
pub(super) struct Handles {
    all: Vec<FormatValidity>,
    /// The number of the namespace that was used last.
    last: u32,
}

impl Handles {
    /// Returns the number of the namespace whose handles share `validity`.
    #[inline]
    pub fn number(&mut self, validity: &FormatValidity) -> u32 {
        match self.all.get(self.last as usize) {
            Some(last) if last.is_shared_with(validity) => self.last,
            _ => self.find(validity),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Commands for one namespace are sent whatever becomes of another one on the same queue pair.
    #[test]
    fn each_namespace_has_a_number_of_its_own() {
        let mut handles = Handles::default();
        let all: Vec<_> = (0..3).map(|_| FormatValidity::of(1)).collect();
        for _ in 0..2 {
            for (number, validity) in (0..).zip(&all) {
                assert_eq!(handles.number(validity), number);
                assert_eq!(handles.number(&validity.clone()), number);
            }
        }
        all[1].withdraw();
        let current = |number| handles.are_current(number, 1);
        assert_eq!([0, 1, 2, 3].map(current), [true, false, true, false]);
        assert!(!handles.are_current(0, 2), "it is of another controller");
    }
}
