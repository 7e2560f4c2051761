"""Mutation check of the kernels: break one thing at a time, and see that a test fails.

    python build_tools/mutants.py [--backend cpu|cuda] [--file csrc/cpu/stats.cpp ...]
                                  [--kind store index ...] [--share 0.5] [--per-file 16] [--seed 0] [--list]

All mutants are built at once, in a copy of the tree (build/mutants/BACKEND), and switched on by number at run
time (mutant_schemata.py); mutant_runner.py runs the tests for each, those of the file's own family first,
then, for what is left, all in FOLDERS_OF_TESTS. For CUDA give a launcher of a device, such as
``--launcher path/to/vgpu/run``. Mutants that do not compile are dropped. docs/mutants.md says what survives,
and why.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from mutant_schemata import Mutant, mutants_of, rewrite

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"cpu": ("csrc/math", "csrc/cpu", "csrc/common", "csrc/autograd"), "cuda": ("csrc/cuda",)}
HEADER = """// The number of the mutant that is on; written by build_tools/mutants.py.
#pragma once
#ifdef __cplusplus
#include <cstdlib>
#include <type_traits>
namespace mutant {
inline int active = std::getenv("TOLARIA_MUTANT") ? std::atoi(std::getenv("TOLARIA_MUTANT")) : 0;
#ifdef __CUDACC__
static __device__ int active_on_device = 0;
__host__ __device__ inline __attribute__((always_inline)) bool on(int number) {
#ifdef __CUDA_ARCH__
  return active_on_device == number;
#else
  return active == number;
#endif
}
#else
inline __attribute__((always_inline)) bool on(int number) { return active == number; }
#endif
#ifdef __CUDACC__
template <class T>
__host__ __device__ inline std::decay_t<T> zero_of(const T&) { return std::decay_t<T>(); }
#else
template <class T>  // an object that stays: a function may return a reference to it
inline const std::decay_t<T>& zero_of(const T&) {
  static const std::decay_t<T> zero = std::decay_t<T>();
  return zero;
}
#endif
}  // namespace mutant
#endif
"""
# TOLARIA_MUTANT_ISA=0 or 1 tests the loops for lesser processors (no constant: chosen as the library loads).
SETTER = """
#include "cpu/isa.h"
extern "C" __attribute__((weak, visibility("default"))) void tolaria_set_mutant(int n) {
  ::mutant::active = n;
#ifdef TOLARIA_HAS_X86_VARIANTS
  using namespace tolaria::cpu;
  const char* isa = std::getenv("TOLARIA_MUTANT_ISA");
  if (isa != nullptr) const_cast<Isa&>(kIsa) = static_cast<Isa>(std::atoi(isa));
#endif
}
"""
DEVICE_SETTER = """
extern "C" __attribute__((visibility("default"))) void tolaria_set_mutant_UNIT(int n) {
  int devices = 0;
  (void)cudaGetDeviceCount(&devices);
  for (int device = devices - 1; device >= 0; --device) {
    (void)cudaSetDevice(device);
    (void)cudaMemcpyToSymbol(::mutant::active_on_device, &n, sizeof(n));
  }
}
"""
# Mutants are compiled for one use: optimised less. The other sources stay what the compiler's cache knows.
INCLUDE = '#include "mutant.h"\n'
FIRST_LINE = defaultdict(lambda: INCLUDE, {".cpp": "#pragma GCC optimize(1)\n" + INCLUDE})
# The tests that know most of a family of files; the first pattern found in a file's name decides.
GOVERNOR = "test_lanes.py test_verdicts.py test_options.py test_rollback.py test_bank.py test_any_bytes.py"
FAMILIES = (
    ("governor|lanes.h", ["ops/test_governor.py", *(f"governor/{name}" for name in GOVERNOR.split())]),
    ("page_locked", ["snapshot/test_page_locked.py", "governor/test_device.py"]),
    ("snapshot", ["ops/test_snapshot.py", "governor/test_rollback.py", "snapshot/test_replaced_state.py"]),
    ("stats|multi_tensor", ["ops/test_stats.py"]),
    ("metrics", ["ops/test_metrics.py"]),
    ("output_pool|cache", ["ops/test_output_pool.py", "ops/test_blend.py"]),
    (
        "",
        [f"ops/test_{name}.py" for name in ("blend*", "straight_through", "output_pool", "stats", "metrics")],
    ),
)
DEVICE_TESTS = ["ops/test_device_parity.py", "ops/test_device_streams.py"]
FOLDERS_OF_TESTS = ("ops", "snapshot", "telemetry", "governor")
TOO_LONG = ("tests/governor/test_distributed.py",)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=FOLDERS, default="cpu")
    parser.add_argument("--file", nargs="*", default=[], help="only these files")
    parser.add_argument(
        "--kind", nargs="*", default=[], help="only these kinds: store, index, comparison, ..."
    )
    parser.add_argument("--share", type=float, default=1.0, help="the share of the mutants, drawn by --seed")
    parser.add_argument("--per-file", type=int, help="at most so many of a file, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, nargs="*", help="only these, by the number in --out or --list")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument(
        "--launcher", default="", help="a command that runs what follows it, with a CUDA device"
    )
    parser.add_argument("--only-near", action="store_true", help="only the tests of the file's own family")
    parser.add_argument(
        "--budget", type=float, default=0.0, help="seconds of tests for a mutant, 0: all tests"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    return parser.parse_args()


def choose(args: argparse.Namespace) -> list[Mutant]:
    """Every mutant of the backend's files, numbered, thinned out as asked for."""
    chosen: list[Mutant] = []
    draw = random.Random(args.seed)
    number = 0
    for folder in FOLDERS[args.backend]:
        for path in sorted((ROOT / folder).iterdir()):
            name = path.relative_to(ROOT).as_posix()
            for mutant in mutants_of(path.read_text(), name):
                number += 1
                mutant.number = number
                is_drawn = draw.random() < args.share
                if args.file and name not in args.file:
                    continue
                if args.kind and mutant.kind not in args.kind:
                    continue
                if is_drawn if args.number is None else number in args.number:
                    chosen.append(mutant)
    return chosen if args.per_file is None else thin(chosen, args.per_file, draw)


