"""Closed forms of every metric, and the record of a run: intervals, log, checkpoint, refusals."""

import math
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from conftest import SAVE_GIF, rows
from PIL import Image
from torch import nn

import metrics


def matrix_with(singular_values, rows, columns):
    """A float64 matrix with these singular values and random singular vectors."""
    rng, k = np.random.default_rng(0), len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(n, k)))[0] for n in (rows, columns))
    return torch.tensor(left * singular_values @ right.T)


def entropy_rank(singular_values):
    p = np.array(singular_values, dtype=np.longdouble) / np.sum(singular_values, dtype=np.longdouble)
    return float(np.exp(-np.sum(p * np.log(p))))


def test_effective_rank_closed_forms():
    for n in (1, 2, 7, 64):
        assert metrics.effective_rank(torch.eye(n)) == pytest.approx(n, rel=1e-9)
    assert metrics.effective_rank(torch.outer(torch.arange(1.0, 6), torch.arange(2.0, 9))) == pytest.approx(1, abs=1e-4)
    assert metrics.effective_rank(torch.zeros(3, 5)) == 0
    # p = (3/4, 1/4): entropy 2 log 2 - 3/4 log 3
    assert metrics.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75, rel=1e-9)
    orthogonal = matrix_with(np.ones(10), 10, 40)
    assert metrics.effective_rank(orthogonal) == pytest.approx(10, rel=1e-9)
    assert metrics.effective_rank(orthogonal.T) == pytest.approx(10, rel=1e-9)


