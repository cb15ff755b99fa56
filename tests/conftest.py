"""The scripts under test lie one folder up; every test runs in an empty folder of its own, on one thread."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import pytest
import torch


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path
