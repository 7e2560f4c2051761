"""The mutation check itself: mutants are built in beside the original, and each does what it says."""

import ctypes
import shutil
import subprocess

import mutant_schemata
import mutants
import pytest

SOURCE = """#include "mutant.h"
#include <algorithm>
constexpr int kFour = 2 + 2;
template <int n>
struct Fixed { int cells[n]; };
extern "C" int sum(int* out, int n, int k) {
  Fixed<kFour> last = {};
  int total = 0;
  for (int i = 0; i < n; ++i) {
    out[i] = i * k;  // a comment with a + b
    total += out[i];
  }
  if (!(total < 9)) last.cells[1] = total - 9;
  return std::max(total, k) + last.cells[1];
}
"""


def found():
    mutants_ = mutant_schemata.mutants_of(SOURCE, "sum.cpp")
    for number, mutant in enumerate(mutants_, 1):
        mutant.number = number
    return mutants_


def test_what_is_changed_and_what_must_stay():
    whats = [mutant.what for mutant in found()]
    assert "`out[i] = i * k;` left out" in whats
    assert "`total += out[i];` left out" in whats
    assert "`<` -> `<=` in `i < n`" in whats
    assert "`out[i]` -> `[i + 1]`" in whats
    assert "`std::max(total, k)` -> `min`" in whats
    assert "`if (!(total < 9))` always false" in whats
    assert "`return std::max(total, k) + last.cells[1]` -> its type's zero" in whats
    lines = {mutant.line for mutant in found()}
    assert lines == {8, 9, 10, 11, 13, 14}, "types, constants and comments stay"


def test_lines_keep_their_numbers():
    text = mutant_schemata.rewrite(SOURCE, found())
    assert text.count("\n") == SOURCE.count("\n")
    assert text.split("\n")[2] == SOURCE.split("\n")[2]


def test_a_mutant_that_is_neither_apart_nor_nested_is_left_out():
    one = mutant_schemata.Mutant("arithmetic", 0, 5, "", "x", number=1)
    two = mutant_schemata.Mutant("arithmetic", 4, 9, "", "y", number=2)
    text = mutant_schemata.rewrite("a + b + c", [one, two])
    assert "on(1)" in text
    assert "on(2)" not in text


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_each_mutant_is_switched_on_by_its_number(tmp_path):
    (tmp_path / "mutant.h").write_text(mutants.HEADER)
    setter = 'extern "C" void set(int n) { ::mutant::active = n; }\n'
    (tmp_path / "sum.cpp").write_text(mutant_schemata.rewrite(SOURCE, found()) + setter)
    library = tmp_path / "sum.so"
    command = ["c++", "-std=c++20", "-shared", "-fPIC", str(tmp_path / "sum.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    code = ctypes.CDLL(str(library))

    def behaviour(number):
        code.set(number)
        out = (ctypes.c_int * 9)(*[-7] * 9)
        results = [(code.sum(out, n, k), *out) for n, k in ((0, 5), (3, 3), (4, 2), (2, 1))]
        code.set(0)
        return results

    right = behaviour(0)
    same = [mutant.what for mutant in found() if behaviour(mutant.number) == right]
    assert right[1][:4] == (9, 0, 3, 6)
    assert same == ["`<` -> `<=` in `total < 9`", "`9` -> `9 + 1` after `!(total <`"], "total - 9 is 0 there"
    assert behaviour(0) == right


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_function_that_returns_a_reference_still_does(tmp_path):
    source = """#include "mutant.h"
#include <vector>
static const std::vector<int>& same(const std::vector<int>& cells) { return cells; }
extern "C" int is_same() {
  std::vector<int> cells(3);
  const std::vector<int>& seen = same(cells);
  return &seen == &cells ? 1 : 2;
}
"""
    changed = [m for m in mutant_schemata.mutants_of(source, "same.cpp") if "return cells" in m.what]
    assert len(changed) == 1
    changed[0].number = 1
    (tmp_path / "mutant.h").write_text(mutants.HEADER)
    (tmp_path / "same.cpp").write_text(mutant_schemata.rewrite(source, changed))
    library = tmp_path / "same.so"
    command = ["c++", "-std=c++20", "-shared", "-fPIC", str(tmp_path / "same.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    assert ctypes.CDLL(str(library)).is_same() == 1


def test_every_family_and_folder_has_tests():
    tests = mutants.ROOT / "tests"
    patterns = [pattern for _, family in mutants.FAMILIES for pattern in family] + mutants.DEVICE_TESTS
    assert [pattern for pattern in patterns if not list(tests.glob(pattern))] == []
    folders = {name: list((tests / name).glob("test_*.py")) for name in mutants.FOLDERS_OF_TESTS}
    assert [name for name, files in folders.items() if not files] == []
    assert all((mutants.ROOT / name).is_file() for name in mutants.TOO_LONG)
