"""What is measured, and the record of a run: the only code that both agents share. It knows no agent.

What is measured: pure functions of networks, weights and activations, which change no network and no random stream. A
*unit* is an output channel of a Conv2d or an output neuron of a Linear. *Weights* are the weight tensors of Conv2d and
Linear, without biases and normalisation parameters. The README lists the papers that are cited.
"""

import copy
import csv
import io
import itertools
import json
import math
import os
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock
import numpy as np
import torch
import tyro
from PIL import Image
from torch import nn
from tqdm import tqdm

# ---- what is measured
# The metrics' columns in the log, and where each goes when plasticity is lost: up (1) or down (-1).
DIRECTION_WHEN_LOST = {
    "erank": -1,
    "feature_erank": -1,
    "weight_magnitude": 1,
    "updated_units": -1,
    "dormant_units": 1,
    "plasticity": -1,
}
METRICS = tuple(DIRECTION_WHEN_LOST)
FRESH_METRICS = ("plasticity_fresh", "feature_erank_fresh", "dormant_units_fresh")


def finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor itself. Raises FloatingPointError if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"{what} is NaN or infinite, as when training has diverged")
    return tensor


def weighted_layers(network: nn.Module) -> list[nn.Module]:
    """The Conv2d and Linear layers of any module, in the order in which they were registered.

    The last one counts as the output layer, all others as hidden.
    """
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(-sum p log p) with p = s / sum(s) for the singular values s (Roy & Vetterli 2007; paper section 2).

    `matrix` has shape (out, ...); a convolution's weight is read as (out, in * kernel height * kernel width). Between 1
    and the rank of the matrix, and 0 for the zero matrix. Raises FloatingPointError for NaN or infinity.
    """
    matrix = finite(torch.as_tensor(matrix), "an entry of a matrix").detach().flatten(1).cpu().double()
    scale = matrix.abs().amax() if matrix.numel() else 0
    if scale == 0:
        return 0.0
    # The singular values are the roots of the eigenvalues of the smaller Gram matrix, far cheaper than the SVD of a
    # 512 x 3136 layer. Squaring loses those below 1e-8 of the largest: they are noise in float32 weights.
    matrix = matrix / scale  # so that squaring neither overflows nor underflows
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()  # entr(p) = -p log p, and 0 at p = 0


def weight_magnitude(network: nn.Module) -> float:
    """sum |w| / number of weights (paper section 2). Raises FloatingPointError for NaN or infinity."""
    weights = [finite(layer.weight.detach(), "a weight") for layer in weighted_layers(network)]
    return sum(w.abs().sum().item() for w in weights) / sum(w.numel() for w in weights)


def updated_units(network: nn.Module) -> float:
    """Percentage of hidden units with a non-zero gradient in their incoming weights or bias (paper section 2).

    To be called after a backward pass, which leaves the gradients of the latest training batch, L2 term included.
    Raises ValueError without gradients, FloatingPointError where one is NaN or infinite.
    """
    largest = []  # |gradient| of each unit
    for layer in weighted_layers(network)[:-1]:
        gradients = [p.grad.reshape(len(p), -1) for p in layer.parameters() if p.grad is not None]
        if not gradients:
            raise ValueError("updated_units: a hidden layer has no gradient; run a backward pass first")
        largest.append(torch.cat(gradients, 1).abs().amax(1))  # (units, incoming weights and bias) to (units,)
    return 100 * (finite(torch.cat(largest), "a gradient") > 0).double().mean().item()


def dormant_units(activations: torch.Tensor | Iterable[torch.Tensor], threshold: float = 0.025) -> float:
    """Percentage of hidden units whose mean |activation| is at most `threshold` of the layer's (Sokar et al. 2023).

    `activations`: a tensor per hidden layer, or one, of shape (batch, units) or (batch, channels, height, width).
    Raises FloatingPointError for NaN or infinity.
    """
    dormant = []
    for layer in [activations] if isinstance(activations, torch.Tensor) else activations:
        per_unit = finite(layer.detach().float().abs().transpose(0, 1).flatten(1).mean(1), "an activation")
        dormant.append(per_unit <= threshold * per_unit.mean())
    return 100 * torch.cat(dormant).double().mean().item()


@torch.no_grad()
def measure_activations(network: nn.Module, obs: torch.Tensor) -> dict[str, float | None]:
    """`feature_erank`, of what enters the last Linear layer, and `dormant_units`, for the observations `obs`.

    There should be hundreds of observations, for their number bounds the effective rank. Dormant units are None without
    ReLU or LeakyReLU modules: a saturated tanh unit is as dead as a silent ReLU, but has the largest |activation|.
    """
    activations = []
    features = []

    def keep_output(module, inputs, output):
        activations.append(output)

    def keep_input(module, inputs):
        features.append(inputs[0])

    linear_layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [linear_layers[-1].register_forward_pre_hook(keep_input)]
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            hooks.append(module.register_forward_hook(keep_output))
    network(obs)
    for hook in hooks:
        hook.remove()
    return {
        "feature_erank": effective_rank(features[-1]),
        "dormant_units": dormant_units(activations) if activations else None,
    }


@torch.no_grad()
def measure(network: nn.Module, obs: torch.Tensor) -> dict[str, float | None]:
    """All metrics of a network except `plasticity`, which costs more; and the norm of its gradient.

    Those of gradients are for the latest training batch, and absent before the first. Raises FloatingPointError for NaN
    or infinity.
    """
    eranks = [effective_rank(layer.weight) for layer in weighted_layers(network)]
    metrics = {"erank": sum(eranks) / len(eranks), "weight_magnitude": weight_magnitude(network)}
    metrics |= measure_activations(network, obs)
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if gradients:
        metrics |= {"updated_units": updated_units(network), "grad_norm": nn.utils.get_total_norm(gradients).item()}
    return metrics


def fresh_twin(network: nn.Module, seed: int) -> nn.Module:
    """A copy of a network, with every layer initialised anew by its own `reset_parameters`.

    Raises ValueError for a parameter that no such layer owns, for nobody can say here how it was initialised.
    """
    twin = copy.deepcopy(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in twin.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            elif list(layer.parameters(recurse=False)):
                raise ValueError(f"{type(layer).__name__} has parameters, but no reset_parameters() to make them fresh")
    return twin


def plasticity(
    network: nn.Module,
    obs: torch.Tensor,
    learning_rate: float = 1e-3,
    adam_eps: float = 1e-8,
    batch_size: int = 32,
    updates: int = 100,
    seed: int = 0,
) -> float | None:
    """How fast a copy of the network learns a change of its function: 0 (not at all) to 100 (at once).

    The change c is what another, freshly initialised network outputs for the observations `obs`, standardised per
    output to mean 0 and variance 1. Adam, its state fresh, trains the copy so that its output minus the network's
    equals c. The error of a batch is taken before its update. The updates, a multiple of ten, are cut into ten parts;
    the mean error of each is capped at 1, that of learning nothing, and the score is 100 (1 - mean of the ten): the
    area above the learning curve (after Lyle et al. 2022, 2023, Moalla et al. 2024). None if all observations are
    alike, for then there is no change to learn.
    """
    if (obs == obs[0]).all():
        return None
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(obs), (updates, batch_size), generator=generator).to(obs.device)
    source = fresh_twin(network, seed=int(torch.randint(2**31, (), generator=generator)))
    learner = copy.deepcopy(network)
    with torch.no_grad():
        before = learner(obs)
        change = source(obs)
    change = (change - change.mean(0)) / change.std(0, correction=0).clamp(min=1e-9)
    optimizer = torch.optim.Adam(learner.parameters(), learning_rate, eps=adam_eps, fused=True)
    errors = []
    for batch in batches:
        error = nn.functional.mse_loss(learner(obs[batch]) - before[batch], change[batch])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.detach())
    # A copy that diverges has learned nothing.
    curve = torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf).view(10, -1)
    return 100 * (1 - curve.mean(1).clamp(max=1).mean().item())


def measure_plasticity(network: nn.Module, obs: torch.Tensor, seed: int, **probe) -> dict[str, float | None]:
    """`plasticity`, and what depends on the observations, too, of a freshly initialised twin: the level to compare with.

    `probe`: the arguments of `plasticity`.
    """
    twin = fresh_twin(network, seed)
    activations = measure_activations(twin, obs)
    return {
        "plasticity": plasticity(network, obs, seed=seed, **probe),
        "plasticity_fresh": plasticity(twin, obs, seed=seed, **probe),
        "feature_erank_fresh": activations["feature_erank"],
        "dormant_units_fresh": activations["dormant_units"],
    }


# ---- the record of a run
LOG_EVERY = 1_000  # steps between rows of the log (paper section 2)


class CSVLog:
    """A CSV file of fixed columns, flushed at every row. What a killed run wrote behind byte `offset` is cut off."""

    def __init__(self, path: str | Path, columns: Iterable[str], offset: int = 0):
        self.file = open(path, "r+" if offset else "w", buffering=1, newline="")  # noqa: SIM115 - open for the run
        if self.file.seek(0, os.SEEK_END) < offset:
            raise OSError(f"{path} has lost rows since the last checkpoint, which needs all of them")
        self.file.truncate(offset)
        self.file.seek(offset)
        self.writer = csv.DictWriter(self.file, list(columns), lineterminator="\n")
        if not offset:
            self.writer.writeheader()

    def write(self, row: dict) -> None:
        """Append a row. Raises ValueError for an unknown column."""
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


class UserError(Exception):
    """A user's mistake: `command` prints it as one line and returns 2."""


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise UserError(message)


