"""Closed forms of every metric, and the record of a run: intervals, log, checkpoint, refusals."""

import math
import random
from unittest import mock

import filelock
import numpy as np
import pytest
import torch
from conftest import SAVE_GIF, rows
from PIL import Image
from torch import nn

import metrics


# ---- effective rank
def matrix_with(singular_values, rows, columns):
    """A float64 matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(0)
    count = len(singular_values)
    left = np.linalg.qr(rng.normal(size=(rows, count)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, count)))[0]
    return torch.tensor(left * singular_values @ right.T)


def entropy_rank(singular_values):
    values = np.array(singular_values, dtype=np.longdouble)
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def test_effective_rank_erank_in_closed_form():
    for n in (1, 2, 7, 64):
        assert metrics.effective_rank(torch.eye(n)) == pytest.approx(n, rel=1e-9)
    outer_product = torch.outer(torch.arange(1.0, 6), torch.arange(2.0, 9))
    assert metrics.effective_rank(outer_product) == pytest.approx(1, abs=1e-4)
    assert metrics.effective_rank(torch.zeros(3, 5)) == 0
    # p = (3/4, 1/4): entropy 2 log 2 - 3/4 log 3
    diagonal = torch.diag(torch.tensor([3.0, 1.0]))
    assert metrics.effective_rank(diagonal) == pytest.approx(4 / 3**0.75, rel=1e-9)
    orthogonal = matrix_with(np.ones(10), 10, 40)
    assert metrics.effective_rank(orthogonal) == pytest.approx(10, rel=1e-9)
    assert metrics.effective_rank(orthogonal.T) == pytest.approx(10, rel=1e-9)


def test_effective_rank_erank_reads_a_convolution_as_out_by_everything_else():
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    singular_values = np.linalg.svd(weight.reshape(8, 36).double().numpy(), compute_uv=False)
    expected = entropy_rank(singular_values)
    for scale in (1e-200, 1, 1e200):
        scaled = weight.double() * scale
        assert metrics.effective_rank(scaled) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_erank_at_any_condition():
    for condition in (1e1, 1e4, 1e6, 1e7):  # of which the Gram matrix has the square
        singular_values = np.geomspace(1, 1 / condition, 60)
        rank = metrics.effective_rank(matrix_with(singular_values, 60, 200))
        assert rank == pytest.approx(entropy_rank(singular_values), rel=1e-6)


# ---- the other metrics
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error(bad):
    matrix = torch.eye(3)
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    network(torch.ones(1, 3)).sum().backward()
    matrix[1, 2] = bad
    network[0].weight.grad[1, 2] = bad
    network[0].weight.data[1, 2] = bad
    cases = [
        (metrics.effective_rank, matrix),
        (metrics.dormant_units, matrix),
        (metrics.updated_units, network),
        (metrics.weight_magnitude, network),
    ]
    for metric, argument in cases:
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            metric(argument)


def test_weight_magnitude_counts_the_weights_of_all_layers_alike_and_nothing_else():
    network = nn.Sequential(
        nn.Conv2d(1, 1, 2), nn.LayerNorm((1, 1, 1)), nn.Flatten(), nn.Linear(1, 2)
    )
    for parameter in network.parameters():
        nn.init.constant_(parameter, 100.0)
    network[0].weight.data = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]])
    network[3].weight.data = torch.tensor([[3.0], [-3.0]])
    assert metrics.weight_magnitude(network) == pytest.approx((1 + 1 + 2 + 2 + 3 + 3) / 6)


def test_updated_units_counts_hidden_units_with_a_gradient():
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.constant_(network[0].weight, 1.0)
    network[0].bias.data = torch.tensor([0.0, 1.0, 2.0, -100.0])  # one unit of four is dead
    with pytest.raises(ValueError, match="backward"):
        metrics.updated_units(network)
    network(torch.ones(5, 2)).square().mean().backward()
    assert metrics.updated_units(network) == 75.0
    network[0].bias.grad[3] = 1e-30  # the bias alone is enough
    assert metrics.updated_units(network) == 100.0
    network[2].zero_grad()  # the output layer does not count
    assert metrics.updated_units(network) == 100.0


def test_dormant_units_closed_form():
    # The means of the units are 2, 2, 0 and 0.049, that of the layer is 1.01225.
    activations = torch.tensor([[1.0, -1.0, 0.0, 0.049], [3.0, 3.0, 0.0, 0.049]])
    assert metrics.dormant_units(activations) == 25.0
    assert metrics.dormant_units(activations, threshold=0.05) == 50.0
    maps = torch.zeros(2, 3, 5, 5)
    maps[:, 0] = 1.0
    assert metrics.dormant_units(maps) == pytest.approx(200 / 3)
    assert metrics.dormant_units([activations, maps]) == pytest.approx(300 / 7)
    assert metrics.dormant_units(torch.zeros(4, 6)) == 100.0


def test_dormant_units_of_a_tanh_network_are_not_defined():
    """A saturated tanh unit is as dead as a silent ReLU, but its |activation| is the largest."""
    obs = torch.randn(100, 2)
    tanh = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    tanh[0].bias.data.fill_(100.0)
    assert metrics.measure(tanh, obs)["dormant_units"] is None
    assert metrics.measure_plasticity(tanh, obs, seed=0, updates=10)["dormant_units_fresh"] is None
    for activation in (nn.ReLU(), nn.LeakyReLU(0.01)):
        network = nn.Sequential(nn.Linear(2, 8), activation, nn.Linear(8, 3))
        network[0].weight.data.zero_()
        network[0].bias.data = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1e-3, -1e-3])
        assert metrics.measure(network, obs)["dormant_units"] == 25.0


def test_measure_gives_every_metric():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    obs = torch.randn(16, 2)
    row = metrics.measure(network, obs)
    assert row["updated_units"] is None
    assert metrics.gradient_norm(network) is None
    network(obs).square().mean().backward()
    row = metrics.measure(network, obs)
    assert {*row, "plasticity"} == set(metrics.METRICS)
    assert row["updated_units"] == metrics.updated_units(network)
    assert row["weight_magnitude"] == metrics.weight_magnitude(network)
    assert row["dormant_units"] == metrics.dormant_units(network[:4](obs))
    assert row["feature_erank"] == pytest.approx(metrics.effective_rank(network[:4](obs)))
    eranks = [metrics.effective_rank(network[i].weight) for i in (0, 2, 4)]
    assert row["erank"] == pytest.approx(sum(eranks) / 3)
    squares = [parameter.grad.square().sum().item() for parameter in network.parameters()]
    assert metrics.gradient_norm(network).item() == pytest.approx(math.sqrt(sum(squares)))


# ---- any network
class Branching(nn.Module):
    """An encoder with two heads: nested, branching, and no nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU())
        self.value = nn.Linear(16, 1)
        self.advantage = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, obs):
        features = self.encoder(obs)
        return torch.cat([self.value(features), self.advantage(features)], 1)


