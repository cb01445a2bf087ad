#!/usr/bin/env python3
"""Runs db_stress for a while with a parameter set of RocksDB's db_crashtest.py, again and again on one database.

    stress.py TOOLS SET SECONDS PROGRAM URI [ARGUMENTS of db_stress]
    stress.py TOOLS blackbox SECONDS PROGRAM URI [ARGUMENTS of db_stress]

TOOLS is the folder of db_crashtest.py. Each run of a set draws new parameters, ends by itself and checks the values
that it expects; nothing is killed. "blackbox" is db_crashtest.py's own loop with its default parameters: each run is
killed after some seconds, and the next one checks that nothing that had returned is lost.
The exit code is 0 if there was no finding.
"""

import signal
import subprocess
import sys
import time

# Seconds until a run of "blackbox" is killed.
KILLED_AFTER = 10

# What db_stress says of its own check of the MANIFEST, for which it lists the kernel's directory, whatever --fs_uri says.
LOOKS_ELSEWHERE = "Warning: Failed to list DB directory for MANIFEST verification"

# The flag by which db_crashtest.py names each set. "blob" is a set that it only draws at random.
FLAGS = {
    "simple": ["--simple"],
    "cf_consistency": ["--cf_consistency"],
    "txn": ["--txn"],
    "ts": ["--enable_ts"],
    "blob": ["--simple"],
    "optimistic_txn": ["--optimistic_txn"],
    "multiops_txn": ["--test_multiops_txn"],
}


def killing(tools, seconds, program, uri, more):
    """Runs db_crashtest.py's blackbox test."""
    # An error that db_stress did not inject itself is a finding. Pumice refuses memory-mapped reads.
    own = ["--tolerate_non_injected_io_errors_for_remote_dbs=0", "--mmap_read=0", "--backup_one_in=0"]
    limits = [f"--duration={seconds}", f"--interval={KILLED_AFTER}"]
    sys.argv = ["db_crashtest.py", "blackbox", f"--stress_cmd={program}", f"--fs_uri={uri}", *limits, *own, *more]
    sys.path.insert(0, tools)
    import db_crashtest

    kills = 0

    def killed(command, timeout=None, *_):
        nonlocal kills
        print(" ".join(command), flush=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=db_crashtest.stress_cmd_env(), **pipes) as process:
            try:
                out, err = process.communicate(timeout=timeout)
                print(out, err, flush=True)
                return False, process.returncode, out, err, process.pid
            except subprocess.TimeoutExpired:
                # Its own program asks with SIGTERM first, which db_stress answers by ending in order.
                process.send_signal(signal.SIGKILL)
                out, err = process.communicate()
                kills += 1
                print(out, err, flush=True)
                return True, process.returncode, out, err, process.pid

    db_crashtest.execute_cmd = killed
    # What it would remove is on the image.
    db_crashtest.cleanup_after_success = lambda *_: None
    db_crashtest.main()
    print(f"{kills} processes killed without a finding")


def main():
    tools, name, seconds, program, uri = sys.argv[1:6]
    if name == "blackbox":
        killing(tools, seconds, program, uri, sys.argv[6:])
        return
    # db_crashtest.py reads the command line when it is imported.
    sys.argv = ["db_crashtest.py", *FLAGS[name], "whitebox", f"--stress_cmd={program}", f"--fs_uri={uri}", *sys.argv[6:]]
    sys.path.insert(0, tools)
    import db_crashtest

    def run(args, unknown_args):
        params = db_crashtest.gen_cmd_params(args)
        if name == "blob":
            params.update(db_crashtest.blob_params)
        params["db"] = db_crashtest.get_db_parent_dir(name)
        params["expected_values_dir"] = db_crashtest.get_ev_parent_dir()
        params["destroy_db_initially"] = 1
        params["kill_random_test"] = None
        params["ops_per_thread"] = 3000
        # An error that db_stress did not inject itself is a finding.
        params["tolerate_non_injected_io_errors_for_remote_dbs"] = 0
        # Pumice refuses them.
        params["mmap_read"] = 0
        # db_stress opens what it has restored on the default file system, whatever --fs_uri says
        # (PrepareOptionsForRestoredDB makes the options from text, which has no Env).
        params["backup_one_in"] = 0
        end = time.time() + int(seconds)
        runs = 0
        while time.time() < end:
            db_crashtest.apply_random_seed_per_iteration()
            command, _ = db_crashtest.gen_cmd(dict(params), unknown_args)
            print(" ".join(command), flush=True)
            # A run that takes a quarter of an hour hangs.
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            print(done.stdout, done.stderr, flush=True)
            said = [line for line in done.stderr.splitlines() if line and not line.startswith(LOOKS_ELSEWHERE)]
            if done.returncode != 0 or said:
                sys.exit(f"run {runs + 1} ended with exit code {done.returncode}")
            runs += 1
            params["destroy_db_initially"] = 0
        print(f"{runs} runs without a finding")

    db_crashtest.whitebox_crash_main = run
    db_crashtest.main()


main()
