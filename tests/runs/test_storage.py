"""A saved model is whole or it is refused: damaged, crafted and half-written files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tolaria
from tolaria.errors import ModelFileError, ModelMissingError, TolariaError
from tolaria.nn import MorphogeneticModel, SeedStage
from tolaria.runs import load_model, save_model, storage
from tolaria.tasks import create_model

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors, which is not installed")
FILES = ("model.json", "model.safetensors")


def grown(
    blueprint: str | None, stage: SeedStage = SeedStage.FOSSILIZED, rng_seed: int = 0
) -> MorphogeneticModel:
    model = create_model("digits", rng_seed=rng_seed)
    if blueprint is not None:
        model.germinate("stage0", blueprint, rng_seed=rng_seed)
        for step in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
            if model.slot("stage0").stage is not stage:
                model.advance("stage0", step, blend_steps=10)
    return model


def same(left: MorphogeneticModel, right: MorphogeneticModel) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return (
        left.structure() == right.structure()
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


@pytest.fixture(scope="module")
def models() -> list[MorphogeneticModel]:
    return [grown("conv", rng_seed=1), grown(None, rng_seed=2)]


@pytest.fixture
def saved(tmp_path: Path, models) -> Path:
    save_model(models[0], tmp_path, task="digits")
    return tmp_path


def craft(
    folder: Path, change=lambda said: None, tensors=lambda found: None, raw: bytes | None = None
) -> None:
    """Change the files as somebody would who knows how they are made: the digest fits."""
    said = json.loads((folder / "model.json").read_text())
    found = safetensors.load((folder / "model.safetensors").read_bytes())
    tensors(found)
    data = safetensors.save(found) if raw is None else raw
    said["tensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(said)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "model.json").write_text(json.dumps(said))


# ------------------------------------------------------------------ what is saved comes back


@pytest.mark.parametrize("stage", [s for s in SeedStage if s not in (SeedStage.DORMANT, SeedStage.CULLED)])
@pytest.mark.parametrize("blueprint", ["conv", "depthwise", "squeeze_excite", "norm"])
def test_every_stage_comes_back(tmp_path, stage, blueprint):
    model = grown(blueprint, stage)
    if stage is SeedStage.BLENDING:
        for _ in range(3):
            model.slot("stage0").schedule.step()
    save_model(model, tmp_path, task="digits")
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert not loaded.training
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_culled_slot_and_chosen_slots_come_back(tmp_path):
    for slots in (["stage1"], {"deep": "stages.1.0"}):
        model = create_model("digits", slots=slots, rng_seed=3)
        (name,) = model.slots
        model.germinate(name, "conv")
        model.cull(name)
        save_model(model, tmp_path, task="digits")
        assert same(load_model(tmp_path), model)


def test_half_precision_is_read_into_the_hosts_own(tmp_path):
    save_model(create_model("digits", rng_seed=1).half(), tmp_path, task="digits")
    loaded = load_model(tmp_path)
    assert loaded.host.head.weight.dtype is torch.float32
    assert torch.equal(
        loaded.host.head.weight.half(), create_model("digits", rng_seed=1).half().host.head.weight
    )


def test_files_have_the_mode_that_the_umask_leaves(tmp_path, models):
    before = os.umask(0o027)
    try:
        save_model(models[0], tmp_path, task="digits")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in FILES} == {0o640}


def test_model_that_cannot_be_saved_leaves_the_former_one(saved, models):
    model = create_model("digits")
    model.germinate("stage0", "conv", options={"expansion": 2.0})
    model.slot("stage0").options["expansion"] = object()
    with pytest.raises(TypeError):
        save_model(model, saved, task="digits")
    assert same(load_model(saved), models[0])


@pytest.mark.parametrize(("model", "task"), [("plain", "digits"), (None, "digits"), ("grown", None)])
def test_what_cannot_be_loaded_is_not_saved(tmp_path, models, model, task):
    given = {"plain": torch.nn.Linear(2, 2), "grown": models[0]}.get(model)
    with pytest.raises(
        TypeError, match=r"save_model: (model: expected a MorphogeneticModel|task: expected a name)"
    ):
        save_model(given, tmp_path, task=task)
    assert not list(tmp_path.iterdir())


def test_link_in_a_drafts_place_is_not_followed(saved, models):
    precious = saved / "precious"
    precious.write_text("mine")
    (saved / ".model.safetensors.part").symlink_to(precious)
    (saved / ".model.json.part").symlink_to(precious)
    save_model(models[1], saved, task="digits")
    assert precious.read_text() == "mine"
    assert same(load_model(saved), models[1])


# ------------------------------------------------------------------ whatever ends the save


class Tracer:
    """Counts the system calls of a save, and does something at each."""

    CALLS = ("open", "write", "fsync", "replace")

    def __init__(self, monkeypatch, at_call) -> None:
        self.count = 0
        self.unsynced: set[int] = set()
        for name in self.CALLS:
            monkeypatch.setattr(storage.os, name, self._wrap(name, getattr(os, name), at_call))

    def _wrap(self, name, real, at_call):
        def call(*arguments, **options):
            self.count += 1
            at_call(self, name)
            if name == "write":
                self.unsynced.add(os.fstat(arguments[0]).st_ino)
                return real(arguments[0], bytes(arguments[1])[:1000])  # a short write is a write
            if name == "fsync":
                self.unsynced.discard(os.fstat(arguments[0]).st_ino)
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["seed-to-none", "none-to-seed"])
def test_power_lost_at_any_system_call_leaves_one_of_the_two(tmp_path, models, monkeypatch, order):
    former, latter = (models[i] for i in order)
    folder, states = tmp_path / "model", []
    folder.mkdir()

    def photograph(tracer: Tracer, name: str) -> None:
        copy = tmp_path / f"state{tracer.count}"
        shutil.copytree(folder, copy)
        for path in folder.iterdir():  # what was never synced may be lost
            if path.stat().st_ino in tracer.unsynced:
                (copy / path.name).write_bytes(b"")
        states.append(copy)

    save_model(former, folder, task="digits")
    with monkeypatch.context() as patch:
        Tracer(patch, photograph)
        save_model(latter, folder, task="digits")
    assert len(states) > 20
    found = [same(load_model(state), latter) for state in states]
    assert found == sorted(found)  # at one moment from the former to the latter
    assert found[0] is False
    assert found[-1] is True
    for state, is_new in zip(states, found, strict=True):
        assert is_new or same(load_model(state), former)
        save_model(former, state, task="digits")  # and goes on from there
        assert same(load_model(state), former)
        assert sorted(path.name for path in state.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()], ids=["full", "ctrl-c"]
)
def test_failure_at_any_system_call_leaves_one_of_the_two(tmp_path, models, monkeypatch, error):
    save_model(models[0], tmp_path, task="digits")
    at, news = 0, 0
    while True:
        at += 1

        def fail(tracer: Tracer, name: str, at=at) -> None:
            if tracer.count == at:
                raise error

        with monkeypatch.context() as patch:
            tracer = Tracer(patch, fail)
            try:
                save_model(models[1], tmp_path, task="digits")
            except (OSError, KeyboardInterrupt):
                pass
            else:
                break
        assert tracer.count == at
        loaded = load_model(tmp_path)
        assert same(loaded, models[0]) or same(loaded, models[1])
        news += same(loaded, models[1])
        save_model(models[0], tmp_path, task="digits")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert at > 20
    assert news > 3


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_storage import grown, load_model, same, save_model
folder = Path(sys.argv[1])
models = [grown("conv", rng_seed=1), grown("depthwise", rng_seed=2), grown(None, rng_seed=3)]
save_model(models[0], folder, task="digits")
dice = random.Random(0)
for _ in range(30):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                save_model(model, folder, task="digits")
                os.write(tell, b".")
    for _ in range(dice.randrange(4)):  # so many saves are over
        os.read(told, 1)
    time.sleep(dice.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told), os.close(tell)
    loaded = load_model(folder)
    print([same(loaded, model) for model in models].index(True))
"""