def fresh_branching(seed):
    torch.manual_seed(seed)
    return Branching()


def test_every_metric_takes_a_nested_and_branching_network_erank_plasticity_updated_units():
    network = fresh_branching(0)
    obs = torch.randn(200, 4)
    network.encoder[1].weight.data[:4] = 0.0
    network.encoder[1].bias.data[:4] = 0.0  # these four units are dormant
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    network.value.weight.grad = None  # a head that is frozen or not in use
    network.value.bias.grad = None
    network.encoder[0].weight.grad[:4] = 0.0
    network.encoder[0].bias.grad[:4] = 0.0
    network.advantage[0].weight.grad[:2] = 0.0
    network.advantage[0].bias.grad[:1] = 0.0  # the second has the gradient of its bias
    row = metrics.measure(network, obs)

    layers = [network.encoder[0], network.value, network.advantage[0], network.advantage[2]]
    eranks = [metrics.effective_rank(layer.weight) for layer in layers]
    assert row["erank"] == pytest.approx(sum(eranks) / 4)
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert row["weight_magnitude"] == pytest.approx(weights.abs().mean().item())
    # Hidden are 16 units of the encoder, 1 of the value and 8 of the advantage.
    assert row["updated_units"] == pytest.approx(100 * (12 + 0 + 7) / 25)
    features = network.advantage[:2](network.encoder(obs))
    assert row["feature_erank"] == pytest.approx(metrics.effective_rank(features), rel=1e-6)
    activations = [network.encoder(obs), features]
    assert row["dormant_units"] == metrics.dormant_units(activations) >= 100 * 4 / 24

    probe = metrics.measure_plasticity(network, obs, seed=0, learning_rate=0.01)
    assert tuple(probe) == metrics.PROBED
    assert 50 < probe["plasticity"] < 100
    assert 50 < probe["plasticity_fresh"] < 100


