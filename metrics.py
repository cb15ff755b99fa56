"""What is measured, and the record of a run: the only code that both agents share.

The first half is pure functions of networks, weights and activations. They change no network and,
unless a network itself draws random numbers, no random stream. They need no agent, so that you can
use them on networks of your own. A *unit* is an output channel of a Conv2d or an output neuron of a
Linear. *Weights* are the weight tensors of Conv2d and Linear, without biases and normalisation
parameters. The README lists the papers that are cited, and says which of them is "the paper".

The second half is a run's folder, log and checkpoint, which a reader may skip.
"""

import contextlib
import copy
import csv
import inspect
import io
import itertools
import json
import math
import os
import signal
import sys
import time
import typing
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
# The metrics' columns in the log, and where each is said to go when plasticity is lost: up (1) or
# down (-1).
DIRECTION_WHEN_LOST = {
    "erank": -1,
    "feature_erank": -1,
    "weight_magnitude": 1,
    "updated_units": -1,
    "dormant_units": 1,
    "plasticity": -1,
}
METRICS = tuple(DIRECTION_WHEN_LOST)
# Columns of the log that are filled only at steps where plasticity is measured.
PROBED = ("plasticity", "plasticity_fresh", "feature_erank_fresh", "dormant_units_fresh")


def finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return the tensor itself. Raises FloatingPointError if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise FloatingPointError(f"{what} is NaN or infinite, as when training has diverged")
    return tensor


def weighted_layers(network: nn.Module) -> list[nn.Module]:
    """The Conv2d and Linear layers of any module, in the order in which they were registered.

    The last one counts as the output layer, all others as hidden.
    """
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(-sum p log p) with p = s / sum(s) for the singular values s of a matrix.

    It is roughly the number of singular values that are not small (Roy & Vetterli 2007; paper
    section 2). `matrix` has shape (out, ...), and a convolution's weight is read as (out, in *
    kernel height * kernel width). The result lies between 1 and the rank of the matrix, and is 0
    for the zero matrix. Raises FloatingPointError for NaN or infinity.
    """
    matrix = finite(torch.as_tensor(matrix), "an entry of a matrix")
    matrix = matrix.detach().flatten(1).cpu().double()
    if not matrix.any():
        return 0.0
    # Scaled, so that squaring neither overflows nor underflows.
    matrix = matrix / matrix.abs().amax()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    # The singular values are the square roots of the eigenvalues of matrix @ matrix.T, far
    # cheaper than the SVD of a 512 x 3136 layer. Squaring loses the values below 1e-8 of the
    # largest, but those are noise in float32.
    eigenvalues = torch.linalg.eigvalsh(matrix @ matrix.T)
    singular_values = eigenvalues.clamp(min=0).sqrt()
    p = singular_values / singular_values.sum()
    # entr(p) is -p log p, and 0 at p = 0.
    return torch.special.entr(p).sum().exp().item()


def mean_effective_rank(network: nn.Module) -> float:
    """The mean of the effective ranks of the weights of all layers (paper section 2)."""
    eranks = [effective_rank(layer.weight) for layer in weighted_layers(network)]
    return sum(eranks) / len(eranks)


def weight_magnitude(network: nn.Module) -> float:
    """sum |w| / number of weights (paper section 2).

    Raises FloatingPointError for NaN or infinity.
    """
    total = 0.0
    count = 0
    for layer in weighted_layers(network):
        weight = finite(layer.weight.detach(), "a weight")
        total += weight.abs().sum().item()
        count += weight.numel()
    return total / count


def updated_units(network: nn.Module) -> float:
    """Percentage of hidden units whose incoming weights or bias have a non-zero gradient.

    Call it after a backward pass, which leaves the gradients of the latest training batch, L2 term
    included (paper section 2). Raises ValueError without gradients, FloatingPointError where one is
    NaN or infinite.
    """
    if gradient_norm(network) is None:
        raise ValueError("there is no gradient: run a backward pass first")
    updated = []
    for layer in weighted_layers(network)[:-1]:
        # The largest |gradient| of each unit.
        largest = layer.weight.new_zeros(len(layer.weight))
        for parameter in layer.parameters():
            # A frozen or unused layer has none.
            if parameter.grad is not None:
                of_unit = parameter.grad.reshape(len(parameter), -1).abs().amax(1)
                largest = torch.maximum(largest, of_unit)
        updated.append(finite(largest, "a gradient") > 0)
    return 100 * torch.cat(updated).double().mean().item()


def dormant_units(
    activations: torch.Tensor | list[torch.Tensor], threshold: float = 0.025
) -> float:
    """Percentage of hidden units whose mean |activation| <= threshold * the mean of their layer.

    (Sokar et al. 2023.) `activations` is a tensor per hidden layer, or one, of shape (batch, units)
    or (batch, channels, height, width). Raises FloatingPointError for NaN or infinity.
    """
    if isinstance(activations, torch.Tensor):
        activations = [activations]
    dormant = []
    for layer in activations:
        # Shape (units, everything else).
        per_unit = layer.detach().float().abs().transpose(0, 1).flatten(1)
        activity = finite(per_unit.mean(1), "an activation")
        dormant.append(activity <= threshold * activity.mean())
    return 100 * torch.cat(dormant).double().mean().item()


@torch.no_grad()
def measure_activations(network: nn.Module, obs: torch.Tensor) -> dict[str, float | None]:
    """`feature_erank`, the effective rank of what enters the last Linear, and `dormant_units`.

    Both are of the observations `obs`, of which there should be hundreds, because their number
    bounds the rank. The last Linear is the one that runs last. `dormant_units` is None without ReLU
    and LeakyReLU modules: it is defined for them alone, since a saturated tanh unit is as dead as a
    silent ReLU but has the largest |activation|.
    """
    activations = []
    features = []

    def keep_output(module, inputs, output):
        activations.append(output)

    def keep_input(module, inputs):
        features.append(inputs[0])

    # A copy, so that hooks, dropout and running means leave the network alone.
    network = copy.deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            module.register_forward_hook(keep_output)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(keep_input)
    network(obs)
    return {
        "feature_erank": effective_rank(features[-1]),
        "dormant_units": dormant_units(activations) if activations else None,
    }


def gradient_norm(network: nn.Module) -> torch.Tensor | None:
    """The norm of the gradient of the latest training batch, None before the first."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else None


