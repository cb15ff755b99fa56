"""Deep Q-learning that measures its own loss of plasticity, with every remedy of the paper as a flag.

"The paper" is R. Cheng, E. Chen and L. Ma, Improving Neural Network Plasticity in Reinforcement Learning with
Plasticity Injection and Plasticity Metric Regularization; the README lists all others that are cited here.
A network that has trained for long may stop learning. This file trains one on an Atari game, on LunarLander (or any
Gymnasium task with flat observations and discrete actions) or on Digits, which shows the collapse in a minute, and logs
what the literature takes for signs of lost plasticity (metrics.py). The update is double DQN (van Hasselt et al. 2016):

    y    = r + gamma * (1 - terminated) * Q_target(s', argmax_a Q(s', a))
    loss = mean (y - Q(s, a))^2 + lambda(step) * ||phi||^2                phi: the parameters that train (paper 3.2)

Plasticity injection (Nikishin et al. 2023; paper 3.1) freezes Q and lets a fresh network learn what is missing, without
changing a single value at that moment: Q <- Q + (f1 - f2) with f1 = f2 fresh, of which only f1 trains.

    python dqn_plasticity.py --env Digits
    python dqn_plasticity.py --env MsPacman --l2 periodic
    python plot.py runs/

A run is the folder runs/<env>__<variant>__seed<k>. The same command given again continues an unfinished run exactly.
"""

import collections
import copy
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from torch import nn

import metrics
from metrics import UserError, refuse, run_folder

gym.register_envs(ale_py)

THREADS = torch.get_num_threads()  # before a run of a small network sets it to one
VERSION = 5  # raised whenever the networks or what is saved of them change
COLUMNS = ("step", "train_return", "eval_return", "loss", "q_mean", "grad_norm", "epsilon", "l2_lambda", "injections")
COLUMNS += (*metrics.METRICS, *metrics.FRESH_METRICS)


# ---- settings
def by_task(atari: float, other: float, digits: float):
    """A default that depends on the task: Args.__post_init__ picks Atari's, Digits' or that of all other tasks."""
    return field(default=None, metadata={"by_task": (atari, other, digits)})