def thin(mutants: list[Mutant], most: int, draw: random.Random) -> list[Mutant]:
    """At most so many mutants of a file, in their order."""
    by_file: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_file[mutant.file].append(mutant)
    drawn = [draw.sample(found, min(most, len(found))) for found in by_file.values()]
    return sorted((mutant for found in drawn for mutant in found), key=lambda mutant: mutant.number)


class Tree:
    """The copy of the tree that has the mutants built in."""

    def __init__(self, backend: str, mutants: list[Mutant]) -> None:
        self.backend, self.mutants = backend, mutants
        self.folder = ROOT / "build" / "mutants" / backend
        self.dropped: list[Mutant] = []
        self.units = (
            sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")) if backend == "cuda" else []
        )

    def copy(self) -> None:
        """Everything that git would keep; a file that is the same stays as it is."""
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )
        for name in filter(None, names):
            if name.startswith("csrc/") or not (ROOT / name).is_file():
                continue
            text = (ROOT / name).read_bytes()
            self._write(name, text)
        stale = {path for path in (self.folder / "tests").rglob("*.py")} if self.folder.exists() else set()
        for path in stale - {self.folder / name for name in names}:
            path.unlink()

    def _write(self, name: str, text: bytes) -> None:
        path = self.folder / name
        if path.exists() and path.read_bytes() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)

    def write_sources(self) -> None:
        """Write csrc with the mutants that are not dropped."""
        by_file: dict[str, list[Mutant]] = defaultdict(list)
        for mutant in self.mutants:
            by_file[mutant.file].append(mutant)
        setters = {name for name in by_file if name.endswith(".cpp")} or {"csrc/registration.cpp"}
        self._write("csrc/mutant.h", HEADER.encode())
        for path in sorted((ROOT / "csrc").rglob("*.*")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text()
            if by_file[name] or name in setters or path.stem in self.units:
                text = FIRST_LINE[path.suffix] + rewrite(text, by_file[name])
            if name in setters:
                text += SETTER
            if path.suffix == ".cu" and path.stem in self.units:
                text += DEVICE_SETTER.replace("UNIT", path.stem)
            self._write(name, text.encode())

    def build(self, prefix: list[str]) -> None:
        """Compile; drop what does not, and again."""
        environment = {**os.environ, "TOLARIA_CUDA": "1" if self.units else "0"}
        if self.units:
            environment.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX")
        setup = [*prefix, sys.executable, "setup.py", "build_ext", "--inplace"]
        for attempt in range(40):
            self.write_sources()
            done = subprocess.run(
                setup, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return
            output = done.stdout + done.stderr
            ninja = next(iter(self.folder.glob("build/temp*/build.ninja")), None)
            if ninja is not None:
                all_errors = ["ninja", "-k", "0", "-C", str(ninja.parent)]
                output = subprocess.run(
                    all_errors, env=environment, capture_output=True, text=True, check=False
                ).stdout
            bad = self._blamed(output, whole_lines=attempt >= 20)
            if not bad:
                (self.folder / "errors.txt").write_text(output)
                sys.exit(f"mutants: the build fails and no mutant is to blame; see {self.folder}/errors.txt")
            print(f"mutants: {len(bad)} do not compile", flush=True)
            self.dropped += [mutant for mutant in self.mutants if mutant.number in bad]
            self.mutants = [mutant for mutant in self.mutants if mutant.number not in bad]
        sys.exit("mutants: the build still fails")

    def _blamed(self, output: str, whole_lines: bool) -> set[int]:
        """The numbers of the mutants at the places of the compilers' errors."""
        bad: set[int] = set()
        lines = output.split("\n")
        ours = re.compile(r"(csrc/[\w./]+?)[:(](\d+)(?::(\d+))?")
        last = None
        for i, line in enumerate(lines):
            place = ours.search(line)
            last = place or last
            if not re.search(r"\b(error|fatal error)\b(:| #)", line):
                continue
            place = place or next(filter(None, map(ours.search, lines[i : i + 30])), None) or last
            if place is None:
                continue
            source = (self.folder / place[1]).read_text().split("\n")[int(place[2]) - 1]
            column = int(place[3] or 0)
            if not column:  # nvcc shows the line and a caret
                caret = next((x for x in lines[i + 1 : i + 4] if x.strip() == "^"), None)
                shown = lines[i + 1] if caret is not None else ""
                indent = len(shown) - len(shown.lstrip()) - (len(source) - len(source.lstrip()))
                column = caret.index("^") + 1 - indent if caret is not None else 0
            found = [(m.start(), int(m[1])) for m in re.finditer(r"::mutant::on\((\d+)\)", source)]
            before = [number for start, number in found if start <= column + 12]
            if whole_lines or not column or not before:
                bad.update(number for _, number in found)
            else:
                bad.add(before[-1])
        return bad


def tests_of(tree: Tree, file: str) -> list[str]:
    """The test files of a source file's family."""
    patterns = next(tests for pattern, tests in FAMILIES if re.search(pattern, Path(file).name))
    patterns = patterns + DEVICE_TESTS if tree.units else patterns
    found = [path for pattern in patterns for path in sorted((tree.folder / "tests").glob(pattern))]
    return [path.relative_to(tree.folder).as_posix() for path in found]


def all_tests(tree: Tree) -> list[str]:
    """All that could notice a mutant, but what takes too long."""
    folders = (tree.folder / "tests" / kind for kind in FOLDERS_OF_TESTS)
    found = [
        path.relative_to(tree.folder).as_posix() for f in folders for path in sorted(f.glob("test_*.py"))
    ]
    return [name for name in found if name not in TOO_LONG]


def run_tests(
    tree: Tree, mutants: list[Mutant], tests: list[str], prefix: list[str]
) -> dict[int, dict[str, object]]:
    """One pytest session: the result of each mutant."""
    jobs = [{"number": mutant.number, "file": mutant.file} for mutant in mutants]
    (tree.folder / "jobs.json").write_text(json.dumps(jobs))
    results = tree.folder / "results.jsonl"
    results.unlink(missing_ok=True)
    marks = ["-m", "(cuda or multi_gpu) and not slow"] if tree.units else []
    options = ["-q", "-p", "mutant_runner", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--no-header"]
    command = [*prefix, sys.executable, "-m", "pytest", *options, *marks, *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree.folder / "build_tools"), "PYTHON": sys.executable}
    if tree.units:
        environment["TOLARIA_MUTANT_UNITS"] = " ".join(tree.units)
    done = subprocess.run(
        command, cwd=tree.folder, env=environment, check=False, capture_output=True, text=True
    )
    if not results.exists() or done.returncode not in {0, 1}:
        sys.exit(f"mutants: pytest failed\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    found: dict[int, dict[str, object]] = {}
    for line in results.read_text().splitlines():
        result = json.loads(line)
        if result["number"] == 0:
            print(f"mutants: left out, since it fails without a mutant: {result['by']}", flush=True)
        else:
            found[result["number"]] = result
    return found


def run(tree: Tree, prefix: list[str], only_near: bool) -> dict[int, dict[str, object]]:
    """The tests of each family for its files' mutants, then all tests for the survivors."""
    groups: dict[tuple[str, ...], list[Mutant]] = defaultdict(list)
    for mutant in tree.mutants:
        groups[tuple(tests_of(tree, mutant.file))].append(mutant)
    results: dict[int, dict[str, object]] = {}
    for tests, mutants in groups.items():
        print(f"mutants: {len(mutants)} of {', '.join(sorted({m.file for m in mutants}))}", flush=True)
        results |= run_tests(tree, mutants, list(tests), prefix)
    left = [mutant for mutant in tree.mutants if results[mutant.number]["how"] == "survived"]
    if left and not only_near:
        print(f"mutants: all tests for {len(left)} survivors", flush=True)
        results |= run_tests(tree, left, all_tests(tree), prefix)
    return results


def report(tree: Tree, results: dict[int, dict[str, object]], out: Path) -> None:
    """Write the results, print the table of files and the survivors."""
    rows = [
        {
            "number": m.number,
            "file": m.file,
            "line": m.line,
            "kind": m.kind,
            "what": m.what,
            **results[m.number],
        }
        for m in tree.mutants
    ]
    dropped = [{"file": m.file, "line": m.line, "kind": m.kind, "what": m.what} for m in tree.dropped]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"mutants": rows, "not compiled": dropped}, indent=1))
    total = Counter(m.file for m in tree.mutants)
    alive = Counter(str(row["file"]) for row in rows if row["how"] == "survived")
    for name in [*sorted(total), "all"]:
        count, left = (total.total(), alive.total()) if name == "all" else (total[name], alive[name])
        print(f"{name:36} {count:5} mutants, {count - left:5} killed, {left:4} survived")
    print(f"{len(dropped)} more did not compile")
    for row in rows:
        if row["how"] == "survived":
            print(f"survived {row['number']}: {row['file']}:{row['line']} {row['kind']}: {row['what']}")


def main() -> None:
    """Choose, build, run, report."""
    args = parse()
    mutants = choose(args)
    if args.list:
        for mutant in mutants:
            print(f"{mutant.number}: {mutant.file}:{mutant.line} {mutant.kind}: {mutant.what}")
        return
    if shutil.which("ninja") is None:
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    os.environ["TOLARIA_MUTANT_BUDGET"] = str(args.budget)
    begin = time.monotonic()
    prefix = args.launcher.split()
    tree = Tree(args.backend, mutants)
    tree.copy()
    tree.build(prefix)
    built = time.monotonic()
    print(f"mutants: {len(tree.mutants)} built in {built - begin:.0f} s", flush=True)
    report(tree, run(tree, prefix, args.only_near), args.out or tree.folder.with_suffix(".json"))
    print(f"mutants: tested in {time.monotonic() - built:.0f} s")


if __name__ == "__main__":
    main()
