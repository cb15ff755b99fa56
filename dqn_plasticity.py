"""Deep Q-learning that measures its own loss of plasticity, with every remedy of the paper as a flag.

A network that has trained for long may stop learning. This file trains one on an Atari game, on LunarLander (or any
Gymnasium task with flat observations and discrete actions) or on Digits, which shows the collapse in a minute. It logs
what the literature takes for signs of lost plasticity (metrics.py). The update is double DQN (van Hasselt et al. 2016):

    y    = r + gamma * (1 - terminated) * Q_target(s', argmax_a Q(s', a))
    loss = mean (y - Q(s, a))^2 + lambda(step) * ||phi||^2                phi: the parameters that train (paper 3.2)

Plasticity injection (Nikishin et al. 2023; paper 3.1) freezes Q and lets a fresh network learn what is missing, without
changing a single value at that moment: Q <- Q + (f1 - f2) with f1 = f2 fresh, of which only f1 trains.

    python dqn_plasticity.py --env Digits
    python dqn_plasticity.py --env LunarLander --injections 1
    python dqn_plasticity.py --env MsPacman --l2 periodic
    python plot.py runs/

A run is the folder runs/<env>__<variant>__seed<k>. The same command given again continues an unfinished run exactly.
"""

import contextlib
import copy
import difflib
import io
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import ale_py
import filelock
import gymnasium as gym
import numpy as np
import torch
import tyro
from ale_py.vector_env import AtariVectorEnv
from gymnasium.envs.registration import find_highest_version
from torch import nn
from tqdm import tqdm

import metrics

gym.register_envs(ale_py)

CHECKPOINT_FORMAT = 2  # raised whenever the networks or what is saved of them change
LOG_EVERY = 1_000  # environment steps (paper section 2)
COLUMNS = ("step", "train_return", "eval_return", "loss", "q_mean", "grad_norm", "epsilon", "l2_lambda", "injections")
COLUMNS += (*metrics.METRICS, "steps_per_second")


# ---- settings
def by_task(atari: float, other: float, digits: float) -> type:
    """A setting whose default depends on the task: None until Args.__post_init__ picks one of the three noted here."""
    kind, hint = type(atari), f"[{atari:,} | {other:,} | {digits:,}]"
    flag = tyro.conf.arg(constructor=kind, metavar=kind.__name__.upper(), help_behavior_hint=hint)
    return Annotated[kind | None, (atari, other, digits), flag]


@dataclass
class Run:
    """What to run; a step is one of the environment. Defaults: [Atari | LunarLander and others | Digits]."""

    env: str = "MsPacman"  # an Atari game, LunarLander, Digits, or a Gymnasium id with flat observations
    seed: int = 1  # decides everything: the same seed, machine and thread count give the same log
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a CUDA GPU if there is one
    total_steps: by_task(2_000_000, 300_000, 60_000) = None  # length of the run
    eval_every: by_task(25_000, 10_000, 15_000) = None  # steps between evaluations, each with a checkpoint
    eval_episodes: int = 10  # whole episodes of an evaluation (Digits has none: its training return is the score)


@dataclass
class Learning:
    """Double DQN with Adam."""

    learning_rate: by_task(1e-4, 1e-3, 1e-3) = None  # step size of Adam
    adam_eps: by_task(1e-4, 1e-8, 1e-8) = None  # epsilon of Adam
    gamma: by_task(0.99, 0.99, 0.5) = None  # discount per step
    batch_size: by_task(32, 128, 32) = None  # transitions in an update
    buffer_size: by_task(1_000_000, 300_000, 1_500) = None  # transitions that the replay keeps
    learning_starts: by_task(20_000, 20_000, 32) = None  # steps before the first update (Digits: of every task)
    train_frequency: by_task(4, 1, 1) = None  # steps per update
    target_network_frequency: by_task(2_000, 1_000, 100) = None  # steps between copies into the target network
    start_e: by_task(1.0, 1.0, 0.05) = None  # first epsilon, the probability of a random action
    end_e: by_task(0.01, 0.02, 0.05) = None  # last epsilon
    exploration_fraction: by_task(0.5, 0.1, 0.0) = None  # share of the run after which epsilon is at its last value
    max_grad_norm: by_task(10.0, 0.0, 0.0) = None  # longer gradients are scaled down to this norm; 0: never


EVENLY = tyro.conf.arg(help_behavior_hint="(default: spread evenly over the second half of the run)")


