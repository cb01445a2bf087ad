#!/usr/bin/env python3
"""Records which pages of its tables RocksDB reads and writes, for benches/policies.rs.

    record.py DB_BENCH DIRECTORY     (needs strace; makes a database of 74 MB in DIRECTORY)

db_bench runs on the kernel's file system with a block cache of 1 MiB, so that nearly all reads reach the file system.
A trace has every access of every fourth page (SHARDS, Waldspurger et al., FAST 2015): a cache of a quarter of the size
has the same share of hits. An access is a number of seven bits to a byte, the lowest first: 4 * difference to the page of
the access before, in zigzag, + kind. Kinds: 0 a read of the foreground, 1 of a compaction or flush, 2 a write; 3 changes
the file, to the number that takes the place of the page.
"""

import pathlib
import re
import subprocess
import sys

COMMON = "--env=kernel --num=1000000 --value_size=100 --compression_type=none --cache_size=1048576 --key_size=16 --seed=7"
SKEW = "--read_random_exp_range=15"
MIXGRAPH = (
    "--key_dist_a=0.002312 --key_dist_b=0.3467 --keyrange_dist_a=14.18 --keyrange_dist_b=-2.917"
    " --keyrange_dist_c=0.0164 --keyrange_dist_d=-0.08082 --keyrange_num=30 --value_k=0.2615 --value_sigma=25.45"
    " --iter_k=2.517 --iter_sigma=14.236 --mix_get_ratio=0.83 --mix_put_ratio=0.14 --mix_seek_ratio=0.03"
    " --sine_mix_rate_interval_milliseconds=5000 --sine_a=1000 --sine_b=0.000073 --sine_d=450000"
)
RUNS = {
    "uniform": "--benchmarks=readrandom --reads=150000",
    "skewed": f"--benchmarks=readrandom --reads=150000 {SKEW}",
    "seeks": "--benchmarks=seekrandom --reads=40000 --seek_nexts=20",
    "scan": f"--benchmarks=readrandom,readseq,readrandom --reads=100000 {SKEW}",
    "mixgraph": f"--benchmarks=mixgraph --reads=60000 {MIXGRAPH}",
    "beside": f"--benchmarks=readwhilewriting --threads=2 --reads=75000 {SKEW} --write_buffer_size=2097152"
    " --target_file_size_base=2097152 --max_bytes_for_level_base=8388608 --benchmark_write_rate_limit=3000000",
}
PAGE = 4096
CALL = re.compile(r"(\d+)<(.*?)> (.*)$")
RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)$")
OPENED = re.compile(r'openat\(.*?"(.*?)".*\) = (\d+)')
TRANSFER = re.compile(r"p?(read|write)(?:64)?\((\d+), .*?, (\d+)(?:, (\d+))?\) += (\d+)")


def accesses(path):
    """Yields kind, file and page of each access to a table."""
    names, files, ends, begun = {}, {}, {}, {}
    for line in open(path, errors="replace"):
        call = CALL.match(line)
        if not call:
            continue
        thread, name, text = call.groups()
        if "<unfinished" in text:
            begun[thread] = text.split("<unfinished")[0]
            continue
        resumed = RESUMED.match(text)
        if resumed:
            text = begun.pop(thread, "") + resumed.group(1)
        opened = OPENED.match(text)
        if opened:
            names[opened.group(2)] = opened.group(1)
            continue
        transfer = TRANSFER.match(text)
        if not transfer or not names.get(transfer.group(2), "").endswith(".sst"):
            continue
        what, fd, _, offset, done = transfer.groups()
        file = files.setdefault(names[fd], len(files))
        offset, done = int(offset or ends.get(file, 0)), int(done)
        kind = 2 if what == "write" else 1 if "rocksdb:" in name else 0
        if kind == 2:
            ends[file] = offset + done
        for page in range(offset // PAGE, (offset + done + PAGE - 1) // PAGE):
            yield kind, file, page


def sampled(file, page):
    return ((file * 0x9E3779B1 + page * 0x85EBCA77) >> 7) % 4 == 0


def number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return out


def encode(found, every):
    out, file, last = bytearray(), None, 0
    for kind, at, page in found:
        if not every and not sampled(at, page):
            continue
        if at != file:
            out += number(at << 2 | 3)
            file = at
        step = page - last
        out += number((step * 2 if step >= 0 else -step * 2 - 1) << 2 | kind)
        last = page
    return bytes(out)


def main():
    program, work = sys.argv[1], pathlib.Path(sys.argv[2])
    common = [program, f"--db={work / 'db'}", *COMMON.split()]
    subprocess.run([*common, "--benchmarks=fillrandom,compact"], check=True, stdout=subprocess.DEVNULL)
    for name, flags in RUNS.items():
        log = work / f"{name}.log"
        strace = ["strace", "-f", "--decode-pids=comm", "-e", "trace=openat,pread64,pwrite64,write", "-o", log]
        run = [*strace, *common, "--use_existing_db", *flags.split()]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        trace = encode(accesses(log), every=name == "mixgraph")
        (pathlib.Path(__file__).parent / f"{name}.trace").write_bytes(trace)
        print(f"{name}: {len(trace)} bytes")
        log.unlink()


main()
