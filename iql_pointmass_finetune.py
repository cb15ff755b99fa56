"""Implicit Q-learning, trained offline and fine-tuned online, with every remedy of the paper as a flag.

"The paper" is R. Cheng, E. Chen and L. Ma, Improving Neural Network Plasticity in Reinforcement Learning with
Plasticity Injection and Plasticity Metric Regularization; the README lists all others that are cited here.
A point has to cross four rooms (PointmassHard). An explorer that does not know the task collects data; IQL learns from
them alone, then goes on in the environment (paper section 5). The optimal return is -33, random actions get -100.
IQL (Kostrikov et al. 2022) never asks for the value of an action that the data do not hold. One update, on one batch
(theirs takes the smaller of two target values, and updates V before the others):

    u       = Q_target(s, a) - V(s)
    loss_V  = mean |expectile - 1(u < 0)| u^2                             their eq. 5: V nears the data's best Q
    loss_Q  = mean (r + gamma * (1 - terminated) * V(s') - Q(s, a))^2     their eq. 6
              + lambda(step) * ||phi||^2                                  phi: what trains of Q (paper 3.2)
    loss_pi = -mean min(exp(beta * u), 100) * log pi(a | s)               their eq. 7
    Q_target <- (1 - polyak) * Q_target + polyak * Q

Plasticity injection (Nikishin et al. 2023; paper 3.1) freezes Q and lets a fresh network learn what is missing, without
changing a single value at that moment: Q <- Q + (f1 - f2) with f1 = f2 fresh, of which only f1 trains.

    python iql_pointmass_finetune.py
    python iql_pointmass_finetune.py --injections 1
    python plot.py runs/

A run is the folder runs/<env>__<variant>__seed<k>. The same command given again continues an unfinished run exactly.
"""

import collections
import copy
import io
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import filelock
import gymnasium as gym
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import metrics
from metrics import UserError, refuse, run_folder

VERSION = 3  # raised whenever the networks or what is saved of them change
COLUMNS = ("step", "phase", "train_return", "eval_return", "q_loss", "v_loss", "actor_loss", "q_mean", "grad_norm")
COLUMNS += ("l2_lambda", "injections", *metrics.METRICS, *metrics.FRESH_METRICS)


