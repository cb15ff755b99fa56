"""Runs of both scripts that are killed, stopped, refused or run out of disk.

And what the same command does then.
"""

import contextlib
import errno
import functools
import hashlib
import math
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

import filelock
import numpy as np
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import call, rows

import dqn_plasticity as dqn
import iql_pointmass_finetune as iql
import metrics

resource = pytest.importorskip("resource", reason="not on Windows")

# Each run has a few intervals between evaluations, with an injection inside one.
SHARED = {
    "device": "cpu",
    "l2": "incremental",
    "plasticity_updates": 10,
    "eval_episodes": 2,
}
CARTPOLE = {
    **SHARED,
    "total_steps": 1_200,
    "eval_every": 300,
    "plasticity_every": 600,
    "learning_starts": 100,
    "injection_steps": (701,),
    "batch_size": 16,
    "buffer_size": 300,
    "train_frequency": 8,
}
DIGITS = {
    **CARTPOLE,
    "total_steps": 4_500,
    "eval_every": 1_500,
    "plasticity_every": 1_500,
    "learning_starts": 800,  # so that a row of every interval precedes its first update
    "injection_steps": (2_001,),
    "train_frequency": 16,
    "layer_norm": "before",
}
ATARI = {
    **CARTPOLE,
    "total_steps": 180,
    "eval_every": 60,
    "eval_episodes": 1,
    "plasticity_every": 120,
    "learning_starts": 30,
    "injection_steps": (71,),
    "target_network_frequency": 40,  # copies before and after the target shares what is frozen
}
IQL = {
    **SHARED,
    "eval_every": 30,
    "plasticity_every": 60,
    "collect_steps": 120,
    "offline_steps": 60,
    "online_steps": 60,
    "injection_steps": (62,),
    "layer_norm": "after",
}
RUNS = {"CartPole": CARTPOLE, "Digits": DIGITS, "MsPacman": ATARI, "PointmassHard": IQL}
SCRIPTS = {"CartPole": dqn, "Digits": dqn, "MsPacman": dqn, "PointmassHard": iql}
ARGS = {env: SCRIPTS[env].Args(env=env, **settings) for env, settings in RUNS.items()}
FOLDERS = {env: metrics.run_folder(args) for env, args in ARGS.items()}
SHORT = pytest.mark.parametrize("env", ["CartPole", "PointmassHard"])

PROCESSES = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = ["torch._dynamo", "sklearn.datasets"]
PROCESSES.set_forkserver_preload(["dqn_plasticity", "iql_pointmass_finetune", *SLOW_IMPORTS])


@contextlib.contextmanager
def short():
    """Rows, episodes and samples for the metrics that are as small as these runs."""
    episodes = functools.partial(AtariVectorEnv, max_num_frames_per_episode=160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Run, "row_due", row_due_twice_an_interval)
        patch.setattr(dqn.Replay, "draw", draw_at_most_64)
        patch.setattr(dqn, "AtariVectorEnv", episodes)
        yield


DRAW = dqn.Replay.draw


def draw_at_most_64(replay, count, rng):
    return DRAW(replay, min(count, 64), rng)