@dataclass
class Args:
    """Deep Q-learning with remedies for lost plasticity. Defaults depend on the task: see --env Digits --help."""

    # ---- The run; a step is one of the environment. by_task: the default on Atari, on other tasks, on Digits
    env: str = "MsPacman"  # an Atari game, LunarLander, Digits, or a Gymnasium id with flat observations
    seed: int = 1  # decides everything: the same seed, machine and thread count give the same log
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # a CUDA GPU if there is one
    bf16: bool = False  # update in bfloat16, weights stay float32: faster on Atari if the hardware has it
    total_steps: int = by_task(2_000_000, 300_000, 60_000)  # length of the run
    eval_every: int = by_task(25_000, 10_000, 1_500)  # steps between evaluations, each with a checkpoint
    plasticity_every: int = by_task(100_000, 2_000, 1_500)  # steps between measurements of plasticity
    plasticity_updates: int = by_task(700, 40, 150)  # updates of such a measurement, a multiple of ten
    eval_episodes: int = 10  # whole episodes of an evaluation (Digits has none: its training return is the score)
    # ---- Double DQN with Adam
    learning_rate: float = by_task(1e-4, 1e-3, 1e-3)  # step size of Adam
    adam_eps: float = by_task(1e-4, 1e-4, 1e-8)  # epsilon of Adam
    gamma: float = by_task(0.99, 0.99, 0.5)  # discount per step
    batch_size: int = by_task(32, 128, 32)  # transitions in an update
    buffer_size: int = by_task(1_000_000, 300_000, 1_500)  # transitions that the replay keeps
    learning_starts: int = by_task(20_000, 20_000, 32)  # steps before the first update (Digits: of every task)
    train_frequency: int = by_task(4, 2, 1)  # steps per update
    target_network_frequency: int = by_task(2_000, 250, 100)  # steps between copies into the target network
    start_e: float = by_task(1.0, 1.0, 0.05)  # first epsilon, the probability of a random action
    end_e: float = by_task(0.01, 0.1, 0.05)  # last epsilon
    exploration_fraction: float = by_task(0.5, 0.1, 0.0)  # share of the run after which epsilon is at its last value
    max_grad_norm: float = by_task(10.0, 10.0, 0.0)  # longer gradients are scaled down to this norm; 0: never
    # ---- Plasticity injection (paper 3.1): freeze the network, let a fresh one learn what is missing
    injections: int = 0  # how many plasticity injections; with a trigger, at most
    injection_steps: tuple[int, ...] = ()  # at which steps; none given: evenly over the second half of the run
    injection_trigger: Literal[metrics.METRICS] | None = None  # inject when the moving average of this metric ...
    injection_threshold: float | None = None  # ... crosses this: weight_magnitude, dormant_units upwards, others down
    # ---- L2 regularisation (paper 3.2): lambda(step) * ||phi||^2 is added to the loss
    l2: Literal["none", "constant", "incremental", "periodic"] = "none"  # schedule of lambda
    l2_lambda: float = by_task(1e-5, 1e-3, 1e-4)  # constant, periodic: lambda
    l2_start: float = 0.0  # incremental: lambda at the start of the run
    l2_end: float = by_task(2e-5, 2e-3, 2e-4)  # incremental: lambda at its end
    l2_on_steps: int = by_task(500_000, 75_000, 4_000)  # periodic: steps with lambda (N in the paper)
    l2_off_steps: int = by_task(100_000, 15_000, 800)  # periodic: steps without it (M), then again
    # ---- The Q-network (paper 3.3)
    layer_norm: Literal["none", "before", "after"] = "none"  # LayerNorm of every hidden layer, before or after the activation
    leaky_relu: bool = False  # LeakyReLU (slope 0.01) in place of ReLU

    def __post_init__(self):
        self.env = re.sub("^ALE/(.*)-v5$", r"\1", self.env)  # "ALE/MsPacman-v5" is "MsPacman"
        task = 0 if is_atari(self.env) else 2 if self.env == "Digits" else 1
        for setting in fields(self):
            if getattr(self, setting.name) is None and "by_task" in setting.metadata:
                setattr(self, setting.name, setting.metadata["by_task"][task])
        if self.injection_steps:
            self.injections = self.injections or len(self.injection_steps)
        elif not self.injection_trigger:  # evenly over the second half of the run, from its middle on
            half = self.total_steps // 2
            self.injection_steps = tuple(half + i * half // self.injections for i in range(self.injections))


# ---- network
class QNetwork(nn.Sequential):
    """Observations as floats to Q-values (batch, actions): the CNN of Mnih et al. 2015, or an MLP."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        def hidden(layer: nn.Module, *shape: int) -> list[nn.Module]:
            activation = nn.LeakyReLU(0.01) if args.leaky_relu else nn.ReLU()
            if args.layer_norm == "before":
                return [layer, nn.LayerNorm(shape), activation]
            if args.layer_norm == "after":
                return [layer, activation, nn.LayerNorm(shape)]
            return [layer, activation]

        actions = int(envs.single_action_space.n)
        if is_atari(args.env):
            super().__init__(
                *hidden(nn.Conv2d(4, 32, 8, stride=4), 32, 20, 20),
                *hidden(nn.Conv2d(32, 64, 4, stride=2), 64, 9, 9),
                *hidden(nn.Conv2d(64, 64, 3, stride=1), 64, 7, 7),
                nn.Flatten(),
                *hidden(nn.Linear(64 * 7 * 7, 512), 512),
                nn.Linear(512, actions),
            )
        else:
            inputs, width = envs.single_observation_space.shape[0], 64 if args.env == "Digits" else 256
            first, second = hidden(nn.Linear(inputs, width), width), hidden(nn.Linear(width, width), width)
            super().__init__(*first, *second, nn.Linear(width, actions))


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


def q_and_target(q: nn.Module, target_network: nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q(s) and Q_target(s). For speed, what both hold frozen runs once: f2, and h once the target has a copy of Q's."""
    if not isinstance(q, Injected):
        return q(obs), target_network(obs)
    h, f2 = q.h(obs), q.f2(obs)
    target_h = h if target_network.h is q.h else target_network.h(obs)
    return h + (q.f1(obs) - f2), target_h + (target_network.f1(obs) - f2)


# ---- L2 regularisation
def l2_coefficient(args: Args, step: int) -> float:
    """lambda(k) of paper 3.2 at step k."""
    if args.l2 == "constant":
        return args.l2_lambda
    if args.l2 == "incremental":
        return args.l2_start + (args.l2_end - args.l2_start) * step / args.total_steps
    if args.l2 == "periodic":
        return args.l2_lambda if (step - 1) % (args.l2_on_steps + args.l2_off_steps) < args.l2_on_steps else 0.0
    return 0.0


def squared_norm(network: nn.Module) -> torch.Tensor:
    """||phi||^2 over all parameters of the network that trains."""
    return torch.cat([parameter.flatten() for parameter in network.parameters()]).square().sum()


# ---- loss
Batch = collections.namedtuple("Batch", "obs action reward next_obs terminated")  # tensors, a row per transition


def td_loss(q: nn.Module, target_network: nn.Module, batch: Batch, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """mean (y - Q(s, a))^2 with the double-Q target y (van Hasselt et al. 2016), and the mean of Q(s, a)."""
    with torch.no_grad():
        next_q, next_target = q_and_target(q, target_network, batch.next_obs)
        next_action = next_q.argmax(1, keepdim=True)
        td_target = batch.reward + gamma * (1 - batch.terminated) * next_target.gather(1, next_action).squeeze(1)
    q_value = q(batch.obs).gather(1, batch.action[:, None]).squeeze(1)
    return nn.functional.mse_loss(q_value, td_target), q_value.detach().mean()


# ---- training
def train(args: Args) -> Path:
    """Train one agent and return its run's folder. Raises UserError, and FloatingPointError when training diverges."""
    check(args)
    run = metrics.Run(run_folder(args), asdict(args) | {"version": VERSION}, args.total_steps, args.eval_every, COLUMNS)
    if run.finished:
        (run.folder / "replay").unlink(missing_ok=True)  # if it was killed just before it could
        return run.folder
    torch.set_num_threads(THREADS if is_atari(args.env) else 1)  # one thread beats two on a small network
    injected_at, smoothed = run.state.get("injected_at", []), run.state.get("smoothed")  # of a run that goes on
    envs = make_env(args.env)
    q = fresh_network(envs, args, 0)
    target_network = copy.deepcopy(q).requires_grad_(False)
    for at in injected_at:
        q, target_network = inject(q, target_network, fresh_network(envs, args, at))
    optimizer = adam(q, args)
    replay = Replay(run.folder / "replay", envs.single_observation_space, args, new=not run.state)
    run.load(q=q, target_network=target_network, optimizer=optimizer, replay=replay)

    for start, steps in run.intervals():
        envs, obs, rng = fresh_start(args, start)
        optimizer.zero_grad()  # a run that goes on has no gradients yet, and its log has to be the same
        if args.env == "Digits":
            # An interval is a task, with new labels. Old ones would poison the targets: a fault of memory, not of
            # plasticity. Weights, target network and optimiser stay, for their plasticity is the question.
            replay.empty()
        episode_return, returns, update = 0.0, [], {}  # returns since the last row; figures of the latest update
        for step in steps:
            if injection_due(args, step, injected_at, smoothed):  # paper 3.1
                q, target_network = inject(q, target_network, fresh_network(envs, args, step))
                optimizer, update = adam(q, args), {}
                injected_at, smoothed = [*injected_at, step], None

            epsilon = exploration_rate(args, step, replay)
            action = epsilon_greedy(q, obs, epsilon, rng)
            next_obs, reward, terminated, truncated, _ = envs.step(action)
            episode_over = terminated[0] or truncated[0]
            episode_return += float(reward[0])
            clipped_reward = np.sign(reward[0]) if is_atari(args.env) else reward[0]  # Mnih et al. 2015
            replay.add(obs[0], action[0], clipped_reward, next_obs[0], terminated[0], episode_over)
            obs = next_obs

            if replay.added > args.learning_starts and step % args.train_frequency == 0:
                batch = replay.sample(args.batch_size, rng, args.device)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                    loss, q_mean = td_loss(q, target_network, batch, args.gamma)
                update = {"loss": loss.detach(), "q_mean": q_mean}
                if l2_lambda := l2_coefficient(args, step):  # paper 3.2
                    loss = loss + l2_lambda * squared_norm(trained(q))
                optimizer.zero_grad()
                loss.backward()
                if args.max_grad_norm:
                    update["grad_norm"] = nn.utils.clip_grad_norm_(trained(q).parameters(), args.max_grad_norm)
                optimizer.step()
            if step % args.target_network_frequency == 0:
                copy_to_target(q, target_network)

            if episode_over:
                returns.append(episode_return)
                episode_return = 0.0
                obs, _ = envs.reset()

            if run.row_due(step) or step % args.plasticity_every == 0:
                row = {"step": step, "epsilon": epsilon, "l2_lambda": l2_coefficient(args, step)}
                row |= {"injections": len(injected_at), "train_return": np.mean(returns) if returns else None}
                row |= measurements(args, step, trained(q), replay) | update  # its grad_norm is that before clipping
                if update and row.get(args.injection_trigger) is not None:  # not before learning has started
                    smoothed = smooth(smoothed, row[args.injection_trigger])
                if step == run.end:
                    row["eval_return"] = evaluate(q, args, step)
                run.log(row)
                returns = []

        replay.end_episode()  # the next interval starts another
        if step == args.total_steps and args.env != "Digits":  # before the run counts as finished
            metrics.save_gif(run.folder / "episode.gif", episode(q, args), envs.metadata.get("render_fps", 15))
        run.save(step, q=q, target_network=target_network, optimizer=optimizer, replay=replay,
                 injected_at=injected_at, smoothed=smoothed)  # fmt: skip
    (run.folder / "replay").unlink()
    return run.folder


def fresh_network(envs: gym.vector.VectorEnv, args: Args, step: int) -> QNetwork:
    """A newly initialised network, decided by (seed, step) alone."""
    torch.manual_seed(seeds(args, step)[0])
    return QNetwork(envs, args).to(args.device, memory_format=torch.channels_last)


def adam(q: nn.Module, args: Args) -> torch.optim.Adam:
    return torch.optim.Adam(trained(q).parameters(), args.learning_rate, eps=args.adam_eps, fused=True)


def copy_to_target(q: nn.Module, target_network: nn.Module) -> None:
    """Copy Q's parameters; from its first copy after an injection on, the target shares the frozen h."""
    target_network.load_state_dict(q.state_dict())
    if isinstance(q, Injected):
        target_network.h = q.h


# ---- when to inject
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
    return metrics.DIRECTION_WHEN_LOST[args.injection_trigger] * (smoothed - args.injection_threshold) >= 0


# ---- replay
def slots_taken(args: Args, steps: int) -> int:
    """By so many steps at most: the end of an episode takes a slot, too, and only on Atari are all episodes long."""
    return int(steps * (17 / 16 if is_atari(args.env) else 2)) + 4


class Replay:
    """A ring of single frames in a file: an Atari transition costs 7 KB, of the disk, and only once it is there.

    A slot holds the newest frame of an observation (a flat observation is one frame) and what followed. The observation
    that ends an episode has a slot too, which no transition starts from. Slots are written like any file, so that a
    full disk is an OSError (through a memory map it would kill the process), and read through a memory map.
    """

    def __init__(self, path: Path, obs_space: gym.spaces.Box, args: Args, new: bool = True):
        self.obs_shape, self.buffer_size = obs_space.shape, args.buffer_size
        self.stack = obs_space.shape[0] if len(obs_space.shape) == 3 else 1
        # end: no transition starts here; episode_start: the slot in which its episode started
        marks = ("terminated", "?"), ("end", "?"), ("episode_start", "i8")
        slot = np.dtype([("frame", obs_space.dtype, obs_space.shape[-2:]), ("action", "i2"), ("reward", "f4"), *marks])
        # An interval more than asked for, so that a run that goes on from its last checkpoint finds all it had
        slots = args.buffer_size + slots_taken(args, args.eval_every)
        self.file = open(path, "w+b" if new else "r+b")  # noqa: SIM115 - open for the run
        self.file.truncate(slots * slot.itemsize)  # for the map, which has a fixed length; it takes no disk yet
        self.ring = np.memmap(path, slot, "r", shape=slots).view(np.ndarray)  # without memmap's slow indexing
        # Slots are numbered from the start of the run; slot k lies at k modulo the length of the ring.
        self.next = 0  # slot to be written
        self.episode_start = 0  # where the episode started
        self.first = 0  # first slot since the replay was emptied
        self.added = 0  # transitions since then

    def state_dict(self) -> dict[str, int]:
        os.fsync(self.file.fileno())
        return {name: getattr(self, name) for name in ("next", "episode_start", "first", "added")}

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)

    def add(self, obs, action: int, reward: float, next_obs, terminated: bool, episode_over: bool) -> None:
        frame, next_frame = (obs, next_obs) if self.stack == 1 else (obs[-1], next_obs[-1])
        transition = (frame, action, reward, terminated, False, self.episode_start)
        end = (next_frame, 0, 0.0, False, True, self.episode_start)  # overwritten if the episode goes on
        for slot, content in enumerate((transition, end), start=self.next):
            self.file.seek(slot % len(self.ring) * self.ring.itemsize)
            self.file.write(np.array(content, self.ring.dtype))
        self.file.flush()
        self.next, self.added = self.next + 1, self.added + 1
        if episode_over:
            self.end_episode()

    def end_episode(self) -> None:
        """Keep the slot of the last observation, unless an episode has just ended."""
        if self.next > self.episode_start:
            self.next = self.episode_start = self.next + 1

    def empty(self) -> None:
        self.first, self.added = self.next, 0

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Slots that transitions start from, uniform over the newest `buffer_size`."""
        oldest = max(self.first, self.next - self.buffer_size)
        slots = rng.integers(oldest, self.next, size=count)
        while (ends := self.ring["end"][slots % len(self.ring)]).any():
            slots[ends] = rng.integers(oldest, self.next, size=ends.sum())
        return slots

    def observations(self, slots: np.ndarray) -> np.ndarray:
        """As the environment returned them: what a stack holds from before its episode is black."""
        stacks = slots[:, None] + np.arange(1 - self.stack, 1)
        frames = self.ring["frame"][stacks % len(self.ring)]
        frames[stacks < self.ring["episode_start"][stacks[:, -1:] % len(self.ring)]] = 0
        return frames.reshape(-1, *self.obs_shape)

    def sample(self, batch_size: int, rng: np.random.Generator, device: str) -> Batch:
        slots = self.draw(batch_size, rng)
        obs, next_obs = (network_input(self.observations(slots + offset), device) for offset in (0, 1))
        columns = [self.ring[name][slots % len(self.ring)] for name in ("action", "reward", "terminated")]
        action, reward, terminated = (torch.as_tensor(array, device=device) for array in columns)
        return Batch(obs, action.long(), reward, next_obs, terminated.float())


def network_input(obs: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """Pixels 0..255 become floats 0..1, in the memory layout that convolutions like best; flat observations stay."""
    obs = torch.as_tensor(obs, device=device)
    if obs.dtype != torch.uint8:
        return obs
    return obs.contiguous(memory_format=torch.channels_last).float().div_(255)


# ---- environments
class Digits(gym.Env):
    """Name 100 handwritten digits whose labels are drawn anew in every episode.

    Drawing random labels anew is from Lyle et al. 2023, appendix A.1; the chain to the next label is ours.
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
        self.image = self.np_random.choice(candidates if len(candidates) else 100)
        return self.images[self.image].copy(), float(action == label), False, False, {}


gym.register("Digits", Digits, max_episode_steps=1_500)


def is_atari(env_id: str) -> bool:
    return f"ALE/{env_id}-v5" in gym.registry


def make_env(env_id: str, num_envs: int = 1, **options) -> gym.vector.VectorEnv:
    """`num_envs` copies of a task. Observations: uint8 (num_envs, 4, 84, 84) of Atari, float (num_envs, n) of others.

    Atari as in Mnih et al. 2015 (up to 30 no-ops, frame skip 4 with a maximum over 2, no sticky actions, FIRE pressed
    where needed), but episodes end with the game, not with a life, and rewards are the game's own.
    """
    if is_atari(env_id):
        rom = gym.registry[f"ALE/{env_id}-v5"].kwargs["game"]  # "ms_pacman" for "MsPacman"
        return AtariVectorEnv(rom, num_envs, reward_clipping=False, num_threads=min(num_envs, os.cpu_count()))
    version = gym.envs.registration.find_highest_version(None, env_id)  # so that "LunarLander" is "LunarLander-v3"
    env_id = env_id if version is None else f"{env_id}-v{version}"
    return gym.make_vec(env_id, num_envs, vectorization_mode="sync", **options)


# Random streams: (seed, step) trains from that step on, (seed, step, 1) evaluates, (seed, step, 2) measures.
def seeds(args: Args, step: int) -> list[int]:
    """Two numbers decided by (seed, step), below 2^31 as emulators need them: for a network, for an environment."""
    return [int(number >> 1) for number in np.random.SeedSequence((args.seed, step)).generate_state(2)]


def fresh_start(args: Args, step: int, **options) -> tuple[gym.vector.VectorEnv, np.ndarray, np.random.Generator]:
    """A new environment, its first observation, and the random stream of training, all decided by (seed, step)."""
    envs = make_env(args.env, **options)
    return envs, envs.reset(seed=seeds(args, step)[1])[0], np.random.default_rng((args.seed, step))


# ---- acting, evaluation and measurements
def exploration_rate(args: Args, step: int, replay: Replay) -> float:
    """Linear from start_e to end_e, on Atari once learning starts. A task of Digits starts with random actions."""
    if args.env == "Digits" and replay.added < args.learning_starts:
        return 1.0
    begin = args.learning_starts if is_atari(args.env) else 0
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


def evaluate(q: nn.Module, args: Args, step: int) -> float | None:
    """Mean return, rewards unclipped, of one whole episode in each of `eval_episodes` environments, at epsilon 0.02."""
    if args.env == "Digits":  # there the training return says it all
        return None
    envs, rng = make_env(args.env, args.eval_episodes), np.random.default_rng((args.seed, step, 1))
    obs, _ = envs.reset(seed=int(rng.integers(2**31 - args.eval_episodes)))
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, bool)
    while running.any():  # environments whose episode is over play on, unheeded
        obs, rewards, terminated, truncated, _ = envs.step(epsilon_greedy(q, obs, 0.02, rng))
        returns += rewards * running
        running &= ~(terminated | truncated)
    return float(returns.mean())