# ---- settings
@dataclass
class Args:
    """Implicit Q-learning, offline then online, with remedies against the loss of plasticity."""

    # ---- The run; a step is one update, online also one of the environment
    env: Literal["PointmassEasy", "PointmassMedium", "PointmassHard"] = "PointmassHard"  # the maze
    seed: int = 1  # decides everything: the same seed, machine and thread count give the same log
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # a CUDA GPU if there is one
    dataset: str | None = None  # .npz file of transitions; left out: those collected for the seed
    collect_steps: int = 10_000  # transitions that the explorer collects
    offline_steps: int = 100_000  # updates on the collected data alone
    online_steps: int = 100_000  # then environment steps, with an update after each
    eval_every: int = 5_000  # steps between evaluations, each with a checkpoint
    plasticity_every: int = 2_000  # steps between measurements of plasticity
    plasticity_updates: int = 120  # updates of such a measurement, a multiple of ten
    eval_episodes: int = 50  # whole episodes of an evaluation; fewer are noise, for a return is about -35 or -100
    # ---- Implicit Q-learning with Adam
    learning_rate: float = 3e-4  # step size of Adam, for all three networks
    gamma: float = 0.95  # discount per step
    batch_size: int = 128  # transitions in an update
    expectile: float = 0.99  # of Q over the data's actions that V learns: 0.5 is their mean, 1 their maximum
    beta: float = 10.0  # inverse temperature of the actor: 0 imitates the data, more seeks value
    polyak: float = 0.005  # share of Q that enters the target network at every step
    # ---- Plasticity injection (paper 3.1): freeze the network, let a fresh one learn what is missing
    injections: int = 0  # how many plasticity injections; with a trigger, at most
    injection_steps: tuple[int, ...] = ()  # at which steps; none given: evenly over the online phase, from its start
    injection_trigger: Literal[metrics.METRICS] | None = None  # inject when the moving average of this metric ...
    injection_threshold: float | None = None  # ... crosses this: weight_magnitude, dormant_units upwards, others down
    # ---- L2 regularisation (paper 3.2): lambda(step) * ||phi||^2 is added to the loss
    l2: Literal["none", "constant", "incremental", "periodic"] = "none"  # schedule of lambda
    l2_lambda: float = 1e-4  # constant, periodic: lambda
    l2_start: float = 0.0  # incremental: lambda at the start of the run
    l2_end: float = 2e-4  # incremental: lambda at its end
    l2_on_steps: int = 50_000  # periodic: steps with lambda (N in the paper)
    l2_off_steps: int = 10_000  # periodic: steps without it (M), then again
    # ---- The Q-network (paper 3.3)
    layer_norm: Literal["none", "before", "after"] = "none"  # LayerNorm of every hidden layer, before or after the activation
    leaky_relu: bool = False  # LeakyReLU (slope 0.01) in place of tanh

    def __post_init__(self):
        if self.injection_steps:
            self.injections = self.injections or len(self.injection_steps)
        elif not self.injection_trigger:  # evenly over the online phase, from its first step on
            first, count = self.offline_steps + 1, self.injections
            self.injection_steps = tuple(first + i * self.online_steps // count for i in range(count))

    @property
    def total_steps(self) -> int:
        return self.offline_steps + self.online_steps


# ---- network
def mlp(*widths: int, layer_norm: str = "none", leaky_relu: bool = False) -> nn.Sequential:
    """Linear layers with tanh between them (ReLU does worse here)."""
    layers = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs)] + [nn.LayerNorm(outputs)] * (layer_norm == "before")
        layers += [nn.LeakyReLU(0.01) if leaky_relu else nn.Tanh()]
        layers += [nn.LayerNorm(outputs)] * (layer_norm == "after")
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def fresh_network(args: Args, step: int) -> nn.Sequential:
    """A newly initialised critic, observations (batch, 2) to Q-values (batch, 5), decided by (seed, step) alone."""
    torch.manual_seed(seeds(args, step)[0])
    return mlp(2, 64, 64, len(MOVES), layer_norm=args.layer_norm, leaky_relu=args.leaky_relu).to(args.device)


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


# ---- losses
# Of a transition, also in the file of --dataset: dtype and shape. Positions are divided by the size of the map.
FIELDS = {"obs": ("float32", (2,)), "action": ("int64", ()), "reward": ("float32", ()), "next_obs": ("float32", (2,))}
FIELDS |= {"terminated": ("bool", ()), "truncated": ("bool", ())}
Batch = collections.namedtuple("Batch", FIELDS)  # tensors (batch, width) like the networks' outputs, numbers (batch, 1)


def expectile_loss(advantage: torch.Tensor, expectile: float) -> torch.Tensor:
    """mean |expectile - 1(u < 0)| u^2 for the advantage u (IQL eq. 5)."""
    return (torch.where(advantage < 0, 1 - expectile, expectile) * advantage.square()).mean()


def iql_losses(q, target_network, v, actor, batch: Batch, args: Args) -> tuple[torch.Tensor, ...]:
    """The losses of V, Q and actor, each with a gradient for its own network only, and the values Q(s, a)."""
    with torch.no_grad():
        target_value = target_network(batch.obs).gather(1, batch.action)
        td_target = batch.reward + args.gamma * ~batch.terminated * v(batch.next_obs)
    advantage = target_value - v(batch.obs)
    v_loss = expectile_loss(advantage, args.expectile)
    q_values = q(batch.obs).gather(1, batch.action)
    q_loss = nn.functional.mse_loss(q_values, td_target)
    weight = (args.beta * advantage.detach()).exp().clamp(max=100)
    actor_loss = -(weight * actor(batch.obs).log_softmax(1).gather(1, batch.action)).mean()
    return v_loss, q_loss, actor_loss, q_values