@dataclass
class Injection:
    """Plasticity injection (paper 3.1): freeze the network, let a fresh one learn what is missing."""

    injections: int = 0  # how many
    injection_steps: Annotated[tuple[int, ...], EVENLY] = ()  # at which steps
    injection_trigger: Literal[metrics.METRICS] | None = None  # or when the moving average of this metric ...
    injection_threshold: float | None = None  # ... crosses this: weight_magnitude, dormant_units upwards, others down


@dataclass
class L2:
    """L2 regularisation (paper 3.2): lambda(step) * ||phi||^2 is added to the loss."""

    l2: Literal["none", "constant", "incremental", "periodic"] = "none"  # schedule of lambda
    l2_lambda: by_task(1e-5, 1e-3, 1e-4) = None  # constant, periodic: lambda
    l2_start: float = 0.0  # incremental: lambda at the start of the run
    l2_end: by_task(2e-5, 2e-3, 2e-4) = None  # incremental: lambda at its end
    l2_on_steps: by_task(500_000, 75_000, 4_000) = None  # periodic: steps with lambda (N in the paper)
    l2_off_steps: by_task(100_000, 15_000, 800) = None  # periodic: steps without it (M), then again


@dataclass
class Architecture:
    """Changes to the Q-network (paper 3.3)."""

    layer_norm: bool = False  # LayerNorm after every hidden layer, before its activation
    leaky_relu: bool = False  # LeakyReLU (slope 0.01) in place of every other activation


