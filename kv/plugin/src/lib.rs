//! BlobFS as the file system of RocksDB, for C++ and Rust: mounting by URI, and the C functions that
//! the C++ `rocksdb::FileSystem` in `shim/` calls.
//!
//! Nothing here needs RocksDB, neither its library nor its headers. Two things are made from it:
//!
//! - The crate `pumice` compiles the shim against the RocksDB of the `rocksdb` crate.
//! - The C library `libpumice_fs` (`library/`) is what the plugin of a C++ program links. The plugin
//!   is this folder, in the form that RocksDB's own build expects in `plugin/pumice`: `README.md`.
//!
//! `src/contract.rs` lists the functions that cross between the two languages.

mod abi;
mod binding;
mod error;
mod fault;
mod ffi;
mod mount;
mod path;
mod shared;
mod uri;

pub use {
    binding::Binding,
    error::{CLOSED, MountError, chain, text},
    fault::Fault,
    ffi::{handle, handle_of},
    mount::{MountOptions, mount, mount_device, open_device},
    path::{from_root, normal, resolve},
    shared::Use,
    uri::{mount_uri, mount_uri_with},
};

/// The abilities that an environment may offer to RocksDB.
pub mod offers {
    pub use super::contract::{
        PUMICE_CAN_ASYNC as ASYNC_READS, PUMICE_CAN_PIN as LENDING,
        PUMICE_CAN_PREFETCH as PREFETCH, PUMICE_CAN_REREAD as REREADING,
    };
}

/// The functions of the shim, which a Rust program calls that has compiled it in (`shim/embed.cc`).
pub mod shim {
    pub use super::contract::{
        pumice_env_from_uri, pumice_env_new, pumice_env_wrap, pumice_register_uri,
        pumice_shim_check,
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
        (
            constants { $($(#[$cdoc:meta])* $constant:ident = $value:literal;)* }
            structs { $($(#[$sdoc:meta])* struct $struct:ident {
                $($(#[$fdoc:meta])* $field:ident: $fty:ty,)*
            })* }
            callbacks { $($(#[$bdoc:meta])* fn $callback:ident($($barg:ident: $bty:ty),*);)* }
            rust { $($(#[$rdoc:meta])* fn $rust:ident($($rarg:ident: $rty:ty),*) $(-> $rret:ty)?;)* }
            cpp { $($(#[$pdoc:meta])* fn $cpp:ident($($parg:ident: $pty:ty),*) $(-> $pret:ty)?;)* }
        ) => {
            $($(#[$cdoc])* pub const $constant: u32 = $value;)*
            $(
                $(#[$sdoc])*
                #[repr(C)]
                pub struct $struct { $($(#[$fdoc])* pub $field: $fty,)* }
            )*
            $($(#[$bdoc])* pub type $callback = unsafe extern "C" fn($($bty),*);)*
            // Each function that Rust implements has the type by which C++ calls it.
            $(const _: unsafe extern "C" fn($($rty),*) $(-> $rret)? = super::ffi::$rust;)*
            unsafe extern "C" {
                $($(#[$pdoc])* pub fn $cpp($($parg: $pty),*) $(-> $pret)?;)*
            }

            /// The declarations of the C ABI, without their comments.
            pub const DECLARATIONS: &str = concat!(
                $(stringify!($constant), "=", stringify!($value), ";",)*
                $(stringify!($struct), "{", $(stringify!($field), ":", stringify!($fty), ",",)* "}",)*
                $(stringify!($callback), "(", $(stringify!($bty), ",",)* ")",)*
                $(stringify!($rust), "(", $(stringify!($rty), ",",)* ")", $(stringify!($rret),)? ";",)*
            );
        };
    }

    include!("contract.rs");
}
