"""``tolaria doctor``: what is installed, what was built, what runs here, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass

import torch
from packaging.version import Version

import tolaria
from tolaria import _backend, _extension
from tolaria._build.cache import cache_folder
from tolaria._build.info import BuildInfo
from tolaria.errors import BuildMismatchError, ExtensionMissingError

_TRAIN = {"rich": "13", "matplotlib": "3.8", "scikit-learn": "1.4", "safetensors": "0.4"}
_TENSORBOARD = {"tensorboard": "2.16"}
_REPORT = {"plotly": "6"}
_PYTEST = {"pytest": "8.2", "pytest-benchmark": "5"}
EXTRAS: dict[str, dict[str, str]] = {
    "train": _TRAIN,
    "tensorboard": _TENSORBOARD,
    "lightning": {"lightning": "2.6"},
    "pytorch-lightning": {"pytorch-lightning": "2.6"},
    "accelerate": {"accelerate": "1.15"},
    "transformers": {"transformers": "5", "accelerate": "1.15"},
    "ignite": {"pytorch-ignite": "0.5"},
    "sb3": {"stable-baselines3": "2.9", "gymnasium": "1"},
    "wandb": {"wandb": "0.20"},
    "trackio": {"trackio": "0.20"},
    "report": _REPORT,
    "browser": {"websocket-client": "1.6"},
    "test": {**_TRAIN, **_TENSORBOARD, **_REPORT, **_PYTEST, "hypothesis": "6.100", "expecttest": "0.2"},
    "bench": {
        **_PYTEST, "matplotlib": "3.8", "lightning-fabric": "2.4", "torchmetrics": "1", "river": "0.21",
        "pytorch-ignite": "0.5", "trainpulse": "0.4",
    },
}  # fmt: skip
"""The optional extras of pyproject.toml: the packages of each, and the oldest version that will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """What :func:`doctor` found."""

    versions: dict[str, str | None]
    """Versions of tolaria, Python, the platform, torch, its CUDA, numpy."""
    build: BuildInfo | None
    """What the extension was built of and for; None if there is no record of a build."""
    extension_loaded: bool
    """Whether the compiled extension is loaded."""
    extension_folder: str
    """Where it is, or was looked for first."""
    extension_error: str | None
    """Why it is not, with the remedy."""
    backend: str
    """The mode in force: auto, fused or reference."""
    ops: dict[str, str]
    """For each device type (each device where they differ), which implementation the ops use there."""
    devices: tuple[str, ...]
    """The devices torch sees, in words."""
    extras: dict[str, tuple[str, ...]]
    """The packages missing of each extra, or too old for it; empty: complete."""
    environment: dict[str, str]
    """The ``TOLARIA_*`` variables that are set."""
    problems: tuple[str, ...]
    """What is broken, each a sentence with the remedy."""
    advice: tuple[str, ...]
    """What could be better."""

    @property
    def is_healthy(self) -> bool:
        """True when nothing is broken."""
        return not self.problems


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing(packages: dict[str, str]) -> tuple[str, ...]:
    """Those of ``packages`` that are not installed, or older than asked for."""
    found = {name: _version(name) for name in packages}
    return tuple(
        name if version is None else f"{name} (at least {least}, got {version})"
        for (name, least), version in zip(packages.items(), found.values(), strict=True)
        if version is None or Version(version).release < Version(least).release
    )


def _devices() -> tuple[str, ...]:
    """The processor and every CUDA device."""
    instructions = torch.backends.cpu.get_cpu_capability()
    names = [f"cpu: {platform.machine()} ({instructions}), {torch.get_num_threads()} threads"]
    if _extension.LOADED:
        names[0] += f", {_extension.last_level_cache() / 2**20:g} MiB of last-level cache, {_streams()}"
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        names.append(f"cuda:{index}: {facts.name}, compute {facts.major}.{facts.minor}, {memory:.0f} GiB")
    return tuple(names)


def _streams() -> str:
    """From where on CPU ops write past the caches, and why."""
    above = _extension.stream_above()
    if above >= 2**62:
        return "never writes past it (TOLARIA_STREAM_ABOVE)"
    said = f"writes past it in passes of more than {above / 2**20:g} MiB"
    if "TOLARIA_STREAM_ABOVE" in os.environ:
        return f"{said} (TOLARIA_STREAM_ABOVE)"
    if above < _extension.last_level_cache() // 2:
        return f"{said} (half of what one program may count on; others share the cache)"
    return f"{said} (half of it)"


def _ops() -> dict[str, str]:
    """Which implementation serves each device type (each device where they differ) in the mode in force."""
    reference = tolaria.current_mode() == "reference"
    kernels = {"cpu": _extension.LOADED, "cuda": _extension.CUDA}
    if torch.version.cuda is None:
        del kernels["cuda"]
    elif without := _backend.devices_without_kernels():
        del kernels["cuda"]
        kernels |= {f"cuda:{index}": index not in without for index in range(torch.cuda.device_count())}
    return {device: "fused" if has and not reference else "reference" for device, has in kernels.items()}