def check(args, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise UserError unless every number is finite and within its bounds, by default 0 or more; and the device."""
    refuse(args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: no CUDA GPU here; use cpu")
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            low, high = bounds.get(name, (0, math.inf))
            inside = low <= value <= high and value < math.inf
            refuse(not inside, f"--{name.replace('_', '-')} {value} must lie in {low}..{high}")


def run_folder(args) -> Path:
    """runs/<env>__<variant>__seed<k>; the variant names the remedies in use, as in "layer-norm+injection-2"."""
    parts = [f"l2-{args.l2}"] if args.l2 != "none" else []
    parts += [f"layer-norm-{args.layer_norm}"] * (args.layer_norm != "none") + ["leaky-relu"] * args.leaky_relu
    if args.injections:
        parts.append(f"injection-{args.injections}" + (f"-{args.injection_trigger}" if args.injection_trigger else ""))
    return Path("runs") / f"{args.env.replace('/', '-')}__{'+'.join(parts) or 'standard'}__seed{args.seed}"


class Run:
    """A run's folder with config.json, log.csv and checkpoint.pt, and how far the run has come.

    Training is a sequence of intervals, each from a fresh environment and random stream to a checkpoint: it can go on
    exactly, and a checkpoint needs no state of an emulator or generator (as in dqn_zoo). `state` is what the last
    checkpoint holds by name, {} in a new run. Raises UserError if the folder is another run's, in use or damaged.
    """

    def __init__(self, folder: Path, settings: dict, steps: int, eval_every: int, columns: Iterable[str]):
        self.folder, self.steps, self.eval_every = folder, steps, eval_every
        self._compare(settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(folder / ".lock", is_singleton=True)  # a notebook may open its run again
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"{folder} is in use by another process") from None
        replace_file(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        self.state = self._read_checkpoint()
        self.step = self.state.get("step", 0)
        self.finished = self.step == steps
        if self.finished:
            print(f"{folder} is finished; nothing is left to do.")
        self.csv = CSVLog(folder / "log.csv", [*columns, "steps_per_second"], self.state.get("log_bytes", 0))

    def _compare(self, settings: dict) -> None:
        path, settings = self.folder / "config.json", json.loads(json.dumps(settings))
        there = json.loads(path.read_text()) if path.exists() else settings
        names = [name for name in settings | there if settings.get(name) != there.get(name)]
        shown = ", ".join(f"{name} {there.get(name)} (now {settings.get(name)})" for name in names)
        refuse(names, f"{self.folder} holds a run with other settings: {shown}; move it away or start elsewhere")

    def _read_checkpoint(self) -> dict:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return {}
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # checks what torch.load does not
                    raise zipfile.BadZipFile
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch raise all sorts
            raise UserError(f"{path} cannot be read ({type(error).__name__}); delete it to start over") from error

    def intervals(self) -> Iterator[tuple[int, Iterator[int]]]:
        """The intervals that are left, under a progress bar: the steps done before, and the steps of each."""
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=None) as self.bar:
            self.latest = self.step, time.perf_counter()  # of the latest row
            for start in range(self.step, self.steps, self.eval_every):
                self.end = min(start + self.eval_every, self.steps)
                yield start, self._steps(start)

    def _steps(self, start: int) -> Iterator[int]:
        for step in range(start + 1, self.end + 1):
            yield step
            self.bar.update()

    def row_due(self, step: int) -> bool:
        """Every 1,000 steps, and at the end of an interval, with its evaluation."""
        return step % LOG_EVERY == 0 or step == self.end

    def log(self, row: dict) -> None:
        """Write a row of numbers and scalar tensors. Raises FloatingPointError for NaN or infinity."""
        row = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in row.items()}
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            raise FloatingPointError(f"training has diverged: {row}")
        (previous, then), (step, now) = self.latest, (row["step"], time.perf_counter())
        self.latest = step, now
        self.csv.write(row | {"steps_per_second": (step - previous) / (now - then)})
        self.bar.set_postfix({name: x for name, x in row.items() if "return" in name and x is not None})

    def save(self, step: int, **parts) -> None:
        """Save the parts by name: what has a state_dict by that, the rest as it is."""
        state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
        os.fsync(self.csv.file.fileno())  # the rows are on the disk before the checkpoint that counts on them
        state |= {"step": step, "log_bytes": self.csv.file.tell()}
        file = io.BytesIO()  # on a full disk torch.save raises errors of its own, a plain write says what is wrong
        torch.save(state, file)
        replace_file(self.folder / "checkpoint.pt", file.getvalue())

    def load(self, **parts) -> None:
        """Give the parts their saved state back; in a new run they keep what they have."""
        for name, part in parts.items() if self.state else ():
            part.load_state_dict(self.state[name])


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, whenever the process is killed or the disk is full."""
    temporary = path.with_suffix(".tmp")  # one left over is overwritten
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_gif(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write pictures, grey or RGB, as a GIF of at most 60 s, mostly below 2 MB. No failure of it ends a run."""
    try:
        step = max(1, fps // 25)  # 25 frames a second are enough
        first, *rest = (Image.fromarray(frame).quantize(64) for frame in itertools.islice(frames, 0, 60 * fps, step))
        for every in (1, 2, 4, 8):  # leave out frames until it is small enough
            content, kept, duration = io.BytesIO(), rest[every - 1 :: every], 1000 * step * every // fps
            first.save(content, "GIF", save_all=True, append_images=kept, duration=duration, loop=0)
            if content.tell() < 2e6:
                break
        replace_file(path, content.getvalue())
    except Exception as error:  # noqa: BLE001 - whatever a third-party environment raises
        print(f"{path} is left out: {error}")


def command(train: Callable, defaults: object) -> int:
    """Train with the command line's settings. Returns 0, or after one line 1: a fault, 2: a mistake, 130: stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    go_on = "the same command goes on from the last checkpoint, or starts over if there is none yet."
    try:
        folder = train(tyro.cli(type(defaults), default=defaults, config=(tyro.conf.FlagCreatePairsOff,)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        advice = f"When that is mended, {go_on}" if isinstance(error, OSError) else "Start anew with other settings."
        print(f"error: {error}. {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped: {go_on}", file=sys.stderr)
        return 130
    print(f"Done: {folder}/log.csv. Draw it with: python plot.py {folder}")
    return 0