def test_fresh_twin_is_what_the_seed_alone_makes():
    """Whatever the network has become, and without a change to it."""
    network = fresh_branching(0)
    for parameter in network.parameters():
        parameter.data.mul_(3.0)
    before = [parameter.clone() for parameter in network.parameters()]
    twin = metrics.fresh_twin(network, seed=7)
    expected = fresh_branching(7).state_dict()
    assert list(twin.state_dict()) == list(expected)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for parameter, value in zip(network.parameters(), before):
        assert torch.equal(parameter, value)


def test_fresh_twin_refuses_a_parameter_that_no_layer_makes_fresh():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, obs):
            return self.scale * self.layer(obs)

    obs = torch.randn(20, 2)
    for network in (Scaled(), nn.Sequential(nn.Linear(2, 2), Scaled())):
        with pytest.raises(ValueError, match="Scaled has parameters but no reset_parameters"):
            metrics.plasticity(network, obs, updates=10)
        with pytest.raises(ValueError, match="Scaled has parameters but no reset_parameters"):
            metrics.measure_plasticity(network, obs, seed=0, updates=10)
        assert metrics.measure(network, obs)["erank"] > 0  # this needs no twin


def keep_as_it_is(module, inputs, output):
    return output


def test_measuring_leaves_network_gradients_hooks_and_random_streams_alone():
    network = fresh_branching(0)
    network.value.bias.requires_grad_(False)
    obs = torch.randn(100, 4)
    network.encoder.register_forward_hook(keep_as_it_is)
    network(obs).square().mean().backward()

    def state():
        tensors = [obs, torch.get_rng_state()]
        flags = []
        hooks = []
        for parameter in network.parameters():
            tensors.append(parameter.detach())
            if parameter.grad is not None:
                tensors.append(parameter.grad)
            flags.append((parameter.requires_grad, parameter.grad is None))
        for module in network.modules():
            hooks.append((len(module._forward_hooks), len(module._forward_pre_hooks)))
            flags.append(module.training)
        numpy_state = np.random.get_state()[1].tolist()
        numbers = [tensor.tolist() for tensor in tensors]
        return numbers, flags, hooks, numpy_state, random.getstate(), torch.is_grad_enabled()

    before = state()
    metrics.measure(network, obs)
    metrics.measure_plasticity(network, obs, seed=3, updates=10)
    assert state() == before

    def broken(*_):
        raise RuntimeError("an error within the network")

    handle = network.advantage[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="within the network"):
        metrics.measure(network, obs)
    handle.remove()
    assert state() == before


# ---- plasticity
def linear_curve(learning_rate, updates):
    """The errors of a weight that Adam moves from 0 to 1, each before its update.

    On observations -1 and 1 the change, standardised, is x or -x. The error of a copy that has
    moved its weight by `moved` in that direction is (1 - moved)^2 for each of them, so that it does
    not matter which are in a batch.
    """
    moved = 0.0
    first_moment = 0.0
    second_moment = 0.0
    errors = []
    for update in range(1, updates + 1):
        errors.append((1 - moved) ** 2)
        gradient = -2 * (1 - moved)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient**2
        mean = first_moment / (1 - 0.9**update)
        mean_square = second_moment / (1 - 0.999**update)
        moved -= learning_rate * mean / math.sqrt(mean_square)
    return errors


