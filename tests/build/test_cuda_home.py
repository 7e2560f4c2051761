from __future__ import annotations

import os
from pathlib import Path

import pytest

from tolaria._build import cuda_home
from tolaria._build.cuda_home import Search, Toolkit, choose, find_toolkit
from tolaria.errors import BuildError


def make_toolkit(
    root: Path,
    version: str = "13.0",
    *,
    layout: str = "lib64",
    without: str = "",
    cudart: str = "libcudart.so",
) -> Path:
    """A folder that looks like a CUDA toolkit, with an nvcc that answers as the real one does."""
    base = root / "targets" / "x86_64-linux" if layout == "targets" else root
    library = base / ("lib" if layout == "targets" else layout)
    for folder in (root / "bin", base / "include", library):
        folder.mkdir(parents=True)
    if without != "header":
        (base / "include" / "cuda_runtime.h").touch()
    if without != "cudart":
        (library / cudart).touch()
    if without != "nvcc":
        nvcc = root / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f"--dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;\n"
            f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;\n"
            "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n' ;;\n"
            "esac\n"
        )
        nvcc.chmod(0o755)
    return root


def search(tmp_path: Path, *, path: Path | None = None, **environ: Path) -> Search:
    """Search with nothing in sight but what the test names."""
    visible = {name: str(folder) for name, folder in environ.items()}
    visible["PATH"] = os.pathsep.join([*([str(path)] if path else []), "/usr/bin", "/bin"])
    return find_toolkit(visible, default=tmp_path / "default")


def test_cuda_home_is_taken_first(tmp_path):
    named = make_toolkit(tmp_path / "named")
    other = make_toolkit(tmp_path / "other", "12.4")
    found = search(tmp_path, path=other / "bin", CUDA_HOME=named).toolkit
    assert found is not None
    assert (found.root, found.version) == (named, (13, 0))


def test_wrapper_script_is_seen_through(tmp_path):
    real = make_toolkit(tmp_path / "cuda-13.0")
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    found = search(tmp_path, path=wrapper.parent).toolkit
    assert found is not None
    assert found.root == real


def test_symlinked_nvcc_is_followed(tmp_path):
    real = make_toolkit(tmp_path / "cuda-13.0")
    link = tmp_path / "local" / "bin" / "nvcc"
    link.parent.mkdir(parents=True)
    link.symlink_to(real / "bin" / "nvcc")
    found = search(tmp_path, path=link.parent).toolkit
    assert found is not None
    assert found.root == real


@pytest.mark.parametrize("layout", ["lib64", "lib", "targets"])
def test_library_layouts_are_known(tmp_path, layout):
    root = make_toolkit(tmp_path / "cuda", layout=layout)
    found = search(tmp_path, CUDA_HOME=root).toolkit
    assert found is not None
    assert [folder.name for folder in found.library_dirs] == [layout.replace("targets", "lib")]
    assert (found.include_dirs[0] / "cuda_runtime.h").is_file()


@pytest.mark.parametrize(
    ("without", "named"), [("header", "cuda_runtime.h"), ("cudart", "libcudart.so"), ("nvcc", "bin/nvcc")]
)
def test_incomplete_toolkit_is_passed_over_and_explained(tmp_path, without, named):
    broken = make_toolkit(tmp_path / "broken", without=without)
    good = make_toolkit(tmp_path / "default")
    found = search(tmp_path, CUDA_HOME=broken)
    assert found.toolkit is not None
    assert found.toolkit.root == good
    assert found.rejected == [f"{broken} (CUDA_HOME): no {named}"]


def test_nothing_found_names_every_place(tmp_path):
    found = search(tmp_path, CUDA_HOME=tmp_path / "gone")
    assert found.toolkit is None
    assert f"{tmp_path / 'gone'} (CUDA_HOME): no such folder" in found.trail()
    assert f"{tmp_path / 'default'} (default): no such folder" in found.trail()


def test_packages_of_pip_are_a_toolkit(tmp_path):
    """``nvidia/cu13`` beside torch: the runtime has a number in its name, and no link without one."""
    root = make_toolkit(tmp_path / "nvidia" / "cu13", layout="lib", cudart="libcudart.so.13")
    make_toolkit(tmp_path / "default", "12.4")
    environ = {"PATH": "/usr/bin:/bin"}
    found = find_toolkit(environ, default=tmp_path / "default", pip=root).toolkit
    assert found is not None
    assert (found.root, found.cudart, found.library_dirs) == (root, ":libcudart.so.13", (root / "lib",))


