"""How fast the agents train on this machine, as Markdown tables (ten minutes; not a test).

    python tests/benchmark.py

All runs take turns, because a machine's speed drifts. Where stable-baselines3 happens to be
installed, its DQN takes turns with ours, on the same settings; it has no double Q, so its update
has two forward passes, not three.
"""

import contextlib
import cProfile
import csv
import io
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dqn_plasticity as dqn
import iql_pointmass_finetune as iql
import metrics

ROUNDS = 5
STEPS = metrics.LOG_EVERY  # to fill the replay, and as many with learning
THREADS = torch.get_num_threads()  # those of Atari; all other tasks take one
# Greedy but for 1 %, and without an evaluation or a measurement of plasticity until the last step.
SETTINGS = {
    "total_steps": 2 * STEPS + 1,
    "learning_starts": STEPS,
    "start_e": 0.01,
    "eval_episodes": 1,
    "buffer_size": 20_000,
    "target_network_frequency": STEPS + 1,  # copied once, just after the injections
    "plasticity_every": 10**9,
}
# The functions that hide behind a decorator.
DECORATED = {
    "decorate_context": "epsilon_greedy",
    "step": "envs.step",
    "wrapper": "optimizer.step",
    "inner": "zero_grad",
    "_no_grad_wrapper": "clip_grad_norm_",
}


@contextlib.contextmanager
def quiet_folder():
    """An empty folder that is deleted afterwards; what is printed meanwhile is lost."""
    nowhere = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def speed_of(args: dqn.Args | iql.Args, step: int) -> float:
    """Steps per second, as logged at this step, which is not the last of the run."""
    script = sys.modules[type(args).__module__]
    with quiet_folder():
        folder = script.train(args)
        with open(folder / "log.csv") as file:
            for row in csv.DictReader(file):
                if int(row["step"]) == step:
                    return float(row["steps_per_second"])
    raise ValueError(f"the log has no row of step {step}")


def our_runs() -> dict[str, Callable[[], float]]:
    """The name of each run, and a function that returns its speed."""
    dqn_runs = {
        "MsPacman": {},
        "MsPacman, --bf16": {"bf16": True},
        "MsPacman, after one injection": {"injection_steps": (STEPS,)},
        "MsPacman, after two injections": {"injection_steps": (STEPS - 1, STEPS)},
        "LunarLander": {"env": "LunarLander"},
    }
    runs = {}
    for name, settings in dqn_runs.items():
        args = dqn.Args(**SETTINGS, **settings)
        try:
            dqn.check(args)
        except metrics.UserError as error:  # such as: the hardware does not support bfloat16
            print(f"{name} is left out: {error}\n")
            continue
        runs[name] = timed(args, 2 * STEPS)
    digits = dqn.Args(env="Digits", total_steps=4_500)
    runs["Digits"] = timed(digits, 3_000)
    small = {"collect_steps": 1_000, "eval_episodes": 1}
    offline = iql.Args(offline_steps=3_001, online_steps=0, **small)
    runs["PointmassHard, offline"] = timed(offline, 3_000)
    online = iql.Args(offline_steps=0, online_steps=3_001, **small)
    runs["PointmassHard, online"] = timed(online, 3_000)
    return runs


def timed(args: dqn.Args | iql.Args, step: int) -> Callable[[], float]:
    def run() -> float:
        return speed_of(args, step)

    return run


