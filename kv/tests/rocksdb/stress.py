#!/usr/bin/env python3
"""Runs db_stress for a while with a parameter set of RocksDB's db_crashtest.py, again and again on one database.

    stress.py TOOLS SET SECONDS PROGRAM URI [ARGUMENTS of db_stress]

TOOLS is the folder of db_crashtest.py. Each run draws new parameters, ends by itself and checks the values
that it expects. Unlike db_crashtest.py, this kills nothing. The exit code is 0 if every run was without a finding.
"""

import subprocess
import sys
import time

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


def main():
    tools, name, seconds, program, uri = sys.argv[1:6]
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
        end = time.time() + int(seconds)
        runs = 0
        while time.time() < end:
            db_crashtest.apply_random_seed_per_iteration()
            command, _ = db_crashtest.gen_cmd(dict(params), unknown_args)
            print(" ".join(command), flush=True)
            # A run that takes a quarter of an hour hangs.
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            print(done.stdout, done.stderr, flush=True)
            if done.returncode != 0 or done.stderr:
                sys.exit(f"run {runs + 1} ended with exit code {done.returncode}")
            runs += 1
            params["destroy_db_initially"] = 0
        print(f"{runs} runs without a finding")

    db_crashtest.whitebox_crash_main = run
    db_crashtest.main()


main()