def measure(network: nn.Module, obs: torch.Tensor) -> dict[str, float | None]:
    """All metrics of a network except `plasticity`, which costs more.

    The network must have hidden layers and end in a Linear. The metrics of activations are for the
    observations `obs`. `updated_units` is for the latest training batch, and None before the first.
    Raises FloatingPointError for NaN or infinity.
    """
    activations = measure_activations(network, obs)
    has_gradients = gradient_norm(network) is not None
    return {
        "erank": mean_effective_rank(network),
        "feature_erank": activations["feature_erank"],
        "weight_magnitude": weight_magnitude(network),
        "updated_units": updated_units(network) if has_gradients else None,
        "dormant_units": activations["dormant_units"],
    }


def fresh_twin(network: nn.Module, seed: int) -> nn.Module:
    """A copy of a network, with every layer initialised anew by its own `reset_parameters`.

    Raises ValueError for a parameter that no such layer owns: how to initialise it is not known. An
    initialisation that is done elsewhere, such as in `__init__`, is not repeated.
    """
    device = next(network.parameters()).device
    # On the CPU, for the same numbers on every device.
    twin = copy.deepcopy(network).cpu().eval()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # Children first, so that an initialisation by their parent stays.
        twin.apply(renew)
    return twin.to(device)


def renew(layer: nn.Module) -> None:
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    elif list(layer.parameters(recurse=False)):
        name = type(layer).__name__
        raise ValueError(f"{name} has parameters but no reset_parameters() to renew them")