# ---- training
def train(args: Args) -> Path:
    """Train one agent and return its run's folder. Raises UserError, and FloatingPointError when training diverges."""
    check(args)
    run = metrics.Run(run_folder(args), asdict(args) | {"version": VERSION}, args.total_steps, args.eval_every, COLUMNS)
    if run.finished:
        return run.folder
    torch.set_num_threads(1)  # one thread beats two on a small network
    data = offline_data(args)
    replay = Replay(data, args.online_steps)
    injected_at, smoothed = run.state.get("injected_at", []), run.state.get("smoothed")  # of a run that goes on
    q = fresh_network(args, 0)
    v, actor = mlp(2, 64, 64, 1).to(args.device), mlp(2, 128, 128, len(MOVES)).to(args.device)
    target_network = copy.deepcopy(q).requires_grad_(False)
    for at in injected_at:
        q, target_network = inject(q, target_network, fresh_network(args, at))
    q_optimizer, optimizer = adam(args, trained(q)), adam(args, v, actor)
    rest = {"v": v, "actor": actor, "optimizer": optimizer, "replay": replay}  # what no injection replaces
    run.load(q=q, target_network=target_network, q_optimizer=q_optimizer, **rest)

    for start, steps in run.intervals():
        env, obs, rng = fresh_start(args, start)
        episode_return, returns = 0.0, []  # returns since the last row
        for step in steps:
            if injection_due(args, step, injected_at, smoothed):  # paper 3.1
                q, target_network = inject(q, target_network, fresh_network(args, step))
                q_optimizer = adam(args, trained(q))
                injected_at, smoothed = [*injected_at, step], None

            if step > args.offline_steps:
                action = sample_actions(actor, obs[None], rng)[0]
                next_obs, reward, terminated, truncated, _ = env.step(action)
                replay.add(obs, action, reward, next_obs, terminated, truncated)
                episode_return += reward
                obs = next_obs
                if terminated or truncated:
                    returns.append(episode_return)
                    episode_return = 0.0
                    obs, _ = env.reset()

            batch = replay.sample(args.batch_size, rng, args.device)
            v_loss, q_loss, actor_loss, q_values = iql_losses(q, target_network, v, actor, batch, args)
            loss = v_loss + q_loss + actor_loss
            if l2_lambda := l2_coefficient(args, step):  # paper 3.2
                loss = loss + l2_lambda * squared_norm(trained(q))
            q_optimizer.zero_grad()
            optimizer.zero_grad()
            loss.backward()
            q_optimizer.step()
            optimizer.step()
            polyak_update(q, target_network, args.polyak)

            if run.row_due(step) or step % args.plasticity_every == 0:
                row = {"step": step, "phase": "online" if step > args.offline_steps else "offline"}
                row |= {"injections": len(injected_at), "train_return": np.mean(returns) if returns else None}
                row |= {"v_loss": v_loss, "q_loss": q_loss, "actor_loss": actor_loss, "q_mean": q_values.mean()}
                row |= {"l2_lambda": l2_lambda} | measurements(args, step, trained(q), replay)
                if row.get(args.injection_trigger) is not None:
                    smoothed = smooth(smoothed, row[args.injection_trigger])
                if step == run.end:
                    row["eval_return"] = evaluate(actor, args, step, args.eval_episodes)[0]
                run.log(row)
                returns = []

        if step == args.total_steps:  # before the run counts as finished
            save_pictures(run.folder, args, data, v, actor)
        run.save(step, q=q, target_network=target_network, q_optimizer=q_optimizer,
                 injected_at=injected_at, smoothed=smoothed, **rest)  # fmt: skip
    return run.folder


def adam(args: Args, *networks: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(nn.ModuleList(networks).parameters(), args.learning_rate, fused=True)


@torch.no_grad()
def polyak_update(q: nn.Module, target_network: nn.Module, polyak: float) -> None:
    for fast, slow in zip(q.parameters(), target_network.parameters()):
        slow.lerp_(fast, polyak)


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


# ---- replay and data
class Replay:
    """All transitions, the offline data first; nothing is ever dropped."""

    def __init__(self, data: dict[str, np.ndarray], room: int):
        self.arrays = {name: np.pad(data[name], [(0, room)] + [(0, 0)] * len(FIELDS[name][1])) for name in FIELDS}
        self.size = self.offline_size = len(data["obs"])

    def add(self, *transition) -> None:
        """obs, action, reward, next_obs, terminated, truncated."""
        for array, value in zip(self.arrays.values(), transition, strict=True):
            array[self.size] = value
        self.size += 1

    def sample(self, batch_size: int, rng: np.random.Generator, device: str = "cpu") -> Batch:
        rows = rng.integers(self.size, size=batch_size)
        arrays = self.arrays.values()
        return Batch(*(torch.as_tensor(array[rows], device=device).view(batch_size, -1) for array in arrays))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array[self.offline_size : self.size]) for name, array in self.arrays.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.size = self.offline_size + len(state["obs"])
        for name, array in self.arrays.items():
            array[self.offline_size : self.size] = state[name].numpy()