@pytest.mark.parametrize("learning_rate", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("updates", [10, 20, 25])
def test_plasticity_closed_form_of_a_linear_network(learning_rate, updates):
    """The area above the learning curve in ten parts, each of which counts 1 at most.

    A learning rate of 3 overshoots: the errors are 1, 4, then smaller and larger ones.
    """
    errors = linear_curve(learning_rate, updates)
    assert errors[:2] == pytest.approx([1, (1 - learning_rate) ** 2])
    lengths = {10: [1] * 10, 20: [2] * 10, 25: [3] * 5 + [2] * 5}[updates]
    part_errors = []
    begin = 0
    for length in lengths:
        part_error = sum(errors[begin : begin + length]) / length
        part_errors.append(min(1, part_error))
        begin += length
    expected = 100 * (1 - sum(part_errors) / 10)

    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    obs = torch.tensor([[-1.0], [1.0]])
    settings = {"learning_rate": learning_rate, "adam_eps": 1e-12, "updates": updates}
    for seed in range(2):
        score = metrics.plasticity(network, obs, batch_size=33, seed=seed, **settings)
        assert score == pytest.approx(expected, abs=1e-3)


def test_plasticity_of_fewer_than_ten_updates_is_refused():
    with pytest.raises(ValueError, match="9 updates are too few"):
        metrics.plasticity(nn.Linear(1, 1), torch.tensor([[-1.0], [1.0]]), updates=9)


def two_layers():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))


def test_plasticity_is_how_fast_a_change_is_learned():
    torch.manual_seed(0)
    obs = torch.randn(64, 4)
    live = two_layers()
    slow = metrics.plasticity(live, obs, learning_rate=1e-9, updates=20)
    # It learns nothing, and only what its batches have by chance below variance 1 remains.
    assert 0 <= slow < 10
    some = metrics.plasticity(live, obs, learning_rate=0.01, updates=20)
    more = metrics.plasticity(live, obs, learning_rate=0.01, updates=300)
    assert 20 < some < 70
    assert 90 < more < 100
    dead = two_layers()
    dead[0].bias.data.fill_(-100.0)
    # The bias of the output alone learns nothing, for the change has mean 0.
    assert metrics.plasticity(dead, obs, learning_rate=0.01, updates=300) < 3


