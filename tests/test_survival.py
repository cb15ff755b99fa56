"""Runs of both scripts that are killed, stopped, refused or run out of disk, and what the same command does then."""

import contextlib
import errno
import functools
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import call, rows

import dqn_plasticity as dqn
import iql_pointmass_finetune as iql
import metrics

resource = pytest.importorskip("resource", reason="not on Windows")

# Each a few intervals between evaluations, with an injection inside one
SHARED = {"device": "cpu", "l2": "incremental", "plasticity_updates": 2, "eval_every": 30, "eval_episodes": 2}
DQN = SHARED | {"total_steps": 1_200, "eval_every": 300, "learning_starts": 100, "injection_steps": (701,)}
DQN |= {"batch_size": 16, "buffer_size": 300, "train_frequency": 8}
DIGITS = {"total_steps": 4_500, "eval_every": 1_500, "injection_steps": (2_001,), "train_frequency": 16}
DIGITS |= {"layer_norm": True, "learning_starts": 800}  # so that a row of every interval precedes its first update
ATARI = {"total_steps": 180, "eval_every": 60, "learning_starts": 30, "injection_steps": (71,), "train_frequency": 8}
ATARI |= {"eval_episodes": 1, "plasticity_every": 2}
ATARI |= {"target_network_frequency": 40}  # copies before and after the target shares what is frozen
IQL = {"layer_norm": True, "collect_steps": 120, "offline_steps": 60, "online_steps": 60, "injection_steps": (62,)}
RUNS = {"CartPole-v1": DQN, "Digits": DQN | DIGITS, "MsPacman": DQN | ATARI, "PointmassHard": SHARED | IQL}
SCRIPTS = dict.fromkeys(RUNS, dqn) | {"PointmassHard": iql}
ARGS = {env: SCRIPTS[env].Args(env=env, **settings) for env, settings in RUNS.items()}
FOLDERS = {env: SCRIPTS[env].run_folder(args) for env, args in ARGS.items()}
SHORT = pytest.mark.parametrize("env", ["CartPole-v1", "PointmassHard"])
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["dqn_plasticity", "iql_pointmass_finetune", "torch._dynamo", "sklearn.datasets"])


