"""Run device tests under many stream schedules of the virtual device, each in a process of its own.

    python build_tools/schedules.py --vgpu PATH/TO/vgpu/run [--starve 24] [--random 16] [PYTEST ARGUMENT...]

Without arguments for pytest: the tests of governor, snapshots and snapshot ops that are marked ``cuda``, but
those that go through schedules of their own. Ends with status 1 if a schedule failed, and says which.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

# The proof's stories choose their schedules themselves, one process can only repeat them.
PROOF = "tests/governor/test_device_proof.py"
FOLDERS = ("tests/governor", "tests/snapshot", "tests/telemetry", "tests/ops/test_snapshot.py")
TESTS = ("-m", "cuda", *FOLDERS, f"--ignore={PROOF}")


def schedules(starve: int, random: int, first: int) -> list[str]:
    """Two that are no lottery, then so many seeds of each kind."""
    seeds = [
        (kind, first + i) for kind, count in (("starve", starve), ("random", random)) for i in range(count)
    ]
    return ["eager", "lazy", *(f"{kind}:{seed}" for kind, seed in seeds)]


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vgpu", required=True, help="the virtual device's `run`")
    parser.add_argument("--starve", type=int, default=24)
    parser.add_argument("--random", type=int, default=16)
    parser.add_argument("--first", type=int, default=1000, help="the first seed")
    options, rest = parser.parse_known_args()
    failed = []
    for schedule in schedules(options.starve, options.random, options.first):
        environment = os.environ | {"VGPU_SCHEDULE": schedule, "TOLARIA_REQUIRE_CUDA": "1"}
        command = [options.vgpu, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(rest or TESTS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        print(f"{schedule:12} {last}", flush=True)
        if done.returncode != 0:
            failed.append(schedule)
            print(done.stdout[-4000:], flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
