//! The connection between RocksDB's C++ `FileSystem` (`kv/shim`) and BlobFS. `contract.rs` lists
//! the functions.

mod binding;
mod fault;
mod ffi;
mod path;

pub(crate) use binding::Binding;
pub(crate) use ffi::{env_from_uri, make_cpp_env, make_env, register_uri};
pub(crate) use path::{from_root, normal};

/// The abilities that an environment may offer to RocksDB.
pub(crate) mod offers {
    pub(crate) use super::contract::{
        PUMICE_CAN_ASYNC as ASYNC_READS, PUMICE_CAN_PIN as LENDING,
        PUMICE_CAN_PREFETCH as PREFETCH, PUMICE_CAN_REREAD as REREADING,
    };
}

/// Makes the Rust side of the contract.
#[allow(
    non_camel_case_types,
    dead_code,
    unsafe_code,
    reason = "the names are those of the C++ side, which uses all of them"
)]
mod contract {
    use std::ffi::{c_char, c_void};

    macro_rules! contract {
        ($($all:tt)*) => {
            /// A hash of the list from which both sides were compiled.
            pub(crate) const PUMICE_CONTRACT: u64 = word_of(stringify!($($all)*));
            declarations! { $($all)* }
        };
    }

    macro_rules! declarations {
        (
            constants { $($(#[$cdoc:meta])* $constant:ident = $value:literal;)* }
            structs { $($(#[$sdoc:meta])* struct $struct:ident {
                $($(#[$fdoc:meta])* $field:ident: $fty:ty,)*
            })* }
            callbacks { $($(#[$bdoc:meta])* fn $callback:ident($($barg:ident: $bty:ty),*);)* }
            rust { $($(#[$rdoc:meta])* fn $rust:ident($($rarg:ident: $rty:ty),*) $(-> $rret:ty)?;)* }
            cpp { $($(#[$pdoc:meta])* fn $cpp:ident($($parg:ident: $pty:ty),*) $(-> $pret:ty)?;)* }
        ) => {
            $($(#[$cdoc])* pub(crate) const $constant: u32 = $value;)*
            $(
                $(#[$sdoc])*
                #[repr(C)]
                pub(crate) struct $struct { $($(#[$fdoc])* pub(crate) $field: $fty,)* }
            )*
            $($(#[$bdoc])* pub(crate) type $callback = unsafe extern "C" fn($($bty),*);)*
            // Each function that Rust implements has the type by which C++ calls it.
            $(const _: unsafe extern "C" fn($($rty),*) $(-> $rret)? = super::ffi::$rust;)*
            unsafe extern "C" {
                $($(#[$pdoc])* pub(crate) fn $cpp($($parg: $pty),*) $(-> $pret)?;)*
            }
        };
    }

    include!("contract.rs");
}