@torch.enable_grad()
def plasticity(
    network: nn.Module,
    obs: torch.Tensor,
    learning_rate: float = 1e-3,
    adam_eps: float = 1e-8,
    batch_size: int = 32,
    updates: int = 100,
    seed: int = 0,
) -> float | None:
    """How fast a copy of the network learns a change of its function: 0 (not at all) to 100.

    The change is the output of another, fresh network for the observations `obs` (n, ...),
    standardised per output to mean 0 and variance 1. A copy of the network is trained by a new
    Adam, so that its output minus the network's own output becomes that change; what is frozen in
    the network stays frozen. The mean squared error of each batch is noted before its update. The
    updates, ten or more, are cut into ten parts that are as equal as they can be. The mean error of
    a part counts as 1 if it is larger, for 1 is the error of a copy that has learned nothing.
    Plasticity is 100 (1 - mean of the ten), the area above the learning curve in percent (after
    Lyle et al. 2022 and 2023, and Moalla et al. 2024).

    A copy that learns nothing gets a little more than 0, because the errors of some parts are below
    1 by chance: about 1 with 150 updates of 32 observations, 2 with 25 of 128. The value holds for
    this learning rate only. It is None if all observations are alike, for then there is no change
    to learn. Raises ValueError for fewer than ten updates.
    """
    if updates < 10:
        raise ValueError(f"{updates} updates are too few for ten parts of a learning curve")
    if (obs == obs[0]).all():
        return None
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(len(obs), (updates, batch_size), generator=generator)
    source_seed = int(torch.randint(2**31, (), generator=generator))

    learner = copy.deepcopy(network).eval()
    source = fresh_twin(network, source_seed)
    with torch.no_grad():
        before = learner(obs)
        change = source(obs)
    # Where an output never varies the change is 0; the minimum avoids a division by 0.
    spread = change.std(0, correction=0).clamp(min=1e-9)
    change = (change - change.mean(0)) / spread

    optimizer = torch.optim.Adam(learner.parameters(), learning_rate, eps=adam_eps, fused=True)
    errors = []
    for batch in batches.to(obs.device):
        learned = learner(obs[batch]) - before[batch]
        error = nn.functional.mse_loss(learned, change[batch])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.detach())

    # A copy that has diverged has learned nothing, either.
    errors = torch.stack(errors).nan_to_num(nan=math.inf, posinf=math.inf)
    part_errors = torch.stack([part.mean() for part in errors.tensor_split(10)])
    return 100 * (1 - part_errors.clamp(max=1).mean().item())


def measure_plasticity(network: nn.Module, obs: torch.Tensor, seed: int, **settings) -> dict:
    """`plasticity` of the network, and of a fresh twin, which has lost none.

    The twin's metrics of activations are measured, too, because they depend on the observations as
    much as on the network. `settings` holds the other arguments of `plasticity`.
    """
    twin = fresh_twin(network, seed)
    twin_activations = measure_activations(twin, obs)
    return {
        "plasticity": plasticity(network, obs, seed=seed, **settings),
        "plasticity_fresh": plasticity(twin, obs, seed=seed, **settings),
        "feature_erank_fresh": twin_activations["feature_erank"],
        "dormant_units_fresh": twin_activations["dormant_units"],
    }


# ---- the record of a run
LOG_EVERY = 1_000  # steps between rows of the log (paper section 2)


class UserError(Exception):
    """A user's mistake: `command` prints it as one line and returns 2."""


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


def is_of_kind(value: object, kind: object) -> bool:
    """Whether a value has the type that a setting's annotation asks for.

    An int counts as a float, but a bool does not count as an int.
    """
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return type(value) is str and value in options
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and all(is_of_kind(item, options[0]) for item in value)
    if options:  # of a union
        return any(is_of_kind(value, option) for option in options)
    if kind is float:
        return type(value) is int or isinstance(value, float)
    return type(value) is kind


def check_kinds(args, complete: bool) -> None:
    """Raise UserError for a setting that the command line would refuse, such as l2="Constant".

    With complete=False, a setting whose default depends on the environment may still be None.
    """
    for name, kind in typing.get_type_hints(type(args)).items():
        value = getattr(args, name)
        waits = value is None and getattr(type(args), name) is None
        if waits and not complete:
            continue
        if not is_of_kind(value, kind):
            expected = inspect.formatannotation(kind)
            raise UserError(f"{flag(name)} {value!r} must be {expected}")


# Each injection is a network inside the next, and Python cannot nest hundreds of them.
MAX_INJECTIONS = 100

# The range of each number that both agents have.
BOUNDS = {
    "eval_every": (1, math.inf),
    "eval_episodes": (1, math.inf),
    "plasticity_every": (1, math.inf),
    "plasticity_updates": (10, math.inf),
    "learning_rate": (1e-12, math.inf),
    "gamma": (0, 1),
    "batch_size": (1, math.inf),
    "injections": (0, MAX_INJECTIONS),
    "l2_on_steps": (1, math.inf),
}


def check(args, bounds: dict[str, tuple[float, float]]) -> None:
    """Raise UserError for a setting that is wrong in itself.

    `bounds` are the ranges of further numbers. A number without a range may be 0 or more.
    """
    check_kinds(args, complete=True)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA GPU here; use cpu")
    ranges = {**BOUNDS, **bounds}
    for name, value in vars(args).items():
        if isinstance(value, int | float):
            low, high = ranges.get(name, (0, math.inf))
            inside = low <= value <= high and value < math.inf
            if not inside:
                raise UserError(f"{flag(name)} {value} must lie in {low}..{high}")