def run(env, *more_flags):
    """The exit code of the command."""
    flags = ["--env", env, *more_flags]
    for name, value in RUNS[env].items():
        values = {bool: (), tuple: value}.get(type(value), (value,))
        flags += [f"--{name.replace('_', '-')}", *values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "LOG_EVERY", ARGS[env].eval_every // 2)
        short_episodes = functools.partial(AtariVectorEnv, max_num_frames_per_episode=240)
        patch.setattr(dqn, "AtariVectorEnv", short_episodes)  # for evaluations of a second
        return call(SCRIPTS[env], *flags)


@contextlib.contextmanager
def at(env, function, step, action):
    """Something happens when this function is called, for this step (None: for any)."""
    owner = SCRIPTS[env] if hasattr(SCRIPTS[env], function) else metrics
    original = getattr(owner, function)

    def disturbed(*arguments):
        if step is None or any(type(argument) is int and argument == step for argument in arguments):
            action()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, disturbed)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run to which nothing happens."""

    @functools.cache
    def folder_of(env):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("undisturbed"))
            assert run(env) == 0
            return FOLDERS[env].resolve()

    return folder_of


# ---- kill -9
def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_with_half_a_file_written():
    """Not at once, but when the next file is about to replace its predecessor."""
    os.replace = lambda temporary, path: (os.truncate(temporary, os.path.getsize(temporary) // 2), kill())


def run_in(place, env, *disturbance):
    os.chdir(place)
    torch.set_num_threads(1)
    with at(env, *disturbance) if disturbance else contextlib.nullcontext():
        sys.exit(run(env))


def exit_code(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("env", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_log(env, undisturbed, tmp_path):
    args, moments = ARGS[env], random.Random(0)
    injection, interval, last = args.injection_steps[0], args.eval_every, args.total_steps
    next_checkpoint = -(-injection // interval) * interval
    deaths = [
        ("injection_due", moments.randint(1, interval), kill),  # called at the beginning of every step
        ("injection_due", interval, kill_with_half_a_file_written),
        ("injection_due", injection + 1, kill),
        ("injection_due", next_checkpoint, kill_with_half_a_file_written),
        ("fresh_start", next_checkpoint, kill),  # just after the checkpoint
        ("injection_due", moments.randint(next_checkpoint + 1, last), kill),
        ("evaluate", last, kill),
    ]
    if env in ("Digits", "MsPacman"):  # slow, so only those that go on from before and from after the injection
        deaths = deaths[3::2]
    if env == "PointmassHard":
        deaths.insert(0, ("collect", None, kill_with_half_a_file_written))
    for death in deaths:
        assert exit_code(run_in, tmp_path, env, *death) == -signal.SIGKILL, death
        assert death[0] != "collect" or not list(tmp_path.glob("runs/*.npz"))  # it is whole or absent
    assert exit_code(run_in, tmp_path, env) == 0
    assert rows(FOLDERS[env]) == rows(undisturbed(env)) and len(rows(FOLDERS[env])) >= 6
    kept = {"config.json", "log.csv", "checkpoint.pt", ".lock", "picture.npz", "episode.gif"}
    assert {path.name for path in FOLDERS[env].iterdir()} <= kept  # no replay, nothing half-written


DIGESTS = {"CartPole-v1": "a1001f54", "Digits": "0a5ec9ff", "MsPacman": "1530a08f", "PointmassHard": "3b05de28"}


@pytest.mark.parametrize("env", RUNS)
def test_a_checkpoint_keeps_its_names_and_shapes_as_long_as_the_version(env, undisturbed):
    saved = []
    for name, part in torch.load(undisturbed(env) / "checkpoint.pt").items():
        inside = part.items() if isinstance(part, dict) and "optimizer" not in name else ()
        saved += [name, *((key, *getattr(value, "shape", ())) for key, value in inside)]
    digest = hashlib.sha256(repr(saved).encode()).hexdigest()[:8]
    now = SCRIPTS[env].VERSION, digest
    assert now == (2 if env == "PointmassHard" else 4, DIGESTS[env]), "raise VERSION, then pin it and this here"


# ---- faults in flight, after two checkpoints
FAULTS = {"log": "too large", "checkpoint": "too large", "fsync": "space", "tmp": "directory", "replay": "too large"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_ends_the_run_with_one_line_and_nothing_is_lost(fault, undisturbed, monkeypatch, capfd):
    env = "CartPole-v1" if fault == "replay" else "PointmassHard"  # which keeps its replay in memory
    whole, (soft, hard), before = rows(undisturbed(env)), resource.getrlimit(resource.RLIMIT_FSIZE), []
    capfd.readouterr()

    def break_the_disk():
        """It is full from now on. A limit on the size of files breaks off a write in its middle, like a full disk."""
        before.extend([(FOLDERS[env] / "checkpoint.pt").read_bytes(), rows(FOLDERS[env])])
        largest = {"log": (FOLDERS[env] / "log.csv").stat().st_size + 20, "checkpoint": 5_000, "replay": 15_000}
        if fault in largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest[fault], hard))
        elif fault == "fsync":
            patch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        else:
            (FOLDERS[env] / "checkpoint.tmp").mkdir()  # binds root, too, unlike a read-only folder

    with monkeypatch.context() as patch, at(env, "injection_due", 2 * ARGS[env].eval_every + 1, break_the_disk):
        code = run(env)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert re.fullmatch(rf"error: .*{FAULTS[fault]}.* the same command goes on .*\n", capfd.readouterr().err)
    assert (FOLDERS[env] / "checkpoint.pt").read_bytes() == before[0]
    assert rows(FOLDERS[env])[: len(before[1])] == before[1] == whole[: len(before[1])]
    with contextlib.suppress(OSError):
        (FOLDERS[env] / "checkpoint.tmp").rmdir()
    if fault == "replay":  # without which a run does not go on as if nothing were missing
        replay = (FOLDERS[env] / "replay").rename("elsewhere")
        assert run(env) == 1 and re.fullmatch(r"error: .*No such file.*replay.*\n", capfd.readouterr().err)
        replay.rename(FOLDERS[env] / "replay")
    assert run(env) == 0 and rows(FOLDERS[env]) == whole


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    Path("runs").write_text("not a folder")
    assert run("CartPole-v1") == 1 and re.fullmatch(r"error: .*runs.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def fill(place):
    """A replay larger than its disk."""
    args = dqn.Args(env="MsPacman", buffer_size=1_000, eval_every=20)
    replay = dqn.Replay(place / "replay", dqn.make_env("MsPacman").single_observation_space, args)
    with pytest.raises(OSError):
        while replay.next < 1_000:
            replay.add(np.ones((4, 84, 84)), 0, 0.0, np.ones((4, 84, 84)), False, False)
    assert 100 < replay.next < 200


def test_the_replay_meets_a_full_disk_with_an_error_and_not_with_the_death_of_the_process(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        code = exit_code(fill, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert code == 0  # a write through a memory map would be killed by SIGBUS


# ---- Ctrl-C and SIGTERM
STOPS = ["CartPole-v1 check", "CartPole-v1 replace_file", "CartPole-v1 evaluate"]


@pytest.mark.parametrize("moment", [*STOPS, "PointmassHard collect", "PointmassHard evaluate"])
def test_a_stopped_run_says_how_to_go_on(moment, undisturbed, capsys):
    env, when = moment.split()
    whole, step = rows(undisturbed(env)), ARGS[env].eval_every if when == "evaluate" else None
    number = signal.SIGINT if when == "evaluate" else signal.SIGTERM
    capsys.readouterr()
    with at(env, when, step, lambda: os.kill(os.getpid(), number)):
        assert run(env) == 130
    assert re.fullmatch("Stopped: the same command goes on .*\n", capsys.readouterr().err)
    assert run(env) == 0 and rows(FOLDERS[env]) == whole


@SHORT
def test_a_run_stopped_in_a_notebook_goes_on_in_the_same_process(env, undisturbed, monkeypatch):
    monkeypatch.setattr(metrics, "LOG_EVERY", ARGS[env].eval_every // 2)
    interrupt, step = mock.Mock(side_effect=KeyboardInterrupt), ARGS[env].eval_every + 5
    with at(env, "injection_due", step, interrupt), pytest.raises(KeyboardInterrupt) as stop:
        SCRIPTS[env].train(ARGS[env])
    assert stop.traceback  # which keeps all that train() held, its lock, too
    assert SCRIPTS[env].train(ARGS[env]) == FOLDERS[env]
    assert rows(FOLDERS[env]) == rows(undisturbed(env))


def test_importing_the_scripts_changes_nothing():
    code = """if True:
        import os, random, signal, numpy, torch
        def state():
            streams = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
            handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
            return torch.get_num_threads(), torch.get_default_dtype(), streams, handlers, os.listdir(), os.getcwd()
        torch.set_num_threads(3)
        before = state()
        import dqn_plasticity, iql_pointmass_finetune, metrics
        assert state() == before"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- refusals