def collect(args: Args) -> dict[str, np.ndarray]:
    """Transitions of an explorer that seeks what it cannot predict yet, and knows nothing of the task's reward.

    Double DQN, whose reward is the error of one network in predicting another, random one at s' (random network
    distillation, Burda et al. 2019). The goal does not end the future of this reward.
    """
    env, obs, rng = fresh_start(args, 0, 1)
    torch.manual_seed(seeds(args, 0, 1)[0])
    q, predictor, random_network = mlp(2, 64, 64, len(MOVES)), mlp(2, 400, 400, 5), mlp(2, 400, 400, 5)  # 5 features
    target_network = copy.deepcopy(q)
    for parameter in random_network.requires_grad_(False).parameters():
        nn.init.normal_(parameter)  # larger than by default, or there is little to predict
    optimizer = torch.optim.Adam([*q.parameters(), *predictor.parameters()], lr=1e-3, fused=True)
    nothing = {name: np.zeros((0, *shape), dtype) for name, (dtype, shape) in FIELDS.items()}
    replay, mean_square = Replay(nothing, args.collect_steps), 0.0
    for step in tqdm(range(1, args.collect_steps + 1), desc="collecting data", unit="step", disable=None):
        action = int(rng.integers(len(MOVES)))
        if rng.random() >= 0.3:
            action = int(q(torch.from_numpy(obs)).argmax())
        next_obs, reward, terminated, truncated, _ = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated, truncated)
        obs = env.reset()[0] if terminated or truncated else next_obs

        batch = replay.sample(128, rng)
        error = (predictor(batch.next_obs) - random_network(batch.next_obs)).square().mean(1, keepdim=True)
        with torch.no_grad():
            mean_square += (error.square().mean() - mean_square) / min(step, 100)  # of the latest 100 updates or so
            next_action = q(batch.next_obs).argmax(1, keepdim=True)
            td_target = error / mean_square.sqrt() + 0.95 * target_network(batch.next_obs).gather(1, next_action)
        q_loss = nn.functional.mse_loss(q(batch.obs).gather(1, batch.action), td_target)
        optimizer.zero_grad()
        (q_loss + error.mean()).backward()
        optimizer.step()
        if step % 300 == 0:
            target_network.load_state_dict(q.state_dict())
    return replay.arrays


def dataset_path(args: Args) -> Path:
    return Path(args.dataset or f"runs/{args.env}__data-{args.collect_steps}__seed{args.seed}.npz")


