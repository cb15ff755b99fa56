"""Implicit Q-learning, offline, then online, with every remedy of the paper as a flag.

"The paper" is R. Cheng, E. Chen and L. Ma, Improving Neural Network Plasticity in Reinforcement
Learning with Plasticity Injection and Plasticity Metric Regularization. The README lists the other
papers that are cited here by year.

A point has to cross four rooms (PointmassHard). An explorer that does not know the task collects
data; IQL learns from them alone (offline), then continues in the environment (online; paper section
5). The optimal return is -33, random actions get -100. IQL (Kostrikov et al. 2022) never asks for
the value of an action that is not in the data. Besides Q(s, a) it trains V(s), which estimates a
high expectile of Q over the data's actions (a mean that weighs high values more), and an actor
pi(a | s), which imitates the data's actions, the better ones more strongly. The remedies are for
lost plasticity: a network that has been trained for a long time may stop learning. One update, on
one batch, is

    u       = Q_target(s, a) - V(s)
    loss_V  = mean |expectile - 1(u < 0)| u^2                             IQL eq. 5
    loss_Q  = mean (r + gamma * (1 - terminated) * V(s') - Q(s, a))^2     IQL eq. 6
              + lambda(step) * ||phi||^2                                  paper 3.2
    loss_pi = -mean min(exp(beta * u), 100) * log pi(a | s)               IQL eq. 7
    Q_target <- (1 - polyak) * Q_target + polyak * Q

where 1(u < 0) is 1 if u < 0 and otherwise 0, u is called the advantage, phi are the parameters of Q
that are trained, and lambda(step) is the strength of L2 regularisation, by default 0.
(Kostrikov et al. take the smaller of two target values, and update V before the others.) A
plasticity injection (paper 3.1) freezes Q and lets a fresh network learn what is missing, without
changing a single value at that moment: Q <- Q + (f1 - f2) with f1 = f2 fresh, of which only f1 is
trained. Nikishin et al. (2023), who invented it, inject the head of a network on a shared encoder;
the paper freezes all of Q. V and the actor are neither injected nor measured.

    python iql_pointmass_finetune.py
    python iql_pointmass_finetune.py --injections 1
    python plot.py runs/

A run is the folder runs/<env>__<variant>__seed<k>. The same command given again continues an
unfinished run exactly.
"""

import collections
import copy
import io
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import metrics
from metrics import UserError, run_folder

# Increased when the networks or the checkpoint change, so that older runs are refused.
VERSION = 4


