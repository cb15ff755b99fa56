"""Runs of both scripts that are killed, stopped, refused or run out of disk, and what the same command does then."""

import contextlib
import errno
import functools
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

import filelock
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv

import dqn_plasticity as dqn
import iql_pointmass_finetune as iql

resource = pytest.importorskip("resource", reason="not on Windows")

DQN = "--total-steps 1200 --eval-every 300 --eval-episodes 2 --learning-starts 100 --injection-steps 701"
DQN += " --batch-size 16 --buffer-size 1500 --train-frequency"
IQL = "--collect-steps 120 --offline-steps 60 --online-steps 60 --eval-every 30 --eval-episodes 2 --injection-steps 62"
RUNS = {  # each a few intervals between evaluations, with an injection inside one; a later flag replaces an earlier one
    "CartPole-v1": f"{DQN} 4",
    "Digits": f"{DQN} 16 --total-steps 4500 --eval-every 1500 --injection-steps 2001",
    "MsPacman": f"{DQN} 12 --total-steps 300 --eval-every 100 --eval-episodes 1 --learning-starts 50 --injection-steps 121"
    " --target-network-frequency 70",  # before and after the target shares what is frozen
    "PointmassHard": IQL,
}
RUNS = {env: f"--env {env} --device cpu --l2 incremental {flags}" for env, flags in RUNS.items()}
SHORT = pytest.mark.parametrize("env", ["CartPole-v1", "PointmassHard"])
PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED_ONCE = ["dqn_plasticity", "iql_pointmass_finetune", "torch._dynamo", "sklearn.datasets"]
PROCESSES.set_forkserver_preload(IMPORTED_ONCE)


def script(env):
    return iql if env == "PointmassHard" else dqn


def settings(env):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *RUNS[env].split()])
        return script(env).parse(script(env).cli)


def run(env, *more_flags):
    """The exit code of the command."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *RUNS[env].split(), *more_flags])
        patch.setattr(script(env), "LOG_EVERY", settings(env).eval_every // 2)
        short_episodes = functools.partial(
            AtariVectorEnv, max_num_frames_per_episode=240
        )  # for evaluations of a second
        patch.setattr(dqn, "AtariVectorEnv", short_episodes)
        try:
            return script(env).main()
        finally:
            signal.signal(signal.SIGTERM, handler)


def folder(env):
    return script(env).run_folder(settings(env))


def log(env):
    """Its lines without the speed."""
    return [line.rsplit(",", 1)[0] for line in (folder(env) / "log.csv").read_text().splitlines()]


@contextlib.contextmanager
def at(env, function, step, action):
    """Something happens when the script calls this function of its own, for this step (None: for any)."""
    original = getattr(script(env), function)

    def disturbed(*arguments):
        if step is None or any(type(argument) is int and argument == step for argument in arguments):
            action()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script(env), function, disturbed)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The log of a run to which nothing happens."""

    @functools.cache
    def log_of(env):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("undisturbed"))
            assert run(env) == 0
            return log(env)

    return log_of


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


