"""How fast the agents train on this machine, as Markdown tables: python tests/benchmark.py (ten minutes; not a test).

All runs take turns, because a machine's speed drifts. Where stable-baselines3 happens to be installed, its DQN takes
turns with ours, on the same settings; it has no double Q, so its update has two forward passes, not three.
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
import iql_pointmass_finetune as iql
import metrics

ROUNDS, STEPS = 5, metrics.LOG_EVERY  # STEPS to fill the replay and as many with learning, greedy but for 1 %
SETTINGS = {"learning_starts": STEPS, "total_steps": 2 * STEPS + 1, "start_e": 0.01, "eval_episodes": 1}
SETTINGS |= {"buffer_size": 20_000, "target_network_frequency": STEPS + 1}  # copied once, just after the injections
NAMES = {"decorate_context": "epsilon_greedy", "step": "envs.step", "wrapper": "optimizer.step", "inner": "zero_grad"}
NAMES |= {"_no_grad_wrapper": "clip_grad_norm_"}  # of functions that are decorated


def rate(
    args: dqn.Args | iql.Args, step: int = 2 * STEPS, call: Callable = lambda function, args: function(args)
) -> float:
    """Steps per second, as logged at this step, which is not the last of the run, so without an evaluation."""
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), quiet[0], quiet[1]:
        log = (call(sys.modules[type(args).__module__].train, args) / "log.csv").read_text().splitlines()
    return {int(row["step"]): float(row["steps_per_second"]) for row in csv.DictReader(log)}[step]


def stable_baselines3(env: str) -> Callable[[], float]:
    """A function that trains stable-baselines3's DQN for STEPS more and returns steps per second."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    args, atari = dqn.Args(env=env, **SETTINGS), dqn.is_atari(env)
    same = ("learning_rate", "buffer_size", "learning_starts", "batch_size", "gamma", "device")
    settings = {name: getattr(args, name) for name in same} | {"train_freq": args.train_frequency}
    settings |= {"max_grad_norm": args.max_grad_norm or float("inf"), "exploration_initial_eps": args.start_e}
    settings |= {"exploration_final_eps": args.end_e, "target_update_interval": args.target_network_frequency}
    if atari:
        model = DQN("CnnPolicy", VecFrameStack(make_atari_env(f"{env}NoFrameskip-v4", seed=0), 4), **settings)
    else:
        layers = metrics.weighted_layers(dqn.fresh_network(dqn.make_env(env), args, 0))
        widths = {"net_arch": [layer.out_features for layer in layers[:-1]]}
        model = DQN("MlpPolicy", make_vec_env(f"{env}-v3", seed=0), policy_kwargs=widths, **settings)

    def run() -> float:
        torch.set_num_threads(dqn.THREADS if atari else 1)  # as ours
        if not model.num_timesteps:
            model.learn(STEPS)
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
    torch.set_num_threads(dqn.THREADS)
    matrix, seconds = torch.rand(2048, 2048, device=dqn.Args().device), []
    for _ in range(10):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * 2.048**3 / min(seconds)


def main() -> None:
    atari = functools.partial(dqn.Args, **SETTINGS)
    runs = {"MsPacman": functools.partial(rate, atari())}
    with contextlib.suppress(metrics.UserError):
        dqn.check(atari(bf16=True))
        runs["MsPacman, --bf16"] = functools.partial(rate, atari(bf16=True))
    runs["MsPacman, after one injection"] = functools.partial(rate, atari(injection_steps=(STEPS,)))
    runs["MsPacman, after two injections"] = functools.partial(rate, atari(injection_steps=(STEPS - 1, STEPS)))
    runs["LunarLander"] = functools.partial(rate, atari(env="LunarLander"))
    runs["Digits"] = functools.partial(rate, dqn.Args(env="Digits", total_steps=4_500), 3_000)
    runs["PointmassHard, offline"] = functools.partial(
        rate, iql.Args(collect_steps=1_000, offline_steps=3_001, online_steps=0), 3_000
    )
    online = iql.Args(collect_steps=1_000, offline_steps=0, online_steps=3_001, eval_episodes=1)
    runs["PointmassHard, online"] = functools.partial(rate, online, 3_000)
    with contextlib.suppress(ImportError):
        runs |= {f"{env}, stable-baselines3": stable_baselines3(env) for env in ("MsPacman", "LunarLander")}
    results = [{name: run() for name, run in runs.items()} for _ in range(ROUNDS)]
    print("| run | steps per second: median | least to most | times the first of its task, median of pairs |")
    print("| --- | --- | --- | --- |")
    for name in runs:
        speeds, first = [result[name] for result in results], name.split(",")[0]
        ratio = statistics.median(result[name] / result[first] for result in results) if first in runs else 1
        print(f"| {name} | {statistics.median(speeds):.0f} | {min(speeds):.0f} to {max(speeds):.0f} | {ratio:.2f} |")

    profile = cProfile.Profile()
    rate(atari(), call=profile.runcall)
    calls = []  # of train() to others: milliseconds in all, times, name
    for (_, _, name), (*_, callers) in pstats.Stats(profile).stats.items():
        for (_, _, caller), (_, times, _, seconds) in callers.items():
            if caller == "train":
                calls.append((1e3 * seconds, times, NAMES.get(name, name)))
    print(f"\n| MsPacman: train() calls in {2 * STEPS} steps | times | ms each |\n| --- | --- | --- |")
    for ms, times, name in sorted(calls, reverse=True)[:15]:
        print(f"| {name} | {times} | {ms / times:.2f} |")

    speed = gflop_per_second()
    print(f"\nA matrix product runs at {speed:.0f} GFLOP/s. GFLOP of an update, and milliseconds at that rate:")
    for injections in range(3):
        print(f"after {injections} injections: {(gflop := update_gflop(injections)):.2f}, {1e3 * gflop / speed:.1f}")


if __name__ == "__main__":
    main()