def test_effective_rank_reads_a_convolution_as_out_by_everything_else_at_any_scale_and_condition():
    weight = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = entropy_rank(np.linalg.svd(weight.reshape(8, 36).double().numpy(), compute_uv=False))
    for scale in (1e-200, 1, 1e200):
        assert metrics.effective_rank(weight.double() * scale) == pytest.approx(expected, rel=1e-5)
    for condition in (1e1, 1e4, 1e6, 1e7):  # of which the Gram matrix has the square
        singular_values = np.geomspace(1, 1 / condition, 60)
        rank = metrics.effective_rank(matrix_with(singular_values, 60, 200))
        assert rank == pytest.approx(entropy_rank(singular_values), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_an_error(bad):
    matrix, network = torch.eye(3), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    network(torch.ones(1, 3)).sum().backward()
    matrix[1, 2] = network[0].weight.grad[1, 2] = network[0].weight.data[1, 2] = bad
    cases = {metrics.effective_rank: matrix, metrics.dormant_units: matrix}
    for metric, of in (cases | {metrics.updated_units: network, metrics.weight_magnitude: network}).items():
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            metric(of)


def test_weight_magnitude_counts_the_weights_of_all_layers_alike_and_nothing_else():
    network = nn.Sequential(nn.Conv2d(1, 1, 2), nn.LayerNorm((1, 1, 1)), nn.Flatten(), nn.Linear(1, 2))
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
    obs, learning = torch.randn(16, 2), ({"lr": 1e-3}, 4, 5)
    assert sorted(metrics.measure(network, obs)) == ["dormant_units", "erank", "feature_erank", "weight_magnitude"]
    network(obs).square().mean().backward()

    def state():
        tensors = [*network.parameters(), *(p.grad for p in network.parameters()), torch.get_rng_state()]
        return [tensor.tolist() for tensor in tensors], np.random.get_state()[1].tolist()

    before = state()
    row = metrics.measure(network, obs)
    first, again, other = (metrics.plasticity(network, obs, *learning, seed) for seed in (0, 0, 1))
    assert state() == before and first == again != other
    assert set(row) | {"plasticity"} == {*metrics.METRICS, "grad_norm"}
    assert row["feature_erank"] == pytest.approx(metrics.effective_rank(network[:4](obs)))
    eranks = [metrics.effective_rank(network[i].weight) for i in (0, 2, 4)]
    assert row["erank"] == pytest.approx(sum(eranks) / 3)
    assert row["grad_norm"] ** 2 == pytest.approx(sum(p.grad.square().sum().item() for p in network.parameters()))


def test_plasticity_is_the_share_of_a_change_that_is_learned():
    torch.manual_seed(0)
    obs, learning = torch.randn(64, 4), {"adam": {"lr": 0.01}, "batch_size": 32, "seed": 0}
    live, dead = (nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(2))
    dead[0].bias.data.fill_(-100.0)
    none, some, more = (metrics.plasticity(live, obs, updates=updates, **learning) for updates in (0, 10, 300))
    assert none == pytest.approx((0, 0), abs=1e-3)  # the change has variance 1
    assert 40 < some[0] < 80 and 95 < more[0] < 100 and more[1] == pytest.approx(more[0], abs=5)
    lost, twin = metrics.plasticity(dead, obs, updates=300, **learning)
    assert lost < 2 and twin > 95  # the bias of the output alone learns nothing, for the change has mean 0
    linear = metrics.plasticity(nn.Sequential(nn.Linear(4, 3)), obs, updates=2_000, **learning)
    assert linear == pytest.approx((100, 100), abs=0.1)  # the change is a linear function, too


def test_plasticity_after_one_step_of_adam_in_closed_form():
    """On x = -1, 1 the change is x or -x. Adam's first step is the learning rate: in the weight towards the change, in
    the bias away from it, for a batch of odd size has no mean of 0. What is left is (1 - 0.1)^2 + 0.1^2."""
    network, obs = nn.Sequential(nn.Linear(1, 1)), torch.tensor([[-1.0], [1.0]])
    for seed in range(5):
        scores = metrics.plasticity(network, obs, {"lr": 0.1, "eps": 1e-12}, 33, 1, seed)
        assert scores == pytest.approx((18, 18), abs=1e-3)


def test_the_twin_is_fresh_whatever_the_network_has_become():
    torch.manual_seed(0)
    network, obs = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(200, 4)
    score, twin = metrics.plasticity(network, obs, {"lr": 0.01}, 32, 20, 0)
    for parameter in network.parameters():
        parameter.data.mul_(3.0)
    other_score, same_twin = metrics.plasticity(network, obs, {"lr": 0.01}, 32, 20, 0)
    assert same_twin == twin and other_score != score


# ---- the record of a run
def test_log_is_flushed_leaves_gaps_empty_and_continues_at_an_offset(tmp_path):
    path, columns = tmp_path / "log.csv", ["step", "loss", "erank"]
    log = metrics.CSVLog(path, columns)
    log.write({"step": 1, "erank": 2.0})
    assert path.read_text() == "step,loss,erank\n1,,2\n"  # readable while the run goes on
    log.write({"step": 2, "loss": 0.125, "erank": None})
    assert path.read_text() == "step,loss,erank\n1,,2\n2,0.125,\n"
    offset = log.file.tell()
    log.write({"step": 3, "loss": 1 / 3})
    log.file.write("4,0.")  # a row cut short by a kill
    log.file.close()
    metrics.CSVLog(path, columns, offset).write({"step": 3, "loss": 1 / 3})
    assert path.read_text() == "step,loss,erank\n1,,2\n2,0.125,\n3,0.333333,\n"
    with pytest.raises(OSError, match="lost rows"):
        metrics.CSVLog(path, columns, path.stat().st_size + 1)
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(ValueError):
        metrics.CSVLog(path, ["step"]).write({"step": 1, "typo": 2})


def open_run(folder, **settings):
    return metrics.Run(folder, {"flag": (1, 2), "version": 1} | settings, 7, 3, ["step", "loss", "eval_return"])


def test_a_run_goes_in_intervals_and_on_from_its_last_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "LOG_EVERY", 2)
    part, folder = nn.Linear(1, 1), tmp_path / "runs" / "a"
    run, weight = open_run(folder), part.weight.item()
    run.load(part=part)
    assert (part.weight.item(), run.state, run.step) == (weight, {}, 0)  # a new run has nothing to load
    for start, steps in run.intervals():
        assert [step for step in steps if run.row_due(step)] == {0: [2, 3], 3: [4, 6], 6: [7]}[start]
        run.log({"step": min(start + 3, 7), "loss": start})
        if start < 6:  # killed before the last checkpoint
            run.save(start + 3, part=part, note=[start])
    part.weight.data.zero_()
    run = open_run(folder)
    run.load(part=part)
    assert (run.step, run.state["note"], part.weight.item(), run.finished) == (6, [3], weight, False)
    assert [row["step"] for row in rows(folder)] == ["3", "6"]
    assert [(start, list(steps)) for start, steps in run.intervals()] == [(6, [7])]
    run.log({"step": 7, "loss": 6})
    run.save(7)
    assert capsys.readouterr().out == ""
    assert open_run(folder).finished and "finished" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == ["3", "6", "7"]


