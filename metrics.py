"""Plasticity metrics and the CSV log: the only code that both agents share.

A *unit* is an output channel of a Conv2d or an output neuron of a Linear. *Weights* are the weight tensors of Conv2d
and Linear, without biases and normalisation parameters. Nothing here draws a random number or changes a network, so
measuring never disturbs training.

    Dohare et al. 2024    Loss of plasticity in deep continual learning (Nature 632)
    Roy & Vetterli 2007   The effective rank: a measure of effective dimensionality (EUSIPCO)
    Sokar et al. 2023     The dormant neuron phenomenon in deep reinforcement learning (ICML)
"""

import csv
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

METRICS = ("erank", "feature_erank", "weight_magnitude", "updated_units", "dormant_units")  # their columns in the log
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Tanh)


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(-sum p log p) with p = s / sum(s) for the singular values s (Roy & Vetterli 2007; paper section 2).

    `matrix` has shape (out, ...); a convolution's weight is read as (out, in * kernel height * kernel width). Returns a
    number between 1 and the rank of the matrix, and 0 for the zero matrix. Raises ValueError for NaN or infinity.
    """
    matrix = torch.as_tensor(matrix).detach().flatten(1).cpu().double()
    scale = matrix.abs().amax().item() if matrix.numel() else 0.0
    if not math.isfinite(scale):
        raise ValueError("effective_rank: the matrix holds NaN or infinity")
    if scale == 0:
        return 0.0
    # The singular values are the roots of the eigenvalues of the smaller Gram matrix, far cheaper than the SVD of a
    # 512 x 3136 layer. Squaring loses those below 1e-8 of the largest: they are noise in float32 weights.
    matrix = matrix / scale  # so that squaring neither overflows nor underflows
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum()
    return torch.special.entr(p).sum().exp().item()  # entr(p) = -p log p, and 0 at p = 0


def weighted_layers(network: nn.Module) -> list[nn.Module]:
    """The Conv2d and Linear layers from input to output. The last one is the output layer, the others are hidden."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def weight_magnitude(network: nn.Module) -> float:
    """sum |w| / number of weights (paper section 2). Raises ValueError for NaN or infinity."""
    weights = [layer.weight.detach() for layer in weighted_layers(network)]
    magnitude = sum(w.abs().sum().item() for w in weights) / sum(w.numel() for w in weights)
    if not math.isfinite(magnitude):
        raise ValueError("weight_magnitude: a weight is NaN or infinite")
    return magnitude


def updated_units(network: nn.Module) -> float:
    """Percentage of hidden units with a non-zero gradient in their incoming weights or bias (paper section 2).

    To be called after a backward pass, which leaves the gradients of the latest training batch, L2 term included.
    Raises ValueError without gradients, or where one is NaN or infinite.
    """
    updated, units = 0, 0
    for layer in weighted_layers(network)[:-1]:
        parameters = [p for p in (layer.weight, layer.bias) if p is not None and p.grad is not None]
        gradients = [p.grad.reshape(len(p), -1) for p in parameters]  # (units, incoming weights), (units, 1)
        if not gradients:
            raise ValueError("updated_units: a hidden layer has no gradient; run a backward pass first")
        largest = torch.cat(gradients, 1).abs().amax(1)
        if not torch.isfinite(largest).all():
            raise ValueError("updated_units: a gradient is NaN or infinite")
        updated += int((largest > 0).sum())
        units += len(largest)
    return 100.0 * updated / units


def dormant_units(activations: torch.Tensor | Iterable[torch.Tensor], threshold: float = 0.025) -> float:
    """Percentage of hidden units whose mean |activation| is at most `threshold` of the layer's (Sokar et al. 2023).

    `activations`: a tensor per hidden layer, or one tensor, of shape (batch, units) or (batch, channels, height,
    width). Raises ValueError for NaN or infinity.
    """
    layers = [activations] if isinstance(activations, torch.Tensor) else list(activations)
    dormant, units = 0, 0
    for layer in layers:
        per_unit = layer.detach().float().abs().transpose(0, 1).flatten(1).mean(1)
        if not torch.isfinite(per_unit).all():
            raise ValueError("dormant_units: an activation is NaN or infinite")
        dormant += int((per_unit <= threshold * per_unit.mean()).sum())
        units += len(per_unit)
    return 100.0 * dormant / units


@torch.no_grad()
def hidden_activations(network: nn.Sequential, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output of every activation function of a sequential network, from input to output."""
    outputs = []
    for layer in network:
        inputs = layer(inputs)
        if isinstance(layer, ACTIVATIONS):
            outputs.append(inputs)
    return outputs


def measure(network: nn.Sequential, inputs: torch.Tensor | None) -> dict[str, float]:
    """All metrics of the network that trains; only those of its weights while there is no training batch `inputs` yet.

    `inputs`: the observations of the latest training batch, whose gradients the network still holds.
    """
    eranks = [effective_rank(layer.weight) for layer in weighted_layers(network)]
    metrics = {"erank": sum(eranks) / len(eranks), "weight_magnitude": weight_magnitude(network)}
    if inputs is not None:
        activations = hidden_activations(network, inputs)
        metrics["feature_erank"] = effective_rank(activations[-1])  # (batch, width), what enters the last Linear
        metrics["updated_units"] = updated_units(network)
        metrics["dormant_units"] = dormant_units(activations)
    return metrics


class CSVLog:
    """A CSV file with fixed columns, every row flushed as it is written; a column that a row lacks stays empty.

    `offset` continues a file from that byte on: what a killed run wrote behind its last checkpoint is cut off.
    """

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
        """Append one row. Raises ValueError for an unknown column, OSError when the disk is full."""
        self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})

    def sync(self) -> int:
        """Bring the rows to the disk and return the file's length in bytes, for a checkpoint."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()