def test_killed_saves_never_mix_models(tmp_path):
    path = os.pathsep.join((str(Path(tolaria.__file__).parents[1]), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) > 1
    assert len(done.stdout.split()) == 30


# ------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_refused(saved, name):
    whole = (saved / name).read_bytes()
    for size in sorted(
        {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1, *range(0, len(whole), len(whole) // 20)}
    ):
        (saved / name).write_bytes(whole[:size])
        if name == "model.json" and whole[:size].strip() == whole.strip():
            continue  # only the closing line break is gone
        with pytest.raises(ModelFileError, match=r"model\."):
            load_model(saved)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_refused_or_harmless(saved, models, name):
    """In JSON a space may become a tab; whatever else changes is found."""
    whole = (saved / name).read_bytes()
    dice, harmless = random.Random(0), 0
    for _ in range(150):
        at, bit = dice.randrange(len(whole)), 1 << dice.randrange(8)
        (saved / name).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            loaded = load_model(saved)
        except ModelFileError:
            continue
        harmless += 1
        state = models[0].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert harmless == 0 if name == "model.safetensors" else harmless < 10


def test_files_of_two_models_are_refused(saved, models, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_model(models[1], other, task="digits")
    for name in FILES:
        mixed = tmp_path_factory.mktemp("mixed")
        for each in FILES:
            shutil.copy((saved if each == name else other) / each, mixed)
        with pytest.raises(ModelFileError, match=r"bytes|SHA-256"):
            load_model(mixed)


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(saved, name):
    path = saved / name
    path.unlink()
    with pytest.raises(ModelMissingError, match=name) as caught:
        load_model(saved)
    assert isinstance(caught.value, FileNotFoundError | TolariaError)
    path.symlink_to(path)
    with pytest.raises(ModelFileError, match=name):
        load_model(saved)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ModelFileError, match="regular file"):
        load_model(saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelFileError, match="regular file"):
        load_model(saved)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelFileError, match=r"model\."):
        load_model(saved)
    with pytest.raises(ModelMissingError, match="expected a folder"):
        load_model(saved / "nothing")


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "[]", "null", '"model"', "{}", '{"format": true}', '{"format": 1}', '{"format": "2"}',
        '{"format": 2}', '{"format": 2, "format": 2}', "[" * 100_000, '{"a":' * 100_000,
        '{"format": NaN}', '{"format": ' + "9" * 10_000 + "}", "\ufeff{}", '{"format": 2, "task": "digits"}',
        '{"weights": [1, 2, 3], "format": 2, "task": "../../etc", "slots": {}, "structure": {}}',
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_foreign_json_is_refused(saved, text):
    (saved / "model.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"model\.json: expected"):
        load_model(saved)


def test_bytes_that_are_no_text_and_files_of_any_size_are_refused(saved):
    (saved / "model.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelFileError, match="expected JSON"):
        load_model(saved)
    os.truncate(saved / "model.json", 2**40)  # sparse: it takes no room, unless somebody reads it
    with pytest.raises(ModelFileError, match="at most"):
        load_model(saved)


def test_tensors_of_a_claimed_size_are_not_read(saved):
    craft(saved, lambda said: said["tensors"].update(bytes=2**40))
    os.truncate(saved / "model.safetensors", 2**40)
    with pytest.raises(ModelFileError, match=r"a model of .* numbers"):
        load_model(saved)


def put(*path, value):
    def change(said) -> None:
        for key in path[:-1]:
            said = said[key]
        said[path[-1]] = value

    return change


SEED = ("structure", "stage0")
RAMP = {"kind": "cosine", "steps": 10, "start": 0.0, "end": 1.0, "position": 3}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("task", value=3), "task: expected a name"),
        (put("task", value="digts"), "did you mean 'digits'"),
        (put("task", value="../../digits"), "expected one of"),
        (put("task", value="text"), "slots"),
        (put("slots", value=["stage0", "stage1"]), "slots: expected a mapping"),
        (put("slots", "stage0", value="../host"), "path of a submodule"),
        (put("slots", "stage0", value=None), "slots"),
        (put("slots", "stage0", value=3), "slots: expected a mapping"),
        (put("slots", value={}), "structure"),
        (put("structure", value=[]), "structure"),
        (put("structure", "stage9", value={}), "structure"),
        (put("extra", value=1), "fields"),
        (put("tensors", value=None), "tensors"),
        (put("tensors", "bytes", value=-1), "bytes: expected an integer"),
        (put("tensors", "bytes", value=1.5), "bytes: expected an integer"),
        (put("tensors", "bytes", value=True), "bytes: expected an integer"),
        (put("tensors", "sha256", value="0" * 64), "SHA-256"),
        (put("tensors", "sha256", value="../" * 20), "hexadecimal"),
        (put(*SEED, value=3), "expected a mapping"),
        (put(*SEED, "stage", value="grown"), "stage: expected one of"),
        (put(*SEED, "stage", value=["fossilized"]), "stage: expected one of"),
        (put(*SEED, "stage", value="dormant"), "expected no seed"),
        (put(*SEED, "stage", value="blending"), "schedule: expected a schedule"),
        (put(*SEED, "stage", value="training"), "alpha"),
        (put(*SEED, "stage", value="germinated"), "alpha"),
        (put(*SEED, "schedule", value=RAMP), "schedule: expected None"),
        (put(*SEED, "blueprint", value=None), "register a blueprint"),
        (put(*SEED, "blueprint", value=7), "blueprint: expected the name"),
        (put(*SEED, "blueprint", value="os.system"), "blueprint: expected one of"),
        (put(*SEED, "blueprint", value="mlp"), r"expected features \(B, T, C\)"),
        (put(*SEED, "blueprint", value="depthwise"), "missing"),
        (put(*SEED, "options", value=[1]), "options: expected a mapping"),
        (put(*SEED, "options", value={"expansion": 3.0}), "shape"),
        (put(*SEED, "options", value={"expansion": "big"}), "options"),
        (put(*SEED, "options", value={"expansion": 10**400}), "options"),
        (put(*SEED, "options", value={"rank": 3}), "options"),
        (put(*SEED, "generation", value=-1), "generation: expected an integer"),
        (put(*SEED, "generation", value=2**70), "generation: expected an integer"),
        (put(*SEED, "generation", value="1"), "generation: expected an integer"),
        (put(*SEED, "rng_seed", value=None), "rng_seed: expected an integer"),
        (put(*SEED, "rng_seed", value=2**70), "rng_seed: expected an integer"),
        (put(*SEED, "rng_seed", value=0.5), "rng_seed: expected an integer"),
    ],
)
def test_crafted_description_is_refused(saved, change, reason):
    craft(saved, change)
    with pytest.raises(ModelFileError, match=reason):
        load_model(saved)


@pytest.mark.parametrize("options", [{"expansion": 1e12}, {"expansion": 3e6}])
def test_seed_larger_than_its_file_is_not_built(saved, options, monkeypatch):
    def build(*_, **__):
        raise AssertionError("a seed was built")

    monkeypatch.setattr(tolaria.nn.slot, "build_seed", build)
    craft(saved, put(*SEED, "options", value=options))
    with pytest.raises(ModelFileError, match=r"a model of .* numbers|options"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 10**12}, "steps: expected an integer from 1 to"),
        ({"steps": 0}, "steps"),
        ({"steps": "10"}, "steps"),
        ({"position": 11}, "position"),
        ({"position": -1}, "position"),
        ({"kind": "cubic"}, "kind"),
        ({"end": 1.5}, "end"),
        ({"start": -0.1}, "start"),
        ({"start": True}, "start"),
        ({"more": 1}, "fields"),
    ],
)
def test_crafted_schedule_is_refused(tmp_path, change, reason):
    save_model(grown("conv", SeedStage.BLENDING), tmp_path, task="digits")
    craft(tmp_path, put(*SEED, "schedule", value={**RAMP, **change}))
    with pytest.raises(ModelFileError, match=reason):
        load_model(tmp_path)