def row_due_twice_an_interval(run, step):
    return step % (run.eval_every // 2) == 0 or run.interval_ends(step)


def run(env, *more_flags):
    """The exit code of the command."""
    flags = ["--env", env]
    for name, value in RUNS[env].items():
        flags.append(metrics.flag(name))
        if isinstance(value, tuple):
            flags.extend(value)
        else:
            flags.append(value)
    with short():
        return call(SCRIPTS[env], *flags, *more_flags)


@contextlib.contextmanager
def at(env, function, step, action):
    """Something happens when this function is called for this step (None: for any)."""
    owner = SCRIPTS[env] if hasattr(SCRIPTS[env], function) else metrics
    original = getattr(owner, function)

    def disturbed(*arguments):
        steps = [argument for argument in arguments if type(argument) is int]
        if step is None or step in steps:
            action()
        return original(*arguments)

    with mock.patch.object(owner, function, disturbed):
        yield


def stop_at(env, step):
    """Start the run, and stop it at the beginning of this step."""
    with at(env, "injection_due", step, mock.Mock(side_effect=KeyboardInterrupt)):
        assert run(env) == 130


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def write_half_and_kill(temporary, path):
    os.truncate(temporary, os.path.getsize(temporary) // 2)
    kill()


def kill_with_half_a_file_written():
    """Not at once, but when the next file is about to replace its predecessor."""
    os.replace = write_half_and_kill


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
    args = ARGS[env]
    moments = random.Random(0)
    injection = args.injection_steps[0]
    interval = args.eval_every
    last = args.total_steps
    next_checkpoint = math.ceil(injection / interval) * interval
    # injection_due is called at the beginning of every step.
    deaths = [
        ("injection_due", moments.randint(1, interval), kill),
        ("injection_due", interval, kill_with_half_a_file_written),
        ("injection_due", injection + 1, kill),
        ("injection_due", next_checkpoint, kill_with_half_a_file_written),
        ("fresh_start", next_checkpoint, kill),  # just after the checkpoint
        ("injection_due", moments.randint(next_checkpoint + 1, last), kill),
        ("evaluate", last, kill),
    ]
    if env in ("Digits", "MsPacman"):
        # They are slow, so only those that continue from before and from after the injection.
        deaths = deaths[3::2]
    if env == "PointmassHard":
        deaths.insert(0, ("collect", None, kill_with_half_a_file_written))
    for death in deaths:
        assert exit_code(run_in, tmp_path, env, *death) == -signal.SIGKILL, death
        if death[0] == "collect":
            assert not list(tmp_path.glob("runs/*.npz"))  # it is whole or absent
    assert exit_code(run_in, tmp_path, env) == 0
    assert rows(FOLDERS[env]) == rows(undisturbed(env))
    assert len(rows(FOLDERS[env])) >= 6
    kept = {"config.json", "log.csv", "checkpoint.pt", ".lock", "picture.npz", "episode.gif"}
    found = {path.name for path in FOLDERS[env].iterdir()}
    assert found <= kept  # no replay, nothing half-written


@pytest.mark.parametrize("env", RUNS)
def test_the_runs_here_measure_plasticity_after_the_injection(env, undisturbed):
    """So that the tests above and below compare it, too."""
    filled = [row["step"] for row in rows(undisturbed(env)) if row["plasticity"]]
    every = ARGS[env].plasticity_every
    assert filled == [str(step) for step in range(every, ARGS[env].total_steps + 1, every)]
    assert int(filled[-1]) > ARGS[env].injection_steps[0]


DIGESTS = {
    "CartPole": "2769061a",
    "Digits": "e39877d6",
    "MsPacman": "9d14d807",
    "PointmassHard": "d57d2828",
}


@pytest.mark.parametrize("env", RUNS)
def test_a_checkpoint_keeps_its_names_and_shapes_as_long_as_the_version(env, undisturbed):
    saved = []
    for name, part in torch.load(undisturbed(env) / "checkpoint.pt").items():
        saved.append(name)
        if isinstance(part, dict) and "optimizer" not in name:
            for key, value in part.items():
                saved.append((key, *getattr(value, "shape", ())))
    digest = hashlib.sha256(repr(saved).encode()).hexdigest()[:8]
    version = 4 if env == "PointmassHard" else 6
    advice = "raise VERSION, then pin it and this here"
    assert (SCRIPTS[env].VERSION, digest) == (version, DIGESTS[env]), advice


# ---- faults in flight, after two checkpoints
FAULTS = {
    "log": "too large",
    "checkpoint": "too large",
    "fsync": "space",
    "tmp": "directory",
    "replay": "too large",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_ends_the_run_with_one_line_and_nothing_is_lost(fault, undisturbed, capfd):
    env = "PointmassHard"  # which keeps its replay in memory
    if fault == "replay":
        env = "CartPole"
    folder = FOLDERS[env]
    whole = rows(undisturbed(env))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {}
    capfd.readouterr()

    def break_the_disk():
        """It is full from now on.

        A limit on the size of files breaks off a write in its middle, as a full disk does.
        """
        before["checkpoint"] = (folder / "checkpoint.pt").read_bytes()
        before["rows"] = rows(folder)
        largest = {
            "log": (folder / "log.csv").stat().st_size + 20,
            "checkpoint": 5_000,
            "replay": 15_000,
        }
        if fault in largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest[fault], hard))
        elif fault == "fsync":
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(os, "fsync", mock.Mock(side_effect=full))
        else:
            (folder / "checkpoint.tmp").mkdir()  # binds root, too, unlike a read-only folder

    step = 2 * ARGS[env].eval_every + 1
    with pytest.MonkeyPatch.context() as patch, at(env, "injection_due", step, break_the_disk):
        code = run(env)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    line = rf"error: .*{FAULTS[fault]}.* the same command continues from the latest checkpoint.*\n"
    assert re.fullmatch(line, capfd.readouterr().err)
    assert (folder / "checkpoint.pt").read_bytes() == before["checkpoint"]
    count = len(before["rows"])
    assert rows(folder)[:count] == before["rows"] == whole[:count]
    with contextlib.suppress(OSError):
        (folder / "checkpoint.tmp").rmdir()
    assert run(env) == 0
    assert rows(folder) == whole


def test_a_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    Path("runs").write_text("not a folder")
    assert run("CartPole") == 1
    assert re.fullmatch(r"error: .*runs.*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def fill(place):
    """A replay larger than its disk."""
    args = dqn.Args(env="MsPacman", buffer_size=1_000, eval_every=20)
    obs_space = dqn.make_env("MsPacman").single_observation_space
    replay = dqn.Replay(place / "replay", obs_space, args)
    obs = np.ones((4, 84, 84))
    with pytest.raises(OSError):
        while replay.next < 1_000:
            replay.add(obs, 0, 0.0, obs, False, False)
    assert 100 < replay.next < 200


def test_the_replay_meets_a_full_disk_with_an_error_and_not_with_the_death_of_the_process(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a small disk here")
    try:
        code = exit_code(fill, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert code == 0  # a write through a memory map would be killed by SIGBUS


# ---- files that change between two starts
def refused(env, changed, capsys, *flags):
    """The line with which the command refuses; nothing but the changed file may be touched."""
    folder = FOLDERS[env]
    before = contents(folder)
    before.pop(changed, None)
    capsys.readouterr()
    assert run(env, *flags) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", error)
    after = contents(folder)
    after.pop(changed, None)
    assert after == before
    return error


def check_changes(env, changes, capsys):
    """Each is refused with a line that says what to do, and leaves the rest as it was."""
    for name, content in changes:
        path = FOLDERS[env] / name
        whole = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        error = refused(env, name, capsys)
        assert f"{path} " in error
        assert "put it back, or delete " in error
        path.write_bytes(whole)


def test_replay_and_config_that_have_changed_are_refused_until_they_are_back(undisturbed, capsys):
    env = "CartPole"
    folder = FOLDERS[env]
    interval = ARGS[env].eval_every
    stop_at(env, interval + 1)
    older_replay = (folder / "replay").read_bytes()
    stop_at(env, 2 * interval + 1)
    replay = (folder / "replay").read_bytes()
    assert len(older_replay) == len(replay)
    changes = [
        ("replay", b""),
        ("replay", replay[: len(replay) // 2]),
        ("replay", None),
        ("replay", older_replay),
        ("config.json", b""),
        ("config.json", b"null"),
        ("config.json", None),
    ]
    check_changes(env, changes, capsys)
    (folder / "log.csv").write_bytes(b"")  # the checkpoint has it, too
    assert run(env) == 0
    assert rows(folder) == rows(undisturbed(env))


def test_replay_that_is_cut_short_is_refused_wherever_its_newest_transitions_lie(capsys):
    """The file is a ring: what its end holds is neither the oldest nor the newest here."""
    env = "CartPole"
    flags = ("--eval-every", 200)
    with at(env, "injection_due", 801, mock.Mock(side_effect=KeyboardInterrupt)):
        assert run(env, *flags) == 130
    path = FOLDERS[env] / "replay"
    whole = path.read_bytes()
    path.write_bytes(whole[:-960])  # 30 slots less
    error = refused(env, "replay", capsys, *flags)
    assert f"{path} has changed since the latest checkpoint: put it back, or delete " in error
    path.write_bytes(whole)
    assert run(env, *flags) == 0


def test_data_set_and_config_that_have_changed_are_refused_until_they_are_back(undisturbed, capsys):
    env = "PointmassHard"
    folder = FOLDERS[env]
    stop_at(env, ARGS[env].eval_every + 1)
    changes = [
        ("config.json", b""),
        ("config.json", b"3"),
        ("config.json", None),
    ]
    check_changes(env, changes, capsys)

    path = iql.dataset_path(ARGS[env])
    kept = path.rename("kept.npz")
    with np.load(kept) as file:
        data = dict(file)
    data["reward"][7] -= 1
    iql.save_arrays(path, data)
    error = refused(env, None, capsys)
    assert f"{path} has changed since the latest checkpoint: put it back, or delete " in error
    path.write_bytes(b"")
    assert f"{path} cannot be read" in refused(env, None, capsys)
    path.unlink()  # then the same is collected again
    log = folder / "log.csv"
    log.write_text(log.read_text().replace("offline", "0ffline"))
    assert run(env) == 0
    assert rows(folder) == rows(undisturbed(env))


def test_data_set_of_a_flag_that_has_changed_is_refused_until_it_is_back(undisturbed, capsys):
    env = "PointmassHard"
    whole = rows(undisturbed(env))
    collected = undisturbed(env).parents[1] / iql.dataset_path(ARGS[env])
    shutil.copy(collected, "data.npz")
    flags = ("--dataset", "data.npz")
    step = ARGS[env].eval_every + 1
    with at(env, "injection_due", step, mock.Mock(side_effect=KeyboardInterrupt)):
        assert run(env, *flags) == 130
    with np.load(collected) as file:
        data = dict(file)
    data["action"][:] = 0
    iql.save_arrays(Path("data.npz"), data)
    error = refused(env, None, capsys, *flags)
    assert "data.npz has changed since the latest checkpoint: put it back, or delete " in error
    shutil.copy(collected, "data.npz")
    assert run(env, *flags) == 0
    assert rows(FOLDERS[env]) == whole


# ---- Windows, where no file that is open or mapped can be deleted or replaced
def files_in_use():
    """The paths of the files that this process has open or mapped."""
    paths = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this very listing
            paths.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            paths.add(fields[5])
    return paths


@contextlib.contextmanager
def watch_deleted_and_replaced_files():
    """Yields a list to which the name of each file is added, and whether it was in use then."""
    seen = []

    def watched(function):
        def call_it(*paths, **options):
            for path in paths:
                absolute = os.path.realpath(path)
                seen.append((os.path.basename(absolute), absolute in files_in_use()))
            return function(*paths, **options)

        return call_it

    with pytest.MonkeyPatch.context() as patch:
        for name in ("unlink", "remove", "replace", "rename"):
            patch.setattr(os, name, watched(getattr(os, name)))
        yield seen


@SHORT
def test_no_file_is_open_or_mapped_when_it_is_deleted_or_replaced_as_windows_asks(env, tmp_path):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("there is no /proc here")
    (tmp_path / "open").touch()
    with watch_deleted_and_replaced_files() as seen, open("open"):
        Path("open").unlink()
    assert seen == [("open", True)]

    with watch_deleted_and_replaced_files() as seen:
        stop_at(env, ARGS[env].eval_every + 1)
        assert run(env) == 0
    # filelock deletes its own file only where an open one can be deleted.
    of_run = [(name, in_use) for name, in_use in seen if not name.endswith(".lock")]
    assert [name for name, in_use in of_run if in_use] == []
    names = {name for name, _ in of_run}
    assert names >= {"checkpoint.pt", "checkpoint.tmp", "config.json", "config.tmp"}
    assert ("replay" in names) == (env == "CartPole")


# ---- Ctrl-C and SIGTERM
STOPS = [
    "CartPole check",
    "CartPole replace_file",
    "CartPole evaluate",
    "PointmassHard collect",
    "PointmassHard evaluate",
]


@pytest.mark.parametrize("moment", STOPS)
def test_a_stopped_run_says_how_to_continue(moment, undisturbed, interruptible, capsys):
    env, function = moment.split()
    step = None
    number = signal.SIGTERM
    if function == "evaluate":
        step = ARGS[env].eval_every
        number = signal.SIGINT
    whole = rows(undisturbed(env))
    capsys.readouterr()
    with at(env, function, step, functools.partial(os.kill, os.getpid(), number)):
        assert run(env) == 130
    line = "Stopped: the same command continues from the latest checkpoint, .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    assert run(env) == 0
    assert rows(FOLDERS[env]) == whole


def is_locked(env):
    lock = filelock.FileLock(FOLDERS[env] / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


@SHORT
def test_lock_and_threads_are_given_back_when_a_notebook_is_interrupted(env, undisturbed):
    """The notebook keeps the traceback, and with it all that train() held."""
    step = ARGS[env].eval_every + 5
    locked = []

    def look_and_interrupt():
        locked.append(is_locked(env))
        raise KeyboardInterrupt

    torch.set_num_threads(2)
    disturbed = at(env, "injection_due", step, look_and_interrupt)
    with short(), disturbed, pytest.raises(KeyboardInterrupt) as stop:
        SCRIPTS[env].train(ARGS[env])
    assert locked == [True]
    assert not is_locked(env)
    assert torch.get_num_threads() == 2
    assert stop.traceback

    with short():
        assert SCRIPTS[env].train(ARGS[env]) == FOLDERS[env]
    assert not is_locked(env)
    assert torch.get_num_threads() == 2
    assert rows(FOLDERS[env]) == rows(undisturbed(env))

    (FOLDERS[env] / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(metrics.UserError, match="cannot be read") as mistake:
        SCRIPTS[env].train(ARGS[env])
    assert not is_locked(env)
    assert torch.get_num_threads() == 2
    assert mistake.traceback


def test_threads_are_given_back_after_digits():
    """In the same process, Atari could otherwise use no more than one."""
    args = dqn.Args(env="Digits", total_steps=1_500, train_frequency=100, plasticity_updates=10)
    torch.set_num_threads(2)
    seen = []

    def look():
        seen.append(torch.get_num_threads())

    with at("Digits", "injection_due", 1_500, look):
        dqn.train(args)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def check_lock_is_named(env, lock, of, capsys):
    """While another process holds the lock, the command refuses, and says what to delete."""
    with filelock.FileLock(lock):
        assert run(env) == 2
    line = f"error: {of} is in use by another process; if .*, delete {lock}\n"
    assert re.fullmatch(line.replace("+", "[+]"), capsys.readouterr().err)


@SHORT
def test_lock_of_another_process_is_named_in_the_line_that_refuses(env, capsys):
    folder = FOLDERS[env]
    folder.mkdir(parents=True)
    check_lock_is_named(env, folder / ".lock", folder, capsys)
    assert {path.name for path in folder.iterdir()} <= {".lock"}


def test_lock_of_a_data_set_is_named_in_the_line_that_refuses(monkeypatch, capsys):
    """In earnest a run waits some minutes, for another may be collecting the data."""
    locked = metrics.locked

    def locked_at_once(path, of, timeout):
        return locked(path, of, timeout=0)

    monkeypatch.setattr(metrics, "locked", locked_at_once)
    env = "PointmassHard"
    data = iql.dataset_path(ARGS[env])
    data.parent.mkdir()
    check_lock_is_named(env, data.with_name(f".{data.stem}.lock"), data, capsys)
    assert not data.exists()


def test_importing_the_scripts_changes_nothing():
    code = """if True:
        import os, random, signal, numpy, torch

        def state():
            return [
                random.getstate(),
                numpy.random.get_state()[1].tolist(),
                torch.get_rng_state().tolist(),
                torch.get_num_threads(),
                torch.get_default_dtype(),
                signal.getsignal(signal.SIGINT),
                signal.getsignal(signal.SIGTERM),
                signal.getsignal(signal.SIGPIPE),
                os.listdir(),
                os.getcwd(),
            ]

        torch.set_num_threads(3)
        before = state()
        import dqn_plasticity, iql_pointmass_finetune, metrics
        assert state() == before"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("script", [dqn, iql])
def test_help_into_a_pipe_whose_reader_has_left_ends_without_a_word(script):
    """As in `--help | head -1`; a reader of no line has left for certain when help is written."""
    command = f"{sys.executable} {script.__file__} --help | head -n 0"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


# ---- refusals
@SHORT
def test_a_finished_run_says_so_and_other_settings_and_another_version_are_refused(
    env, capsys, monkeypatch
):
    assert run(env) == 0
    before = contents(FOLDERS[env])
    if env == "CartPole":  # as if killed just before it removed the replay
        (FOLDERS[env] / "replay").touch()
    capsys.readouterr()
    assert run(env) == 0
    assert "finished" in capsys.readouterr().out
    assert run(env, "--gamma", 0.5) == 2
    line = r"error: .* settings: gamma 0\.9\d? \(now 0\.5\); .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    monkeypatch.setattr(SCRIPTS[env], "VERSION", SCRIPTS[env].VERSION + 1)
    assert run(env) == 2
    assert re.fullmatch(r"error: .*: version \d \(now \d\); .*\n", capsys.readouterr().err)
    assert contents(FOLDERS[env]) == before


# Settings from Python that the command line would refuse, and what the error says of them.
WRONG_SETTINGS = {
    "l2": ("Constant", "--l2 'Constant' must be Literal['none', 'constant', "),
    "layer_norm": (True, "--layer-norm True must be Literal['none', 'before', 'after']"),
    "device": ("gpu", "--device 'gpu' must be Literal['cpu', 'cuda']"),
    "injection_trigger": ("rank", "--injection-trigger 'rank' must be "),
    "eval_every": (1e5, "--eval-every 100000.0 must be int"),
    "batch_size": (True, "--batch-size True must be int"),
    "seed": (None, "--seed None must be int"),
    "injections": (2.0, "--injections 2.0 must be int"),
    "leaky_relu": (1, "--leaky-relu 1 must be bool"),
    "gamma": ("0.9", "--gamma '0.9' must be float"),
    "injection_steps": ([5], "--injection-steps [5] must be tuple[int, ...]"),
    "l2_lambda": (math.nan, "--l2-lambda nan must lie in 0..inf"),
}
SPECIAL_SETTINGS = {
    "CartPole": {
        "env": (5, "--env 5 must be str"),
        "total_steps": (1e5, "--total-steps 100000.0 must be int"),
        "injection_steps": ((5.0,), "--injection-steps (5.0,) must be tuple[int, ...]"),
        "learning_rate": (math.nan, "--learning-rate nan must lie in 1e-12..inf"),
    },
    "PointmassHard": {
        "env": ("PointmassHardest", "--env 'PointmassHardest' must be Literal['PointmassEasy', "),
        "online_steps": (1e5, "--online-steps 100000.0 must be int"),
        "dataset": (5, "--dataset 5 must be str | None"),
        "expectile": (math.nan, "--expectile nan must lie in 0..1"),
    },
}


@SHORT
def test_a_setting_from_python_that_the_command_line_would_refuse_is_refused(
    env, tmp_path, monkeypatch
):
    script = SCRIPTS[env]
    cases = [*WRONG_SETTINGS.items(), *SPECIAL_SETTINGS[env].items()]
    started = AssertionError("the run was started")
    monkeypatch.setattr(metrics, "Run", mock.Mock(side_effect=started))
    for name, (value, message) in cases:
        with pytest.raises(metrics.UserError, match=re.escape(message)):
            script.train(script.Args(**{"env": env, name: value}))
        changed_later = script.Args(env=env)
        setattr(changed_later, name, value)
        with pytest.raises(metrics.UserError, match=re.escape(message)):
            script.train(changed_later)
    assert not list(tmp_path.iterdir())


def test_a_default_of_the_task_that_is_set_to_none_later_is_refused(tmp_path):
    for name in dqn.DEFAULTS_BY_ENV:
        args = dqn.Args(env="CartPole", l2="periodic")
        setattr(args, name, None)
        message = f"{metrics.flag(name)} None must be "
        with pytest.raises(metrics.UserError, match=message):
            dqn.train(args)
    assert not list(tmp_path.iterdir())


@SHORT
def test_a_setting_from_python_that_the_command_line_would_take_is_taken(env):
    script = SCRIPTS[env]
    trigger = {"injection_trigger": "erank", "injection_threshold": 1, "injections": 1}
    numbers = {"gamma": 1, "l2_lambda": 0, "injection_steps": ()}
    script.check(script.Args(env=env, **trigger, **numbers))
    script.check(script.Args(env=env, injection_steps=(5, 7), layer_norm="after", l2="periodic"))


# ---- room on the disk
Usage = namedtuple("Usage", "total used free")


def attempt(capsys, *flags):
    """What the command says before it would start a run."""
    start = mock.Mock(side_effect=metrics.UserError("started"))
    with mock.patch("metrics.Run", start):
        assert call(dqn, "--eval-every", 1_000, *flags) == 2
    return capsys.readouterr().err


STARTED = "error: started\n"


def test_too_little_disk_is_refused_with_the_buffer_size_that_fits(monkeypatch, capsys, tmp_path):
    disk = mock.Mock(return_value=Usage(10**12, 0, 1_040_000_000))
    monkeypatch.setattr(shutil, "disk_usage", disk)
    line = r"error: .* needs 7,\d+.\d MB .* 940.0 MB .* room, .* --buffer-size (\d+) or less\n"
    size = int(re.fullmatch(line, attempt(capsys))[1])
    assert 130_000 < size < 133_000  # of 7 KB each
    assert attempt(capsys, "--buffer-size", size) == STARTED
    assert "make room" in attempt(capsys, "--buffer-size", size + 1)
    # A replay that is never filled needs less.
    assert attempt(capsys, "--total-steps", 120_000) == STARTED
    assert attempt(capsys, "--env", "CartPole-v1") == STARTED
    assert not list(tmp_path.iterdir())

    disk.return_value = Usage(10**12, 0, 0)
    # No replay would fit, so none is proposed.
    assert attempt(capsys, "--buffer-size", 3_000).endswith(": make room\n")
    # What a run that continues has written is no longer free.
    folder = metrics.run_folder(dqn.Args())
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    assert attempt(capsys, "--buffer-size", 3_000) == STARTED


def test_disk_is_that_to_which_a_link_called_runs_leads(monkeypatch, capsys, tmp_path):
    here = tmp_path / "here"
    elsewhere = tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    Path("runs").symlink_to(elsewhere)
    full = {}

    def disk_usage(path):
        disk = here
        if elsewhere in (Path(path).resolve(), *Path(path).resolve().parents):
            disk = elsewhere
        return Usage(10**12, 0, 0 if full[disk] else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    full.update({here: True, elsewhere: False})
    assert attempt(capsys) == STARTED
    full.update({here: False, elsewhere: True})
    assert "make room" in attempt(capsys)
    # A link to a run's folder on a disk of its own leads there, too.
    Path("runs").unlink()
    metrics.run_folder(dqn.Args()).parent.mkdir()
    metrics.run_folder(dqn.Args()).symlink_to(elsewhere)
    assert "make room" in attempt(capsys)
