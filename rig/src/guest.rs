//! Commands that the guest's scripts need and busybox does not have.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use clap::Subcommand;

/// Commands for use inside the guest.
#[derive(Subcommand)]
pub enum Cmd {
    /// Send one admin command without data through the kernel's own driver
    Admin {
        /// Controller, such as `/dev/nvme0`
        device: String,
        /// Opcode
        opcode: u8,
        /// Command dword 10
        cdw10: u32,
        /// Command dword 11
        cdw11: u32,
    },
}

/// The kernel's `struct nvme_passthru_cmd` (Linux `include/uapi/linux/nvme_ioctl.h`).
#[repr(C)]
#[derive(Default)]
struct Passthrough {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<Passthrough>() == 72);

/// The ioctl number `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = 0xc048_4e41;

impl Cmd {
    /// Runs the command. The exit code is 1 for a status other than success.
    pub fn run(&self) -> ExitCode {
        let Cmd::Admin {
            device,
            opcode,
            cdw10,
            cdw11,
        } = self;
        let file = match File::open(device) {
            Ok(file) => file,
            Err(e) => {
                eprintln!("{device}: {e}");
                return ExitCode::from(2);
            }
        };
        let mut command = Passthrough {
            opcode: *opcode,
            cdw10: *cdw10,
            cdw11: *cdw11,
            timeout_ms: 5000,
            ..Passthrough::default()
        };
        // SAFETY: the descriptor is open for the whole call, the request matches the type of its
        // argument, and the command names no data buffer for the kernel to touch.
        let status = unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                NVME_IOCTL_ADMIN_CMD,
                std::ptr::from_mut(&mut command),
            )
        };
        let error = std::io::Error::last_os_error();
        match status {
            0 => ExitCode::SUCCESS,
            s if s > 0 => {
                eprintln!("{device}: opcode {opcode:#x}: status {s:#x}");
                ExitCode::from(1)
            }
            _ => {
                eprintln!("{device}: opcode {opcode:#x}: {error}");
                ExitCode::from(2)
            }
        }
    }
}