def first(found, name, value) -> None:
    found[name].view(-1)[0] = value


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (lambda f: first(f, "host.head.weight", float("nan")), "host.head.weight: expected finite"),
        (lambda f: first(f, "host.stages.0.1.running_var", float("inf")), "running_var: expected finite"),
        (lambda f: first(f, "seed_slots.stage0.seed.project.weight", float("-inf")), "finite"),
        (lambda f: first(f, "seed_slots.stage0.alpha", float("nan")), "finite"),
        (lambda f: first(f, "seed_slots.stage0.alpha", 0.5), "alpha: expected one of stage FOSSILIZED"),
        (lambda f: first(f, "seed_slots.stage1.alpha", 1.0), "alpha: expected one of stage DORMANT"),
        (lambda f: f.pop("host.head.bias"), "missing"),
        (lambda f: f.update(extra=torch.zeros(3)), "unknown"),
        (lambda f: f.update({"host.head.bias": torch.zeros(11)}), "shape"),
        (lambda f: f.update({"host.head.bias": torch.zeros(10, dtype=torch.int64)}), "torch.float32"),
        (lambda f: f.update({"host.head.bias": torch.full((10,), 1e300, dtype=torch.float64)}), "finite"),
        (lambda f: f.update({"host.stages.0.1.num_batches_tracked": torch.zeros(())}), "torch.int64"),
    ],
)  # fmt: skip
def test_crafted_tensors_are_refused(saved, tensors, reason):
    craft(saved, tensors=tensors)
    with pytest.raises(ModelFileError, match=reason):
        load_model(saved)


