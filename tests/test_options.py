"""The command line that is a dataclass: types, ranges, what was typed, errors in one line."""
from dataclasses import dataclass

import pytest

import data
import train
from data import UserError, option


@dataclass
class Config:
    """What the script does."""
    run: str = option(None, "a folder")
    model: str = option("lstm", "which", choices=["rnn", "lstm"])
    lr: float = option(1e-3, "100 % of it", above=0, group="the step")
    share: float = option(0.5, "of all", above=0, at_most=1)
    n: int = option(3, "how many", at_least=1, below=10)
    each: list[float] = option([1.0, 2.0], "several", above=0)
    resume: bool = option(False, "go on")
    whiten: bool = option(True, "advantages")


def test_defaults_types_and_what_was_typed():
    assert data.parse_args(Config, []) == (Config(), set())
    config, given = data.parse_args(Config, "--model rnn --lr 0.1 --n 3 --each 4 5 --resume --no-whiten".split())
    assert config == Config(model="rnn", lr=0.1, each=[4.0, 5.0], resume=True, whiten=False)
    assert given == {"model", "lr", "n", "each", "resume", "whiten"}            # n too, though it is the default
    assert Config().each is not Config().each


@pytest.mark.parametrize("words, message", [
    ("--lr 0", "--lr must be above 0, not 0.0"), ("--lr inf", "--lr must be above 0, not inf"), ("--lr nan", "--lr must"),
    ("--share 1.5", "--share must be above 0 and at most 1, not 1.5"), ("--n 0", "--n must be at least 1 and below 10, not 0"),
    ("--n 10", "--n must be"), ("--n 1.5", "invalid int value: '1.5'"), ("--each 1 -2", "--each must be above 0, not -2.0"),
    ("--model gru", "invalid choice: 'gru'"), ("--modle rnn", "unrecognized arguments: --modle"), ("--n", "expected one argument")])
def test_what_is_not_allowed_is_said_in_one_line(words, message):
    with pytest.raises(UserError) as e:
        data.parse_args(Config, words.split())
    assert message in str(e.value) and "--help lists the options" in str(e.value) and "\n" not in str(e.value)


def test_help_has_groups_defaults_and_the_example(capsys):
    with pytest.raises(SystemExit):
        data.parse_args(Config, ["--help"], "example: python script.py")
    text = capsys.readouterr().out
    assert all(part in text for part in ("What the script does.", "the step:", "100 % of it (default: 0.001)", "--no-whiten",
                                         "several (default: 1.0 2.0)", "a folder\n", "example: python script.py"))


def test_an_option_may_be_written_with_underscores_and_several_files_are_explained():
    config, given = data.parse_args(train.Config, ["--batch_size=4", "--n_embd", "32", "--run", "my_run"])
    assert (config.batch_size, config.n_embd, config.run) == (4, 32, "my_run") and given == {"batch_size", "n_embd", "run"}
    with pytest.raises(data.UserError, match="a/2.txt; of several files, name their folder"):
        data.parse_args(train.Config, ["--data", "a/1.txt", "a/2.txt"])