def test_a_row_has_its_speed_takes_tensors_and_refuses_what_is_not_finite(tmp_path, monkeypatch):
    clock = iter((0.0, 8.0, 12.0))
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = open_run(tmp_path)
    next(intervals := run.intervals())
    run.log({"step": 2, "loss": torch.tensor(0.5), "eval_return": 9})
    for bad in (math.nan, math.inf, torch.tensor(math.nan)):
        with pytest.raises(FloatingPointError):
            run.log({"step": 3, "loss": bad})
    run.log({"step": 4})
    assert (tmp_path / "log.csv").read_text().splitlines()[1:] == ["2,0.5,9,0.25", "4,,,0.5"]
    intervals.close()


def test_a_gif_has_at_most_60_seconds_and_2_mb_and_no_failure_ends_the_run(tmp_path, capsys):
    rng, path = np.random.default_rng(0), tmp_path / "episode.gif"
    cases = ((4, 4, 3), 1_500, 15, 900, 60), ((4, 4, 3), 100, 50, 50, 40), ((250, 250), 60, 10, 30, 200)
    for shape, count, fps, frames, milliseconds in cases:
        SAVE_GIF(path, (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(count)), fps)
        with Image.open(path) as gif:
            assert (gif.size, gif.n_frames, gif.info["duration"]) == (shape[:2], frames, milliseconds)
        assert path.stat().st_size < 2e6
    SAVE_GIF(tmp_path / "none.gif", iter(()), 15)
    assert "none.gif is left out: " in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1


def test_other_settings_another_version_and_a_second_writer_are_refused(tmp_path):
    open_run(tmp_path).save(3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = r"other settings: flag \[1, 2\] \(now 5\), version 1 \(now 2\), more None \(now 0\); move it away"
    with pytest.raises(metrics.UserError, match=message):
        open_run(tmp_path, flag=5, version=2, more=0)
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(metrics.UserError, match="in use by another process"):
        open_run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run = open_run(tmp_path)
    assert run.step == open_run(tmp_path).step == 3  # a notebook may open its run again
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(tmp_path / ".lock").acquire(timeout=0)


@pytest.mark.parametrize("damage", [0, 0.001, 0.3, 0.6, 0.999, "truncated", "empty"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(damage, tmp_path):
    open_run(tmp_path).save(3, part=nn.Linear(64, 64))
    checkpoint, log = tmp_path / "checkpoint.pt", (tmp_path / "log.csv").read_bytes()
    whole = checkpoint.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage)
    if broken is None:
        start = int(damage * len(whole))
        broken = whole[:start] + bytes(byte ^ 0xFF for byte in whole[start : start + 64]) + whole[start + 64 :]
    checkpoint.write_bytes(broken)
    with pytest.raises(metrics.UserError, match=r"checkpoint.pt cannot be read .*; delete it to start over"):
        open_run(tmp_path)
    assert checkpoint.read_bytes() == broken and (tmp_path / "log.csv").read_bytes() == log