@pytest.mark.parametrize("env", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_log(env, undisturbed, tmp_path):
    args, moments = settings(env), random.Random(0)
    injection, interval, last = args.injection_steps[0], args.eval_every, args.total_steps
    next_checkpoint = -(-injection // interval) * interval
    deaths = [
        ("injection_due", moments.randint(1, interval), kill),  # called at the beginning of every step
        ("injection_due", interval, kill_with_half_a_file_written),
        ("fresh_start", interval, kill),  # just after the checkpoint
        ("injection_due", injection + 1, kill),
        ("injection_due", next_checkpoint, kill_with_half_a_file_written),
        ("injection_due", moments.randint(next_checkpoint + 1, last), kill),
    ]
    if env in ("Digits", "MsPacman"):  # slow, so only the later half
        deaths = deaths[3:]
    else:
        deaths.append(("evaluate", last, kill))
    deaths = [("collect", None, kill_with_half_a_file_written)] * (env == "PointmassHard") + deaths
    for death in [*deaths, ()]:
        process = PROCESSES.Process(target=run_in, args=(tmp_path, env, *death))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if death else 0), death
    assert log(env) == undisturbed(env) and len(log(env)) > 6
    kept = {"config.json", "log.csv", "checkpoint.pt", ".lock", "picture.npz"}
    assert {path.name for path in folder(env).iterdir()} <= kept  # no replay, nothing half-written


# ---- faults in flight, after two checkpoints


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fault(name, env, patch):
    """A disk that is full from now on: for the log, for a checkpoint, for the replay ..."""
    if name in ("log", "checkpoint"):  # a limit on the size of files breaks off a write in its middle, like a full disk
        size = (folder(env) / "log.csv").stat().st_size + {"log": 20, "checkpoint": 5_000}[name]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    elif name == "replay":
        patch.setattr(os, "posix_fallocate", no_space, raising=False)
        patch.setattr(dqn.Replay, "_write", lambda *_, **__: pytest.fail("the process would be dead by now"))
    elif name == "fsync":
        patch.setattr(os, "fsync", no_space)
    else:
        (folder(env) / "checkpoint.tmp").mkdir()  # binds root, too, unlike a read-only folder


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "log": "too large",
        "checkpoint": "too large",
        "fsync": "space",
        "replay": "space",
        "no file": "directory",
    }.items(),
)
@SHORT
def test_a_full_disk_ends_the_run_with_one_line_and_nothing_is_lost(
    name, message, env, undisturbed, monkeypatch, capfd
):
    if name == "replay" and env == "PointmassHard":
        pytest.skip("keeps its replay in memory")
    whole, (soft, hard), before = undisturbed(env), resource.getrlimit(resource.RLIMIT_FSIZE), []
    capfd.readouterr()

    def break_the_disk():
        before.extend([(folder(env) / "checkpoint.pt").read_bytes(), log(env)])
        fault(name, env, patch)

    with monkeypatch.context() as patch, at(env, "injection_due", 2 * settings(env).eval_every + 1, break_the_disk):
        if name == "replay":  # a place must be reserved at every step
            patch.setattr(dqn.Replay, "reserved", property(lambda _: 0, lambda *_: None), raising=False)
        code = run(env)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert code == 1 and error.count("\n") == 1 and error.startswith("error: ") and message in error
    assert "the same command goes on" in error
    assert (folder(env) / "checkpoint.pt").read_bytes() == before[0] and log(env)[: len(before[1])] == before[1]
    with contextlib.suppress(OSError):
        (folder(env) / "checkpoint.tmp").rmdir()
    assert run(env) == 0 and log(env) == whole


@SHORT
def test_a_folder_that_cannot_be_made_is_one_line(env, capsys, tmp_path):
    Path("runs").write_text("not a folder")
    assert run(env) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "runs" in error and [path.name for path in tmp_path.iterdir()] == ["runs"]


def fill(place):
    """A replay larger than its disk."""
    args = dqn.Args(env="MsPacman", buffer_size=1_000, eval_every=20)
    replay, frames = dqn.Replay(place / "replay", dqn.make_env("MsPacman").single_observation_space, args), np.ones(1)
    with contextlib.suppress(OSError):
        for _ in range(1_000):
            replay.add(np.broadcast_to(frames, (4, 84, 84)), 0, 0.0, frames, False, False)
        sys.exit(3)
    sys.exit(0 if 100 < replay.next < 200 else 4)


