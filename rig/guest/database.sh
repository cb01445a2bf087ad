# Tests RocksDB on the file system, the driver and the device: it is filled and read, every key is checked, and another process
# checks it again on the device.
device=nvme://$(slot 8)/2
bench() {
	db_bench --device=$device --num=20000 --value_size=100 --write_buffer_size=1048576 \
		--compression_type=none --stats_interval_seconds=0 "$@"
}
step "the database fills and reads" bench --benchmarks=fillrandom,readrandom --verify
step "it is there for the next process" bench --use_existing_db=1 --benchmarks=readrandom --verify
step "synced writes" bench --use_existing_db=1 --sync=1 --num=200 --benchmarks=fillrandom
step "the file system is whole" pumice fsck $device
