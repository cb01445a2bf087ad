//! The instructions that this program was built with, and a check that the processor has them.
//!
//! `scripts/env.sh` builds for x86-64-v2 and PCLMULQDQ, since RocksDB's fast checksum exists only
//! where the compiler may use them. On a processor without them the program would end by SIGILL,
//! often before `main`, in a constructor of the C++ library. A constructor of this module runs
//! before those and ends the program with one line instead.

/// Returns the required instruction sets as text: "SSE4.2, PCLMULQDQ" and so on, or "any x86-64".
#[must_use]
pub fn built_for() -> String {
    let used: Vec<&str> = [
        (cfg!(target_feature = "avx2"), "AVX2"),
        (cfg!(target_feature = "sse4.2"), "SSE4.2"),
        (cfg!(target_feature = "pclmulqdq"), "PCLMULQDQ"),
    ]
    .into_iter()
    .filter_map(|(is_used, name)| is_used.then_some(name))
    .collect();
    if used.is_empty() {
        format!("any {}", std::env::consts::ARCH.replace('_', "-"))
    } else {
        used.join(", ")
    }
}

/// Whether RocksDB's three-way CRC-32C was compiled in. Without it checksums take about three times
/// as long.
#[must_use]
pub const fn has_fast_crc32c() -> bool {
    cfg!(all(
        target_arch = "x86_64",
        target_feature = "sse4.2",
        target_feature = "pclmulqdq"
    ))
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod start {
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    const fn bit(is_used: bool, bit: u32) -> u32 {
        if is_used { 1 << bit } else { 0 }
    }

    /// The bits of CPUID leaf 1, ECX, and leaf 7, EBX, that the build requires. Source: Intel 64
    /// and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID.
    const LEAF_1_ECX: u32 = bit(cfg!(target_feature = "sse3"), 0)
        | bit(cfg!(target_feature = "pclmulqdq"), 1)
        | bit(cfg!(target_feature = "ssse3"), 9)
        | bit(cfg!(target_feature = "fma"), 12)
        | bit(cfg!(target_feature = "cmpxchg16b"), 13)
        | bit(cfg!(target_feature = "sse4.1"), 19)
        | bit(cfg!(target_feature = "sse4.2"), 20)
        | bit(cfg!(target_feature = "popcnt"), 23)
        | bit(cfg!(target_feature = "avx"), 28);
    const LEAF_7_EBX: u32 = bit(cfg!(target_feature = "bmi1"), 3)
        | bit(cfg!(target_feature = "avx2"), 5)
        | bit(cfg!(target_feature = "bmi2"), 8)
        | bit(cfg!(target_feature = "avx512f"), 16);

    const fn lacks(found: u32, needed: u32) -> bool {
        found & needed != needed
    }

    const LINE: &[u8] = b"this processor has no SSE4.2, PCLMULQDQ or other instructions for which this program was built: \
        build it with PUMICE_CPU=generic\n";

    /// Checks the processor. It runs before `main` and before the constructors of C++, and must not
    /// call anything that might use a missing instruction. So there is no formatting here, and the
    /// line cannot name the single instruction.
    extern "C" fn refuse_an_older_processor() {
        let leaf_1 = __cpuid(1).ecx;
        let leaf_7 = if __cpuid(0).eax >= 7 {
            __cpuid_count(7, 0).ebx
        } else {
            0
        };
        if lacks(leaf_1, LEAF_1_ECX) || lacks(leaf_7, LEAF_7_EBX) {
            // SAFETY: the pointer and the length are those of a static; `_exit` runs no handler and
            // does not return.
            #[allow(unsafe_code, reason = "system calls before main")]
            unsafe {
                libc::write(libc::STDERR_FILENO, LINE.as_ptr().cast(), LINE.len());
                libc::_exit(2);
            }
        }
    }

    // SAFETY: the section holds function pointers that the C library's start-up code calls without
    // using their result; the function takes no argument, and priority 1 puts it before every
    // constructor of C++.
    #[allow(unsafe_code, reason = "the section of constructors")]
    #[unsafe(link_section = ".init_array.00001")]
    #[used]
    static CONSTRUCTOR: extern "C" fn() = refuse_an_older_processor;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_build_uses_is_named() {
        assert_eq!(has_fast_crc32c(), built_for().contains("SSE4.2, PCLMULQDQ"));
        assert!(!built_for().is_empty());
    }
}
