"""How fast MsPacman trains on this machine, as Markdown tables: python tests/benchmark.py (some minutes; not a test).

The runs of a table take turns, because a machine's speed drifts. Where stable-baselines3 happens to be installed, its
DQN takes turns with ours, on the same settings; it knows no double Q, so its update is a forward pass of five shorter.
"""

import contextlib
import cProfile
import csv
import functools
import io
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dqn_plasticity as dqn

ROUNDS, START, STEPS = 5, 400, 600  # START steps to fill the replay and STEPS with learning, greedy but for 1 %
SETTINGS = {"learning_starts": START, "total_steps": START + STEPS + 1, "start_e": 0.01, "buffer_size": 20_000}


def ours(*injection_steps: int) -> tuple[float, pstats.Stats]:
    """Steps per second while learning, as logged just before the last step and its evaluation; the run's profile."""
    args, profile = dqn.Args(injection_steps=injection_steps, eval_episodes=1, **SETTINGS), cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        run = profile.runcall(dqn.train, args)
        with open(run / "log.csv") as log:
            speeds = {int(row["step"]): float(row["steps_per_second"]) for row in csv.DictReader(log)}
    return speeds[START + STEPS], pstats.Stats(profile)


def stable_baselines3():
    """A function that trains stable-baselines3's DQN for STEPS more and returns steps per second; None without it."""
    try:
        from stable_baselines3 import DQN
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import VecFrameStack
    except ImportError:
        return None
    args, envs = dqn.Args(**SETTINGS), VecFrameStack(make_atari_env("MsPacmanNoFrameskip-v4", seed=0), 4)
    same = ("learning_rate", "buffer_size", "learning_starts", "batch_size", "gamma", "max_grad_norm", "device")
    settings = {name: getattr(args, name) for name in same} | {"train_freq": args.train_frequency}
    settings |= {"exploration_initial_eps": args.start_e, "exploration_final_eps": args.end_e}
    model = DQN("CnnPolicy", envs, target_update_interval=args.target_network_frequency, **settings)
    model.learn(START)

    def run() -> tuple[float, None]:
        start = time.perf_counter()
        model.learn(STEPS, reset_num_timesteps=False)
        return STEPS / (time.perf_counter() - start), None

    return run


def floor() -> tuple[float, float]:
    """GFLOP of an update, and GFLOP/s of a matrix product on this machine."""
    args, envs = dqn.Args(), dqn.make_env("MsPacman")
    q, target_network, _ = dqn.networks(envs, args, [])
    obs, zeros = torch.rand(args.batch_size, 4, 84, 84).to(args.device), torch.zeros(args.batch_size).to(args.device)
    with FlopCounterMode(display=False) as counter:
        dqn.td_loss(q, target_network, dqn.Batch(obs, zeros.long(), zeros, obs, zeros), args.gamma)[0].backward()
    matrix, seconds = torch.rand(2048, 2048).to(args.device), []
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return counter.get_total_flops() / 1e9, 2 * 2.048**3 / min(seconds)


def main() -> None:
    dqn.LOG_EVERY = 200
    variants = {"standard": ours, "after one injection": functools.partial(ours, START)}
    variants["after two injections"] = functools.partial(ours, START - 1, START)
    if their_run := stable_baselines3():
        variants["stable-baselines3"] = their_run
    results = [{name: run() for name, run in variants.items()} for _ in range(ROUNDS)]
    print("| MsPacman | steps per second: median | least to most | standard / this, median of pairs |")
    print("| --- | --- | --- | --- |")
    for name in variants:
        speeds = [result[name][0] for result in results]
        ratio = statistics.median(result["standard"][0] / result[name][0] for result in results)
        print(f"| {name} | {statistics.median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} | {ratio:.2f} |")

    print("\n| what train() calls | ms a call, median of runs | ms a step |\n| --- | --- | --- |")
    calls = {}  # of every function that train() calls itself: milliseconds a call in each run, and calls
    for result in results:
        for (_, _, name), (*_, callers) in result["standard"][1].stats.items():
            for (_, _, caller), (_, count, _, seconds) in callers.items():
                if caller == "train":
                    calls.setdefault(name, []).append((1e3 * seconds / count, count))
    per_step = {name: statistics.median(ms * count for ms, count in runs) for name, runs in calls.items()}
    for name in sorted(calls, key=per_step.get, reverse=True)[:14]:
        print(f"| {name} | {statistics.median(ms for ms, _ in calls[name]):.2f} | {per_step[name] / STEPS:.2f} |")

    gflop, rate = floor()
    print(
        f"\nAn update is {gflop:.2f} GFLOP: at the {rate:.0f} GFLOP/s of a matrix product, {1e3 * gflop / rate:.1f} ms."
    )


if __name__ == "__main__":
    main()
