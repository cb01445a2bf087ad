//! Numbered slots for operations that a stacked device has passed down.

/// Values by number; a number is used again after its value was taken.
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
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let i = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[i] = Some(value);
        i as u64
    }

    /// The value with this number; `None` for a number that was never given out, which only a
    /// device's mistake can bring here.
    pub(crate) fn remove(&mut self, tag: u64) -> Option<T> {
        let i = usize::try_from(tag).ok()?;
        let value = self.slots.get_mut(i)?.take()?;
        self.free.push(i);
        Some(value)
    }

    pub(crate) fn get_mut(&mut self, tag: u64) -> Option<&mut T> {
        self.slots.get_mut(usize::try_from(tag).ok()?)?.as_mut()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(i, v)| Some((i as u64, v.as_ref()?)))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
