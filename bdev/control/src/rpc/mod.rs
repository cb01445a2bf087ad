//! JSON-RPC 2.0 on a Unix socket, with SPDK's method names and shapes, so that its `rpc.py` talks
//! to a process of ours.
//!
//! Only the owner may connect. A client that sends nonsense, too much, or nothing for too long is
//! told so where that is possible and let go; the others do not notice.

mod client;
mod frame;
mod message;
mod server;

pub use client::{RpcClient, RpcError};
pub use message::handle;
pub(crate) use server::clear_stale;
pub use server::{RpcServer, ServerOptions, serve};
