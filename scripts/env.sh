# Sourced by the scripts beside it: goes to the top of the clone and chooses the target directory.
# A target directory outside the clone is used where one exists, since RocksDB takes long to compile.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shared_target="${XDG_CACHE_HOME:-$HOME/.cache}/pumice/target"
if [ -z "${CARGO_TARGET_DIR:-}" ] && [ -d "$shared_target" ]; then
    export CARGO_TARGET_DIR="$shared_target"
fi
target="${CARGO_TARGET_DIR:-$PWD/target}"