# ---- settings
@dataclass
class Args:
    """Implicit Q-learning, offline then online, with remedies for lost plasticity.

    A step is one update, and online also one step of the environment.
    """

    # The maze.
    env: Literal["PointmassEasy", "PointmassMedium", "PointmassHard"] = "PointmassHard"
    # Seed of all random numbers: the same seed, machine and thread count give the same log.
    seed: int = 1
    # Device that the networks run on. By default a CUDA GPU if there is one.
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    # File of transitions (.npz). By default those that an explorer collects with this seed.
    dataset: str | None = None
    # Transitions that the explorer collects.
    collect_steps: int = 10_000
    # Updates on the collected data alone.
    offline_steps: int = 100_000
    # Steps of the environment after the offline updates, with an update after each.
    online_steps: int = 100_000
    # Steps between evaluations, each with a checkpoint.
    eval_every: int = 5_000
    # Episodes per evaluation. With fewer the mean is noisy, for a return is near -35 or -100.
    eval_episodes: int = 50
    # Steps between measurements of plasticity.
    plasticity_every: int = 2_000
    # Updates of the copy that is trained to measure plasticity, at least ten.
    plasticity_updates: int = 120

    # Learning rate of Adam, for Q, V and the actor.
    learning_rate: float = 3e-4
    # Discount per step.
    gamma: float = 0.95
    # Transitions in an update.
    batch_size: int = 128
    # V learns this expectile of Q over the data's actions: 0.5 is the mean of Q, 1 its maximum.
    expectile: float = 0.99
    # How strongly the actor prefers actions of high advantage: 0 imitates all data alike.
    beta: float = 10.0
    # Polyak averaging: the share of Q's weights that enters the target network at every step.
    polyak: float = 0.005

    # Number of plasticity injections; with a trigger, the maximum. By default one for each of
    # --injection-steps, and so none without them.
    injections: int | None = None
    # Steps at which to inject. By default spread evenly over the online phase.
    injection_steps: tuple[int, ...] = ()
    # Inject when the moving average of this metric reaches --injection-threshold.
    injection_trigger: Literal[metrics.METRICS] | None = None
    # Threshold of the trigger: with weight_magnitude or dormant_units it injects at or above the
    # threshold, with all others at or below it.
    injection_threshold: float | None = None

    # Schedule of lambda, the factor of the squared norm of the trained parameters in the loss.
    l2: Literal["none", "constant", "incremental", "periodic"] = "none"
    # Lambda of constant and periodic L2.
    l2_lambda: float = 1e-4
    # Lambda of incremental L2 at the start of the run.
    l2_start: float = 0.0
    # Lambda of incremental L2 at the end of the run.
    l2_end: float = 2e-4
    # Steps with lambda in a period of periodic L2 (N in the paper).
    l2_on_steps: int = 50_000
    # Steps without lambda in a period of periodic L2, after those with it (M in the paper).
    l2_off_steps: int = 10_000

    # Normalise each hidden layer of Q before its activation, so that tanh saturates less, or after
    # it, so that the inputs of the next layer are normalised: two different remedies.
    layer_norm: Literal["none", "before", "after"] = "none"
    # LeakyReLU with a slope of 0.01 in place of the tanh of Q.
    leaky_relu: bool = False

    def __post_init__(self):
        # Settings that depend on others are filled in once, here: change none of them later.
        metrics.check_kinds(self, complete=False)
        if self.injections is None:
            self.injections = len(self.injection_steps)
        if not self.injection_steps and not self.injection_trigger:
            first = self.offline_steps + 1
            # `check` refuses more than this.
            count = min(self.injections, metrics.MAX_INJECTIONS)
            steps = [first + i * self.online_steps // count for i in range(count)]
            self.injection_steps = tuple(steps)

    @property
    def total_steps(self) -> int:
        return self.offline_steps + self.online_steps


# ---- network
def mlp(*widths: int, layer_norm: str = "none", leaky_relu: bool = False) -> nn.Sequential:
    """Linear layers with tanh (ReLU does worse here) or LeakyReLU between them.

    `widths` are the numbers of inputs, of units of each hidden layer, and of outputs.
    """
    layers = []
    inputs, *hidden_widths, outputs = widths
    for width in hidden_widths:
        layers.append(nn.Linear(inputs, width))
        if layer_norm == "before":
            layers.append(nn.LayerNorm(width))
        layers.append(nn.LeakyReLU(0.01) if leaky_relu else nn.Tanh())
        if layer_norm == "after":
            layers.append(nn.LayerNorm(width))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def fresh_network(args: Args, step: int) -> nn.Sequential:
    """A newly initialised Q, which depends only on (seed, step).

    It maps observations (batch, 2) to a Q-value for each of the five MOVES (batch, 5).
    """
    torch.manual_seed(seeds(args, step)[0])
    q = mlp(2, 64, 64, len(MOVES), layer_norm=args.layer_norm, leaky_relu=args.leaky_relu)
    return q.to(args.device)


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


# ---- losses
# The fields of a transition, also in the file of --dataset: dtype, and shape of one entry.
# Observations are positions divided by the size of the map. `truncated` only serves to count the
# episodes of a data set, for IQL bootstraps through a time limit.
FIELDS = {
    "obs": ("float32", (2,)),
    "action": ("int64", ()),
    "reward": ("float32", ()),
    "next_obs": ("float32", (2,)),
    "terminated": ("bool", ()),
    "truncated": ("bool", ()),
}
# Tensors: obs and next_obs (batch, 2), all others (batch, 1).
Batch = collections.namedtuple("Batch", FIELDS)


def expectile_loss(advantage: torch.Tensor, expectile: float) -> torch.Tensor:
    """mean |expectile - 1(u < 0)| u^2 for the advantage u (IQL eq. 5)."""
    weight = torch.where(advantage < 0, 1 - expectile, expectile)
    return (weight * advantage.square()).mean()


def iql_losses(
    q, target_network, v, actor, batch: Batch, args: Args
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The losses of V, Q and actor, which are scalars, and Q(s, a) (batch, 1).

    Each loss has a gradient for its own network only.
    """
    with torch.no_grad():
        target_value = target_network(batch.obs).gather(1, batch.action)
        not_terminated = ~batch.terminated
        td_target = batch.reward + args.gamma * not_terminated * v(batch.next_obs)

    # IQL eq. 5. The advantage has a gradient for V only, and is detached in the actor's loss.
    advantage = target_value - v(batch.obs)
    v_loss = expectile_loss(advantage, args.expectile)

    # IQL eq. 6.
    q_value = q(batch.obs).gather(1, batch.action)
    q_loss = nn.functional.mse_loss(q_value, td_target)

    # IQL eq. 7. Weights are at most 100, so that no single action dominates the batch.
    weight = (args.beta * advantage.detach()).exp().clamp(max=100)
    log_probability = actor(batch.obs).log_softmax(1).gather(1, batch.action)
    actor_loss = -(weight * log_probability).mean()
    return v_loss, q_loss, actor_loss, q_value


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
        if run.finished:
            return run.folder
        torch.set_num_threads(1)  # one thread beats two on a small network

        data = offline_data(args)
        replay = Replay(data, args.online_steps)
        # fresh_network seeds torch, so that the initial V and actor depend on the seed alone, too.
        # Q has an optimiser of its own, because an injection replaces that optimiser.
        q = fresh_network(args, step=0)
        v = mlp(2, 64, 64, 1).to(args.device)
        actor = mlp(2, 128, 128, len(MOVES)).to(args.device)
        v_and_actor = [*v.parameters(), *actor.parameters()]
        v_and_actor_optimizer = adam(v_and_actor, args)
        if run.checkpoint is None:
            target_network = copy.deepcopy(q).requires_grad_(False)
            q_optimizer = adam(q.parameters(), args)
            injected_at = []  # the steps of the injections so far
            smoothed_metric = None  # moving average of the metric of --injection-trigger
        else:
            # These five are as at the latest checkpoint. V, actor, their optimiser and the replay
            # are filled in.
            loaded = load_checkpoint(run, args, q, v, actor, v_and_actor_optimizer, replay)
            q, target_network, q_optimizer, injected_at, smoothed_metric = loaded

        for step in run.steps():
            online = step > args.offline_steps
            if run.interval_begins(step):
                # Environment and random stream are new, and depend only on the seed and on the
                # steps done so far. So a run that was killed repeats the interval from the latest
                # checkpoint, and its log is that of a run that was never killed.
                env, obs, rng = fresh_start(args, step - 1)
                episode_return = 0.0
                returns = []  # of the episodes that ended since the latest row

            if injection_due(args, step, injected_at, smoothed_metric):
                # Paper 3.1. Adam starts anew, too: its averages are of the old network's gradients.
                q, target_network = inject(q, target_network, fresh_network(args, step))
                q_optimizer = adam(trainable(q).parameters(), args)
                injected_at.append(step)
                # The metrics are now those of the fresh network, which has not been updated yet.
                smoothed_metric = None

            if online:
                # Act, and remember what followed. If the episode is terminated, no reward can
                # follow; if it is truncated, only the time limit was reached, and the value of
                # next_obs still counts.
                action = sample_actions(actor, obs[None], rng)[0]  # of a batch of one observation
                next_obs, reward, terminated, truncated, _ = env.step(action)
                replay.add(obs, action, reward, next_obs, terminated, truncated)
                episode_return += reward
                obs = next_obs
                if terminated or truncated:
                    returns.append(episode_return)
                    episode_return = 0.0
                    obs, _ = env.reset()

            # One update of all three networks. Each loss has a gradient for its own network only,
            # so that one backward pass serves all.
            batch = replay.sample(args.batch_size, rng, args.device)
            losses = iql_losses(q, target_network, v, actor, batch, args)
            v_loss, q_loss, actor_loss, q_value = losses
            loss = v_loss + q_loss + actor_loss
            l2_lambda = l2_coefficient(args, step)
            if l2_lambda > 0:
                # Paper 3.2. Only what is trained is regularised.
                loss = loss + l2_lambda * squared_norm(trainable(q))
            q_optimizer.zero_grad()
            v_and_actor_optimizer.zero_grad()
            loss.backward()
            q_optimizer.step()
            v_and_actor_optimizer.step()
            polyak_update(q, target_network, args.polyak)

            if run.row_due(step) or step % args.plasticity_every == 0:
                # The log: numbers of the latest update, and metrics of the part of Q that trains.
                eval_return = None
                if run.interval_ends(step):
                    eval_return = evaluate(actor, args, step)
                row = {
                    "step": step,
                    "phase": "online" if online else "offline",
                    "train_return": np.mean(returns) if returns else None,
                    "eval_return": eval_return,
                    "q_loss": q_loss,
                    "v_loss": v_loss,
                    "actor_loss": actor_loss,
                    "q_mean": q_value.mean(),
                    "grad_norm": metrics.gradient_norm(trainable(q)),
                    "l2_lambda": l2_lambda,
                    "injections": len(injected_at),
                    **measurements(args, step, trainable(q), replay),
                }
                run.log(row)
                returns = []
                if args.injection_trigger:
                    smoothed_metric = smooth(smoothed_metric, row[args.injection_trigger])

            if run.interval_ends(step):
                # The next interval needs no more than this checkpoint and the offline data.
                if step == args.total_steps:
                    save_pictures(run.folder, args, data, v, actor)
                run.save(
                    {
                        "step": step,
                        "q": q.state_dict(),
                        "target_network": target_network.state_dict(),
                        "v": v.state_dict(),
                        "actor": actor.state_dict(),
                        "q_optimizer": q_optimizer.state_dict(),
                        "v_and_actor_optimizer": v_and_actor_optimizer.state_dict(),
                        "injected_at": injected_at,
                        "smoothed_metric": smoothed_metric,
                        "replay": replay.state_dict(),
                    }
                )
        return run.folder


ADAM_EPS = 1e-8  # PyTorch's default


def adam(parameters: Iterable[nn.Parameter], args: Args) -> torch.optim.Adam:
    """A new Adam, whose moving averages are 0."""
    return torch.optim.Adam(parameters, args.learning_rate, eps=ADAM_EPS, fused=True)


@torch.no_grad()
def polyak_update(q: nn.Module, target_network: nn.Module, polyak: float) -> None:
    """Q_target <- (1 - polyak) * Q_target + polyak * Q, parameter by parameter."""
    for parameter, target in zip(q.parameters(), target_network.parameters()):
        target.lerp_(parameter, polyak)


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
@torch.inference_mode()
def sample_actions(actor: nn.Module, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Actions (n,) for observations (n, 2), drawn from pi(a | s) = softmax(logits).

    Gumbel noise is added to each logit: the index of the largest sum has exactly this distribution.
    """
    device = next(actor.parameters()).device
    inputs = torch.as_tensor(obs, device=device)
    logits = actor(inputs).cpu().numpy()
    noise = rng.gumbel(size=logits.shape)
    return (logits + noise).argmax(1)


# ==================================================================================================
# The method ends here. What follows is machinery, which a reader may skip: loading a checkpoint,
# replay and data, the maze, evaluation and measurements, checks of the settings, the command line.
# ==================================================================================================


# ---- loading a checkpoint
def load_checkpoint(
    run: metrics.Run,
    args: Args,
    q: nn.Module,
    v: nn.Module,
    actor: nn.Module,
    v_and_actor_optimizer: torch.optim.Adam,
    replay: "Replay",
) -> tuple[nn.Module, nn.Module, torch.optim.Adam, list[int], float | None]:
    """Fill v, actor, their optimiser and the replay; return what an injection replaces.

    Raises UserError if the offline data have changed since the checkpoint.
    """
    checkpoint = run.checkpoint
    if replay.data_checksum != checkpoint["replay"]["data_checksum"]:
        run.refuse_changed_file(dataset_path(args))
    replay.load_state_dict(checkpoint["replay"])
    v.load_state_dict(checkpoint["v"])
    actor.load_state_dict(checkpoint["actor"])
    v_and_actor_optimizer.load_state_dict(checkpoint["v_and_actor_optimizer"])
    target_network = copy.deepcopy(q).requires_grad_(False)
    for step in checkpoint["injected_at"]:
        q, target_network = inject(q, target_network, fresh_network(args, step))
    q_optimizer = adam(trainable(q).parameters(), args)
    q.load_state_dict(checkpoint["q"])
    target_network.load_state_dict(checkpoint["target_network"])
    q_optimizer.load_state_dict(checkpoint["q_optimizer"])
    injected_at = checkpoint["injected_at"]
    return q, target_network, q_optimizer, injected_at, checkpoint["smoothed_metric"]


# ---- replay and data
class Replay:
    """The offline data, then up to `room` transitions seen online; nothing is ever dropped."""

    def __init__(self, data: dict[str, np.ndarray], room: int):
        self.offline_size = len(data["obs"])
        self.size = self.offline_size
        self.data_checksum = 0
        self.arrays = {}
        for name, (dtype, shape) in FIELDS.items():
            self.data_checksum = zlib.crc32(data[name].tobytes(), self.data_checksum)
            array = np.zeros((self.offline_size + room, *shape), dtype)
            array[: self.offline_size] = data[name]
            self.arrays[name] = array

    def add(self, obs, action, reward, next_obs, terminated, truncated) -> None:
        self.arrays["obs"][self.size] = obs
        self.arrays["action"][self.size] = action
        self.arrays["reward"][self.size] = reward
        self.arrays["next_obs"][self.size] = next_obs
        self.arrays["terminated"][self.size] = terminated
        self.arrays["truncated"][self.size] = truncated
        self.size += 1

    def sample(self, batch_size: int, rng: np.random.Generator, device: str = "cpu") -> Batch:
        """A batch of transitions, drawn uniformly and with replacement."""
        rows = rng.integers(self.size, size=batch_size)
        columns = {}
        for name, array in self.arrays.items():
            column = torch.as_tensor(array[rows], device=device)
            columns[name] = column.view(batch_size, -1)
        return Batch(**columns)

    def state_dict(self) -> dict:
        """What was seen online; the offline data have a file of their own."""
        state = {"data_checksum": self.data_checksum}
        for name, array in self.arrays.items():
            state[name] = torch.from_numpy(array[self.offline_size : self.size])
        return state

    def load_state_dict(self, state: dict) -> None:
        self.size = self.offline_size + len(state["obs"])
        for name, array in self.arrays.items():
            array[self.offline_size : self.size] = state[name].numpy()


# The settings of the explorer.
EXPLORER_EPSILON = 0.3  # the probability of a random action
EXPLORER_LEARNING_RATE = 1e-3
EXPLORER_BATCH_SIZE = 128
EXPLORER_GAMMA = 0.95
EXPLORER_TARGET_FREQUENCY = 300  # steps between copies into the target network


def collect(args: Args) -> dict[str, np.ndarray]:
    """Transitions of an explorer that seeks what it cannot predict yet.

    (Burda et al., Exploration by random network distillation, ICLR 2019.)
    It is double DQN without the task's reward. Its own reward is the novelty of s': the error of a
    predictor that learns the outputs of a fixed, random network at s', divided by the root mean
    square of recent errors.
    """
    env, obs, rng = fresh_start(args, 0, 1)
    torch.manual_seed(seeds(args, 0, 1)[0])
    q = mlp(2, 64, 64, len(MOVES))
    target_network = copy.deepcopy(q)
    predictor = mlp(2, 400, 400, 5)
    random_network = mlp(2, 400, 400, 5).requires_grad_(False)
    for parameter in random_network.parameters():
        nn.init.normal_(parameter)  # larger than by default, or there is little to predict
    learners = [*q.parameters(), *predictor.parameters()]
    optimizer = torch.optim.Adam(learners, lr=EXPLORER_LEARNING_RATE, fused=True)
    no_data = {}
    for name, (dtype, shape) in FIELDS.items():
        no_data[name] = np.zeros((0, *shape), dtype)
    replay = Replay(no_data, args.collect_steps)
    mean_square = 0.0  # of the errors of the latest 100 updates or so
    steps = range(1, args.collect_steps + 1)
    for step in tqdm(steps, desc="collecting data", unit="step", disable=None):
        action = int(rng.integers(len(MOVES)))
        if rng.random() >= EXPLORER_EPSILON:
            action = int(q(torch.from_numpy(obs)).argmax())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()

        batch = replay.sample(EXPLORER_BATCH_SIZE, rng)
        difference = predictor(batch.next_obs) - random_network(batch.next_obs)
        error = difference.square().mean(1, keepdim=True)
        with torch.no_grad():
            mean_square += (error.square().mean() - mean_square) / min(step, 100)
            novelty = error / mean_square.sqrt()
            next_action = q(batch.next_obs).argmax(1, keepdim=True)
            next_value = target_network(batch.next_obs).gather(1, next_action)
            # There is novelty beyond the goal, so the target ignores terminated.
            td_target = novelty + EXPLORER_GAMMA * next_value
        q_value = q(batch.obs).gather(1, batch.action)
        q_loss = nn.functional.mse_loss(q_value, td_target)
        loss = q_loss + error.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EXPLORER_TARGET_FREQUENCY == 0:
            target_network.load_state_dict(q.state_dict())
    return replay.arrays


def dataset_path(args: Args) -> Path:
    if args.dataset:
        return Path(args.dataset)
    return Path("runs") / f"{args.env}__data-{args.collect_steps}__seed{args.seed}.npz"


def read_dataset(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set. Raises UserError unless they are what training needs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged file makes NumPy raise all kinds of errors
        reason = type(error).__name__
        advice = "replace it, or, if the explorer collected it, delete it to collect it again"
        raise UserError(f"{path} cannot be read as an .npz file ({reason}): {advice}") from error
    missing = [name for name in FIELDS if name not in data]
    if missing:
        names = ", ".join(FIELDS)
        raise UserError(f"{path} lacks {', '.join(missing)}; it must hold {names}")
    transitions = data["obs"].shape[:1]  # (n,)
    for name, (dtype, shape) in FIELDS.items():
        array = data[name]
        needed = (*transitions, *shape)
        if array.dtype != dtype or array.shape != needed or array.size == 0:
            expected_shape = ", ".join(map(str, ("transitions", *shape)))
            expected = f"{dtype} of shape ({expected_shape})"
            found = f"{array.dtype} of shape {array.shape}"
            raise UserError(f"{path}: {name} is {found}; it must be {expected}")
        low, high = RANGES.get(name, (0, 1))
        inside = (low <= array) & (array <= high)
        if not inside.all():
            found = f"{array.min()}..{array.max()}"
            raise UserError(f"{path}: {name} must lie in {low}..{high}, but lies in {found}")
    return data


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    metrics.replace_file(path, file.getvalue())


def offline_data(args: Args) -> dict[str, np.ndarray]:
    """The data of --dataset, or those of this maze and seed, which are collected if missing."""
    path = dataset_path(args)
    if not args.dataset:
        # Several runs of this seed may start at once, and one of them collects the data for all.
        if not path.exists():
            print(f"{path} is missing. This run collects it, or waits for one that does.")
        lock = path.with_name(f".{path.stem}.lock")
        patience = 600 + args.collect_steps / 10  # seconds, far more than it takes
        with metrics.locked(lock, of=path, timeout=patience):
            if not path.exists():
                save_arrays(path, collect(args))
    data = read_dataset(path)
    free = ~Pointmass(args.env).walls
    visited = (coverage(args, data) > 0) & free
    reached = data["terminated"].sum()
    episodes = (data["terminated"] | data["truncated"]).sum()
    cells = f"{visited.sum()} of {free.sum()} free cells visited"
    print(f"{path}: {cells}, goal reached in {reached} of {episodes} episodes.")
    return data


def coverage(args: Args, data: dict[str, np.ndarray]) -> np.ndarray:
    """How often the data visit each cell of the map."""
    size = Pointmass(args.env).size
    x, y = size * data["next_obs"].T
    edges = np.arange(size + 1)
    visits, _, _ = np.histogram2d(x, y, bins=edges)
    return visits


# ---- the maze
EASY = "00000 11110 11110 11110 11110"
MEDIUM = "001000 101010 001011 011001 001101 100001"
HARD = """00000100000 00000100000 00000000000 00000100000 00000100000 10111100000
          00000111011 00000100000 00000100000 00000000000 00000100000"""
# The rows of the map (1: wall), its enlargement, start, goal, the goal's radius, the time limit.
MAZES = {
    "PointmassEasy": (EASY, 2, (1.0, 1.0), (9.0, 9.0), 2.0, 50),
    "PointmassMedium": (MEDIUM, 1, (0.5, 0.5), (1.5, 5.5), 1.0, 150),
    "PointmassHard": (HARD, 2, (2.0, 2.0), (20.0, 20.0), 2.0, 100),
}
# How far each action moves the point along axis 0 (the map's rows) and axis 1 (its columns).
MOVES = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
RANGES = {"action": (0, len(MOVES) - 1), "reward": (-1e6, 1e6)}  # in a data set; all others 0..1


class Pointmass(gym.Env):
    """A point in a maze, moved by noisy unit steps.

    Reward: -1 per step, 0 for the step that comes within `radius` of the goal, which ends the
    episode. Observation (2,): the position divided by the size of the map, so in 0..1. Walls stop a
    move where it meets them.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, maze: str = "PointmassHard", render_mode: str | None = None):
        rows, scale, self.start, self.goal, self.radius, self.time_limit = MAZES[maze]
        cells = np.array([list(row) for row in rows.split()])
        walls = cells == "1"
        self.walls = walls.repeat(scale, 0).repeat(scale, 1)
        self.size = len(self.walls)
        # Plain lists and floats are ten times faster than NumPy on two numbers. A point on the far
        # edge counts as in the last cell, hence the padding.
        self.blocked = np.pad(self.walls, (0, 1), "edge").tolist()
        self.noise = []
        self.observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(len(MOVES))
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.noise.clear()  # it was drawn from the former generator
        self.x, self.y = self.start
        self.elapsed = 0
        return self.observation(), {}

    def observation(self) -> np.ndarray:
        return np.array((self.x / self.size, self.y / self.size), np.float32)

    def step(self, action):
        if not self.noise:  # many at once: a single draw would cost as much as the whole step
            self.noise = self.np_random.normal(0.0, 0.5, (500, 2)).tolist()
        move_x, move_y = MOVES[action]
        noise_x, noise_y = self.noise.pop()
        dx = (move_x + noise_x) / 10
        dy = (move_y + noise_y) / 10
        x = self.x
        y = self.y
        size = self.size
        blocked = self.blocked
        # Ten small steps do not jump over walls. The axes take turns, so that the point slides
        # along a wall.
        for _ in range(10):
            if 0 <= x + dx <= size and not blocked[int(x + dx)][int(y)]:
                x += dx
            if 0 <= y + dy <= size and not blocked[int(x)][int(y + dy)]:
                y += dy
        self.x = x
        self.y = y
        self.elapsed += 1
        terminated = math.dist((x, y), self.goal) < self.radius
        truncated = not terminated and self.elapsed >= self.time_limit
        reward = 0.0 if terminated else -1.0
        return self.observation(), reward, terminated, truncated, {}

    def render(self) -> np.ndarray:
        """The map from above, axis 0 downwards: the goal green, the point red."""
        axis = (np.arange(16 * self.size) + 0.5) / 16  # 16 pixels per cell
        rows, columns = np.meshgrid(axis, axis, indexing="ij")
        shade = np.where(self.walls, 60, 255).astype(np.uint8)
        shade = shade.repeat(16, 0).repeat(16, 1)
        image = np.stack([shade, shade, shade], axis=2)
        goal_x, goal_y = self.goal
        goal_distance = np.hypot(rows - goal_x, columns - goal_y)
        point_distance = np.hypot(rows - self.x, columns - self.y)
        image[goal_distance < self.radius] = (90, 190, 90)
        image[point_distance < 0.4] = (220, 50, 50)
        return image


for name in MAZES:
    gym.register(f"{name}-v0", Pointmass, kwargs={"maze": name})


# Every random stream has a name: (seed, step) for training from that step on, (seed, step, 1) for
# an evaluation, (seed, step, 2) for a measurement. So none of them disturbs another. The explorer
# uses (seed, 0, 1), for there is no evaluation at step 0.
def seeds(args: Args, *stream: int) -> list[int]:
    """Two numbers that depend only on (seed, stream): for a network, and for an environment."""
    numbers = np.random.SeedSequence((args.seed, *stream)).generate_state(2)
    return [int(number) for number in numbers]


def fresh_start(args: Args, *stream: int) -> tuple[Pointmass, np.ndarray, np.random.Generator]:
    """A new environment, its first observation, and a random stream, from (seed, stream) alone."""
    env = Pointmass(args.env)
    obs, _ = env.reset(seed=seeds(args, *stream)[1])
    return env, obs, np.random.default_rng((args.seed, *stream))


# ---- evaluation and measurements
def evaluate(actor: nn.Module, args: Args, step: int) -> float:
    """Mean return of `eval_episodes` whole episodes."""
    return play(actor, args, step, args.eval_episodes)[0]


def play(actor: nn.Module, args: Args, step: int, episodes: int) -> tuple[float, np.ndarray]:
    """Mean return of whole episodes, and their positions on the map.

    The positions have shape (episodes, time limit + 1, 2), and are NaN after the end of an episode.
    """
    rng = np.random.default_rng((args.seed, step, 1))
    envs = []
    obs = np.zeros((episodes, 2), np.float32)
    for i in range(episodes):
        env = Pointmass(args.env)
        seed = int(rng.integers(2**31))
        obs[i], _ = env.reset(seed=seed)
        envs.append(env)
    positions = np.full((episodes, env.time_limit + 1, 2), np.nan, np.float32)
    positions[:, 0] = env.start
    total = 0.0
    running = list(range(episodes))
    while running:
        actions = sample_actions(actor, obs[running], rng)
        for i, action in zip(running.copy(), actions):
            env = envs[i]
            obs[i], reward, terminated, truncated, _ = env.step(action)
            positions[i, env.elapsed] = (env.x, env.y)
            total += reward
            if terminated or truncated:
                running.remove(i)
    return total / episodes, positions


@torch.inference_mode()
def save_pictures(
    folder: Path, args: Args, data: dict[str, np.ndarray], v: nn.Module, actor: nn.Module
) -> None:
    """picture.npz: what plot.py draws, on the cells of the map. episode.gif: one trajectory."""
    env = Pointmass(args.env)
    rows, columns = np.indices(env.walls.shape)
    cells = np.stack([rows.ravel(), columns.ravel()], axis=1)
    centres = (cells + 0.5) / env.size
    obs = torch.as_tensor(centres, dtype=torch.float32, device=args.device)
    values = v(obs).cpu().numpy()
    value = values.reshape(env.walls.shape)
    _, trajectories = play(actor, args, args.total_steps, episodes=10)
    arrays = {
        "maze": env.walls,
        "start": env.start,
        "goal": env.goal,
        "coverage": coverage(args, data),
        "value": np.where(env.walls, np.nan, value),
        "trajectories": trajectories,
    }
    save_arrays(folder / "picture.npz", arrays)
    pictures = frames(env, trajectories[0])
    metrics.save_gif(folder / "episode.gif", pictures, env.metadata["render_fps"])


def frames(env: Pointmass, trajectory: np.ndarray) -> Iterator[np.ndarray]:
    for x, y in trajectory:
        if not np.isnan(x):
            env.x = x
            env.y = y
            yield env.render()


def measurements(
    args: Args, step: int, network: nn.Sequential, replay: Replay
) -> dict[str, float | None]:
    """The metrics of the network that is trained, for 512 observations of the replay.

    The observations are drawn by a random stream of their own, so that measuring changes nothing.
    """
    rng = np.random.default_rng((args.seed, step, 2))
    obs = replay.sample(512, rng, args.device).obs
    # None, unless it is measured at this step.
    probe = dict.fromkeys(metrics.PROBED)
    if step % args.plasticity_every == 0:
        probe = metrics.measure_plasticity(
            network,
            obs,
            seed=int(rng.integers(2**31)),
            learning_rate=args.learning_rate,
            adam_eps=ADAM_EPS,
            batch_size=args.batch_size,
            updates=args.plasticity_updates,
        )
    return {**metrics.measure(network, obs), **probe}


# ---- checks of the settings
# The ranges of numbers that are not in metrics.BOUNDS. A number in neither may be 0 or more.
BOUNDS = {
    "collect_steps": (1, np.inf),
    "expectile": (0, 1),
    "polyak": (0, 1),
}


def check(args: Args) -> None:
    """Raise UserError, saying what is wrong and what would be right, before anything is written."""
    metrics.check(args, BOUNDS)
    check_injections(args)
    if args.injection_trigger == "dormant_units" and not args.leaky_relu:
        reason = "they are not defined for tanh"
        raise UserError(f"--injection-trigger dormant_units needs --leaky-relu: {reason}")
    if args.total_steps == 0:
        raise UserError("--offline-steps and --online-steps must not both be 0")
    if args.dataset or dataset_path(args).exists():
        read_dataset(dataset_path(args))


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


def main() -> int:
    defaults = Args()
    # Args() has made it 0, which would contradict every --injection-steps.
    defaults.injections = None
    return metrics.command(train, defaults)


if __name__ == "__main__":
    sys.exit(main())