def test_plasticity_depends_on_its_seed_and_on_nothing_else():
    network = fresh_branching(0)
    obs = torch.randn(64, 4)
    scores = [metrics.plasticity(network, obs, updates=20, seed=seed) for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    torch.manual_seed(5)
    network(obs).sum().backward()
    assert metrics.plasticity(network, obs, updates=20, seed=0) == scores[0]


@pytest.mark.parametrize(
    ("updates", "batch_size", "expected"), [(150, 32, 1), (25, 128, 2)], ids=["Digits", "Lander"]
)
def test_plasticity_of_a_copy_that_learns_nothing_is_a_little_above_0(
    updates, batch_size, expected
):
    """The errors of some parts are below 1 by chance."""
    torch.manual_seed(0)
    obs = torch.rand(512, 8)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    scores = []
    for seed in range(12):
        score = metrics.plasticity(
            network,
            obs,
            learning_rate=1e-12,
            batch_size=batch_size,
            updates=updates,
            seed=seed,
        )
        scores.append(score)
    assert min(scores) >= 0
    assert np.mean(scores) == pytest.approx(expected, rel=0.4)


def test_plasticity_can_be_measured_where_gradients_are_off():
    torch.manual_seed(0)
    obs = torch.randn(64, 4)
    network = two_layers()
    expected = metrics.plasticity(network, obs, updates=20)
    with torch.no_grad():
        assert metrics.plasticity(network, obs, updates=20) == expected


def test_plasticity_of_a_copy_that_diverges_is_0():
    torch.manual_seed(0)
    obs = torch.randn(64, 4)
    network = two_layers()
    # The first batch comes before any update, so it has the error of a copy that learned nothing.
    for learning_rate in (1e18, 1e30):
        score = metrics.plasticity(network, obs, learning_rate=learning_rate, updates=50)
        assert score == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scaled", ["weight", "bias"])
def test_plasticity_of_outputs_of_1e8_is_not_lost_in_rounding(scaled):
    """The target f + c is f itself where |f| is 1e8: the copy would seem to have learned it."""
    torch.manual_seed(0)
    obs = torch.randn(64, 4)
    network = two_layers()
    if scaled == "weight":
        network[2].weight.data.mul_(1e9)
    else:
        network[2].weight.data.zero_()
        network[2].bias.data.fill_(1e8)
    assert 1e7 < network(obs).abs().mean() < 1e9
    assert metrics.plasticity(network, obs, updates=50) < 10
    twin = metrics.fresh_twin(network, seed=0)
    assert metrics.plasticity(twin, obs, learning_rate=0.01, updates=50) > 50


def test_plasticity_is_not_defined_where_all_observations_are_alike():
    network = two_layers()
    alike = torch.full((64, 4), 0.3)
    assert metrics.plasticity(network, alike, updates=10) is None
    probe = metrics.measure_plasticity(network, alike, seed=0, updates=10)
    assert probe["plasticity"] is None
    assert probe["plasticity_fresh"] is None
    assert probe["feature_erank_fresh"] == pytest.approx(1, abs=1e-3)
    alike[63, 3] = 0.5
    assert metrics.plasticity(network, alike, updates=10) is not None


def test_plasticity_comes_with_what_a_fresh_twin_has_feature_erank_dormant_units():
    """The twin is that of the seed, whatever the network has become."""
    obs = torch.randn(200, 4).relu()
    settings = {"learning_rate": 0.01, "adam_eps": 1e-4, "batch_size": 16, "updates": 20}
    network = fresh_branching(0)
    before = metrics.measure_plasticity(network, obs, seed=9, **settings)
    for parameter in network.parameters():
        parameter.data.mul_(3.0)
    after = metrics.measure_plasticity(network, obs, seed=9, **settings)
    assert after["plasticity"] != before["plasticity"]
    del after["plasticity"]
    del before["plasticity"]
    assert after == before

    fresh = fresh_branching(9)
    activations = metrics.measure(fresh, obs)
    assert before == {
        "plasticity_fresh": metrics.plasticity(fresh, obs, seed=9, **settings),
        "feature_erank_fresh": activations["feature_erank"],
        "dormant_units_fresh": activations["dormant_units"],
    }


# ---- the record of a run
def open_run(folder, **settings):
    return metrics.Run(folder, {"flag": (1, 2), "version": 1, **settings}, 7, 3)


def text(folder):
    """The log's lines, without the speed, as they are on the disk at this moment."""
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]


def log_two_rows_and_save(run, **row):
    steps = run.steps()
    next(steps)
    run.log({"step": 1, "loss": None, "erank": 2.0, **row})
    run.log({"step": 2, "loss": 0.125, "erank": None, **row})
    run.save({"step": 3})
    return steps


def test_log_has_the_columns_of_its_first_row_and_is_flushed_at_every_row(tmp_path):
    with open_run(tmp_path) as run:
        steps = run.steps()
        next(steps)
        run.log({"step": 1, "loss": None, "erank": 2.0})
        assert text(tmp_path) == ["step,loss,erank", "1,,2"]  # readable while the run continues
        run.log({"step": 2, "loss": 1 / 3, "erank": None})
        assert text(tmp_path) == ["step,loss,erank", "1,,2", "2,0.333333,"]
        steps.close()
    header = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert header == "step,loss,erank,steps_per_second"


def test_log_continues_at_the_checkpoint(tmp_path):
    with open_run(tmp_path) as run:
        steps = log_two_rows_and_save(run)
        run.log({"step": 4, "loss": 9.0, "erank": 9.0})
        steps.close()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,9.")  # a row that a kill cut short
    with open_run(tmp_path) as run:
        assert run.step == 3
        assert text(tmp_path) == ["step,loss,erank", "1,,2", "2,0.125,"]
        steps = run.steps()
        assert next(steps) == 4
        run.log({"step": 4, "loss": None, "erank": 1.0})
        steps.close()
    assert text(tmp_path) == ["step,loss,erank", "1,,2", "2,0.125,", "4,,1"]


