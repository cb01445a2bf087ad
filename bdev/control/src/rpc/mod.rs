//! JSON-RPC 2.0 on a Unix socket, with SPDK's method names and forms, so that SPDK's `rpc.py` works
//! with a process of ours.
//!
//! Only the owner may connect. A client that sends invalid messages, too much, or nothing for too
//! long gets an error where possible and is disconnected. Other clients are not affected.

mod client;
mod frame;
mod message;
mod server;

pub use client::{RpcClient, RpcError};
pub use message::handle;
pub(crate) use server::clear_stale;
pub use server::{RpcServer, ServerOptions, serve};
