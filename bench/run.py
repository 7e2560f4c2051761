"""Run the whole suite and write the page: ``python bench/run.py`` (15 minutes), ``--quick`` (five).

Each file of benches runs in a process of its own and leaves one JSON file in ``--out``; ``report.py`` merges
them. Files named as arguments run alone, the rest of the page then comes from what ``--out`` already holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def main() -> int:
    """Command line; the exit status is 0 if every bench ran and was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("only", nargs="*", help="parts of names: blend, stats, steps, ... (default: all)")
    parser.add_argument("--quick", action="store_true", help="the most telling cases, in five minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON files")
    parser.add_argument(
        "--docs", type=Path, help="where the page goes (default: docs/, with --quick beside the JSON)"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = sorted(BENCH.glob("*/bench_*.py"))
    wanted = [f for f in files if not arguments.only or any(part in f.stem for part in arguments.only)]
    if not wanted:
        parser.error(f"only: expected parts of {', '.join(f.stem for f in files)}, got {arguments.only}")
    failed = []
    for path in wanted:
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(path),
            "-q",
            "--no-header",
            "--benchmark-columns=median,iqr",
        ]
        command += [f"--benchmark-json={arguments.out / path.stem}.json", f"--rootdir={BENCH.parent}"]
        command += ["--quick"] if arguments.quick else []
        command += [f"--bench-device={arguments.device}"] if arguments.device else []
        log = arguments.out / f"{path.stem}.log"
        with log.open("w") as output:
            status = subprocess.run(
                command, cwd=BENCH.parent, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        print(
            f"{path.stem}: {'ok' if status == 0 else f'FAILED, see {log}'}, {time.monotonic() - start:.0f} s",
            flush=True,
        )
        failed += [path.stem] if status else []
    found = [str(p) for p in sorted(arguments.out.glob("bench_*.json")) if p.stat().st_size]
    docs = arguments.docs or (arguments.out if arguments.quick else BENCH.parent / "docs")
    report = [sys.executable, str(BENCH / "report.py")]
    subprocess.run([*report, "--bars", *found], check=True)
    subprocess.run([*report, f"--docs={docs}", *found], check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