def test_log_starts_anew_without_a_checkpoint(tmp_path):
    for value in (1, 2):
        with open_run(tmp_path) as run:
            steps = run.steps()
            next(steps)
            run.log({"step": 1, "loss": value})
            steps.close()
        assert text(tmp_path) == ["step,loss", f"1,{value}"]


@pytest.mark.parametrize("change", ["edited", "missing"])
def test_log_that_changes_during_the_run_is_whole_again_at_the_next_checkpoint(change, tmp_path):
    path = tmp_path / "log.csv"
    with open_run(tmp_path) as run:
        steps = log_two_rows_and_save(run)
        path.unlink()
        if change == "edited":  # an editor saves another file under the same name
            path.write_text("step,loss\n1,")
        run.log({"step": 4, "loss": None, "erank": 1.0})
        run.save({"step": 6})
        run.log({"step": 7, "loss": None, "erank": 3.0})
        run.save({"step": 7})
        steps.close()
    assert text(tmp_path) == ["step,loss,erank", "1,,2", "2,0.125,", "4,,1", "7,,3"]


@pytest.mark.parametrize("change", ["emptied", "missing", "shortened", "edited"])
def test_log_that_has_changed_since_the_checkpoint_is_put_back(change, tmp_path):
    with open_run(tmp_path) as run:
        log_two_rows_and_save(run).close()
    path = tmp_path / "log.csv"
    whole = path.read_bytes()
    if change == "emptied":
        path.write_bytes(b"")
    elif change == "missing":
        path.unlink()
    elif change == "shortened":
        path.write_bytes(whole[:-1])
    else:  # to one of the same length
        path.write_bytes(whole.replace(b"0.125", b"0.625"))
    with open_run(tmp_path) as run:
        assert run.step == 3
        assert path.read_bytes() == whole
        steps = run.steps()
        next(steps)
        run.log({"step": 4, "loss": None, "erank": 1.0})
        steps.close()
    assert text(tmp_path) == ["step,loss,erank", "1,,2", "2,0.125,", "4,,1"]


def test_a_run_goes_in_intervals_and_continues_from_its_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(metrics, "LOG_EVERY", 2)
    folder = tmp_path / "runs" / "a"
    weight = torch.randn(3, 3)
    begun = []
    due = []
    with open_run(folder) as run:
        assert run.checkpoint is None  # a new run has nothing to load
        assert (run.step, run.finished) == (0, False)
        for step in run.steps():
            if run.interval_begins(step):
                begun.append(step)
            if run.row_due(step):
                due.append(step)
                run.log({"step": step, "loss": 1.0})
            if step == 7:
                break  # killed just before the last checkpoint
            if run.interval_ends(step):
                run.save({"step": step, "weight": weight, "note": [step]})
    assert begun == [1, 4, 7]
    assert due == [2, 3, 4, 6, 7]

    with open_run(folder) as run:
        assert (run.step, run.finished) == (6, False)
        assert run.checkpoint["note"] == [6]
        assert torch.equal(run.checkpoint["weight"], weight)
        assert [row["step"] for row in rows(folder)] == ["2", "3", "4", "6"]
        assert list(run.steps()) == [7]
        run.log({"step": 7, "loss": 1.0})
        run.save({"step": 7})
    assert capsys.readouterr().out == ""
    with open_run(folder) as run:
        assert run.finished
        assert "finished" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == ["2", "3", "4", "6", "7"]