def episode(q: nn.Module, args: Args) -> Iterator[np.ndarray]:
    """The pictures of an episode as in `evaluate`: what the network sees of Atari, what another task renders."""
    envs, obs, rng = fresh_start(args, args.total_steps, render_mode="rgb_array")
    terminated = truncated = [False]
    while not (terminated[0] or truncated[0]):
        yield obs[0, -1].repeat(3, 0).repeat(3, 1) if is_atari(args.env) else envs.render()[0]
        obs, _, terminated, truncated, _ = envs.step(epsilon_greedy(q, obs, 0.02, rng))


def measurements(args: Args, step: int, network: nn.Sequential, replay: Replay) -> dict[str, float]:
    """The metrics of the network that trains, on 512 observations of the replay, by a random stream of their own."""
    rng = np.random.default_rng((args.seed, step, 2))
    obs = network_input(replay.observations(replay.draw(512, rng)), args.device)
    row = metrics.measure(network, obs)
    if step % args.plasticity_every == 0:
        row |= metrics.measure_plasticity(
            network,
            obs,
            seed=int(rng.integers(2**31)),
            learning_rate=args.learning_rate,
            adam_eps=args.adam_eps,
            batch_size=args.batch_size,
            updates=args.plasticity_updates,
        )
    return row


# ---- checks of the settings
AT_LEAST_1 = ("total_steps", "eval_every", "plasticity_every", "eval_episodes", "batch_size", "train_frequency")
AT_LEAST_1 += ("target_network_frequency", "l2_on_steps")
BOUNDS = dict.fromkeys(AT_LEAST_1, (1, np.inf)) | {"learning_rate": (1e-12, np.inf), "buffer_size": (2, np.inf)}
BOUNDS |= dict.fromkeys(("gamma", "start_e", "end_e", "exploration_fraction"), (0, 1))