def run_folder(args) -> Path:
    """runs/<env>__<variant>__seed<k>; the variant names the remedies, as in "l2-constant"."""
    remedies = []
    if args.l2 != "none":
        remedies.append(f"l2-{args.l2}")
    if args.layer_norm != "none":
        remedies.append(f"layer-norm-{args.layer_norm}")
    if args.leaky_relu:
        remedies.append("leaky-relu")
    if args.injections and args.injection_trigger:
        remedies.append(f"injection-{args.injections}-{args.injection_trigger}")
    elif args.injections:
        remedies.append(f"injection-{args.injections}")
    variant = "+".join(remedies) or "standard"
    return Path("runs") / f"{args.env.replace('/', '-')}__{variant}__seed{args.seed}"


@contextlib.contextmanager
def locked(path: Path, of: Path, timeout: float) -> Iterator[None]:
    """Hold a lock on `of` by means of the lock file `path`.

    Raises UserError, saying how to break the lock, if it is not free within `timeout` seconds.
    """
    lock = filelock.FileLock(path)
    try:
        held = lock.acquire(timeout=timeout)
    except filelock.Timeout:
        advice = f"if no run is using it, here or on another machine, delete {path}"
        raise UserError(f"{of} is in use by another process; {advice}") from None
    with held:
        yield