def read_dataset(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set. Raises UserError unless they are what training needs."""
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged file makes NumPy raise all sorts
        raise UserError(f"{path} cannot be read as an .npz file of arrays ({type(error).__name__})") from error
    missing = [name for name in FIELDS if name not in data]
    refuse(missing, f"{path} lacks {', '.join(missing)}; it must hold {', '.join(FIELDS)}")
    for name, (dtype, shape) in FIELDS.items():
        array, needed = data[name], (*data["obs"].shape[:1], *shape)
        right = array.dtype == dtype and array.shape == needed and array.size
        must = f"it must be {dtype} of shape (transitions{', 2' if shape else ''})"
        refuse(not right, f"{path}: {name} is {array.dtype} of shape {array.shape}; {must}")
        low, high = {"action": (0, len(MOVES) - 1), "reward": (-1e6, 1e6)}.get(name, (0, 1))
        inside = ((low <= array) & (array <= high)).all()
        refuse(not inside, f"{path}: {name} must lie in {low}..{high}, but lies in {array.min()}..{array.max()}")
    return data


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    metrics.replace_file(path, file.getvalue())


def offline_data(args: Args) -> dict[str, np.ndarray]:
    """The data set of --dataset, or the one collected for this task and seed, now if need be."""
    path = dataset_path(args)
    if not args.dataset:
        with filelock.FileLock(path.with_name(f".{path.stem}.lock")):  # several runs of this seed may start at once
            if not path.exists():
                save_arrays(path, collect(args))
    data = read_dataset(path)
    walls, visits = Pointmass(args.env).walls, coverage(args, data)
    visited, free = ((visits > 0) & ~walls).sum(), (~walls).sum()
    reached, episodes = data["terminated"].sum(), (data["terminated"] | data["truncated"]).sum()
    print(f"{path}: {visited} of {free} free cells visited, goal reached in {reached} of {episodes} episodes.")
    return data


def coverage(args: Args, data: dict[str, np.ndarray]) -> np.ndarray:
    """How often the data visit each cell of the map."""
    size = Pointmass(args.env).size
    return np.histogram2d(*size * data["next_obs"].T, bins=size, range=[(0, size)] * 2)[0]


# ---- environment
EASY = "00000 11110 11110 11110 11110"
MEDIUM = "001000 101010 001011 011001 001101 100001"
HARD = """00000100000 00000100000 00000000000 00000100000 00000100000 10111100000
          00000111011 00000100000 00000100000 00000000000 00000100000"""
TASKS = {  # rows of the map (1: wall), its enlargement, start, goal, the goal's radius, time limit
    "PointmassEasy": (EASY, 2, (1.0, 1.0), (9.0, 9.0), 2.0, 50),
    "PointmassMedium": (MEDIUM, 1, (0.5, 0.5), (1.5, 5.5), 1.0, 150),
    "PointmassHard": (HARD, 2, (2.0, 2.0), (20.0, 20.0), 2.0, 100),
}
MOVES = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # of an action along axis 0 (the map's rows) and axis 1


class Pointmass(gym.Env):
    """A point in a maze, moved by noisy unit steps; the reward is -1 for a step, 0 for one that comes near the goal.

    Observation: the position over the size of the map. Walls stop a move where it meets them.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, task: str = "PointmassHard", render_mode: str | None = None):
        rows, scale, self.start, self.goal, self.radius, self.time_limit = TASKS[task]
        small = np.array([[cell == "1" for cell in row] for row in rows.split()])
        self.walls = small.repeat(scale, 0).repeat(scale, 1)
        self.size = len(self.walls)
        # Plain lists and floats are ten times faster than NumPy on two numbers. The far edge belongs to the last cell.
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
        move, noise = MOVES[action], self.noise.pop()
        dx, dy = (move[0] + noise[0]) / 10, (move[1] + noise[1]) / 10
        x, y, size, blocked = self.x, self.y, self.size, self.blocked
        for _ in range(10):  # small steps do not jump over walls; the axes take turns, so the point slides along them
            if 0 <= x + dx <= size and not blocked[int(x + dx)][int(y)]:
                x += dx
            if 0 <= y + dy <= size and not blocked[int(x)][int(y + dy)]:
                y += dy
        self.x, self.y, self.elapsed = x, y, self.elapsed + 1
        terminated = math.dist((x, y), self.goal) < self.radius
        truncated = not terminated and self.elapsed >= self.time_limit
        return self.observation(), 0.0 if terminated else -1.0, terminated, truncated, {}

    def render(self) -> np.ndarray:
        """The map from above, axis 0 downwards: the goal green, the point red."""
        axis = (np.arange(16 * self.size) + 0.5) / 16  # 16 pixels per cell
        rows, columns = np.meshgrid(axis, axis, indexing="ij")
        image = np.where(self.walls, 60, 255).astype(np.uint8).repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)
        image[np.hypot(rows - self.goal[0], columns - self.goal[1]) < self.radius] = (90, 190, 90)
        image[np.hypot(rows - self.x, columns - self.y) < 0.4] = (220, 50, 50)
        return image


for name in TASKS:
    gym.register(f"{name}-v0", Pointmass, kwargs={"task": name})


# Random streams: (seed, step) trains from that step on, (.., 1) evaluates and collects the data, (.., 2) measures.
def seeds(args: Args, *stream: int) -> list[int]:
    """Two numbers decided by (seed, stream): for a network, for an environment."""
    return [int(number) for number in np.random.SeedSequence((args.seed, *stream)).generate_state(2)]


