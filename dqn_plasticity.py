"""Deep Q-learning that measures its loss of plasticity, with every remedy of the paper as a flag.

"The paper" is R. Cheng, E. Chen and L. Ma, Improving Neural Network Plasticity in Reinforcement
Learning with Plasticity Injection and Plasticity Metric Regularization. The README lists the other
papers that are cited here by year.

A network that has been trained for a long time may stop learning: it loses its plasticity. This
file trains one on an Atari game, on LunarLander (or any Gymnasium environment with flat
observations and discrete actions) or on Digits, where most of it is lost within a minute, and logs
the signs of lost plasticity that are known from the literature. The update is that of double DQN
(van Hasselt et al. 2016):

    y    = r + gamma * (1 - terminated) * Q_target(s', argmax_a Q(s', a))
    loss = mean (y - Q(s, a))^2 + lambda(step) * ||phi||^2

where phi are the parameters that are trained, and lambda(step) is the strength of L2 regularisation
(paper 3.2), by default 0. A plasticity injection (paper 3.1) freezes Q and lets a fresh network
learn what is missing, without changing a single value at that moment: Q <- Q + (f1 - f2) with
f1 = f2 fresh, of which only f1 is trained. Nikishin et al. (2023), who invented it, inject the head
of a network on a shared encoder; the paper freezes all of Q.

    python dqn_plasticity.py --env Digits
    python dqn_plasticity.py --env MsPacman --l2 periodic
    python plot.py runs/

A run is the folder runs/<env>__<variant>__seed<k>. The same command given again continues an
unfinished run exactly.
"""

import collections
import copy
import mmap
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from torch import nn

import metrics
from metrics import UserError, run_folder

gym.register_envs(ale_py)

# Increased when the networks or the checkpoint change, so that older runs are refused.
VERSION = 6

# ---- settings
# fmt: off
DEFAULTS_BY_ENV = {
    #                            Atari       others      Digits
    "total_steps":              (2_000_000,  300_000,    60_000),
    "eval_every":               (25_000,     10_000,     1_500),
    "plasticity_every":         (100_000,    2_000,      1_500),
    "plasticity_updates":       (700,        25,         150),
    "learning_rate":            (1e-4,       1e-3,       1e-3),
    "adam_eps":                 (1e-4,       1e-4,       1e-8),
    "gamma":                    (0.99,       0.99,       0.5),
    "batch_size":               (32,         128,        32),
    "buffer_size":              (1_000_000,  300_000,    1_500),
    "learning_starts":          (20_000,     20_000,     32),
    "train_frequency":          (4,          2,          1),
    "target_network_frequency": (2_000,      250,        100),
    "start_e":                  (1.0,        1.0,        0.05),
    "end_e":                    (0.01,       0.1,        0.05),
    "exploration_fraction":     (0.5,        0.1,        0.0),
    "max_grad_norm":            (10.0,       10.0,       0.0),
    "l2_lambda":                (1e-5,       1e-3,       1e-4),
    "l2_end":                   (2e-5,       2e-3,       2e-4),
    "l2_on_steps":              (500_000,    75_000,     4_000),
    "l2_off_steps":             (100_000,    15_000,     800),
}
# fmt: on