def check(args: Args) -> None:
    """Raise UserError, saying what is wrong and what would be right, before anything is written."""
    metrics.check(args, BOUNDS)
    check_injections(args)
    on_gpu, cpu = args.device == "cuda", torch.cpu.get_capabilities()
    has_bf16 = torch.cuda.is_bf16_supported() if on_gpu else any(cpu[name] for name in cpu if "bf16" in name)
    refuse(args.bf16 and not has_bf16, f"--bf16: this {'GPU' if on_gpu else 'CPU'} has no bfloat16")
    refuse(args.buffer_size < args.batch_size, "--buffer-size must be at least --batch-size")
    refuse(args.learning_starts >= args.total_steps, "--learning-starts must lie below --total-steps")
    wrong = args.env == "Digits" and (args.eval_every != 1_500 or args.learning_starts >= 1_500)
    refuse(wrong, "--env Digits: --eval-every must be 1500, the length of a task, and --learning-starts below it")
    try:
        envs = make_env(args.env)
    except Exception as error:  # whatever a third-party environment raises
        raise UserError(f"--env {args.env} cannot be made: {' '.join(str(error).split())}") from error
    actions, obs = envs.single_action_space, envs.single_observation_space
    counted = isinstance(actions, gym.spaces.Discrete) and actions.start == 0
    refuse(not counted, f"--env {args.env} has actions {actions}, not Discrete ones from 0 on")
    flat = isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1 and obs.dtype == np.float32
    refuse(not (flat or is_atari(args.env)), f"--env {args.env} has observations {obs}, not a flat Box of float32")
    slot_bytes = int(np.prod(obs.shape[-2:])) * obs.dtype.itemsize + 16  # of a stack, one frame
    spare, free = slots_taken(args, args.eval_every), shutil.disk_usage(".").free - 10**8  # for all else in the run
    needed = slot_bytes * min(args.buffer_size + spare, slots_taken(args, args.total_steps))
    too_little = needed > free and not (run_folder(args) / "checkpoint.pt").exists()  # a run that goes on has its disk
    sizes = f"the replay needs {needed / 1e6:,.1f} MB of disk, {max(0, free) / 1e6:,.1f} MB are free for it"
    refuse(too_little, f"{sizes}: make room, or start with at most --buffer-size {max(0, free // slot_bytes - spare)}")


def check_injections(args: Args) -> None:
    """The injection settings agree with each other and with the length of the run."""
    steps, shown = args.injection_steps, " ".join(map(str, args.injection_steps))
    if args.injection_trigger or args.injection_threshold is not None:
        valid = args.injection_trigger and args.injection_threshold is not None and args.injections and not steps
        refuse(not valid, "--injection-trigger needs --injection-threshold, --injections; excludes --injection-steps")
    else:
        refuse(len(steps) != args.injections, f"--injections {args.injections} but --injection-steps {shown}")
    right = list(steps) == sorted({step for step in steps if 1 <= step <= args.total_steps})
    refuse(not right, f"--injection-steps {shown} must increase and must lie in 1..{args.total_steps}")


def main() -> int:
    envs = re.findall(r"--env[= ](\S+)", " ".join(sys.argv))  # its defaults are those that --help shows
    return metrics.command(train, Args(env=envs[-1] if envs else "MsPacman"))


if __name__ == "__main__":
    sys.exit(main())
