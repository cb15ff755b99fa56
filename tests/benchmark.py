"""How fast MsPacman trains on this machine, as Markdown tables: python tests/benchmark.py (some minutes; not a test).

The runs of a table take turns, because a machine's speed drifts. Where stable-baselines3 happens to be installed, its
DQN takes turns with ours, on the same settings; it has no double Q, so its update has two forward passes, not three.
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
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dqn_plasticity as dqn
import metrics

ROUNDS, STEPS = 5, metrics.LOG_EVERY  # STEPS to fill the replay and as many with learning, greedy but for 1 %
SETTINGS = {"learning_starts": STEPS, "total_steps": 2 * STEPS + 1, "start_e": 0.01, "buffer_size": 20_000}
SETTINGS |= {"target_network_frequency": STEPS + 1}  # copied once, just after the injections
NAMES = {"decorate_context": "epsilon_greedy", "step": "envs.step", "wrapper": "optimizer.step", "inner": "zero_grad"}
NAMES |= {"_no_grad_wrapper": "clip_grad_norm_"}  # of functions that are decorated


def ours(*injection_steps: int, call: Callable = lambda function, args: function(args)) -> float:
    """Steps per second while learning, as logged just before the last step and its evaluation."""
    args = dqn.Args(injection_steps=injection_steps, eval_episodes=1, **SETTINGS)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        log = (call(dqn.train, args) / "log.csv").read_text().splitlines()
    return {int(row["step"]): float(row["steps_per_second"]) for row in csv.DictReader(log)}[2 * STEPS]


def stable_baselines3() -> Callable | None:
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
    model.learn(STEPS)

    def run() -> float:
        start = time.perf_counter()
        model.learn(STEPS, reset_num_timesteps=False)
        return STEPS / (time.perf_counter() - start)

    return run


def update_gflop(injections: int) -> float:
    """GFLOP of an update, from the first target copy after the injections on."""
    args, envs = dqn.Args(device="cpu"), dqn.make_env("MsPacman")
    q, target_network, *fresh = (dqn.fresh_network(envs, args, step) for step in range(2 + injections))
    for network in fresh:
        q, target_network = dqn.inject(q, target_network, network)
    dqn.copy_to_target(q, target_network)
    obs, zeros = torch.rand(args.batch_size, 4, 84, 84), torch.zeros(args.batch_size)
    with FlopCounterMode(display=False) as counter:
        dqn.td_loss(q, target_network, dqn.Batch(obs, zeros.long(), zeros, obs, zeros), args.gamma)[0].backward()
    return counter.get_total_flops() / 1e9


def gflop_per_second() -> float:
    """Of a matrix product on the device of the runs."""
    matrix, seconds = torch.rand(2048, 2048, device=dqn.Args().device), []
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * 2.048**3 / min(seconds)


def main() -> None:
    variants = {"standard": ours, "after one injection": functools.partial(ours, STEPS)}
    variants["after two injections"] = functools.partial(ours, STEPS - 1, STEPS)
    if their_run := stable_baselines3():
        variants["stable-baselines3"] = their_run
    results = [{name: run() for name, run in variants.items()} for _ in range(ROUNDS)]
    print("| MsPacman | steps per second: median | least to most | standard / this, median of pairs |")
    print("| --- | --- | --- | --- |")
    for name in variants:
        speeds = [result[name] for result in results]
        ratio = statistics.median(result["standard"] / result[name] for result in results)
        print(f"| {name} | {statistics.median(speeds):.1f} | {min(speeds):.1f} to {max(speeds):.1f} | {ratio:.2f} |")

    profile = cProfile.Profile()
    ours(call=profile.runcall)
    calls = []  # of train() to others: milliseconds in all, times, name
    for (_, _, name), (*_, callers) in pstats.Stats(profile).stats.items():
        for (_, _, caller), (_, times, _, seconds) in callers.items():
            if caller == "train":
                calls.append((1e3 * seconds, times, NAMES.get(name, name)))
    print(f"\n| train() calls in {2 * STEPS} steps | times | ms each |\n| --- | --- | --- |")
    for ms, times, name in sorted(calls, reverse=True)[:15]:
        print(f"| {name} | {times} | {ms / times:.2f} |")

    rate = gflop_per_second()
    print(f"\nA matrix product runs at {rate:.0f} GFLOP/s. GFLOP of an update, and milliseconds at that rate:")
    for injections in range(3):
        print(f"after {injections} injections: {(gflop := update_gflop(injections)):.2f}, {1e3 * gflop / rate:.1f}")


if __name__ == "__main__":
    main()