def fresh_start(args: Args, *stream: int) -> tuple[Pointmass, np.ndarray, np.random.Generator]:
    """A new environment, its first observation, and a random stream, all decided by (seed, stream)."""
    env = Pointmass(args.env)
    return env, env.reset(seed=seeds(args, *stream)[1])[0], np.random.default_rng((args.seed, *stream))


# ---- acting, evaluation and measurements
@torch.inference_mode()
def sample_actions(actor: nn.Module, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One action per observation from pi(a | s) = softmax(logits): the largest of logits plus Gumbel noise."""
    logits = actor(torch.as_tensor(obs, device=next(actor.parameters()).device)).cpu().numpy()
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)


def evaluate(actor: nn.Module, args: Args, step: int, episodes: int) -> tuple[float, np.ndarray]:
    """Mean return of whole episodes, and their positions on the map, (episodes, time limit + 1, 2), NaN when over."""
    rng = np.random.default_rng((args.seed, step, 1))
    envs = [Pointmass(args.env) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs])
    positions = np.full((episodes, envs[0].time_limit + 1, 2), np.nan, np.float32)
    positions[:, 0] = envs[0].start
    total, running = 0.0, list(range(episodes))
    while running:
        for i, action in zip(running.copy(), sample_actions(actor, obs[running], rng)):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            positions[i, envs[i].elapsed] = envs[i].x, envs[i].y
            total += reward
            if terminated or truncated:
                running.remove(i)
    return total / episodes, positions


@torch.inference_mode()
def save_pictures(folder: Path, args: Args, data: dict[str, np.ndarray], v: nn.Module, actor: nn.Module) -> None:
    """picture.npz: what a picture of the run needs, on the cells of the map. episode.gif: the first trajectory."""
    env = Pointmass(args.env)
    centres = (np.stack(np.indices(env.walls.shape), -1).reshape(-1, 2) + 0.5) / env.size
    obs = torch.as_tensor(centres, dtype=torch.float32, device=args.device)
    value = np.where(env.walls, np.nan, v(obs).cpu().numpy().reshape(env.walls.shape))
    arrays = {"maze": env.walls, "start": env.start, "goal": env.goal, "coverage": coverage(args, data), "value": value}
    trajectories = evaluate(actor, args, args.total_steps, episodes=10)[1]
    save_arrays(folder / "picture.npz", arrays | {"trajectories": trajectories})
    metrics.save_gif(folder / "episode.gif", frames(env, trajectories[0]), env.metadata["render_fps"])


def frames(env: Pointmass, trajectory: np.ndarray) -> Iterator[np.ndarray]:
    for env.x, env.y in trajectory[~np.isnan(trajectory[:, 0])]:
        yield env.render()


def measurements(args: Args, step: int, network: nn.Sequential, replay: Replay) -> dict[str, float]:
    """The metrics of the network that trains, on 512 observations of the replay, by a random stream of their own."""
    rng = np.random.default_rng((args.seed, step, 2))
    obs = replay.sample(512, rng, args.device).obs
    row = metrics.measure(network, obs)
    if step % args.plasticity_every == 0:
        row |= metrics.measure_plasticity(
            network,
            obs,
            seed=int(rng.integers(2**31)),
            learning_rate=args.learning_rate,
            adam_eps=1e-8,
            batch_size=args.batch_size,
            updates=args.plasticity_updates,
        )
    return row


# ---- checks of the settings
AT_LEAST_1 = ("eval_every", "plasticity_every", "eval_episodes", "batch_size", "collect_steps", "l2_on_steps")
BOUNDS = dict.fromkeys(AT_LEAST_1, (1, np.inf)) | {"learning_rate": (1e-12, np.inf)}
BOUNDS |= dict.fromkeys(("gamma", "expectile", "polyak"), (0, 1))


def check(args: Args) -> None:
    """Raise UserError, saying what is wrong and what would be right, before anything is written."""
    metrics.check(args, BOUNDS)
    check_injections(args)
    refuse(args.total_steps == 0, "--offline-steps and --online-steps must not both be 0")
    if args.dataset or dataset_path(args).exists():
        read_dataset(dataset_path(args))


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
    return metrics.command(train, Args())


if __name__ == "__main__":
    sys.exit(main())