def test_a_row_has_its_speed_takes_tensors_and_refuses_what_is_not_finite(tmp_path, monkeypatch):
    clock = mock.Mock(side_effect=[0.0, 8.0, 12.0])
    monkeypatch.setattr(metrics, "time", mock.Mock(perf_counter=clock))
    with open_run(tmp_path) as run:
        steps = run.steps()
        next(steps)
        run.log({"step": 2, "loss": torch.tensor(0.5), "eval_return": 9})
        for bad in (math.nan, math.inf, torch.tensor(math.nan)):
            with pytest.raises(FloatingPointError, match="training has diverged: loss is"):
                run.log({"step": 3, "loss": bad, "eval_return": 9})
        run.log({"step": 4, "loss": None, "eval_return": None})
        steps.close()
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[1:] == ["2,0.5,9,0.25", "4,,,0.5"]


def test_a_gif_has_at_most_60_seconds_and_2_mb_and_no_failure_ends_the_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = tmp_path / "episode.gif"
    # shape and number of pictures, pictures a second; number of frames, and how long one is shown
    cases = [
        ((4, 4, 3), 1_500, 15, 900, 60),
        ((4, 4, 3), 100, 50, 50, 40),
        ((250, 250), 60, 10, 30, 200),
    ]
    for shape, count, fps, frames, milliseconds in cases:
        pictures = (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(count))
        SAVE_GIF(path, pictures, fps)
        with Image.open(path) as gif:
            assert gif.size == shape[:2]
            assert gif.n_frames == frames
            assert gif.info["duration"] == milliseconds
        assert path.stat().st_size < 2e6
    SAVE_GIF(tmp_path / "none.gif", iter(()), 15)
    assert "none.gif was not written: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


# ---- refusals
def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_settings_and_another_version_are_refused(tmp_path):
    with open_run(tmp_path) as run:
        run.save({"step": 3})
    before = contents(tmp_path)
    changes = r"flag \[1, 2\] \(now 5\), version 1 \(now 2\), more None \(now 0\)"
    message = f"other settings: {changes}; move it away"
    with pytest.raises(metrics.UserError, match=message):
        open_run(tmp_path, flag=5, version=2, more=0)
    assert contents(tmp_path) == before


def test_lock_refuses_a_second_writer_and_says_what_to_delete_if_there_is_none(tmp_path):
    with open_run(tmp_path) as run:
        run.save({"step": 3})
    before = contents(tmp_path)
    message = r"in use by another process; if .*, delete .*\.lock"
    elsewhere = filelock.FileLock(tmp_path / ".lock")
    with elsewhere, pytest.raises(metrics.UserError, match=message), open_run(tmp_path):
        pass
    assert contents(tmp_path) == before
    with open_run(tmp_path) as run:
        assert run.step == 3
        with pytest.raises(metrics.UserError, match=message), open_run(tmp_path):
            pass
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / ".lock").acquire(timeout=0)


@pytest.mark.parametrize("damage", [0, 0.001, 0.3, 0.6, 0.999, "truncated", "empty"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, tmp_path):
    with open_run(tmp_path) as run:
        run.save({"step": 3, "weight": torch.randn(64, 64)})
    checkpoint = tmp_path / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    if damage == "truncated":
        broken = whole[: len(whole) // 2]
    elif damage == "empty":
        broken = b""
    else:
        broken = bytearray(whole)
        start = int(damage * len(whole))
        for i in range(start, min(start + 64, len(whole))):
            broken[i] ^= 0xFF
    checkpoint.write_bytes(broken)
    before = contents(tmp_path)
    message = r"checkpoint.pt cannot be read .*; delete it to start over"
    with pytest.raises(metrics.UserError, match=message), open_run(tmp_path):
        pass
    assert contents(tmp_path) == before


CONFIGS = {
    "empty": "",
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "cut": '{"flag": [',
}


@pytest.mark.parametrize("config", CONFIGS)
def test_config_that_cannot_be_read_is_refused_and_left_alone(config, tmp_path):
    with open_run(tmp_path) as run:
        run.save({"step": 3})
    path = tmp_path / "config.json"
    whole = path.read_text()
    path.write_text(CONFIGS[config])
    before = contents(tmp_path)
    with pytest.raises(metrics.UserError, match=r"config.json cannot be read .*: put it back, or"):
        open_run(tmp_path)
    assert contents(tmp_path) == before
    path.write_text(whole)
    with open_run(tmp_path) as run:
        assert run.step == 3
