"""The solutions of README's exercises still apply to the code, and are programs."""
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((ROOT / "tests" / "exercises").glob("*.diff"))
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git, which applies the solutions, is not installed")


def solve(solution, folder):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    (folder / "tests").mkdir()
    for name in ("__init__.py", "recurrent.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    subprocess.run(["git", "apply", str(solution)], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("solution", SOLUTIONS, ids=lambda path: path.stem)
def test_a_solution_applies_and_compiles(solution, tmp_path):
    solve(solution, tmp_path)
    changed = [file for file in tmp_path.glob("*.py")
               if not (ROOT / file.name).exists() or file.read_bytes() != (ROOT / file.name).read_bytes()]
    assert changed
    for file in changed:
        py_compile.compile(str(file), doraise=True)


def test_the_gated_recurrent_unit_matches_the_library(tmp_path):
    solve(ROOT / "tests" / "exercises" / "gru.diff", tmp_path)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_gru.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_readme_names_every_solution():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert SOLUTIONS and all(f"`{path.stem}`" in text for path in SOLUTIONS)
