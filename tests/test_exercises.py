"""Every exercise has a test that fails in the code as it is and passes with the solution; solutions apply to today's code."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = ROOT / "tests" / "exercises"
SOLUTIONS = sorted(path.stem for path in EXERCISES.glob("*.diff"))
pytestmark = pytest.mark.skipif(not shutil.which("git") or not hasattr(os, "fork"), reason="the solutions need git, and a system with fork")

# One process imports torch; a child per tree runs tests of exercises there. Arguments: (tree, what to test) in turn.
GRADER = """
import os, sys
import pytest, torch
torch.set_num_threads(1)
for tree, tests in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if not child:
        os.chdir(tree)
        sys.path.insert(0, tree)
        with open("output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = pytest.main(["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", tests])
        os._exit(int(status))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """{exercise: (exit status, output) of its test where it is solved; None: of all tests in the code as it is}"""
    folder, jobs = tmp_path_factory.mktemp("graded"), []
    for name in [None, *SOLUTIONS]:
        tree = folder / str(name)
        tree.mkdir()
        for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
            shutil.copy(file, tree)
        for subfolder in ("tests", "fast"):
            shutil.copytree(ROOT / subfolder, tree / subfolder, ignore=shutil.ignore_patterns("__pycache__"))
        if name:
            subprocess.run(["git", "apply", str(EXERCISES / f"{name}.diff")], cwd=tree, check=True, capture_output=True)
        jobs += [str(tree), f"tests/exercises/test_{name}.py" if name else "tests/exercises"]
    run = subprocess.run([sys.executable, "-c", GRADER, *jobs], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {name: (int(status), (folder / str(name) / "output.txt").read_text(errors="replace"))
            for name, status in zip([None, *SOLUTIONS], run.stdout.split())}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_test_of_an_exercise_tells_solved_from_unsolved(graded, name):
    status, output = graded[name]
    assert status == 0, output
    assert f"FAILED tests/exercises/test_{name}.py" in graded[None][1], graded[None][1]


def test_the_page_for_students_names_every_exercise():
    text = (EXERCISES / "README.md").read_text(encoding="utf-8")
    assert len(SOLUTIONS) == 12 and all(f"`{name}`" in text for name in SOLUTIONS)