@SHORT
def test_a_finished_run_says_so_and_other_settings_and_another_version_are_refused(env, capsys, monkeypatch):
    assert run(env) == 0
    before = {path: path.read_bytes() for path in FOLDERS[env].iterdir()}
    if env == "CartPole-v1":  # as if killed just before it removed the replay
        (FOLDERS[env] / "replay").touch()
    capsys.readouterr()
    assert run(env) == 0 and "finished" in capsys.readouterr().out
    assert run(env, "--gamma", 0.5) == 2
    assert re.fullmatch(r"error: .* settings: gamma 0\.9\d? \(now 0\.5\); .*\n", capsys.readouterr().err)
    monkeypatch.setattr(SCRIPTS[env], "VERSION", SCRIPTS[env].VERSION + 1)
    assert run(env) == 2 and re.fullmatch(r"error: .*: version \d \(now \d\); .*\n", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in FOLDERS[env].iterdir()} == before


def test_too_little_disk_is_refused_with_the_buffer_size_that_fits(monkeypatch, capsys, tmp_path):
    free, usage = 1_040_000_000, namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
    monkeypatch.setattr(metrics, "Run", lambda *_: metrics.refuse(True, "started"))

    def attempt(*flags):
        assert call(dqn, "--eval-every", 1_000, *flags) == 2
        return capsys.readouterr().err

    error, started = attempt(), "error: started\n"
    size = re.fullmatch(r"error: .* needs 7,\d+.\d MB .*, 940.0 MB .* make room, .* --buffer-size (\d+)\n", error)[1]
    assert 130_000 < int(size) < 133_000  # of 7 KB each
    assert attempt("--buffer-size", size) == started and "make room" in attempt("--buffer-size", int(size) + 1)
    assert attempt("--total-steps", 120_000) == started  # with a replay that is never filled
    assert attempt("--env", "CartPole-v1") == started and not list(tmp_path.iterdir())
    free = 0
    assert "make room" in attempt("--buffer-size", 3_000)
    dqn.run_folder(dqn.Args()).mkdir(parents=True)
    (dqn.run_folder(dqn.Args()) / "checkpoint.pt").touch()  # what a run that goes on has written is no longer free
    assert attempt("--buffer-size", 3_000) == started
