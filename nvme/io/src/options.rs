//! The style of every struct of options: public fields to read, a method for each to set it.

/// Gives a struct of options a method for each of its options, which sets it and returns the struct.
///
/// The struct is `#[non_exhaustive]`, so that a new option breaks nobody, and has a `Default` or a
/// `new`. After `const`, the methods can be called in constants.
///
/// ```
/// /// Options of a queue.
/// #[derive(Debug, Default)]
/// #[non_exhaustive]
/// pub struct Options {
///     /// Most operations in flight.
///     pub depth: u16,
/// }
/// pumice_io::setters!(Options: depth: u16);
///
/// assert_eq!(Options::default().depth(8).depth, 8);
/// ```
#[macro_export]
macro_rules! setters {
    (const $options:ident: $($field:ident: $kind:ty),* $(,)?) => {
        $crate::setters!(@ (const) $options: $($field: $kind),*);
    };
    ($options:ident: $($field:ident: $kind:ty),* $(,)?) => {
        $crate::setters!(@ () $options: $($field: $kind),*);
    };
    (@ $constant:tt $options:ident: $($field:ident: $kind:ty),*) => {
        impl $options {
            $($crate::setters!(# $constant $options $field $kind);)*
        }
    };
    (# ($($constant:tt)?) $options:ident $field:ident $kind:ty) => {
        #[doc = concat!("Sets [`", stringify!($field), "`](#structfield.", stringify!($field), ").")]
        #[must_use]
        pub $($constant)? fn $field(mut self, $field: $kind) -> $options {
            self.$field = $field;
            self
        }
    };
}
