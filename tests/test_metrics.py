"""Closed forms of every metric, and the log."""

import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

import metrics


def matrix_with(singular_values, rows, columns, seed=0):
    """A float64 matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    k = len(singular_values)
    left, _ = np.linalg.qr(rng.normal(size=(rows, k)))
    right, _ = np.linalg.qr(rng.normal(size=(columns, k)))
    return torch.tensor(left * singular_values @ right.T)


def entropy_rank(singular_values):
    p = np.array(singular_values, dtype=np.longdouble) / np.sum(singular_values, dtype=np.longdouble)
    p = p[p > 0]
    return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_effective_rank_of_the_identity_is_its_size(n):
    assert metrics.effective_rank(torch.eye(n)) == pytest.approx(n, rel=1e-9)


def test_effective_rank_closed_forms():
    assert metrics.effective_rank(torch.outer(torch.arange(1.0, 6), torch.arange(2.0, 9))) == pytest.approx(1, abs=1e-4)
    assert metrics.effective_rank(torch.zeros(3, 5)) == 0
    # p = (3/4, 1/4): entropy 2 log 2 - 3/4 log 3
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75, rel=1e-9)
    orthogonal = matrix_with(np.ones(10), 10, 40)
    assert metrics.effective_rank(orthogonal) == pytest.approx(10, rel=1e-9)
    assert metrics.effective_rank(orthogonal.T) == pytest.approx(10, rel=1e-9)


def test_effective_rank_reads_a_convolution_as_out_by_everything_else():
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = entropy_rank(np.linalg.svd(weight.reshape(8, 36).double().numpy(), compute_uv=False))
    assert metrics.effective_rank(weight) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6, 1e7])
def test_effective_rank_from_the_gram_matrix_is_precise_on_ill_conditioned_matrices(condition):
    singular_values = np.geomspace(1, 1 / condition, 60)
    assert metrics.effective_rank(matrix_with(singular_values, 60, 200)) == pytest.approx(
        entropy_rank(singular_values), rel=1e-6
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_effective_rank_does_not_depend_on_the_scale(scale):
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    assert metrics.effective_rank(matrix * scale) == pytest.approx(metrics.effective_rank(matrix), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="NaN|infin"):
        metrics.effective_rank(matrix)
    with pytest.raises(ValueError, match="NaN|infin"):
        metrics.dormant_units(matrix)
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    network(torch.ones(1, 3)).sum().backward()
    network[0].weight.grad[1, 2] = bad
    with pytest.raises(ValueError, match="NaN|infin"):
        metrics.updated_units(network)
    network[0].weight.data[1, 2] = bad
    with pytest.raises(ValueError, match="NaN|infin"):
        metrics.weight_magnitude(network)


def test_weight_magnitude_counts_the_weights_of_all_layers_alike_and_nothing_else():
    network = nn.Sequential(nn.Conv2d(1, 1, 2), nn.LayerNorm((1, 1, 1)), nn.Flatten(), nn.Linear(1, 2))
    for parameter in network.parameters():
        nn.init.constant_(parameter, 100.0)
    network[0].weight.data = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]])
    network[3].weight.data = torch.tensor([[3.0], [-3.0]])
    assert metrics.weight_magnitude(network) == pytest.approx((1 + 1 + 2 + 2 + 3 + 3) / 6)


def relu_network_with_one_dead_unit_of_four():
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.constant_(network[0].weight, 1.0)
    network[0].bias.data = torch.tensor([0.0, 1.0, 2.0, -100.0])
    return network


def test_updated_units_counts_hidden_units_with_a_gradient():
    network = relu_network_with_one_dead_unit_of_four()
    with pytest.raises(ValueError, match="backward"):
        metrics.updated_units(network)
    network(torch.ones(5, 2)).square().mean().backward()
    assert metrics.updated_units(network) == 75.0
    network[0].bias.grad[3] = 1e-30  # the bias alone is enough
    assert metrics.updated_units(network) == 100.0
    network[2].weight.grad.zero_()  # the output layer does not count
    network[2].bias.grad.zero_()
    assert metrics.updated_units(network) == 100.0


def test_dormant_units_closed_form():
    activations = torch.tensor([[1.0, -1.0, 0.0, 0.049], [3.0, 3.0, 0.0, 0.049]])  # means 2, 2, 0, 0.049; layer 1.01225
    assert metrics.dormant_units(activations) == 25.0
    assert metrics.dormant_units(activations, threshold=0.05) == 50.0
    maps = torch.zeros(2, 3, 5, 5)
    maps[:, 0] = 1.0
    assert metrics.dormant_units(maps) == pytest.approx(200 / 3)
    assert metrics.dormant_units([activations, maps]) == pytest.approx(300 / 7)
    assert metrics.dormant_units(torch.zeros(4, 6)) == 100.0


def test_measure_gives_every_metric_and_leaves_the_network_and_the_random_streams_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs = torch.randn(16, 2)
    network(inputs).square().mean().backward()
    before = [p.detach().clone() for p in network.parameters()] + [p.grad.clone() for p in network.parameters()]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy()
    row = metrics.measure(network, inputs)
    assert tuple(sorted(row)) == tuple(sorted(metrics.METRICS))
    with torch.no_grad():
        features = network[:4](inputs)
    assert row["feature_erank"] == pytest.approx(metrics.effective_rank(features))
    eranks = [metrics.effective_rank(network[i].weight) for i in (0, 2, 4)]
    assert row["erank"] == pytest.approx(sum(eranks) / 3)
    after = [p.detach() for p in network.parameters()] + [p.grad for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(streams[0], torch.get_rng_state()) and (streams[1] == np.random.get_state()[1]).all()
    assert sorted(metrics.measure(network, None)) == ["erank", "weight_magnitude"]


def test_log_is_flushed_leaves_gaps_empty_and_continues_at_an_offset(tmp_path):
    path = tmp_path / "log.csv"
    log = metrics.CSVLog(path, ["step", "loss", "erank"])
    log.write({"step": 1, "erank": 2.0})
    assert path.read_text() == "step,loss,erank\n1,,2\n"  # readable while the run goes on
    offset = log.sync()
    log.write({"step": 2, "loss": 1 / 3})
    log.file.write("3,0.")  # a row cut short by a kill
    log.close()
    log = metrics.CSVLog(path, ["step", "loss", "erank"], offset)
    log.write({"step": 2, "loss": 1 / 3, "erank": None})
    log.close()
    with open(path) as file:
        assert list(csv.reader(file)) == [["step", "loss", "erank"], ["1", "", "2"], ["2", "0.333333", ""]]
    with pytest.raises(OSError, match="lost rows"):
        metrics.CSVLog(path, ["step", "loss", "erank"], path.stat().st_size + 1)
    assert len(path.read_text().splitlines()) == 3
    with pytest.raises(ValueError):
        metrics.CSVLog(path, ["step"]).write({"step": 1, "typo": 2})