class Run:
    """A run's folder with config.json, log.csv and checkpoint.pt, and how far the run has come.

    Training is a sequence of intervals of `eval_every` steps. Each starts with a fresh environment
    and a fresh random stream, and ends with a checkpoint. So a run that was killed can continue
    exactly, and a checkpoint needs no state of an emulator or a generator (as in dqn_zoo).

    `checkpoint` is the one that was found when the run was entered, None in a new run. Entering the
    run locks its folder, leaving it unlocks it. Raises UserError if the folder belongs to another
    run, is in use or is damaged.
    """

    def __init__(self, folder: Path, settings: dict, total_steps: int, eval_every: int):
        self.folder = folder
        # As they will be read from config.json: JSON makes lists of tuples.
        self.settings = json.loads(json.dumps(settings))
        self.total_steps = total_steps
        self.eval_every = eval_every
        self.refuse_other_settings()

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        # The lock is released, and the number of threads, which `train` may change, is put back:
        # here on an error, else by __exit__.
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder / ".lock", of=self.folder, timeout=0))
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            self.open()
            self.undo = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.undo.close()

    def open(self) -> None:
        content = json.dumps(self.settings, indent=2) + "\n"
        replace_file(self.folder / "config.json", content.encode())
        self.checkpoint = self.read_checkpoint()
        self.step = 0
        # The log as it was at the checkpoint: without later rows, whatever became of its file.
        self.log_text = ""
        if self.checkpoint is not None:
            self.step = self.checkpoint["step"]
            self.log_text = self.checkpoint["log"]
        replace_file(self.folder / "log.csv", self.log_text.encode())
        self.finished = self.step == self.total_steps
        if self.finished:
            print(f"{self.folder} is finished; nothing is left to do.")

    def refuse_other_settings(self) -> None:
        path = self.folder / "config.json"
        if not path.exists() and not (self.folder / "checkpoint.pt").exists():
            return  # a new run
        try:
            before = json.loads(path.read_text())
            if not isinstance(before, dict):
                raise TypeError
        except (OSError, ValueError, TypeError) as error:
            reason = type(error).__name__
            advice = f"put it back, or delete {self.folder} to start over"
            raise UserError(f"{path} cannot be read ({reason}): {advice}") from error

        now = self.settings
        differences = []
        for name in {**now, **before}:
            old = before.get(name)
            new = now.get(name)
            if old != new and name != "device":  # on another device it continues, too
                differences.append(f"{name} {old} (now {new})")
        if differences:
            what = f"holds a run with other settings: {', '.join(differences)}"
            raise UserError(f"{self.folder} {what}; move it away, or start in another folder")

    def read_checkpoint(self) -> dict | None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # checks what torch.load does not
                    raise zipfile.BadZipFile
            return torch.load(path, map_location="cpu", weights_only=True)
        except OSError:  # such as a missing permission: the file itself may be whole
            raise
        # A damaged file makes torch raise errors of all kinds.
        except Exception as error:
            reason = type(error).__name__
            raise UserError(f"{path} cannot be read ({reason}); delete it to start over") from error

    def refuse_changed_file(self, path: Path) -> None:
        """Raise UserError for a file that is not what it was when the checkpoint was saved."""
        checkpoint = self.folder / "checkpoint.pt"
        advice = f"put it back, or delete {checkpoint} to start over"
        raise UserError(f"{path} has changed since the latest checkpoint: {advice}")

    def steps(self) -> Iterator[int]:
        """The steps that are left, under a progress bar."""
        with tqdm(total=self.total_steps, initial=self.step, unit="step", disable=None) as self.bar:
            self.row_step = self.step
            self.row_time = time.perf_counter()
            for step in range(self.step + 1, self.total_steps + 1):
                yield step
                self.bar.update()

    def interval_begins(self, step: int) -> bool:
        return (step - 1) % self.eval_every == 0

    def interval_ends(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total_steps

    def row_due(self, step: int) -> bool:
        """Every 1,000 steps, and at the end of an interval, with its evaluation."""
        return step % LOG_EVERY == 0 or self.interval_ends(step)

    def log(self, row: dict) -> None:
        """Write a row of numbers, scalar tensors and texts; None is an empty cell.

        The first row decides the columns. Raises FloatingPointError for NaN or infinity.
        """
        numbers = {}
        for name, value in row.items():
            if isinstance(value, torch.Tensor):
                value = value.item()
            if isinstance(value, float) and not math.isfinite(value):
                advice = "Move its folder away, and start again with other settings"
                raise FloatingPointError(f"training has diverged: {name} is {value}. {advice}")
            numbers[name] = value
        now = time.perf_counter()
        speed = (row["step"] - self.row_step) / (now - self.row_time)
        self.row_step = row["step"]
        self.row_time = now
        numbers["steps_per_second"] = speed

        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        if not self.log_text:
            writer.writerow(numbers)
        cells = numbers.values()
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
        self.log_text += lines.getvalue()
        with open(self.folder / "log.csv", "a", newline="") as file:
            file.write(lines.getvalue())
        returns = {}
        for name, value in numbers.items():
            if "return" in name and value is not None:
                returns[name] = value
        self.bar.set_postfix(returns)

    def save(self, state: dict) -> None:
        """Save a checkpoint, which the next start finds as `checkpoint`."""
        # If the log's file was edited or deleted meanwhile, it is made whole again.
        log = self.log_text.encode()
        path = self.folder / "log.csv"
        if not path.exists() or path.read_bytes() != log:
            replace_file(path, log)
        # In memory first, because on a full disk torch.save raises errors of its own.
        content = io.BytesIO()
        torch.save({**state, "log": self.log_text}, content)
        replace_file(self.folder / "checkpoint.pt", content.getvalue())


def replace_file(path: Path, content: bytes) -> None:
    """Write or replace a file. If that fails or the process is killed, it is as it was before."""
    # A temporary file that a killed run has left behind is overwritten.
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_gif(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Write pictures as a GIF of at most 60 s, mostly below 2 MB. A failure ends no run."""
    try:
        step = max(1, fps // 25)  # 25 frames a second are enough
        pictures = []
        for frame in itertools.islice(frames, 0, 60 * fps, step):
            pictures.append(Image.fromarray(frame).quantize(64))
        first, *rest = pictures
        # Leave out frames until it is small enough.
        for every in (1, 2, 4, 8):
            content = io.BytesIO()
            kept = rest[every - 1 :: every]
            duration = 1000 * step * every // fps
            options = {"save_all": True, "append_images": kept, "duration": duration, "loop": 0}
            first.save(content, "GIF", **options)
            if content.tell() < 2e6:
                break
        replace_file(path, content.getvalue())
    except Exception as error:  # noqa: BLE001 - whatever a third-party environment raises
        print(f"{path} was not written: {type(error).__name__} {error}")


def command(train: Callable, defaults: object) -> int:
    """Train with the command line's settings.

    Returns the exit code. 0: done. Otherwise, after one line that says what happened, 1: a fault on
    the way; 2: a user's mistake; 130: stopped. A flag that tyro refuses ends in its SystemExit(2).
    """
    # SIGTERM, which Slurm sends, stops a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        # `--help | head -1` ends without a word.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if sys.stderr is None:  # it was closed, and the progress bar needs one
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    resumption = "the same command continues from the latest checkpoint, or else starts over."
    try:
        settings = (tyro.conf.FlagCreatePairsOff,)
        folder = train(tyro.cli(type(defaults), default=defaults, config=settings))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. Once that is mended, {resumption}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped: {resumption}", file=sys.stderr)
        return 130
    print(f"Done: {folder}/log.csv. Draw it with: python plot.py {folder}")
    return 0
