"""Run the whole suite and write the page: ``python bench/run.py`` (nine minutes), ``--quick`` (two).

The training steps run in a process of their own, the rest in another. Each file of benches leaves a JSON file
in ``--out``, and ``report.py`` merges them. Files named as arguments run alone, the rest of the page then
comes from what ``--out`` already holds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ALONE = ("bench_steps",)
"""Whole training steps have a process of their own: its memory is as a training run finds it."""


def run(name: str, paths: list[Path], out: Path, options: list[str]) -> bool:
    """Run files in one process, tell of each when it is done, and keep its figures; whether all was right."""
    together, log = (out / f"{name}.json").resolve(), out / f"{name}.log"
    command = [sys.executable, "-m", "pytest", *map(str, paths), "-q", "--no-header", *options]
    command += ["--benchmark-columns=median,iqr", f"--benchmark-json={together}", f"--rootdir={BENCH.parent}"]
    # -m puts the current folder on sys.path; in the root, the source tree would hide the installed tolaria.
    with (
        log.open("w") as copy,
        subprocess.Popen(
            command, cwd=BENCH, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            copy.write(line)
            if re.match(r"bench_\w+: ", line):
                print(line, end="", flush=True)
    if process.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-60:]), end="")
        print(f"{name}: FAILED, its last lines are above; all of it: {log}", flush=True)
    if together.is_file() and together.stat().st_size:
        data = json.loads(together.read_text())
        for path in paths:
            rows = [row for row in data["benchmarks"] if f"/{path.name}::" in row["fullname"]]
            (out / f"{path.stem}.json").write_text(json.dumps({**data, "benchmarks": rows}))
    together.unlink(missing_ok=True)
    return process.returncode == 0


def main() -> int:
    """Command line; the exit status is 0 if every bench ran and was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="parts of names: blend, stats, steps, ... (default: all)")
    parser.add_argument("--quick", action="store_true", help="the most telling cases, in two minutes")
    parser.add_argument("--smoke", action="store_true", help="a tiny case of each bench, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON files")
    parser.add_argument(
        "--docs", type=Path, help="where the page goes (default: docs/, if not full beside the JSON)"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = sorted(BENCH.glob("*/bench_*.py"))
    wanted = [f for f in files if not arguments.only or any(part in f.stem for part in arguments.only)]
    if not wanted:
        parser.error(f"only: expected parts of {', '.join(f.stem for f in files)}, got {arguments.only}")
    is_full = not (arguments.quick or arguments.smoke)
    options = [option for option in ("--quick", "--smoke") if getattr(arguments, option[2:])]
    options += [f"--bench-device={arguments.device}"] if arguments.device else []
    is_right = True
    for name, is_alone in (("ops", False), ("steps", True)):
        ours = [path for path in wanted if (path.stem in ALONE) == is_alone]
        is_right &= not ours or run(name, ours, arguments.out, options)
    found = [str(path) for path in sorted(arguments.out.glob("bench_*.json"))]
    docs = arguments.docs or (BENCH.parent / "docs" if is_full else arguments.out)
    report = [sys.executable, str(BENCH / "report.py"), "--bars", f"--docs={docs}"]
    subprocess.run([*report, *found], check=True)
    print(f"total: {time.monotonic() - start:.0f} s")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