def stable_baselines3(env: str) -> Callable[[], float]:
    """A function that trains its DQN for STEPS more and returns steps per second."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    args = dqn.Args(env=env, **SETTINGS)
    settings = {
        "learning_rate": args.learning_rate,
        "buffer_size": args.buffer_size,
        "learning_starts": args.learning_starts,
        "batch_size": args.batch_size,
        "gamma": args.gamma,
        "device": args.device,
        "train_freq": args.train_frequency,
        "max_grad_norm": args.max_grad_norm,
        "exploration_initial_eps": args.start_e,
        "exploration_final_eps": args.end_e,
        "target_update_interval": args.target_network_frequency,
    }
    if dqn.is_atari(env):
        envs = VecFrameStack(make_atari_env(f"{env}NoFrameskip-v4", seed=0), 4)
        model = DQN("CnnPolicy", envs, **settings)
    else:
        network = dqn.fresh_network(dqn.make_env(env), args, 0)
        hidden = metrics.weighted_layers(network)[:-1]
        widths = {"net_arch": [layer.out_features for layer in hidden]}
        envs = make_vec_env(dqn.make_env(env).spec.id, seed=0)
        model = DQN("MlpPolicy", envs, policy_kwargs=widths, **settings)

    def run() -> float:
        torch.set_num_threads(THREADS if dqn.is_atari(env) else 1)  # as ours
        if not model.num_timesteps:
            model.learn(STEPS)
        start = time.perf_counter()
        model.learn(STEPS, reset_num_timesteps=False)
        seconds = time.perf_counter() - start
        torch.set_num_threads(THREADS)
        return STEPS / seconds

    return run


def show_speeds(runs: dict[str, Callable[[], float]], rounds: int) -> None:
    results = []
    for _ in range(rounds):
        results.append({name: run() for name, run in runs.items()})
    columns = ["run", "steps per second: median", "least to most"]
    columns.append("times the first of its task, median of pairs")
    print(f"| {' | '.join(columns)} |")
    print("| --- | --- | --- | --- |")
    for name in runs:
        speeds = [result[name] for result in results]
        first = name.split(",")[0]
        ratio = 1.0
        if first in runs:
            ratio = statistics.median(result[name] / result[first] for result in results)
        median = statistics.median(speeds)
        least_to_most = f"{min(speeds):.0f} to {max(speeds):.0f}"
        print(f"| {name} | {median:.0f} | {least_to_most} | {ratio:.2f} |")


def show_profile(args: dqn.Args) -> None:
    """What train() calls, and how long that takes."""
    profile = cProfile.Profile()
    with quiet_folder():
        profile.runcall(dqn.train, args)
    calls = []
    for (_, _, name), (*_, callers) in pstats.Stats(profile).stats.items():
        for (_, _, caller), (_, times, _, seconds) in callers.items():
            if caller == "train":
                calls.append((1e3 * seconds, times, DECORATED.get(name, name)))
    calls.sort(reverse=True)
    print(f"\n| MsPacman: train() calls in {args.total_steps} steps | times | ms each |")
    print("| --- | --- | --- |")
    for milliseconds, times, name in calls[:15]:
        print(f"| {name} | {times} | {milliseconds / times:.2f} |")


def update_gflop(injections: int) -> float:
    """GFLOP of an update, from the first target copy after the injections on."""
    args = dqn.Args(device="cpu")
    envs = dqn.make_env("MsPacman")
    q = dqn.fresh_network(envs, args, step=0)
    target_network = dqn.fresh_network(envs, args, step=1)
    for i in range(injections):
        q, target_network = dqn.inject(q, target_network, dqn.fresh_network(envs, args, 2 + i))
    dqn.copy_to_target(q, target_network)
    obs = torch.rand(args.batch_size, 4, 84, 84)
    zeros = torch.zeros(args.batch_size)
    batch = dqn.Batch(obs=obs, action=zeros.long(), reward=zeros, next_obs=obs, terminated=zeros)
    with FlopCounterMode(display=False) as counter:
        loss, _ = dqn.td_loss(q, target_network, batch, args.gamma)
        loss.backward()
    return counter.get_total_flops() / 1e9


def gflop_per_second() -> float:
    """Of a matrix product on the device of the runs."""
    matrix = torch.rand(2048, 2048, device=dqn.Args().device)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * 2.048**3 / min(seconds)


def show_flop() -> None:
    speed = gflop_per_second()
    print(f"\nA matrix product runs at {speed:.0f} GFLOP/s.")
    print("GFLOP of an update, and milliseconds at that rate:")
    for injections in range(3):
        gflop = update_gflop(injections)
        print(f"after {injections} injections: {gflop:.2f}, {1e3 * gflop / speed:.1f}")


def main() -> None:
    print(f"{os.cpu_count()} cores, {THREADS} threads on Atari.\n")
    runs = our_runs()
    with contextlib.suppress(ImportError):
        for env in ("MsPacman", "LunarLander"):
            runs[f"{env}, stable-baselines3"] = stable_baselines3(env)
    show_speeds(runs, ROUNDS)
    show_profile(dqn.Args(**SETTINGS))
    show_flop()


if __name__ == "__main__":
    main()
