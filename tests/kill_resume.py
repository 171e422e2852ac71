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
from collections import Counter
from pathlib import Path

from conftest import ROOT
from prompt_encoder import METHODS
from runs import assert_same_run, log_of, write_small

EPOCHS = 6


def start(arguments, kill_after=None):
    """Run train.py to its end, or kill it so many seconds after it began to work -> seconds, or None if killed."""
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    any(" parameters (" in line for line in process.stdout)         # this line comes when the model is loaded
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


def moment(folder, halves):
    """Where a kill hit, by what is in the folder. halves: half-written files of earlier kills."""
    if set(folder.rglob("*.tmp*")) - halves:
        return "in a save"
    logs = sorted(folder.rglob("log.jsonl"))
    if not logs:
        return "before the first checkpoint"
    return "in the test or between trials" if len(log_of(logs[-1].parent)) == EPOCHS + 1 else "in an epoch"


def check(name, arguments, kills, folder):
    """Kill and resume, anew when a run reaches its end, until there were enough kills -> whether all were the same."""
    seconds = start([*arguments, "--out", folder / "whole"])
    moments, runs, same = Counter(), 0, True
    while moments.total() < kills:
        runs += 1
        run, ended = folder / f"run-{runs}", None
        while ended is None:
            halves = set(run.rglob("*.tmp*"))
            kill_after = random.uniform(0, seconds) if moments.total() < kills else None
            ended = start([*arguments, "--out", run, "--resume"], kill_after)
            if ended is None:
                moments[moment(run, halves)] += 1
        try:
            assert_same_run(run, folder / "whole")
        except AssertionError as error:
            print(f"{name}: {run} differs from {folder / 'whole'} in {error}")
            same = False
    where = ", ".join(f"{n} {moment}" for moment, n in moments.most_common())
    print(f"{name}: {moments.total()} kills in {runs} runs ({where}): best.pt, generations.jsonl, results.json and "
          f"log.jsonl are {'equal' if same else 'NOT EQUAL'}", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each method (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "trials"], help="default: all, and trials")
    parser.add_argument("--seed", type=int, help="of the moments (default: another one each time)")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    flags = [*write_small(folder), "--epochs", EPOCHS]
    methods = {method: ["--method", method] for method in METHODS} | {"trials": ["--method", "soft", "--trials", 2]}
    same = [check(name, [*methods[name], *flags], args.kills, folder / name) for name in args.methods]
    if not all(same):
        sys.exit(f"the runs are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