@dataclass
class Args:
    """Deep Q-learning with remedies for lost plasticity.

    Many defaults depend on the environment: see for instance --env Digits --help.
    """

    # The environment: an Atari game, LunarLander, Digits, or a Gymnasium id with flat observations.
    env: str = "MsPacman"
    # Seed of all random numbers: the same seed, machine and thread count give the same log.
    seed: int = 1
    # Device that the networks run on. By default a CUDA GPU if there is one.
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    # Compute updates in bfloat16, weights in float32: faster on Atari if the hardware supports it.
    # Q-values are then rounded by up to 0.4 %, so that the best actions can tie in the target.
    bf16: bool = False
    # Length of the run in steps of the environment.
    total_steps: int = None
    # Steps between evaluations, each with a checkpoint. On Digits it must be one task, 1,500.
    eval_every: int = None
    # Episodes per evaluation. Digits is not evaluated: its training return is the score.
    eval_episodes: int = 10
    # Steps between measurements of plasticity.
    plasticity_every: int = None
    # Updates of the copy that is trained to measure plasticity, at least ten.
    plasticity_updates: int = None

    # Learning rate of Adam.
    learning_rate: float = None
    # Adam's epsilon, which is added to the denominator (not the epsilon of exploration).
    adam_eps: float = None
    # Discount per step.
    gamma: float = None
    # Transitions in an update.
    batch_size: int = None
    # Transitions that the replay keeps; the end of an episode counts as one more.
    buffer_size: int = None
    # Steps before the first update. Digits counts them anew whenever its labels change.
    learning_starts: int = None
    # Steps from one update to the next.
    train_frequency: int = None
    # Steps between copies of Q into the target network.
    target_network_frequency: int = None
    # Epsilon, the probability of a random action, at the start of the run.
    start_e: float = None
    # Epsilon at the end of its schedule.
    end_e: float = None
    # Share of the run after which the schedule of epsilon ends.
    exploration_fraction: float = None
    # Maximum norm of the gradient: a larger gradient is scaled down to it. 0 means no limit.
    max_grad_norm: float = None

    # Number of plasticity injections; with a trigger, the maximum. By default one for each of
    # --injection-steps, and so none without them.
    injections: int | None = None
    # Steps at which to inject. By default spread evenly from the middle of the run on.
    injection_steps: tuple[int, ...] = ()
    # Inject when the moving average of this metric reaches --injection-threshold.
    injection_trigger: Literal[metrics.METRICS] | None = None
    # Threshold of the trigger: with weight_magnitude or dormant_units it injects at or above the
    # threshold, with all others at or below it.
    injection_threshold: float | None = None

    # Schedule of lambda, the factor of the squared norm of the trained parameters in the loss.
    l2: Literal["none", "constant", "incremental", "periodic"] = "none"
    # Lambda of constant and periodic L2.
    l2_lambda: float = None
    # Lambda of incremental L2 at the start of the run.
    l2_start: float = 0.0
    # Lambda of incremental L2 at the end of the run.
    l2_end: float = None
    # Steps with lambda in a period of periodic L2 (N in the paper).
    l2_on_steps: int = None
    # Steps without lambda in a period of periodic L2, after those with it (M in the paper).
    l2_off_steps: int = None

    # Normalise each hidden layer before its activation, so that no unit goes without a gradient, or
    # after it, so that the inputs of the next layer are normalised: two different remedies.
    layer_norm: Literal["none", "before", "after"] = "none"
    # LeakyReLU with a slope of 0.01 in place of ReLU.
    leaky_relu: bool = False

    def __post_init__(self):
        # Settings that depend on others are filled in once, here: change none of them later.
        metrics.check_kinds(self, complete=False)
        self.env = short_name(self.env)
        # The column of DEFAULTS_BY_ENV.
        if is_atari(self.env):
            column = 0
        elif self.env == "Digits":
            column = 2
        else:
            column = 1
        for name, defaults in DEFAULTS_BY_ENV.items():
            if getattr(self, name) is None:
                setattr(self, name, defaults[column])

        if self.injections is None:
            self.injections = len(self.injection_steps)
        if not self.injection_steps and not self.injection_trigger:
            half = self.total_steps // 2
            # `check` refuses more than this.
            count = min(self.injections, metrics.MAX_INJECTIONS)
            steps = [half + i * half // count for i in range(count)]
            self.injection_steps = tuple(steps)


# ---- network
def hidden_layer(layer: nn.Module, shape: tuple[int, ...], args: Args) -> list[nn.Module]:
    """A layer and its activation, and a LayerNorm over `shape` if there is one (paper 3.3)."""
    activation = nn.LeakyReLU(0.01) if args.leaky_relu else nn.ReLU()
    if args.layer_norm == "before":
        return [layer, nn.LayerNorm(shape), activation]
    if args.layer_norm == "after":
        return [layer, activation, nn.LayerNorm(shape)]
    return [layer, activation]


class QNetwork(nn.Sequential):
    """Float observations to Q-values (batch, actions): the CNN of Mnih et al. 2015, or an MLP."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args):
        actions = int(envs.single_action_space.n)
        if is_atari(args.env):
            # From 4 frames of 84 x 84 pixels; the sizes are those of Mnih et al. 2015.
            super().__init__(
                *hidden_layer(nn.Conv2d(4, 32, 8, stride=4), (32, 20, 20), args),
                *hidden_layer(nn.Conv2d(32, 64, 4, stride=2), (64, 9, 9), args),
                *hidden_layer(nn.Conv2d(64, 64, 3, stride=1), (64, 7, 7), args),
                nn.Flatten(),
                *hidden_layer(nn.Linear(64 * 7 * 7, 512), (512,), args),
                nn.Linear(512, actions),
            )
        else:
            inputs = envs.single_observation_space.shape[0]
            width = 64 if args.env == "Digits" else 256
            super().__init__(
                *hidden_layer(nn.Linear(inputs, width), (width,), args),
                *hidden_layer(nn.Linear(width, width), (width,), args),
                nn.Linear(width, actions),
            )


def fresh_network(envs: gym.vector.VectorEnv, args: Args, step: int) -> QNetwork:
    """A newly initialised network, which depends only on (seed, step)."""
    torch.manual_seed(seeds(args, step)[0])
    return QNetwork(envs, args).to(args.device, memory_format=torch.channels_last)


# ---- injection
class Injected(nn.Module):
    """Q = h + (f1 - f2) of paper 3.1: h frozen, f1 and f2 fresh and identical, only f1 trained."""

    def __init__(self, h: nn.Module, fresh: nn.Module):
        super().__init__()
        # After a second injection h is itself an injected network.
        self.h = h.requires_grad_(False)
        self.f1 = fresh
        self.f2 = copy.deepcopy(fresh).requires_grad_(False)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        # The brackets matter: f1 - f2 is exactly 0 until f1 is trained, so that Q equals h to the
        # last bit.
        return self.h(obs) + (self.f1(obs) - self.f2(obs))


def trainable(q: nn.Module) -> nn.Sequential:
    """The part of Q that is trained: all of it, or f1 after an injection."""
    return q.f1 if isinstance(q, Injected) else q


def inject(q: nn.Module, target_network: nn.Module, fresh: nn.Module) -> tuple[Injected, Injected]:
    """Inject the same fresh network into Q and its target network."""
    # The target keeps its own h, which lags as before, so that its values do not jump either. Its
    # f1 is a copy, which will lag behind Q's.
    injected_target = Injected(target_network, copy.deepcopy(fresh))
    return Injected(q, fresh), injected_target.requires_grad_(False)


def q_and_target(q, target_network, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values as q(obs) and target_network(obs), with less work after an injection."""
    if not isinstance(q, Injected):
        return q(obs), target_network(obs)
    # Both networks have the same f2, and after copy_to_target the same h. Each is computed once.
    f2 = q.f2(obs)
    h = q.h(obs)
    target_h = h
    if target_network.h is not q.h:
        target_h = target_network.h(obs)
    return h + (q.f1(obs) - f2), target_h + (target_network.f1(obs) - f2)


# ---- L2 regularisation
def l2_coefficient(args: Args, step: int) -> float:
    """lambda(step) of paper 3.2, the factor of the squared norm. Steps count from 1."""
    if args.l2 == "constant":
        return args.l2_lambda
    if args.l2 == "incremental":
        return args.l2_start + (args.l2_end - args.l2_start) * step / args.total_steps
    if args.l2 == "periodic":
        period = args.l2_on_steps + args.l2_off_steps
        if (step - 1) % period < args.l2_on_steps:
            return args.l2_lambda
    return 0.0


def squared_norm(network: nn.Module) -> torch.Tensor:
    """||phi||^2, the sum of the squares of all parameters."""
    parameters = torch.cat([parameter.flatten() for parameter in network.parameters()])
    return parameters.square().sum()


# ---- loss
# Tensors: obs and next_obs (batch, *observation), all others (batch,), terminated is 0.0 or 1.0.
Batch = collections.namedtuple("Batch", "obs action reward next_obs terminated")


def td_loss(q, target_network, batch: Batch, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (y - Q(s, a))^2 and mean Q(s, a), both scalars.

    In double DQN (van Hasselt et al. 2016) Q chooses the next action, which the target network
    evaluates.
    """
    with torch.no_grad():
        next_q, next_target = q_and_target(q, target_network, batch.next_obs)
        next_action = next_q.argmax(1, keepdim=True)
        next_value = next_target.gather(1, next_action).squeeze(1)
        td_target = batch.reward + gamma * (1 - batch.terminated) * next_value
    q_value = q(batch.obs).gather(1, batch.action[:, None]).squeeze(1)
    return nn.functional.mse_loss(q_value, td_target), q_value.detach().mean()


# ---- training
def train(args: Args) -> Path:
    """Train one agent and return its run's folder.

    Raises UserError for a user's mistake, and FloatingPointError when training diverges.
    """
    check(args)  # refuses mistakes before anything is written
    settings = {**asdict(args), "version": VERSION}
    # A Run (metrics.py) is the folder of this run: settings, log and latest checkpoint. It counts
    # the steps, from 1, or from the step after the checkpoint. They are cut into intervals of
    # eval_every steps, each of which ends with an evaluation and a checkpoint.
    with metrics.Run(run_folder(args), settings, args.total_steps, args.eval_every) as run:
        replay_path = run.folder / "replay"
        if run.finished:
            # It is left over if the run was killed after its last checkpoint.
            replay_path.unlink(missing_ok=True)
            return run.folder
        if not is_atari(args.env):
            torch.set_num_threads(1)  # one thread beats two on a small network

        envs = make_env(args.env)
        replay = Replay(replay_path, envs.single_observation_space, args)
        if run.checkpoint is None:
            q = fresh_network(envs, args, step=0)
            target_network = copy.deepcopy(q).requires_grad_(False)
            optimizer = adam(trainable(q).parameters(), args)
            injected_at = []  # the steps of the injections so far
            smoothed_metric = None  # moving average of the metric of --injection-trigger
        else:
            # The same five as at the latest checkpoint; the replay gets its counters back.
            loaded = load_checkpoint(run, envs, args, replay)
            q, target_network, optimizer, injected_at, smoothed_metric = loaded

        for step in run.steps():
            if run.interval_begins(step):
                # Environment and random stream are new, and depend only on the seed and on the
                # steps done so far. So a run that was killed repeats the interval from the latest
                # checkpoint, and its log is that of a run that was never killed.
                envs.close()
                envs, obs, rng = fresh_start(args, step - 1)
                # Gradients are not in a checkpoint, so every interval starts without them.
                optimizer.zero_grad()
                if args.env == "Digits":
                    # An interval is a task with new labels. Transitions with the old labels would
                    # make wrong targets: a fault of the replay, not of plasticity. Networks and
                    # optimiser stay, for the question is whether they can still learn.
                    replay.empty()
                episode_return = 0.0
                returns = []  # of the episodes that ended since the latest row
                # Of the latest update.
                loss = None
                q_mean = None
                grad_norm = None

            if injection_due(args, step, injected_at, smoothed_metric):
                # Paper 3.1. Adam starts anew, too: its averages are of the old network's gradients.
                fresh = fresh_network(envs, args, step)
                q, target_network = inject(q, target_network, fresh)
                optimizer = adam(trainable(q).parameters(), args)
                injected_at.append(step)
                # The metrics are now those of the fresh network, which has not been updated yet.
                smoothed_metric = None
                loss = None
                q_mean = None
                grad_norm = None

            # Act, and remember what followed. If the episode is terminated, no reward can
            # follow; if it is truncated, only the time limit was reached, and the value of
            # next_obs still counts. The environment is a vector of one, hence the [0].
            epsilon = exploration_rate(args, step, replay)
            action = epsilon_greedy(q, obs, epsilon, rng)
            next_obs, reward, terminated, truncated, _ = envs.step(action)
            episode_over = terminated[0] or truncated[0]
            episode_return += float(reward[0])
            if is_atari(args.env):
                # Clipped to -1, 0 or 1: games count in ones or in thousands (Mnih et al. 2015).
                reward = np.sign(reward)
            replay.add(obs[0], action[0], reward[0], next_obs[0], terminated[0], episode_over)
            obs = next_obs

            l2_lambda = l2_coefficient(args, step)
            learning = replay.added > args.learning_starts
            if learning and step % args.train_frequency == 0:
                # One update, its forward passes in bfloat16 with --bf16.
                batch = replay.sample(args.batch_size, rng, args.device)
                with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                    loss, q_mean = td_loss(q, target_network, batch, args.gamma)
                regularised_loss = loss
                if l2_lambda > 0:
                    # Paper 3.2. Only what is trained is regularised.
                    regularised_loss = loss + l2_lambda * squared_norm(trainable(q))
                optimizer.zero_grad()
                regularised_loss.backward()
                if args.max_grad_norm > 0:
                    parameters = trainable(q).parameters()
                    grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()

            # The target network lags behind, or else Q would chase values that move with it.
            if step % args.target_network_frequency == 0:
                copy_to_target(q, target_network)

            if episode_over:
                returns.append(episode_return)
                episode_return = 0.0
                obs, _ = envs.reset()

            if run.row_due(step) or step % args.plasticity_every == 0:
                # The log: numbers of the latest update, and metrics of the part of Q that trains.
                if args.max_grad_norm == 0:  # otherwise clipping has returned the norm
                    grad_norm = metrics.gradient_norm(trainable(q))
                eval_return = None
                if run.interval_ends(step):
                    eval_return = evaluate(q, args, step)
                row = {
                    "step": step,
                    "train_return": np.mean(returns) if returns else None,
                    "eval_return": eval_return,
                    "loss": loss,
                    "q_mean": q_mean,
                    "grad_norm": grad_norm,
                    "epsilon": epsilon,
                    "l2_lambda": l2_lambda,
                    "injections": len(injected_at),
                    **measurements(args, step, trainable(q), replay),
                }
                run.log(row)
                returns = []
                # Not before the first update since the interval began or a network was injected.
                if args.injection_trigger and loss is not None:
                    smoothed_metric = smooth(smoothed_metric, row[args.injection_trigger])

            if run.interval_ends(step):
                # This checkpoint and the replay's file are all that the next interval needs.
                replay.end_episode()  # the next interval starts another
                if step == args.total_steps:
                    save_episode(run.folder / "episode.gif", q, args)
                run.save(
                    {
                        "step": step,
                        "q": q.state_dict(),
                        "target_network": target_network.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "injected_at": injected_at,
                        "smoothed_metric": smoothed_metric,
                        "replay": replay.state_dict(),
                    }
                )
        replay.close()
        # The replay is of no more use, and takes up to 7.3 GB on Atari.
        replay_path.unlink()
        return run.folder


def adam(parameters: Iterable[nn.Parameter], args: Args) -> torch.optim.Adam:
    """A new Adam, whose moving averages are 0."""
    return torch.optim.Adam(parameters, args.learning_rate, eps=args.adam_eps, fused=True)


def copy_to_target(q: nn.Module, target_network: nn.Module) -> None:
    """Copy all parameters. After an injection the target network shares the frozen h of Q."""
    target_network.load_state_dict(q.state_dict())
    if isinstance(q, Injected):
        target_network.h = q.h


# ---- when to inject
def smooth(average: float | None, value: float | None) -> float | None:
    """Exponential moving average with weight 0.8, as in the paper's figures."""
    if value is None:  # it was not measured
        return average
    if average is None:
        return value
    return 0.8 * average + 0.2 * value


def injection_due(args: Args, step: int, injected_at: list[int], average: float | None) -> bool:
    """Whether to inject: at a step given (paper 3.1), or by a metric's average (paper 6.1)."""
    if args.injection_trigger is None:
        return step in args.injection_steps
    if average is None or len(injected_at) == args.injections:
        return False
    # The network of the latest injection is trained for 5 % of the run before it is judged.
    if injected_at and step - injected_at[-1] < 0.05 * args.total_steps:
        return False
    if metrics.DIRECTION_WHEN_LOST[args.injection_trigger] > 0:
        return average >= args.injection_threshold
    return average <= args.injection_threshold


# ---- acting
def exploration_rate(args: Args, step: int, replay: "Replay") -> float:
    """Epsilon: linear from start_e to end_e, on Atari from the step at which learning starts."""
    # On Digits all actions are random after every change of the labels, until learning starts.
    if args.env == "Digits" and replay.added < args.learning_starts:
        return 1.0
    begin = args.learning_starts if is_atari(args.env) else 0
    end = max(begin + 1, args.exploration_fraction * args.total_steps)
    return float(np.interp(step, (begin, end), (args.start_e, args.end_e)))


@torch.inference_mode()
def epsilon_greedy(q, obs: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Actions (n,) for observations (n, ...): at random with probability epsilon, else the best."""
    output_layer = trainable(q)[-1]  # it has one output per action
    actions = rng.integers(output_layer.out_features, size=len(obs))
    greedy = rng.random(len(obs)) >= epsilon
    if greedy.any():
        inputs = network_input(obs[greedy], output_layer.weight.device)
        actions[greedy] = q(inputs).argmax(1).cpu().numpy()
    return actions


# ==================================================================================================
# The method ends here. What follows is machinery, which a reader may skip: loading a checkpoint,
# replay, environments, evaluation and measurements, checks of the settings, the command line.
# ==================================================================================================


# ---- loading a checkpoint
def load_checkpoint(
    run: metrics.Run, envs: gym.vector.VectorEnv, args: Args, replay: "Replay"
) -> tuple[nn.Module, nn.Module, torch.optim.Adam, list[int], float | None]:
    """Q, target network, optimiser, injected_at and smoothed_metric as saved.

    The replay, whose file is still there, gets its counters back. Raises UserError if that file has
    changed since the checkpoint.
    """
    checkpoint = run.checkpoint
    replay.load_state_dict(checkpoint["replay"])
    is_same = replay.fingerprint() == checkpoint["replay"]["fingerprint"]
    if not replay.was_whole or not is_same:
        run.refuse_changed_file(replay.path)
    q = fresh_network(envs, args, step=0)
    target_network = copy.deepcopy(q).requires_grad_(False)
    for step in checkpoint["injected_at"]:
        q, target_network = inject(q, target_network, fresh_network(envs, args, step))
    optimizer = adam(trainable(q).parameters(), args)
    q.load_state_dict(checkpoint["q"])
    target_network.load_state_dict(checkpoint["target_network"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    injected_at = checkpoint["injected_at"]
    return q, target_network, optimizer, injected_at, checkpoint["smoothed_metric"]


# ---- replay
def slots_taken(args: Args, steps: int) -> int:
    """The largest number of slots of the replay that so many steps can take.

    An episode takes one slot more than it has steps. On Atari it has at least 16 steps, unless the
    interval ends before.
    """
    if is_atari(args.env):
        return steps + steps // min(16, args.eval_every) + 4
    return 2 * steps + 4


def ring_length(args: Args) -> int:
    """The slots of the replay's ring, at most as many as the whole run can take.

    The ring is an interval longer than buffer_size, so that a run that continues from its latest
    checkpoint still finds every transition that it may draw.
    """
    spare_slots = slots_taken(args, args.eval_every)
    return min(args.buffer_size + spare_slots, slots_taken(args, args.total_steps))


class Replay:
    """A ring of single frames in a file: an Atari transition takes 7 KB of disk once it is written.

    A slot holds the newest frame of an observation (a flat observation is one frame) and what
    followed. The observation that ends an episode has a slot, too, from which no transition starts.
    Slots are numbered from the start of the run: slot k lies at k modulo the length of the ring.
    """

    def __init__(self, path: Path, obs_space: gym.spaces.Box, args: Args):
        self.path = path
        self.obs_shape = obs_space.shape
        self.stack = obs_space.shape[0] if len(obs_space.shape) == 3 else 1
        self.buffer_size = args.buffer_size
        self.slot = np.dtype(
            [
                ("frame", obs_space.dtype, obs_space.shape[-2:]),
                ("action", "i2"),
                ("reward", "f4"),
                ("terminated", "?"),
                ("end", "?"),  # no transition starts here
                ("episode_start", "i8"),  # the slot in which its episode started
            ]
        )
        self.length = ring_length(args)
        # A run that continues finds its file at full size. A new run creates the file, and never
        # reads what a killed run may have left in it.
        path.touch()
        size = self.length * self.slot.itemsize
        self.was_whole = path.stat().st_size == size
        # Slots are written like any file, so that a full disk is an OSError (a memory map would
        # kill the process), but they are read through a memory map. Most file systems give the
        # file no disk space before a slot is written.
        self.file = open(path, "r+b")  # noqa: SIM115 - it stays open during the run
        self.file.truncate(size)
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.ring = np.frombuffer(self.map, self.slot)
        self.next = 0  # the slot to be written
        self.episode_start = 0  # the slot in which the episode started
        self.first = 0  # the first slot since the replay was emptied
        self.added = 0  # transitions since then

    def close(self) -> None:
        """Release the file, for Windows cannot delete a file in use."""
        self.ring = None
        self.map.close()
        self.file.close()

    def state_dict(self) -> dict[str, int]:
        # The slots have to be on the disk before a checkpoint relies on them.
        os.fsync(self.file.fileno())
        return {
            "next": self.next,
            "episode_start": self.episode_start,
            "first": self.first,
            "added": self.added,
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]
        self.episode_start = state["episode_start"]
        self.first = state["first"]
        self.added = state["added"]

    def fingerprint(self) -> int:
        """Checksum of 200 slots, oldest to newest, by which a changed file is noticed."""
        slots = np.linspace(self.oldest(), self.next - 1, 200).astype(int)
        return zlib.crc32(self.ring[slots % self.length].tobytes())

    def oldest(self) -> int:
        """The oldest slot that may be drawn."""
        return max(self.first, self.next - self.buffer_size)

    def add(
        self, obs, action: int, reward: float, next_obs, terminated: bool, episode_over: bool
    ) -> None:
        """Append a transition, its observations without a batch dimension.

        Raises FloatingPointError for an observation or a reward that is NaN or infinite.
        """
        frame = obs
        next_frame = next_obs
        if self.stack > 1:
            frame = obs[-1]
            next_frame = next_obs[-1]
        for number in (frame, reward, next_frame):
            if not np.isfinite(number).all():
                raise FloatingPointError("the environment returned a NaN or infinite number")
        self.write(self.next, (frame, action, reward, terminated, False, self.episode_start))
        # This slot is overwritten by the next transition, unless the episode ends here.
        self.write(self.next + 1, (next_frame, 0, 0.0, False, True, self.episode_start))
        self.file.flush()  # so that the memory map sees it
        self.next += 1
        self.added += 1
        if episode_over:
            self.end_episode()

    def write(self, slot: int, content: tuple) -> None:
        self.file.seek(slot % self.length * self.slot.itemsize)
        self.file.write(np.array(content, self.slot))

    def end_episode(self) -> None:
        """Keep the slot of the last observation, unless an episode has just ended."""
        if self.next > self.episode_start:
            self.next += 1
            self.episode_start = self.next

    def empty(self) -> None:
        self.first = self.next
        self.added = 0

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Slots from which transitions start, uniform over the newest `buffer_size` slots."""
        slots = rng.integers(self.oldest(), self.next, size=count)
        while True:
            ends = self.ring["end"][slots % self.length]
            if not ends.any():
                return slots
            slots[ends] = rng.integers(self.oldest(), self.next, size=ends.sum())

    def observations(self, slots: np.ndarray) -> np.ndarray:
        """The observations (n, *obs_shape) that end at these slots, as the environment gave them.

        In a stack of frames those from before the episode are black.
        """
        # Shape (n, stack): the slots of each observation's frames.
        stacks = slots[:, None] + np.arange(1 - self.stack, 1)
        frames = self.ring["frame"][stacks % self.length]
        episode_starts = self.ring["episode_start"][stacks[:, -1:] % self.length]
        frames[stacks < episode_starts] = 0
        return frames.reshape(-1, *self.obs_shape)

    def sample(self, batch_size: int, rng: np.random.Generator, device: str) -> Batch:
        """A batch of transitions, drawn uniformly and with replacement."""
        slots = self.draw(batch_size, rng)
        places = slots % self.length
        action = torch.as_tensor(self.ring["action"][places], device=device)
        terminated = torch.as_tensor(self.ring["terminated"][places], device=device)
        return Batch(
            obs=network_input(self.observations(slots), device),
            action=action.long(),
            reward=torch.as_tensor(self.ring["reward"][places], device=device),
            next_obs=network_input(self.observations(slots + 1), device),
            terminated=terminated.float(),
        )


def network_input(obs: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """Flat observations as they are; of Atari, pixels 0..255 as floats 0..1.

    The memory layout is the one in which convolutions are fastest.
    """
    obs = torch.as_tensor(obs, device=device)
    if obs.dtype != torch.uint8:
        return obs
    return obs.contiguous(memory_format=torch.channels_last).float().div_(255)


# ---- environments
class Digits(gym.Env):
    """Name 100 handwritten digits whose labels are drawn anew in every episode.

    After Lyle et al. 2023, appendix A.1. Observation: 64 pixels in 0..1. Action: the label. Reward:
    1 for the image's label, which leads to an image of the next label (modulo 10); 0 otherwise,
    which leads to any image. One episode is one task of 1,500 steps, so its return shows how well
    the network could still learn. Random actions get about 150.
    """

    def __init__(self):
        # Imported here, because it takes a second that no other environment should cost.
        from sklearn.datasets import load_digits

        # Always the same 100 of the 1,797 images, whose pixels are 0..16.
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
        correct = bool(action == label)
        candidates = np.arange(100)
        next_images = np.flatnonzero(self.labels == (label + 1) % 10)
        if correct and len(next_images) > 0:  # it can happen that no image has the next label
            candidates = next_images
        self.image = self.np_random.choice(candidates)
        return self.images[self.image].copy(), float(correct), False, False, {}


DIGITS_TASK = 1_500  # steps
gym.register("Digits", Digits, max_episode_steps=DIGITS_TASK)


def is_atari(env_id: str) -> bool:
    return f"ALE/{env_id}-v5" in gym.registry


def short_name(env_id: str) -> str:
    """One name per environment: MsPacman for ALE/MsPacman-v5.

    Without a version it is the newest one, so LunarLander-v3 becomes LunarLander.
    """
    try:
        namespace, name, version = parse_env_id(env_id)
    except gym.error.Error:  # it is refused later, with all other mistakes
        return env_id
    if is_atari(name):
        return name if env_id == f"ALE/{name}-v5" else env_id
    if version is None or version != find_highest_version(namespace, name):
        return env_id
    return get_env_id(namespace, name, None)


def make_env(env_id: str, num_envs: int = 1, **options) -> gym.vector.VectorEnv:
    """`num_envs` copies of an environment.

    Observations: uint8 (num_envs, 4, 84, 84) of Atari, float32 (num_envs, n) of others. Atari as in
    Mnih et al. 2015 (0 to 29 no-ops, frame skip 4 with a maximum over 2, no sticky actions, FIRE
    pressed where needed), but episodes end with the game, not with a life, and rewards are the
    game's own.
    """
    if is_atari(env_id):
        # "ms_pacman" for "MsPacman".
        rom = gym.registry[f"ALE/{env_id}-v5"].kwargs["game"]
        threads = min(num_envs, os.cpu_count())
        return AtariVectorEnv(rom, num_envs, reward_clipping=False, num_threads=threads)
    namespace, name, version = parse_env_id(env_id)
    if version is None:
        version = find_highest_version(namespace, name)
    full_id = get_env_id(namespace, name, version)
    envs = gym.make_vec(full_id, num_envs, vectorization_mode="sync", **options)
    if envs.single_observation_space.dtype == np.float64:
        envs = gym.wrappers.vector.DtypeObservation(envs, np.float32)
    return envs


# Every random stream has a name: (seed, step) for training from that step on, (seed, step, 1) for
# an evaluation, (seed, step, 2) for a measurement. So none of them disturbs another.
def seeds(args: Args, step: int) -> list[int]:
    """Two numbers that depend only on (seed, step): for a network, and for an environment."""
    numbers = np.random.SeedSequence((args.seed, step)).generate_state(2)
    # Below 2^31, as emulators need them.
    return [int(number >> 1) for number in numbers]


def fresh_start(
    args: Args, step: int, **options
) -> tuple[gym.vector.VectorEnv, np.ndarray, np.random.Generator]:
    """A new environment, its first observation, and a random stream, from (seed, step) alone."""
    envs = make_env(args.env, **options)
    obs, _ = envs.reset(seed=seeds(args, step)[1])
    return envs, obs, np.random.default_rng((args.seed, step))


# ---- evaluation and measurements
EVALUATION_EPSILON = 0.02
# Evaluations cut an episode after so many steps, 30 minutes of Atari. In other environments it
# might never end.
LONGEST_EPISODE = 27_000


def evaluate(q: nn.Module, args: Args, step: int) -> float | None:
    """Mean return, rewards unclipped, of one episode in each of `eval_episodes` environments.

    None on Digits, which is not evaluated.
    """
    if args.env == "Digits":
        return None
    envs = make_env(args.env, args.eval_episodes)
    rng = np.random.default_rng((args.seed, step, 1))
    obs, _ = envs.reset(seed=int(rng.integers(2**31 - args.eval_episodes)))
    returns = np.zeros(args.eval_episodes)
    running = np.ones(args.eval_episodes, bool)
    for _ in range(LONGEST_EPISODE):
        actions = epsilon_greedy(q, obs, EVALUATION_EPSILON, rng)
        obs, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * running
        # Finished environments play on, but do not count.
        running &= ~(terminated | truncated)
        if not running.any():
            break
    envs.close()
    return float(returns.mean())


def save_episode(path: Path, q: nn.Module, args: Args) -> None:
    """A GIF of one episode; Digits has nothing to show."""
    if args.env != "Digits":
        # Atari names no rate: the agent sees every fourth of 60 frames a second.
        fps = make_env(args.env).metadata.get("render_fps", 15)
        metrics.save_gif(path, episode(q, args), fps)


def episode(q: nn.Module, args: Args) -> Iterator[np.ndarray]:
    """The frames of an episode that is played as in `evaluate`.

    On Atari they are what the network sees, else what the environment renders.
    """
    envs, obs, rng = fresh_start(args, args.total_steps, render_mode="rgb_array")
    for _ in range(LONGEST_EPISODE):
        if is_atari(args.env):
            yield obs[0, -1].repeat(3, 0).repeat(3, 1)  # three times the size
        else:
            yield envs.render()[0]
        actions = epsilon_greedy(q, obs, EVALUATION_EPSILON, rng)
        obs, _, terminated, truncated, _ = envs.step(actions)
        if terminated[0] or truncated[0]:
            return


def measurements(
    args: Args, step: int, network: nn.Sequential, replay: Replay
) -> dict[str, float | None]:
    """The metrics of the network that is trained, for 512 observations of the replay.

    The observations are drawn by a random stream of their own, so that measuring changes nothing.
    """
    rng = np.random.default_rng((args.seed, step, 2))
    obs = network_input(replay.observations(replay.draw(512, rng)), args.device)
    # None, unless it is measured at this step.
    probe = dict.fromkeys(metrics.PROBED)
    if step % args.plasticity_every == 0:
        probe = metrics.measure_plasticity(
            network,
            obs,
            seed=int(rng.integers(2**31)),
            learning_rate=args.learning_rate,
            adam_eps=args.adam_eps,
            batch_size=args.batch_size,
            updates=args.plasticity_updates,
        )
    return {**metrics.measure(network, obs), **probe}


# ---- checks of the settings
# The ranges of numbers that are not in metrics.BOUNDS. A number in neither may be 0 or more.
BOUNDS = {
    "total_steps": (1, np.inf),
    "buffer_size": (2, np.inf),
    "train_frequency": (1, np.inf),
    "target_network_frequency": (1, np.inf),
    "start_e": (0, 1),
    "end_e": (0, 1),
    "exploration_fraction": (0, 1),
}


def check(args: Args) -> None:
    """Raise UserError, saying what is wrong and what would be right, before anything is written."""
    metrics.check(args, BOUNDS)
    check_injections(args)
    if args.bf16:
        check_bf16(args.device)
    if args.buffer_size < args.batch_size:
        raise UserError("--buffer-size must be at least --batch-size")
    if args.learning_starts >= args.total_steps:
        raise UserError("--learning-starts must lie below --total-steps")
    if args.env == "Digits" and args.eval_every != DIGITS_TASK:
        raise UserError(f"--env Digits: --eval-every must be {DIGITS_TASK}, the length of a task")
    if args.env == "Digits" and args.learning_starts >= DIGITS_TASK:
        raise UserError(f"--env Digits: --learning-starts must lie below {DIGITS_TASK}, a task")
    obs_space = check_env(args.env)
    check_disk(args, obs_space)


def check_injections(args: Args) -> None:
    """Raise UserError unless the injection settings fit each other and the length of the run."""
    steps = args.injection_steps
    shown = " ".join(map(str, steps))
    if args.injection_trigger or args.injection_threshold is not None:
        complete = args.injection_trigger and args.injection_threshold is not None
        if not complete or args.injections == 0 or steps:
            rule = "go together, with --injections and without --injection-steps"
            raise UserError(f"--injection-trigger and --injection-threshold {rule}")
    elif len(steps) != args.injections:
        contradiction = f"--injections {args.injections} contradicts --injection-steps {shown}"
        raise UserError(f"{contradiction}: leave out one of them")
    in_range = all(1 <= step <= args.total_steps for step in steps)
    if not in_range or list(steps) != sorted(set(steps)):
        limits = f"must increase and must lie in 1..{args.total_steps}"
        raise UserError(f"--injection-steps {shown} {limits}")


def check_bf16(device: str) -> None:
    if device == "cuda":
        supported = torch.cuda.is_bf16_supported()
    else:
        capabilities = torch.cpu.get_capabilities()
        supported = any(capabilities[name] for name in capabilities if "bf16" in name)
    if not supported:
        raise UserError(f"--bf16: the hardware of --device {device} does not support bfloat16")


def check_env(env_id: str) -> gym.spaces.Box:
    """The space of its observations. Raises UserError unless the agent can play here."""
    game = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d+)?$", "", env_id)
    if is_atari(game) and game != env_id:
        raise UserError(f"--env {env_id}: use {game}, the game with the preprocessing of this file")
    try:
        envs = make_env(env_id)
    except Exception as error:  # whatever a third-party environment raises
        reason = " ".join(str(error).split())
        raise UserError(f"--env {env_id} cannot be created: {reason}") from error
    actions = envs.single_action_space
    if not isinstance(actions, gym.spaces.Discrete) or actions.start != 0:
        raise UserError(f"--env {env_id} has actions {actions}, not Discrete ones from 0 on")
    obs_space = envs.single_observation_space
    flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    if not is_atari(env_id) and not (flat and obs_space.dtype == np.float32):
        raise UserError(f"--env {env_id} has observations {obs_space}, not a flat Box of floats")
    return obs_space


def check_disk(args: Args, obs_space: gym.spaces.Box) -> None:
    """A new run needs room for its replay, and 100 MB for all else."""
    folder = run_folder(args)
    # A run that continues is not asked for room, for a part of its replay is on the disk already.
    if (folder / "checkpoint.pt").exists():
        return
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free - 10**8
    frame_bytes = int(np.prod(obs_space.shape[-2:])) * obs_space.dtype.itemsize
    slot_bytes = frame_bytes + 16
    bytes_needed = slot_bytes * ring_length(args)
    if bytes_needed > free:
        needed = f"the replay needs {bytes_needed / 1e6:,.1f} MB of disk"
        found = f"but only {max(0, free) / 1e6:,.1f} MB are free for it"
        advice = "make room"
        fitting = free // slot_bytes - slots_taken(args, args.eval_every)
        if fitting >= args.batch_size:
            advice = f"make room, or use --buffer-size {fitting} or less"
        raise UserError(f"{needed}, {found}: {advice}")


def main() -> int:
    # --help shows the defaults of the environment, so its name has to be found first.
    names = ["MsPacman", *re.findall(r"--env[= ](\S+)", " ".join(sys.argv))]
    defaults = Args(env=names[-1])
    # Args() has made it 0, which would contradict every --injection-steps.
    defaults.injections = None
    return metrics.command(train, defaults)


if __name__ == "__main__":
    sys.exit(main())
