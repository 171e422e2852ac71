"""Kill `python train.py` at random moments, resume it until it ends, and compare it with a run that nothing disturbed.
Run by hand:

    python tests/kill_resume.py                             20 kills for each method, and for a run of two trials
    python tests/kill_resume.py --kills 3 --methods soft dynamic
"""
import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT
from prompt_encoder import METHODS
from runs import assert_same_run, write_small

EPOCHS = 6


def start(arguments, kill_after=None, until=" parameters ("):
    """Run train.py to its end, or kill it so many seconds after a certain line -> the seconds from there, or None if
    killed. That line comes when the model is loaded, unless `until` says otherwise."""
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    any(until in line for line in process.stdout)
    begun = time.perf_counter()
    try:
        process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        sys.exit(f"train.py ended with status {process.returncode}")
    return time.perf_counter() - begun


def check(name, arguments, kills, folder):
    """Kill and resume, anew when a run reaches its end, until there were enough kills -> whether all were the same."""
    seconds = start([*arguments, "--out", folder / "whole"])
    killed, runs, same = 0, 0, True
    while killed < kills:
        runs += 1
        run = folder / f"run-{runs}"
        while not start([*arguments, "--out", run, "--resume"], random.uniform(0, seconds) if killed < kills else None):
            killed += 1
        try:
            assert_same_run(run, folder / "whole")
        except AssertionError as error:
            print(f"{name}: {run} differs from {folder / 'whole'} in {error}")
            same = False
    print(f"{name}: {killed} kills in {runs} runs: best.pt, generations.jsonl, results.json and log.jsonl are "
          f"{'equal' if same else 'NOT EQUAL'}", flush=True)
    return same


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=20, help="for each method (default: %(default)s)")
    flags.add_argument("--methods", nargs="+", default=[*METHODS, "trials"], help="default: all, and trials")
    args = flags.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    settings = [*write_small(folder), "--epochs", EPOCHS, "--patience", EPOCHS]
    methods = {method: ["--method", method] for method in METHODS} | {"trials": ["--method", "soft", "--trials", 2]}
    same = [check(name, [*methods[name], *settings], args.kills, folder / name) for name in args.methods]
    if not all(same):
        sys.exit(f"the runs are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
