"""``tolaria train``: one task, the whole story. A thin shell around :func:`tolaria.runs.run_task`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tolaria.cli.arguments import add_preset
from tolaria.cli.display import QuietDisplay, choose_display, print_table
from tolaria.cli.task_name import add_task, settle_task
from tolaria.errors import MissingDependencyError
from tolaria.runs import default_folder, resume_task, run_task
from tolaria.tasks import get_task, list_tasks
from tolaria.train import GrowthResult, list_faults

INTERRUPTED = 130
_PHASES = ("host_steps", "incubate_steps", "blend_steps", "finish_steps")
_SETTINGS: dict[str, type] = {
    "batch_size": int, "lr": float, "seed_lr": float, "weight_decay": float, "warmup_steps": int,
    "max_grad_norm": float, "seed_max_grad_norm": float, "accumulation_steps": int, "host_steps": int,
    "incubate_steps": int, "blend_steps": int, "finish_steps": int, "trial_steps": int, "slot": str,
    "blueprint": str, "alpha_kind": str, "min_gain": float, "max_germinations": int, "validate_every": int,
}  # fmt: skip
_GOVERNOR: dict[str, type] = {
    "snapshot_interval": int, "probation": int, "lr_factor": float, "max_rollbacks": int,
    "lr_recovery_steps": int, "skip_batches": int,
    "absolute_threshold": float, "sensitivity": float, "multiplier": float,
}  # fmt: skip
_DEFAULTS: dict[str, object] = {"task": "digits", "device": "cpu", "rng_seed": 0}
_BESIDE_RESUME = ("resume", "no_plot", "quiet", "json", "command", "run")
_HELP = {
    "batch_size": "samples in a batch",
    "lr": "peak learning rate of the host",
    "seed_lr": "peak learning rate of the seed",
    "weight_decay": "of both optimizers",
    "warmup_steps": "linear warm-up of the learning rate",
    "max_grad_norm": "clip the host's gradient to this norm",
    "seed_max_grad_norm": "clip the seed's gradient to this norm",
    "accumulation_steps": "batches per optimizer step",
    "host_steps": "steps of the host alone",
    "incubate_steps": "steps the seed learns in isolation",
    "blend_steps": "steps over which alpha rises",
    "finish_steps": "steps after that",
    "trial_steps": "how many of those before the verdict on the seed",
    "slot": "where the seed is grafted",
    "blueprint": "what is grafted: conv, depthwise, squeeze_excite, norm; mlp, low_rank, attention",
    "alpha_kind": "the ramp: linear, cosine, sigmoid",
    "min_gain": "share of the host's loss alone that a seed must save to be kept",
    "max_germinations": "seeds to try, should a rollback take one away",
    "validate_every": "steps between looks at the validation data",
    "snapshot_interval": "steps between captures",
    "probation": "healthy losses before a capture counts as good",
    "lr_factor": "multiplies the learning rate at each rollback",
    "lr_recovery_steps": "healthy steps after which a lowered learning rate is its own again (0: never)",
    "skip_batches": "batches left out after each rollback",
    "max_rollbacks": "so many within 1000 steps end the run",
    "absolute_threshold": "a loss up to this is no anomaly",
    "sensitivity": "standard deviations above the mean that make an anomaly",
    "multiplier": "times the mean that make an anomaly",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tolaria train``."""
    parser.usage = "%(prog)s [TASK] [options]"
    add_task(parser, "digits", more=", list")
    length = parser.add_argument_group("length")
    length.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps in all; the phases keep their shares"
    )
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the training data in all")
    training = parser.add_argument_group("training (defaults are the task's)")
    for name, kind in _SETTINGS.items():
        training.add_argument(_flag(name), type=kind, metavar=_letter(kind), help=_HELP[name])
    training.add_argument("--no-grow", action="store_true", help="leave the host alone, for as many steps")
    machine = parser.add_argument_group("where and how")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 (default: cpu)")
    machine.add_argument(
        "--backend", choices=("auto", "fused", "reference"), help="which implementation the ops use"
    )
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    machine.add_argument("--amp", choices=("float16", "bfloat16"), help="train under autocast")
    machine.add_argument("--rng-seed", type=int, metavar="N", help="model, data order and seed (default: 0)")
    machine.add_argument("--data-dir", metavar="DIR", help="where a task that needs files finds them")
    governor = parser.add_argument_group("governor")
    governor.add_argument("--no-governor", action="store_true", help="nobody watches over the run")
    add_preset(governor)
    governor.add_argument("--log-only", action="store_true", help="judge and tell, never act")
    governor.add_argument(
        "--skip-anomalous-steps", action="store_true", help="judge before the optimizer steps"
    )
    for name, kind in _GOVERNOR.items():
        governor.add_argument(_flag(name), type=kind, metavar=_letter(kind), help=_HELP[name])
    kinds = f"break the run on purpose, repeatable: {', '.join(list_faults())}"
    governor.add_argument("--inject", action="append", default=[], metavar="KIND@STEP", help=kinds)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", metavar="DIR", help="run folder (default: a new one, runs/<task>-<time>-<process>)"
    )
    output.add_argument("--overwrite", action="store_true", help="the run folder may hold an earlier run")
    output.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with the interrupted run in this folder, under its own settings",
    )
    output.add_argument("--no-plot", action="store_true", help="do not draw run.png")
    output.add_argument("--quiet", action="store_true", help="only the closing line")
    output.add_argument("--json", action="store_true", help="print the summary as JSON, nothing else")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _letter(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "NAME")


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 if the run ended as planned, 1 if it diverged, 2 for a bad option, 130 after Ctrl-C."""
    try:
        settle_task(arguments)
    except ValueError as error:
        print(f"tolaria train: {error}", file=sys.stderr)
        return 2
    if arguments.task == "list":
        for name in list_tasks():
            print(f"{name:<10} {get_task(name).summary}")
        return 0
    display = choose_display(quiet=arguments.quiet or arguments.json)
    work = _train if arguments.resume is None else _resume
    folder = _folder(arguments)
    try:
        result = work(arguments, folder, display)
    except MissingDependencyError:
        raise
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if display.context is None:  # nothing has begun: the command line is to blame
            print(f"tolaria train: {error}", file=sys.stderr)
            return 2
        if display.result is not None:
            _close(arguments, folder, display)
        raise
    except KeyboardInterrupt:
        if display.result is None:
            raise
        _close(arguments, folder, display)
        print(
            "tolaria train: interrupted when training was over; the run folder is complete", file=sys.stderr
        )
        return INTERRUPTED
    finally:
        display.close()
    _close(arguments, folder, display)
    return INTERRUPTED if result.interrupted else 0


def _folder(arguments: argparse.Namespace) -> Path:
    """The run folder; what was left open and is not to be resumed is as by default from here on."""
    if arguments.resume is not None:
        return Path(arguments.resume)
    for name, value in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return Path(arguments.out) if arguments.out is not None else default_folder(arguments.task)


def _resume(arguments: argparse.Namespace, folder: Path, display: QuietDisplay) -> GrowthResult:
    for name, value in vars(arguments).items():
        is_given = value is not None and value is not False and value != []
        if is_given and name not in _BESIDE_RESUME:
            what = "TASK" if name == "task" else _flag(name)
            raise ValueError(
                f"{what}: expected not to come with --resume, which goes on under the settings of the run"
            )
    return resume_task(folder, plot=not arguments.no_plot, observers=[display])


def _train(arguments: argparse.Namespace, folder: Path, display: QuietDisplay) -> GrowthResult:
    given = vars(arguments)
    changes = {name: given[name] for name in _SETTINGS if given[name] is not None}
    options = {name: given[name] for name in _GOVERNOR if given[name] is not None}
    options |= {name: True for name in ("log_only", "skip_anomalous_steps") if given[name]}
    if arguments.overwrite and arguments.out is None:
        raise ValueError(
            "--overwrite: expected to come with --out, which names the folder of the earlier run"
        )
    phases = [_flag(name) for name in _PHASES if name in changes]
    if phases and (arguments.steps is not None or arguments.epochs is not None):
        raise ValueError(f"{phases[0]}: expected not to come with --steps or --epochs, which set every phase")
    return run_task(
        arguments.task, out=folder, overwrite=arguments.overwrite, plot=not arguments.no_plot,
        device=arguments.device, rng_seed=arguments.rng_seed, backend=arguments.backend,
        threads=arguments.threads, amp=arguments.amp, data_dir=arguments.data_dir,
        steps=arguments.steps, epochs=arguments.epochs,
        grow_seed=not arguments.no_grow, use_governor=not arguments.no_governor,
        preset=arguments.preset or "default",
        governor_options=options, inject=arguments.inject, observers=[display], **changes,
    )  # fmt: skip


def _close(arguments: argparse.Namespace, folder: Path, display: QuietDisplay) -> None:
    """What the run came to, as a table, a line or JSON."""
    if arguments.json:
        print((folder / "summary.json").read_text(encoding="utf-8"), end="")
        return
    rows = display.rows()
    if arguments.quiet:
        said = dict(rows)
        assert display.context is not None, "there are rows, so it has begun"
        print(f"{display.context.task.name}: {said['at the end, test']}; {said['steps']}; {folder}")
        return
    print_table([*rows, ("run folder", str(folder))])