def test_the_replay_meets_a_full_disk_with_an_error_and_not_with_the_death_of_the_process(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        process = PROCESSES.Process(target=fill, args=(tmp_path,))
        process.start()
        process.join()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert process.exitcode == 0  # without the reservation: killed by SIGBUS


# ---- Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["check", "collect", "evaluate", "replace_file"])
@SHORT
def test_a_stopped_run_says_how_to_go_on(env, when, number, undisturbed, capsys):
    if not hasattr(script(env), when):
        pytest.skip("collects no data")
    capsys.readouterr()
    step = settings(env).eval_every if when == "evaluate" else None
    with at(env, when, step, lambda: os.kill(os.getpid(), number)):
        assert run(env) == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("Stopped: the same command goes on")
    if when == "evaluate":
        assert run(env) == 0 and log(env) == undisturbed(env)


@SHORT
def test_a_run_stopped_in_a_notebook_goes_on_in_the_same_process(env, undisturbed, monkeypatch):
    monkeypatch.setattr(script(env), "LOG_EVERY", settings(env).eval_every // 2)

    def interrupt():
        raise KeyboardInterrupt

    with at(env, "injection_due", settings(env).eval_every + 5, interrupt), pytest.raises(KeyboardInterrupt) as stop:
        script(env).train(settings(env))
    assert stop.traceback  # which keeps all that train() held, its lock, too
    script(env).train(settings(env))
    assert log(env) == undisturbed(env)


# ---- refusals


def test_a_finished_run_says_so(capsys):
    assert run("CartPole-v1") == 0
    before = {path: path.read_bytes() for path in folder("CartPole-v1").iterdir()}
    (folder("CartPole-v1") / "replay").touch()  # killed just before it removed the replay
    capsys.readouterr()
    assert run("CartPole-v1") == 0 and "finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder("CartPole-v1").iterdir()} == before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Runs stopped at the start of their second interval, so that they have one checkpoint."""
    place = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for env in ("CartPole-v1", "PointmassHard"):
            with at(env, "injection_due", settings(env).eval_every + 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
                assert run(env) == 130
    return place / "runs"


@pytest.fixture
def stopped(checkpoints, tmp_path):
    """Copies of them, in the current folder."""
    shutil.copytree(checkpoints, tmp_path / "runs")


@SHORT
def test_other_settings_a_second_writer_and_another_format_are_refused(env, stopped, capsys):
    def refused_with():
        assert run(env, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    flags = ["--gamma", "0.5"]
    assert re.search(r"gamma 0\.9\d? \(now 0\.5\)", refused_with())
    flags = []
    with filelock.FileLock(folder(env) / ".lock"):
        assert "in use" in refused_with()
    checkpoint = torch.load(folder(env) / "checkpoint.pt")
    torch.save(checkpoint | {"format": 0}, folder(env) / "checkpoint.pt")
    assert "another version" in refused_with()


@pytest.mark.parametrize("damage", [0, 0.001, 0.3, 0.6, 0.999, "truncated", "empty"])
@SHORT
def test_a_damaged_checkpoint_is_refused_and_left_alone(env, damage, stopped, capsys):
    checkpoint = folder(env) / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    if damage == "truncated":
        broken = whole[: len(whole) // 2]
    elif damage == "empty":
        broken = b""
    else:
        start = int(damage * len(whole))
        broken = whole[:start] + bytes(byte ^ 0xFF for byte in whole[start : start + 64]) + whole[start + 64 :]
    checkpoint.write_bytes(broken)
    before = log(env)
    assert run(env) == 2
    assert re.fullmatch(r"error: .*checkpoint.pt cannot be read .*delete it.*\n", capsys.readouterr().err)
    assert checkpoint.read_bytes() == broken and log(env) == before


def test_too_little_disk_is_refused_with_the_buffer_size_that_fits(monkeypatch, capsys, tmp_path):
    def attempt(*flags):
        monkeypatch.setattr(sys, "argv", ["dqn_plasticity.py", "--eval-every", "1000", *flags])
        monkeypatch.setattr(dqn, "open_run", lambda args: pytest.fail("started"))
        with pytest.raises(pytest.fail.Exception) if fits else contextlib.nullcontext():
            assert dqn.main() == 2
        return capsys.readouterr().err

    free = 1_000_000_000
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
    fits = False
    error = attempt()
    assert re.fullmatch(
        r"error: .*7,\d+.\d MB of disk, 940.0 MB are free for it: make room, .* --buffer-size \d+\n", error
    )
    size = int(error.split()[-1])
    assert 131_000 < size < 133_000  # of 7 KB each
    assert attempt("--buffer-size", str(size + 1))
    assert not list(tmp_path.iterdir())
    fits = True
    attempt("--buffer-size", str(size))
    attempt("--total-steps", "100000")  # never fills its replay
    attempt("--env", "CartPole-v1")
    # What the run's own replay has taken already counts as free; a finished run needs nothing.
    args = dqn.Args(eval_every=1_000, buffer_size=3_000)
    dqn.run_folder(args).mkdir(parents=True)
    replay = dqn.Replay(dqn.run_folder(args) / "replay", dqn.make_env("MsPacman").single_observation_space, args)
    while replay.next < len(replay.ring):
        replay.reserve()
        replay.next = replay.reserved
    taken, free = (dqn.run_folder(args) / "replay").stat().st_blocks * 512, 60_000_000
    assert taken >= replay.ring.nbytes
    attempt("--buffer-size", "3000")
    (dqn.run_folder(args) / "checkpoint.pt").write_bytes(bytes(27_000_000))  # has its place on the disk already
    free -= 27_000_000
    attempt("--buffer-size", "3000")
    (dqn.run_folder(args) / "replay").unlink()
    attempt("--buffer-size", "3000")
    fits = False
    (dqn.run_folder(args) / "checkpoint.pt").unlink()
    assert attempt("--buffer-size", "3000").endswith("make room\n")
