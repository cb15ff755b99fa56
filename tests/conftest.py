"""The scripts under test lie one folder up; every test runs in an empty folder of its own, on one thread."""

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
    monkeypatch.setattr(metrics, "save_gif", lambda *_: None)  # slower than a small run; the tests of it put it back
    torch.set_num_threads(1)
    return tmp_path


def call(script, *flags):
    """The exit code of `python script.py flags`, in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        try:
            return script.main()
        except SystemExit as stop:  # tyro's: its help, or its box around a mistake
            return stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)


def rows(folder):
    """The log's, without their speed."""
    with open(folder / "log.csv") as file:
        return [dict(list(row.items())[:-1]) for row in csv.DictReader(file)]


def mistakes(table):
    return [pair.strip().split(" => ") for pair in table.split(";")]


def check_mistake(script, mistake, message, capsys):
    """One line, or tyro's box, exit code 2, and nothing is written."""
    with mock.patch("metrics.Run", side_effect=AssertionError("the run was started")):
        assert call(script, *mistake.split()) == 2 and not os.listdir()
    error = capsys.readouterr().err
    assert message in error and (re.fullmatch("error: .*\n", error) or "--help" in error)


def check_defaults(script, table, column, flags, capsys):
    """`table` names every setting and its defaults; of several, the one in this column is that for these flags."""
    expected = {name: values[column % len(values)] for name, *values in map(str.split, table.split(","))}
    expected["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    assert {name: str(value) for name, value in vars(script.Args(env=expected["env"])).items()} == expected
    assert call(script, *flags.split(), "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    for name, value in expected.items():
        flag, default = f"--{name.replace('_', '-')}", re.escape(value.strip("()"))
        assert re.search(rf"{flag} (?:(?!\(default).)*\(default: {default}\)", shown), flag