@pytest.mark.parametrize("value", [-0.5, 1.5])
def test_alpha_out_of_range_is_refused_while_it_blends(tmp_path, value):
    save_model(grown("conv", SeedStage.BLENDING), tmp_path, task="digits")
    craft(tmp_path, tensors=lambda f: first(f, "seed_slots.stage0.alpha", value))
    with pytest.raises(ModelFileError, match="alpha"):
        load_model(tmp_path)


def header(said: dict, data: bytes = b"") -> bytes:
    text = json.dumps(said).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\0" * 8, b"\xff" * 8, (2**62).to_bytes(8, "little"), b"PK\x03\x04" + b"\0" * 40,
        b"\x80\x04cos\nsystem\n(S'true'\ntR." + b"\0" * 20,
        header({}), header({"host.head.bias": 3}),
        header({"host.head.bias": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"host.head.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]}}, b"\0" * 8),
        header({"host.head.bias": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"host.head.bias": {"dtype": "X7", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        len("[" * 1000).to_bytes(8, "little") + b"[" * 1000,
    ],
    ids=range(14),
)  # fmt: skip
def test_crafted_safetensors_are_refused(saved, raw):
    for data in (raw, raw + b"\0" * 8000):  # of a size that cannot be right, and of one that can
        craft(saved, raw=data)
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            load_model(saved)
        save_model(create_model("digits"), saved, task="digits")


def test_random_damage_with_a_digest_that_fits_is_refused_or_finite(saved):
    whole, dice = (saved / "model.safetensors").read_bytes(), random.Random(1)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(dice.choice((1, 4, 64))):
            damaged[dice.randrange(len(whole))] = dice.randrange(256)
        craft(saved, raw=bytes(damaged))
        try:
            loaded = load_model(saved)
        except ModelFileError:
            continue
        finally:
            (saved / "model.safetensors").write_bytes(whole)
        assert all(bool(v.isfinite().all()) for v in loaded.state_dict().values())


def test_infinite_mask_that_the_host_is_born_with_is_loaded(tmp_path):
    from tolaria.tasks import TaskSpec, get_task

    def host() -> torch.nn.Module:
        made = get_task("digits").model_factory()
        made.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        return made

    digits = get_task("digits")
    spec = TaskSpec(
        name="masked", topology="cnn", num_classes=10, model_factory=host, load_data=digits.load_data,
        example_input=digits.example_input,
    )  # fmt: skip
    save_model(create_model(spec), tmp_path, task="masked")
    assert load_model(tmp_path, task=spec).host.mask.tolist() == [0.0, float("-inf")]
    craft(tmp_path, tensors=lambda f: first(f, "host.mask", float("-inf")))
    with pytest.raises(ModelFileError, match=r"host\.mask"):
        load_model(tmp_path, task=spec)
    with pytest.raises(ModelFileError, match="expected a task that is registered"):
        load_model(tmp_path)
