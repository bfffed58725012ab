"""Shared by all tests: two threads, the project root as working folder, real data where it is, no network."""
import os
import signal
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)
if hasattr(signal, "SIGHUP"):                           # Windows has none
    signal.signal(signal.SIGHUP, signal.SIG_DFL)      # tests send it; under nohup it would be ignored


def real(path):
    """A file of the real data, or a skip that names it. Every test that uses this has a twin on made-up data."""
    file = Path(os.environ.get("DATA_DIR") or ROOT / "data") / path
    if not file.exists():
        pytest.skip(f"{file} is not there (set DATA_DIR to a folder that has {path})")
    return file


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections leave the machine for nobody: loopback only."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty DATA_DIR of the test's own."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def next_words(language, words):
    """{word: p} for the word after this text (which starts at a document's beginning), from a language's rules."""
    stack, posterior = ["DOCUMENT"], [1 / len(language.moods)] * len(language.moods)
    for word in words:
        weights, push = language.rules[stack.pop()][word]
        posterior = [q * w for q, w in zip(posterior, weights)]
        posterior = [q / sum(posterior) for q in posterior]
        stack.extend(push)
        if not stack:
            stack, posterior = ["DOCUMENT"], [1 / len(language.moods)] * len(language.moods)
    return {word: sum(q * w for q, w in zip(posterior, weights)) for word, (weights, _) in language.rules[stack[-1]].items()}


def pytest_ignore_collect(collection_path, config):
    """The tests of the exercises pass where an exercise is solved: they run when they are asked for."""
    asked = any("exercises" in str(arg) for arg in config.invocation_params.args)
    return True if collection_path.parent.name == "exercises" and not asked else None
