"""Compile every kernel for every architecture and write what ptxas says of them to ``docs/kernels.md``.

    python build_tools/ptxas_report.py [--archs 8.0 9.0] [--out docs/kernels.md]

Needs nvcc and a CUDA build of torch, for its headers; no GPU. Ends with status 1 if a kernel spills registers
or has a stack frame.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bare_package  # noqa: F401
import torch

from tolaria._build import cuda_home

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture."""

    registers: int
    shared: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Family:
    """The instances of one kernel template that work on packs, or on single elements, by one operation."""

    source: str
    name: str


def compile_source(nvcc: Path, source: Path, archs: list[str], folder: Path) -> tuple[str, str]:
    """What ptxas reports of a source file for all architectures, and its PTX for the first."""
    from torch.utils.cpp_extension import include_paths

    numbers = [arch.replace(".", "") for arch in archs]
    command = [str(nvcc), *cuda_home.NVCC_FLAGS, "--expt-relaxed-constexpr", "-Xptxas=-v"]
    command += [f"-isystem={path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command += [f"-I{ROOT / 'csrc'}", "-DTOLARIA_WITH_CUDA", str(source)]
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    ptx, device_code = folder / f"{source.stem}.ptx", folder / f"{source.stem}.fatbin"
    done = subprocess.run(
        [*command, *targets, "-fatbin", "-o", str(device_code)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        one = [*command, f"-arch=compute_{numbers[0]}", "-ptx", "-o", str(ptx)]
        done_ptx = subprocess.run(one, capture_output=True, text=True, check=False)
        if done_ptx.returncode == 0:
            return done.stdout + done.stderr, ptx.read_text()
        done = done_ptx
    sys.exit(f"nvcc failed on {source.name}:\n{done.stderr}")


def usages(report: str) -> Iterator[tuple[str, str, Usage]]:
    """Kernel, architecture and usage for each entry of ptxas' verbose output."""
    pattern = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for found in pattern.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        arch = f"{found['arch'][:-1]}.{found['arch'][-1]}"
        yield (
            found["kernel"],
            arch,
            Usage(
                registers=int(found["registers"]),
                shared=int(shared[1]) if shared else 0,
                stack=int(found["stack"]),
                spilled=int(found["stores"]) + int(found["loads"]),
            ),
        )


def widest_accesses(ptx: str) -> dict[str, tuple[int, int]]:
    """Bytes of the widest load and store of each kernel, by global or generic addresses."""
    widest = {}
    for kernel, body in re.findall(r"\.entry (\w+)\((.*?)^\}", ptx, re.DOTALL | re.MULTILINE):
        widths = {"ld": 0, "st": 0}
        for kind, vector, bits in re.findall(
            r"\b(ld|st)(?!\.(?:param|shared|local|const))(?:\.[a-uw-z]\w*)*?(?:\.v(\d))?\.[busf](\d+)\b", body
        ):
            widths[kind] = max(widths[kind], int(vector or 1) * int(bits) // 8)
        widest[kernel] = (widths["ld"], widths["st"])
    return widest


def demangled(names: list[str]) -> dict[str, str]:
    """The C++ names of mangled ones."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def family_of(source: str, name: str) -> Family:
    """Where an instance belongs: its template, its operation, and whether it moves single elements."""
    kernel = re.search(r"(\w+_kernel)", name)
    assert kernel is not None, name
    operation = re.search(r"::(\w+)<[^<>]*> ?>\(", name)
    parts = [kernel[1]] + ([operation[1]] if operation else [])
    if re.search(r"_kernel<\w+, 1,", name):
        parts.append("single elements")
    return Family(source, ", ".join(parts))


def span(values: list[int]) -> str:
    """Smallest and largest of the values."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def page(rows: dict[Family, list[str]], archs: list[str], version: str, failures: list[str]) -> str:
    """The page: one row a family."""
    verdict = (
        "No kernel spills a register or has a stack frame."
        if not failures
        else "These kernels do not keep to their registers:\n\n" + "\n".join(f"- {line}" for line in failures)
    )
    head = ["kernel", "instances", "load", "store", "shared", *archs]
    lines = [
        "# Kernels",
        "",
        f"What ptxas (CUDA {version}) says of every kernel. Written by",
        "`python build_tools/ptxas_report.py`, which fails where this is not so:",
        "",
        verdict,
        "",
        "One row for the instances of a template with one operation. *load*, *store*: bytes of the widest",
        "access to global memory in the PTX; *shared*: bytes of shared memory; then registers by compute",
        "capability. Where the instances differ, the smallest and the largest. 16 bytes is the widest there",
        "is; the rows of single elements serve arrays that do not lie on 16 bytes.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    lines += [f"| {' | '.join([family.name, *cells])} |" for family, cells in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, tell, and fail where a kernel needs local memory."""
    parser = argparse.ArgumentParser(description="Write what ptxas says of every kernel.")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="compute capabilities")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "kernels.md")
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        sys.exit(
            f"expected a CUDA build of torch, whose headers the kernels include, got {torch.__version__}"
        )
    toolkit = cuda_home.find_toolkit().toolkit
    if toolkit is None:
        sys.exit("no CUDA toolkit was found; put nvcc on PATH or set CUDA_HOME")
    rows: dict[Family, list[str]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            report, ptx = compile_source(toolkit.nvcc, source, arguments.archs, Path(folder))
            by_kernel: dict[str, dict[str, Usage]] = defaultdict(dict)
            for kernel, arch, usage in usages(report):
                by_kernel[kernel][arch] = usage
            names, widths = demangled(sorted(by_kernel)), widest_accesses(ptx)
            families: dict[Family, list[str]] = defaultdict(list)
            for kernel, name in names.items():
                families[family_of(source.stem, name)].append(kernel)
                failures += [
                    f"{name} on {arch}: {usage.spilled} bytes spilled, {usage.stack} bytes of stack"
                    for arch, usage in by_kernel[kernel].items()
                    if usage.spilled or usage.stack
                ]
            for family, kernels in sorted(families.items(), key=lambda item: item[0].name):
                used = [by_kernel[kernel] for kernel in kernels]
                rows[family] = [
                    str(len(kernels)),
                    span([widths[kernel][0] for kernel in kernels]),
                    span([widths[kernel][1] for kernel in kernels]),
                    span([usage.shared for each in used for usage in each.values()]),
                    *(span([each[arch].registers for each in used]) for arch in arguments.archs),
                ]
            print(f"{source.name}: {len(by_kernel)} kernels", flush=True)
    version = ".".join(map(str, toolkit.version))
    arguments.out.write_text(page(rows, arguments.archs, version, failures), encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
