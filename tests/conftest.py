"""The scripts under test lie one folder up. Every test runs in an empty folder, on one thread."""

import csv
import os
import re
import signal
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import pytest
import torch

import metrics

SAVE_GIF = metrics.save_gif


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A picture takes longer than a small run; the tests of pictures put it back.
    monkeypatch.setattr(metrics, "save_gif", mock.Mock())
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def interruptible():
    """Ctrl-C stops a run even if pytest was started in the background, where SIGINT is ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def call(script, *flags):
    """The exit code of `python script.py flags`, in this process."""
    changed = [signal.SIGTERM]
    if hasattr(signal, "SIGPIPE"):
        changed.append(signal.SIGPIPE)
    handlers = [signal.getsignal(number) for number in changed]
    arguments = [script.__file__, *map(str, flags)]
    with mock.patch.object(sys, "argv", arguments):
        try:
            return script.main()
        except SystemExit as stop:  # tyro's: its help, or its box around a mistake
            return stop.code
        finally:
            for number, handler in zip(changed, handlers):
                signal.signal(number, handler)


def rows(folder):
    """The rows of the log, without their speed."""
    with open(folder / "log.csv") as file:
        table = list(csv.DictReader(file))
    for row in table:
        del row["steps_per_second"]
    return table


def mistakes(table):
    """Pairs of flags and message, from "flags => message; flags => message"."""
    return [pair.strip().split(" => ") for pair in table.split(";")]


def check_mistake(script, mistake, message, capsys):
    """The mistake ends with one line, or tyro's box, with exit code 2, and nothing is written."""
    with mock.patch("metrics.Run", side_effect=AssertionError("the run was started")):
        code = call(script, *mistake.split())
    assert code == 2
    assert not os.listdir()
    error = capsys.readouterr().err
    assert message in error
    assert re.fullmatch("error: .*\n", error) or "--help" in error


def check_defaults(script, table, column, flags, capsys):
    """Every setting has its default, and the help shows it.

    `table` names every setting and its default, or its defaults by task, of which `column` is the
    one for these flags.
    """
    expected = {}
    for line in table.split(","):
        name, *values = line.split()
        expected[name] = values[column % len(values)]
    expected["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    args = script.Args(env=expected["env"])
    assert {name: str(value) for name, value in vars(args).items()} == expected

    assert call(script, *flags.split(), "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    # On the command line it is None until it is known whether injection steps are given.
    expected["injections"] = "None"
    for name, value in expected.items():
        default = re.escape(value.strip("()"))
        pattern = rf"{metrics.flag(name)} (?:(?!\(default).)*\(default: {default}\)"
        assert re.search(pattern, shown), name