def test_packages_of_pip_without_nvcc_are_passed_over(tmp_path):
    root = make_toolkit(tmp_path / "nvidia" / "cu13", layout="lib", cudart="libcudart.so.13", without="nvcc")
    good = make_toolkit(tmp_path / "default")
    found = find_toolkit({"PATH": "/usr/bin:/bin"}, default=good, pip=root)
    assert found.toolkit is not None
    assert (found.toolkit.root, found.toolkit.cudart) == (good, "cudart")
    assert found.rejected == [f"{root} (pip): no bin/nvcc"]


def toolkit(major: int, minor: int = 0) -> Search:
    return Search(Toolkit(Path("/toolkit"), (major, minor), (), ()))


@pytest.mark.parametrize(
    ("torch_cuda", "wish", "found", "expected"),
    [
        ("13.0", None, toolkit(13), True),
        ("13.0", True, toolkit(13, 2), True),
        ("13.0", False, toolkit(13), False),
        ("13.0", False, toolkit(12), False),
        ("13.0", None, Search(), False),
        (None, None, toolkit(13), False),
        (None, False, Search(), False),
    ],
    ids=[
        "auto",
        "forced",
        "forbidden",
        "forbidden-mismatch",
        "no-toolkit",
        "cpu-torch",
        "cpu-torch-forbidden",
    ],
)
def test_cuda_is_chosen_by_facts(torch_cuda, wish, found, expected):
    with_cuda, reason = choose("2.14.1", torch_cuda, wish, found)
    assert with_cuda is expected
    assert reason


@pytest.mark.parametrize(
    ("torch_cuda", "wish", "found", "message"),
    [
        (
            None,
            True,
            toolkit(13),
            r"TOLARIA_CUDA=1: .*got torch 2\.14\.1 for the CPU; install a CUDA build of torch",
        ),
        ("13.0", True, Search(), r"TOLARIA_CUDA=1: no complete CUDA toolkit .*; install the CUDA 13 toolkit"),
        (
            "13.0",
            None,
            toolkit(12, 4),
            r"built for CUDA 13\.0, .* is CUDA 12\.4; point CUDA_HOME at a CUDA 13",
        ),
    ],
    ids=["cpu-torch", "no-toolkit", "major-mismatch"],
)
def test_impossible_cuda_build_is_one_sentence_with_the_remedy(torch_cuda, wish, found, message):
    with pytest.raises(BuildError, match=message) as caught:
        choose("2.14.1", torch_cuda, wish, found)
    assert "\n" not in str(caught.value)


def test_arch_list_is_what_nvcc_knows_of_what_we_want():
    known = {(7, 5), (8, 0), (9, 0), (10, 0)}
    assert cuda_home.arch_list(known) == "8.0;9.0+PTX"
    assert cuda_home.arch_list({(7, 5), (8, 0)}) == "8.0+PTX"
    assert cuda_home.arch_list({(10, 0), (12, 0)}) == "10.0+PTX"


def test_arch_list_holds_the_devices_that_are_plugged_in():
    assert cuda_home.arch_list({(7, 5), (8, 0), (9, 0)}, [(7, 5)]) == "7.5;8.0;9.0+PTX"
    assert cuda_home.arch_list({(8, 0), (9, 0)}, [(12, 0)]) == "8.0;9.0+PTX"


def test_arch_list_without_any_architecture_is_an_error():
    with pytest.raises(BuildError, match="set TORCH_CUDA_ARCH_LIST"):
        cuda_home.arch_list(set())


def test_supported_archs_come_from_nvcc(tmp_path):
    found = search(tmp_path, CUDA_HOME=make_toolkit(tmp_path / "cuda")).toolkit
    assert found is not None
    assert cuda_home.supported_archs(found) == {(7, 5), (8, 0), (9, 0), (10, 0)}


@pytest.mark.parametrize(
    ("wish", "built"),
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.0+PTX", ["8.0+PTX"]),
        ("Turing", ["7.5+PTX"]),
        ("8.6 9.0a", ["8.6", "9.0a"]),
    ],
)
def test_names_of_architectures_become_numbers(monkeypatch, wish, built):
    flags = pytest.importorskip("torch.utils.cpp_extension")._get_cuda_arch_flags
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert cuda_home.built_archs(flags()) == built