def _problems() -> tuple[str, ...]:
    """What is broken: an extension that exists and does not fit, or one that lags behind its sources."""
    if isinstance(_extension.LOAD_ERROR, BuildMismatchError):
        return (str(_extension.LOAD_ERROR),)
    outdated = _extension.outdated_sentence(_extension.FOLDER)
    return () if outdated is None else (outdated,)


def _advice(info: BuildInfo | None, missing: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What could be better, each with how to get it."""
    advice = []
    rebuild = _extension.rebuild_command(_extension.FOLDER)
    if isinstance(_extension.LOAD_ERROR, ExtensionMissingError):
        advice.append(f"every op runs in pure PyTorch: {_extension.LOAD_ERROR}")
    is_cached = cache_folder() in _extension.PLACE.parents
    if _extension.LOADED and not is_cached and _extension.PLACE != _extension.FOLDER:
        advice.append(
            f"this is the source tree {_extension.FOLDER.parent} with the extension installed in "
            f"{_extension.PLACE}; both are of the same csrc"
        )
    if torch.version.cuda and _extension.LOADED and not _extension.CUDA:
        why = info.reason if info else "no build info"
        advice.append(
            f"ops on CUDA tensors run in pure PyTorch, as this is a CPU build ({why}); "
            f"for CUDA kernels set TOLARIA_CUDA=1 and run {rebuild}"
        )
    for sentence in _backend.devices_without_kernels().values():
        advice.append(f"ops run in pure PyTorch there, 'fused' is refused: {sentence}")
    if torch.version.cuda and torch.cuda.device_count() == 0:
        advice.append(f"torch is built for CUDA {torch.version.cuda} but sees no device; check nvidia-smi")
    if missing["train"]:
        wanted = " ".join(f'"{name}>={least}"' for name, least in _TRAIN.items())
        advice.append(f"`tolaria train` needs {', '.join(missing['train'])}; run `pip install {wanted}`")
    return tuple(advice)


def doctor() -> DoctorReport:
    """Look at the installation and at the machine; changes nothing.

    Returns:
        The facts, what is broken, and what could be better.
    """
    info = _extension.INFO
    missing = {extra: _missing(packages) for extra, packages in EXTRAS.items()}
    return DoctorReport(
        versions={
            "tolaria": tolaria.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "torch CUDA": torch.version.cuda,
            "numpy": _version("numpy"),
        },
        build=info,
        extension_loaded=_extension.LOADED,
        extension_folder=str(_extension.PLACE),
        extension_error=None if _extension.LOAD_ERROR is None else str(_extension.LOAD_ERROR),
        backend=tolaria.current_mode(),
        ops=_ops(),
        devices=_devices(),
        extras=missing,
        environment={
            name: value for name, value in sorted(os.environ.items()) if name.startswith("TOLARIA_")
        },
        problems=_problems(),
        advice=_advice(info, missing),
    )


def render(report: DoctorReport) -> str:
    """The report for people, a fact a line."""
    build = report.build
    lines = [f"{name:<12}{value or 'none'}" for name, value in report.versions.items()]
    if build is None or not build.extension:
        lines.append(f"{'extension':<12}none")
    else:
        kind = f"CUDA {build.cuda} ({';'.join(build.archs)})" if build.cuda else "CPU"
        state = "loaded" if report.extension_loaded else "NOT LOADED"
        lines.append(
            f"{'extension':<12}{state}; built for torch {build.torch}, {kind}, Python {build.python}"
        )
        lines.append(f"{'':<12}in {report.extension_folder}")
        lines.append(f"{'':<12}{build.reason}; {build.compiler}")
        lines.append(f"{'':<12}commit {build.git or 'unknown'}; {' '.join(build.cxx_flags)}")
    lines.append(f"{'backend':<12}{report.backend}")
    lines += [f"{'ops':<12}{device}: {kind}" for device, kind in report.ops.items()]
    lines += [f"{'device':<12}{device}" for device in report.devices]
    for extra, missing in report.extras.items():
        lines.append(f"{'extra':<12}{extra}: {'missing ' + ', '.join(missing) if missing else 'complete'}")
    lines += [f"{'environment':<12}{name}={value}" for name, value in report.environment.items()]
    lines.append("")
    lines += [f"PROBLEM: {sentence}" for sentence in report.problems]
    lines += [f"advice: {sentence}" for sentence in report.advice]
    if not report.problems and not report.advice:
        lines.append("nothing to do")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria doctor``."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if something is broken."""
    report = doctor()
    print(json.dumps(asdict(report), indent=2) if arguments.json else render(report))
    return 0 if report.is_healthy else 1
