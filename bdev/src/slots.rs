//! Numbered slots for operations that have been passed down.

/// Values by number. A number is used again after its value was taken.
#[derive(Debug)]
pub(crate) struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Slots {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slots<T> {
    #[inline]
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let i = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[i] = Some(value);
        i as u64
    }

    #[inline]
    fn slot(&mut self, number: u64) -> Option<&mut Option<T>> {
        self.slots.get_mut(usize::try_from(number).ok()?)
    }

    /// Takes the value with this number. Returns `None` for a number that is not in use, which only
    /// a device's mistake can bring here.
    #[inline]
    pub(crate) fn remove(&mut self, number: u64) -> Option<T> {
        let value = self.lend(number)?;
        self.free(number);
        Some(value)
    }

    /// As [`Slots::remove`], but the number stays taken until [`Slots::put_back`] or [`Slots::free`].
    #[inline]
    pub(crate) fn lend(&mut self, number: u64) -> Option<T> {
        self.slot(number)?.take()
    }

    /// Puts back a value that was lent.
    #[inline]
    pub(crate) fn put_back(&mut self, number: u64, value: T) {
        if let Some(slot) = self.slot(number) {
            *slot = Some(value);
        }
    }

    /// Frees the number of a value that was lent.
    #[inline]
    pub(crate) fn free(&mut self, number: u64) {
        self.free.extend(usize::try_from(number));
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, number: u64) -> Option<&mut T> {
        self.slot(number)?.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(i, v)| Some((i as u64, v.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