@dataclass
class Args(Architecture, L2, Injection, Learning, Run):
    """All settings, flat: --l2-lambda is args.l2_lambda. What is None takes its default."""

    def __post_init__(self):
        task = 0 if rom(self.env) else 2 if self.env == "Digits" else 1
        for name, hint in get_type_hints(Args, include_extras=True).items():
            if getattr(self, name) is None and hasattr(hint, "__metadata__"):
                setattr(self, name, hint.__metadata__[0][task])
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.injection_steps:
            self.injections = self.injections or len(self.injection_steps)
        elif not self.injection_trigger:  # evenly over the second half of the run, from its middle on
            half = self.total_steps // 2
            self.injection_steps = tuple(half + i * half // self.injections for i in range(self.injections))


# ---- environment
class Digits(gym.Env):
    """A task over 100 handwritten digits whose labels are drawn anew in every episode (Lyle et al. 2023).

    Observation: 64 pixels in 0..1. Action: the label. Reward: 1 for the image's label, which leads to an image of the
    next label (modulo 10); 0 otherwise, which leads to any image. One episode is one task of 1,500 steps, so its return
    says how well the network could still learn. Chance is 150.
    """

    def __init__(self):
        from sklearn.datasets import load_digits  # takes a second to import, which no other task should pay

        chosen = np.random.default_rng(123).permutation(1797)[:100]
        self.images = (load_digits().data[chosen] / 16).astype(np.float32)
        self.observation_space = gym.spaces.Box(0, 1, (64,), np.float32)
        self.action_space = gym.spaces.Discrete(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.labels = self.np_random.integers(10, size=100)
        self.image = self.np_random.integers(100)
        return self.images[self.image].copy(), {}

    def step(self, action):
        label = self.labels[self.image]
        candidates = np.flatnonzero(self.labels == (label + 1) % 10) if action == label else []
        if len(candidates):
            self.image = self.np_random.choice(candidates)
        else:
            self.image = self.np_random.integers(100)
        return self.images[self.image].copy(), float(action == label), False, False, {}


gym.register("Digits", Digits, max_episode_steps=1_500)


def rom(env_id: str) -> str | None:
    """The ROM behind an Atari game's name, "ms_pacman" for "MsPacman"; None for any other task."""
    spec = gym.registry.get(f"ALE/{env_id}-v5")
    return spec and spec.kwargs["game"]


def gym_id(env_id: str) -> str:
    """The full id of a Gymnasium task: "LunarLander" is the newest version, "LunarLander-v3"."""
    return env_id if env_id in gym.registry else f"{env_id}-v{find_highest_version(None, env_id)}"


def make_env(env_id: str, num_envs: int = 1) -> gym.vector.VectorEnv:
    """`num_envs` copies of a task. Observations: uint8 (num_envs, 4, 84, 84) of Atari, float (num_envs, n) of others.

    Atari as in Mnih et al. 2015, but episodes end with the game, not with a life: up to 30 no-ops at the start, frame
    skip 4 with the maximum over the last two, no sticky actions, FIRE pressed where needed. Rewards are the game's own.
    """
    if rom(env_id):
        return AtariVectorEnv(rom(env_id), num_envs, reward_clipping=False, num_threads=min(num_envs, os.cpu_count()))
    return gym.make_vec(gym_id(env_id), num_envs, vectorization_mode="sync")


def seeds(args: Args, step: int) -> list[int]:
    """Two numbers decided by (seed, step), below 2^31 as emulators need them: for a network, for an environment."""
    return [int(number >> 1) for number in np.random.SeedSequence((args.seed, step)).generate_state(2)]


def fresh_start(args: Args, step: int) -> tuple[gym.vector.VectorEnv, np.ndarray, np.random.Generator]:
    """A new environment, its first observation, and the random stream of training, all decided by (seed, step).

    Training starts afresh like this after every checkpoint, so that a checkpoint needs neither the state of an emulator
    nor that of a random generator, and a run that was killed goes on exactly like one that was not (as in dqn_zoo).
    """
    envs = make_env(args.env)
    return envs, envs.reset(seed=seeds(args, step)[1])[0], np.random.default_rng((args.seed, step))


# ---- checks of the settings
class UserError(Exception):
    """A user's mistake; main prints it as one line and exits with code 2."""


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise UserError(message)


def check(args: Args) -> None:
    """Raise UserError, saying what is wrong and what would be right, before anything is written."""
    above_zero = {"total_steps", "eval_every", "eval_episodes", "learning_rate", "batch_size", "train_frequency"}
    check_numbers(args, above_zero | {"target_network_frequency", "l2_on_steps"})
    check_injections(args, 1, args.total_steps)
    for name in ("gamma", "start_e", "end_e", "exploration_fraction"):
        refuse(getattr(args, name) > 1, f"--{name.replace('_', '-')} {getattr(args, name)} must lie between 0 and 1")
    refuse(args.buffer_size < max(2, args.batch_size), "--buffer-size must be at least --batch-size, and 2")
    refuse(args.learning_starts >= args.total_steps, "--learning-starts must lie below --total-steps")
    refuse(args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no CUDA GPU here; use cpu or auto")
    parts_of_tasks = args.env == "Digits" and (args.eval_every % 1_500 or args.learning_starts >= 1_500)
    refuse(parts_of_tasks, "--eval-every must be whole tasks of 1500, --learning-starts below it")
    if not rom(args.env) and gym_id(args.env) not in gym.registry:
        names = {spec.name for spec in gym.registry.values()}
        close = difflib.get_close_matches(args.env, names, cutoff=0.5) or ["MsPacman", "LunarLander", "Digits"]
        raise UserError(f"--env {args.env}: no such task; perhaps {' or '.join(close)}?")
    try:
        envs = make_env(args.env)
    except Exception as error:  # whatever a third-party environment raises
        raise UserError(f"--env {args.env} cannot be made: {' '.join(str(error).split())}") from error
    actions, obs = envs.single_action_space, envs.single_observation_space
    discrete = isinstance(actions, gym.spaces.Discrete)
    refuse(not discrete, f"--env {args.env} has actions {actions}; needed are Discrete ones")
    flat = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1 and obs.dtype == np.float32
    refuse(not (flat or rom(args.env)), f"--env {args.env} has observations {obs}; needed is a flat Box of float32")
    check_disk(args, obs)


def check_numbers(args: Args, above_zero: set[str]) -> None:
    """Every number is finite and not negative, and those named are above zero."""
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            bound = "above 0" if name in above_zero else "0 or more"
            wrong = not 0 <= value < math.inf or (value == 0 and name in above_zero)
            refuse(wrong, f"--{name.replace('_', '-')} {value} must be {bound}")


def check_injections(args: Args, first_step: int, last_step: int) -> None:
    """The injection settings agree with each other and with the steps in which injections are possible."""
    steps, trigger, shown = args.injection_steps, args.injection_trigger, " ".join(map(str, args.injection_steps))
    alone = (trigger is None) != (args.injection_threshold is None)
    refuse(alone, "--injection-trigger and --injection-threshold need each other")
    refuse(trigger and steps, "--injection-trigger and --injection-steps exclude each other: give one of them")
    refuse(trigger and not args.injections, "--injection-trigger needs --injections: how often it may inject")
    differ = not trigger and len(steps) != args.injections
    refuse(differ, f"--injections {args.injections} but --injection-steps {shown}")
    refuse(list(steps) != sorted(set(steps)), f"--injection-steps {shown} must increase")
    outside = steps and not first_step <= steps[0] <= steps[-1] <= last_step
    refuse(outside, f"--injection-steps {shown} must lie in {first_step}..{last_step}")


def check_disk(args: Args, obs_space: gym.spaces.Box) -> None:
    """The disk has room for all that the replay will ever hold, and for the checkpoint and its successor."""
    folder, (slot, interval, slots) = run_folder(args), replay_layout(obs_space, args)
    ring = folder / "replay"
    if (folder / "checkpoint.pt").exists() and not ring.exists():  # finished, nothing will be written
        return
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    free += sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in folder.glob("*"))  # what the run has already
    free -= (60_000_000 if rom(args.env) else 1_000_000) * (1 + args.injections)  # two checkpoints, and the log
    needed = slot.itemsize * min(slots, interval * math.ceil(args.total_steps / args.eval_every))
    fits = free // slot.itemsize - (slots - args.buffer_size)
    hint = f", or start a new run with --buffer-size {fits}" if fits >= max(2, args.batch_size) else ""
    sizes = f"{needed / 1e6:,.1f} MB of disk, {max(0, free) / 1e6:,.1f} MB are free for it"
    refuse(needed > free, f"the replay needs {sizes}: make room{hint}")


# ---- network
def network_input(obs: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """Observations as networks take them: pixels 0..255 become floats 0..1, flat observations are floats already.

    Once for each batch, and in the memory layout in which convolutions run fastest.
    """
    obs = torch.as_tensor(obs, device=device)
    if obs.dtype != torch.uint8:
        return obs
    return obs.float().div_(255).contiguous(memory_format=torch.channels_last)


class QNetwork(nn.Sequential):
    """network_input(observations) to Q-values (batch, actions): the CNN of Mnih et al. 2015, or an MLP 64-64."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        def hidden(layer: nn.Module, shape: tuple[int, ...]) -> list[nn.Module]:
            norm = [nn.LayerNorm(shape)] if args.layer_norm else []
            return [layer, *norm, nn.LeakyReLU(0.01) if args.leaky_relu else nn.ReLU()]

        actions = int(envs.single_action_space.n)
        if rom(args.env):
            super().__init__(
                *hidden(nn.Conv2d(4, 32, 8, stride=4), (32, 20, 20)),
                *hidden(nn.Conv2d(32, 64, 4, stride=2), (64, 9, 9)),
                *hidden(nn.Conv2d(64, 64, 3, stride=1), (64, 7, 7)),
                nn.Flatten(),
                *hidden(nn.Linear(64 * 7 * 7, 512), (512,)),
                nn.Linear(512, actions),
            )
        else:
            inputs = envs.single_observation_space.shape[0]
            layers = [*hidden(nn.Linear(inputs, 64), (64,)), *hidden(nn.Linear(64, 64), (64,)), nn.Linear(64, actions)]
            super().__init__(*layers)


def fresh_network(envs: gym.vector.VectorEnv, args: Args, step: int) -> QNetwork:
    """A newly initialised network, decided by (seed, step) alone."""
    torch.manual_seed(seeds(args, step)[0])
    return QNetwork(envs, args).to(args.device, memory_format=torch.channels_last)


# ---- injection
class Injected(nn.Module):
    """Q = h + (f1 - f2): h frozen, f1 and f2 fresh and identical, only f1 trains (Nikishin et al. 2023; paper 3.1).

    Added in this order, Q is h to the last bit until f1 is trained. h may itself be an injected network.
    """

    def __init__(self, h: nn.Module, fresh: nn.Module):
        super().__init__()
        self.h = h.requires_grad_(False)
        self.f1 = fresh
        self.f2 = copy.deepcopy(fresh).requires_grad_(False)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.h(obs) + (self.f1(obs) - self.f2(obs))


def trained(q: nn.Module) -> nn.Sequential:
    """The part of Q that trains: all of it, or f1 after an injection."""
    return q.f1 if isinstance(q, Injected) else q


def inject(q: nn.Module, target_network: nn.Module, fresh: nn.Module) -> tuple[Injected, Injected]:
    """Inject the same fresh network into both; the target keeps its own lagging h, so its values do not jump either."""
    return Injected(q, fresh), Injected(target_network, copy.deepcopy(fresh)).requires_grad_(False)


def smooth(average: float | None, value: float) -> float:
    """Exponential moving average with weight 0.8, as in the paper's figures."""
    return value if average is None else 0.8 * average + 0.2 * value


def injection_due(args: Args, step: int, injected_at: list[int], smoothed: float | None) -> bool:
    """At the steps given (paper 3.1), or when the smoothed metric has crossed the threshold (paper 6.1).

    A triggered injection waits for 5 % of the run after the one before it.
    """
    if args.injection_trigger is None:
        return step in args.injection_steps
    waited = not injected_at or step - injected_at[-1] >= 0.05 * args.total_steps
    if smoothed is None or not waited or len(injected_at) == args.injections:
        return False
    rises = args.injection_trigger in ("weight_magnitude", "dormant_units")  # with the loss of plasticity
    return smoothed >= args.injection_threshold if rises else smoothed <= args.injection_threshold


# ---- regularisation
def l2_coefficient(args: Args, step: int) -> float:
    """lambda(k) of paper 3.2 at step k."""
    if args.l2 == "constant":
        return args.l2_lambda
    if args.l2 == "incremental":
        return args.l2_start + (args.l2_end - args.l2_start) * step / args.total_steps
    if args.l2 == "periodic":
        return args.l2_lambda if step % (args.l2_on_steps + args.l2_off_steps) < args.l2_on_steps else 0.0
    return 0.0


def squared_norm(network: nn.Module) -> torch.Tensor:
    """||phi||^2 over all parameters of the network that trains."""
    return torch.cat([parameter.flatten() for parameter in network.parameters()]).square().sum()


# ---- replay
class Batch(NamedTuple):
    obs: torch.Tensor
    action: torch.Tensor
    reward: torch.Tensor
    next_obs: torch.Tensor
    terminated: torch.Tensor


def replay_layout(obs_space: gym.spaces.Box, args: Args) -> tuple[np.dtype, int, int]:
    """What a slot of the replay holds, how many the steps between two checkpoints take at most, how many there are."""
    stacked = len(obs_space.shape) == 3
    frame = ("frame", obs_space.dtype, obs_space.shape[1:] if stacked else obs_space.shape)
    # end: no transition starts here; age: steps since the reset, as far as a stack looks back
    rest = [("action", "i2"), ("reward", "f4"), ("terminated", "?"), ("end", "?"), ("age", "u1")]
    interval = int(args.eval_every * (17 / 16 if stacked else 2))  # for ends, too: at worst one a step, few on Atari
    interval += obs_space.shape[0] if stacked else 1
    return np.dtype([frame, *rest]), interval, args.buffer_size + interval


class Replay:
    """A ring of single frames in a memory-mapped file, so that an Atari transition costs 7 KB, and only once needed.

    A slot holds the newest frame of an observation (a flat observation is one frame) and what followed. The observation
    that ends an episode has a slot too, which no transition starts from. The ring has room for the steps of one
    interval between evaluations beyond `buffer_size`, so that a run which is continued from its last checkpoint finds
    all it had.
    """

    def __init__(self, path: Path, obs_space: gym.spaces.Box, args: Args, new: bool = True):
        self.obs_shape, self.buffer_size = obs_space.shape, args.buffer_size
        self.stack = obs_space.shape[0] if len(obs_space.shape) == 3 else 1
        slot, self.interval, slots = replay_layout(obs_space, args)
        self.file = np.memmap(path, slot, "w+" if new else "r+", shape=slots)
        self.ring = self.file.view(np.ndarray)  # the same memory, without memmap's slow indexing
        # Slots are numbered from the start of the run; slot k lies at k modulo the length of the ring.
        self.next = 0  # slot to be written
        self.reserved = 0  # slots before this one have their place on the disk
        self.first = 0  # first slot since the replay was emptied
        self.added = 0  # transitions since then
        self.age = 0  # steps of the episode

    def state_dict(self) -> dict[str, int]:
        self.file.flush()
        return {"next": self.next, "first": self.first, "added": self.added}

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)

    def reserve(self) -> None:
        """Take the disk for one interval ahead, or raise OSError.

        A write to a memory map that finds the disk full would kill the process by a signal (SIGBUS), without a word.
        """
        start = self.next % len(self.ring)
        slots = min(self.interval, len(self.ring) - start)  # from the start of the ring on, all is taken already
        if hasattr(os, "posix_fallocate"):  # Linux
            with open(self.file.filename, "r+b") as file:
                os.posix_fallocate(file.fileno(), start * self.ring.itemsize, slots * self.ring.itemsize)
        self.reserved = self.next + slots

    def add(self, obs, action: int, reward: float, next_obs, terminated: bool, episode_over: bool) -> None:
        if self.next + 1 >= self.reserved:
            self.reserve()
        self._write(self.next, obs, action, reward, terminated, end=False)
        self.next, self.added, self.age = self.next + 1, self.added + 1, self.age + 1
        self._write(self.next, next_obs, 0, 0.0, False, end=True)  # overwritten unless the episode is over
        if episode_over:
            self.next, self.age = self.next + 1, 0

    def _write(self, slot, obs, action, reward, terminated, end) -> None:
        frame, age = obs[-1] if self.stack > 1 else obs, min(self.age, self.stack)
        self.ring[slot % len(self.ring)] = (frame, action, reward, terminated, end, age)

    def empty(self) -> None:
        self.first, self.added = self.next, 0

    def sample(self, batch_size: int, rng: np.random.Generator, device: str) -> Batch:
        """Uniform over the newest `buffer_size` slots. Frames before an episode's start are black, as in a stack."""
        oldest = max(self.first, self.next - self.buffer_size)
        slots = rng.integers(oldest, self.next, size=batch_size)
        while (ends := self.ring["end"][slots % len(self.ring)]).any():
            slots[ends] = rng.integers(oldest, self.next, size=ends.sum())
        now = self.ring[slots % len(self.ring)]
        ages = np.arange(1 - self.stack, 2)  # the frames of obs, and then the newest of next_obs
        frames = self.ring["frame"][(slots[:, None] + ages) % len(self.ring)]
        frames[now["age"][:, None] + ages < 0] = 0  # before the reset: black, as the environment returns them
        obs, next_obs = (x.reshape(-1, *self.obs_shape) for x in (frames[:, :-1], frames[:, 1:]))
        arrays = now["action"].astype(np.int64), now["reward"].copy(), now["terminated"].astype(np.float32)
        action, reward, terminated = (torch.as_tensor(array, device=device) for array in arrays)
        return Batch(network_input(obs, device), action, reward, network_input(next_obs, device), terminated)


# ---- acting and evaluation
def epsilon(args: Args, step: int, replay: Replay) -> float:
    """Linear from start_e to end_e, on Atari once learning starts. In Digits every task starts with random actions."""
    if args.env == "Digits" and replay.added < args.learning_starts:
        return 1.0
    begin = args.learning_starts if rom(args.env) else 0
    end = max(begin + 1, args.exploration_fraction * args.total_steps)
    return float(np.interp(step, (begin, end), (args.start_e, args.end_e)))


@torch.inference_mode()
def epsilon_greedy(q: nn.Module, obs: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """One action per environment."""
    output_layer = trained(q)[-1]
    actions = rng.integers(output_layer.out_features, size=len(obs))
    greedy = rng.random(len(obs)) >= epsilon
    if greedy.any():
        inputs = network_input(obs[greedy], output_layer.weight.device)
        actions[greedy] = q(inputs).argmax(1).cpu().numpy()
    return actions


def evaluate(q: nn.Module, args: Args, step: int) -> float:
    """Mean return, rewards unclipped, of one whole episode in each of `eval_episodes` environments, at epsilon 0.02."""
    envs, rng = make_env(args.env, args.eval_episodes), np.random.default_rng((args.seed, step, 1))
    obs, _ = envs.reset(seed=int(rng.integers(2**31 - args.eval_episodes)))
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    while running.any():  # environments whose episode is over play on, unheeded
        obs, rewards, terminated, truncated, _ = envs.step(epsilon_greedy(q, obs, 0.02, rng))
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


# ---- checkpoint
def variant(args: Args) -> str:
    """The remedies in use, as in the run's folder and in the figures: "layer-norm+injection-2"."""
    parts = [f"l2-{args.l2}"] if args.l2 != "none" else []
    parts += ["layer-norm"] * args.layer_norm + ["leaky-relu"] * args.leaky_relu
    if args.injections:
        parts.append(f"injection-{args.injections}" + (f"-{args.injection_trigger}" if args.injection_trigger else ""))
    return "+".join(parts) or "standard"


def run_folder(args: Args) -> Path:
    return Path("runs") / f"{args.env.replace('/', '-')}__{variant(args)}__seed{args.seed}"


def open_run(args: Args) -> tuple[Path, filelock.FileLock, dict | None]:
    """The run's folder, a lock on it, and its checkpoint if there is one. Raises UserError."""
    folder = run_folder(args)
    config, path = json.loads(json.dumps(asdict(args))), folder / "config.json"
    if path.exists():
        there = json.loads(path.read_text())
        names = [name for name in config | there if config.get(name) != there.get(name)]
        if names:
            differences = ", ".join(f"{name} {there.get(name)} (now {config.get(name)})" for name in names)
            raise UserError(f"{folder} holds a run with other settings: {differences}; move it away or start elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)  # a run stopped in a notebook may go on in it
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder} is in use by another process") from None
    replace_file(path, (json.dumps(config, indent=2) + "\n").encode())
    path = folder / "checkpoint.pt"
    if not path.exists():
        return folder, lock, None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # checks what torch.load does not
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise all sorts
        raise UserError(f"{path} cannot be read ({type(error).__name__}); delete it to start this run over") from error
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is of another version of this program; delete it to start this run over")
    return folder, lock, checkpoint


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, whenever the process is killed or the disk is full."""
    temporary = path.with_suffix(".tmp")  # one left over is overwritten
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(folder: Path, state: dict, **parts) -> None:
    """Save plain values and the state_dict of everything that has one."""
    whole = state | {name: part.state_dict() for name, part in parts.items()}
    file = io.BytesIO()  # on a full disk torch.save raises RuntimeErrors of its own, a plain write says what is wrong
    torch.save(whole, file)
    replace_file(folder / "checkpoint.pt", file.getvalue())


def load_checkpoint(checkpoint: dict | None, **parts) -> None:
    """Give everything that has a state_dict its state back, if there is a checkpoint."""
    for name, part in parts.items() if checkpoint else ():
        part.load_state_dict(checkpoint[name])


# ---- training
def q_and_target(q: nn.Module, target_network: nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q(s) and Q_target(s). What both hold frozen after an injection runs once: 4 networks, not 6, once h is shared."""
    if not isinstance(q, Injected):
        return q(obs), target_network(obs)
    h, f2 = q.h(obs), q.f2(obs)
    target_h = h if target_network.h is q.h else target_network.h(obs)
    return h + (q.f1(obs) - f2), target_h + (target_network.f1(obs) - f2)


def copy_to_target(q: nn.Module, target_network: nn.Module) -> None:
    """Copy Q's parameters; from its first copy after an injection on, the target shares the frozen h."""
    target_network.load_state_dict(q.state_dict())
    if isinstance(q, Injected):
        target_network.h = q.h


def td_loss(q: nn.Module, target_network: nn.Module, batch: Batch, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """mean (y - Q(s, a))^2 with the double-Q target y (van Hasselt et al. 2016), and the mean of Q(s, a)."""
    with torch.no_grad():
        next_q, next_target = q_and_target(q, target_network, batch.next_obs)
        next_value = next_target.gather(1, next_q.argmax(1, keepdim=True)).squeeze(1)
        td_target = batch.reward + gamma * (1 - batch.terminated) * next_value
    value = q(batch.obs).gather(1, batch.action[:, None]).squeeze(1)
    return nn.functional.mse_loss(value, td_target), value.detach().mean()


def measurements(network: nn.Sequential, update: dict[str, torch.Tensor]) -> dict[str, float]:
    """The columns of the log that describe the network that trains and its latest update, if there was one."""
    row = {name: update[name].item() for name in ("loss", "q_mean", "grad_norm") if name in update}
    if update and "grad_norm" not in update:  # the gradients were not clipped and are still there
        row["grad_norm"] = nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()]).item()
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"training has diverged: {row}.")
    try:
        return row | metrics.measure(network, update.get("obs"))
    except ValueError as error:
        raise FloatingPointError(f"training has diverged: {error}.") from error


def adam(q: nn.Module, args: Args) -> torch.optim.Adam:
    return torch.optim.Adam(trained(q).parameters(), args.learning_rate, eps=args.adam_eps, fused=True)


def networks(envs: gym.vector.VectorEnv, args: Args, injected_at: list[int]) -> tuple:
    """Q, the target network and the optimiser as at the start of a run, and after injections at these steps."""
    q = fresh_network(envs, args, 0)
    target_network = copy.deepcopy(q).requires_grad_(False)
    for step in injected_at:
        q, target_network = inject(q, target_network, fresh_network(envs, args, step))
    return q, target_network, adam(q, args)


def train(args: Args) -> Path:
    """Train one agent and return its run's folder. Raises UserError, and FloatingPointError when training diverges."""
    check(args)
    folder, lock, checkpoint = open_run(args)
    if checkpoint and checkpoint["step"] == args.total_steps:
        print(f"{folder} is finished; nothing is left to do.")
        (folder / "replay").unlink(missing_ok=True)  # if it was killed just before it could
        lock.release(force=True)
        return folder
    torch.set_num_threads(torch.get_num_threads() if rom(args.env) else 1)  # one thread beats two on a small network
    state = checkpoint or {"format": CHECKPOINT_FORMAT, "step": 0, "injected_at": [], "smoothed": None, "log_bytes": 0}
    envs, obs, rng = fresh_start(args, state["step"])
    q, target_network, optimizer = networks(envs, args, state["injected_at"])
    replay = Replay(folder / "replay", envs.single_observation_space, args, new=not checkpoint)
    load_checkpoint(checkpoint, q=q, target_network=target_network, optimizer=optimizer, replay=replay)
    log = metrics.CSVLog(folder / "log.csv", COLUMNS, state["log_bytes"])
    episode_return, returns, update, shown, logged_at = 0.0, [], {}, {}, (state["step"], time.perf_counter())

    steps = range(state["step"] + 1, args.total_steps + 1)
    progress = tqdm(steps, initial=state["step"], total=args.total_steps, unit="step", disable=None)
    for step in progress:
        if injection_due(args, step, state["injected_at"], state["smoothed"]):  # paper 3.1
            q, target_network = inject(q, target_network, fresh_network(envs, args, step))
            optimizer, update = adam(q, args), {}
            state["injected_at"], state["smoothed"] = [*state["injected_at"], step], None

        exploration = epsilon(args, step, replay)
        action = epsilon_greedy(q, obs, exploration, rng)
        next_obs, reward, terminated, truncated, _ = envs.step(action)
        episode_return += float(reward[0])
        episode_over = terminated[0] or truncated[0]
        checkpoint_due = step % args.eval_every == 0 or step == args.total_steps  # cuts the episode
        clipped_reward = np.sign(reward[0]) if rom(args.env) else reward[0]  # Mnih et al. 2015
        replay.add(obs[0], action[0], clipped_reward, next_obs[0], terminated[0], episode_over or checkpoint_due)
        obs = next_obs

        if replay.added > args.learning_starts and step % args.train_frequency == 0:
            batch = replay.sample(args.batch_size, rng, args.device)
            loss, q_mean = td_loss(q, target_network, batch, args.gamma)
            l2_lambda = l2_coefficient(args, step)
            optimizer.zero_grad()
            (loss + l2_lambda * squared_norm(trained(q)) if l2_lambda else loss).backward()  # paper 3.2
            update = {"loss": loss.detach(), "q_mean": q_mean, "obs": batch.obs}
            if args.max_grad_norm:
                update["grad_norm"] = nn.utils.clip_grad_norm_(trained(q).parameters(), args.max_grad_norm)
            optimizer.step()
        if step % args.target_network_frequency == 0:
            copy_to_target(q, target_network)

        if episode_over:
            returns.append(episode_return)
            episode_return = 0.0
            obs, _ = envs.reset()
        if args.env == "Digits" and (episode_over or checkpoint_due):
            # New labels: what is stored would poison the targets with old ones, a fault of memory, not of plasticity.
            # The weights, the target network and the optimiser stay, for they are what loses its plasticity.
            replay.empty()

        if step % LOG_EVERY == 0 or checkpoint_due:
            row = {"step": step, "epsilon": exploration, "l2_lambda": l2_coefficient(args, step)}
            row |= {"injections": len(state["injected_at"])} | measurements(trained(q), update)
            row["train_return"] = np.mean(returns) if returns else None
            if update and args.injection_trigger:
                state["smoothed"] = smooth(state["smoothed"], row[args.injection_trigger])
            row["eval_return"] = evaluate(q, args, step) if checkpoint_due and args.env != "Digits" else None
            log.write(row | {"steps_per_second": (step - logged_at[0]) / (time.perf_counter() - logged_at[1])})
            shown |= {name: row[name] for name in ("train_return", "eval_return") if row[name] is not None}
            progress.set_postfix(shown)
            returns, logged_at = [], (step, time.perf_counter())
        if checkpoint_due:
            state |= {"step": step, "log_bytes": log.sync()}
            save_checkpoint(folder, state, q=q, target_network=target_network, optimizer=optimizer, replay=replay)
            envs, obs, rng = fresh_start(args, step)
            episode_return, update = 0.0, {}
    log.close()
    (folder / "replay").unlink(missing_ok=True)
    lock.release(force=True)
    return folder


def cli(run: Run, learning: Learning, injection: Injection, l2: L2, architecture: Architecture) -> Args:
    """Deep Q-learning with measures of lost plasticity and remedies against it. It writes to runs/."""
    return Args(**vars(run), **vars(learning), **vars(injection), **vars(l2), **vars(architecture))


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    go_on = "the same command goes on from the last checkpoint, or starts over if there is none yet."
    try:
        args = parse(cli)
        folder = train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error} What was saved before is kept.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. When that is mended, {go_on}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped: {go_on}", file=sys.stderr)
        return 130
    print(f"Done: {folder}/log.csv. Draw it with: python plot.py {folder}")
    return 0


def parse(command: Callable) -> Args:
    """tyro's command line, its box around an error message made one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(command, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff))
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        message = itertools.takewhile(lambda line: "──" not in line, box.getvalue().splitlines()[1:])
        raise UserError(" ".join(" ".join(message).replace("│", "").split()) + " (see --help)") from None


if __name__ == "__main__":
    sys.exit(main())
