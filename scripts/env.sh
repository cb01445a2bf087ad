# The scripts beside it source this: it goes to the top of the clone, chooses the target directory and the processor to build for,
# and sets the variables for the RocksDB library that `scripts/rocksdb` has compiled.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The packages below RocksDB, tested in the dev profile with debug assertions, and those that link it, in the one profile that it is
# compiled in. Always whole: with another selection cargo compiles the dependencies with other features.
# shellcheck disable=SC2034
low=(
    -p pumice-tidy -p pumice-io -p pumice-nvme -p pumice-nvme-soft -p pumice-bdev -p pumice-bdev-control
    -p pumice-bdev-testkit -p pumice-describe -p pumice-confine -p pumice-blobfs -p pumice-leveldb -p pumice-rig -p pumice-rocksdb-fs
    -p pumice-c
)
# shellcheck disable=SC2034
high=(--release -p pumice -p pumice-cli -p pumice-rocksdb-tools -p pumice-bench -p pumice-examples -p pumice-cluster -p pumice-embed)

# A target directory outside the clone is used if it exists, so that clones share what takes long to compile.
shared_target="${XDG_CACHE_HOME:-$HOME/.cache}/pumice/target"
if [ -z "${CARGO_TARGET_DIR:-}" ] && [ -d "$shared_target" ]; then
    export CARGO_TARGET_DIR="$shared_target"
fi
target="${CARGO_TARGET_DIR:-$PWD/target}"

# RocksDB computes checksums three times as fast with SSE4.2 and PCLMULQDQ (processors since 2010), but only if the compiler
# may use them. PUMICE_CPU=native builds for this machine. PUMICE_CPU=generic, or your own RUSTFLAGS, leave the flags unchanged.
if [ -z "${RUSTFLAGS+set}" ] && [ "$(uname -m)" = x86_64 ]; then
    case "${PUMICE_CPU:-v2}" in
        native) export RUSTFLAGS="-C target-cpu=native" ;;
        generic) ;;
        v2)
            if grep -m 1 '^flags' /proc/cpuinfo | grep -w sse4_2 | grep -w popcnt | grep -qw pclmulqdq; then
                export RUSTFLAGS="-C target-cpu=x86-64-v2 -C target-feature=+pclmulqdq"
            else
                echo "env: this processor has no SSE4.2 or no PCLMULQDQ: built for any x86-64, with slower checksums" >&2
            fi
            ;;
        *)
            echo "env: PUMICE_CPU=$PUMICE_CPU: not one of v2, native, generic" >&2
            exit 2
            ;;
    esac
fi

if [ "${1:-}" != --no-rocksdb ] && [ -z "${ROCKSDB_LIB_DIR:-}" ]; then
    if rocksdb=$(scripts/rocksdb --where 2>/dev/null) && [ -n "$rocksdb" ]; then
        export ROCKSDB_LIB_DIR="$rocksdb" ROCKSDB_STATIC=1
    fi
fi
