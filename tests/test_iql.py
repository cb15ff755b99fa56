"""The maze against its facts, IQL against what can be solved by hand, injection to the last bit, and whole runs."""

import ast
import csv
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn

import iql_pointmass_finetune as iql

SCRIPT = Path(iql.__file__)
STAY, LEFT, RIGHT, UP, DOWN = range(5)


def transitions(count: int) -> dict[str, np.ndarray]:
    """Of a random walk."""
    env, rng = iql.Pointmass(), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    rows = []
    for action in rng.integers(5, size=count):
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, next_obs, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    columns = zip(*rows)
    return {name: np.array(column, iql.FIELDS[name][0]) for name, column in zip(iql.FIELDS, columns)}


def small_args(**settings) -> iql.Args:
    """A run of a second on a data set of its own."""
    np.savez("data.npz", **transitions(300))
    small = {"dataset": "data.npz", "offline_steps": 20, "online_steps": 20, "eval_every": 10, "eval_episodes": 2}
    return iql.Args(**{**small, "device": "cpu", **settings})


def log_of(folder: Path) -> list[dict]:
    with open(folder / "log.csv") as file:
        return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in csv.DictReader(file)]


# ---- the maze


def placed(x: float, y: float, noise: tuple[float, float] = (0.0, 0.0), task: str = "PointmassHard") -> iql.Pointmass:
    """An environment with the point put somewhere, and its next noise known."""
    env = iql.Pointmass(task)
    env.reset(seed=0)
    env.x, env.y, env.noise = x, y, [noise]
    return env


@pytest.mark.parametrize("task", iql.TASKS)
def test_gymnasium_accepts_the_task(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"{task}-v0", render_mode="rgb_array")
        check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.render().shape == (16 * env.unwrapped.size, 16 * env.unwrapped.size, 3)


def test_the_hard_maze_is_the_one_of_the_paper():
    env = iql.Pointmass()
    assert env.walls.shape == (22, 22) and (~env.walls).sum() == 416
    assert [row.tolist() for row in env.walls[[0, 4, 10, 12], ::2].astype(int)] == [
        [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1],
    ]
    assert np.allclose(env.reset(seed=0)[0], 2 / 22)


@pytest.mark.parametrize(
    ("action", "there"), [(STAY, (5, 5)), (LEFT, (5, 4)), (RIGHT, (5, 6)), (UP, (4, 5)), (DOWN, (6, 5))]
)
def test_actions_move_along_their_axis(action, there):
    env = placed(5.0, 5.0)
    obs, reward, terminated, truncated, _ = env.step(action)
    assert np.allclose(obs * 22, there, atol=1e-5) and reward == -1.0 and not terminated and not truncated


def test_walls_and_the_border_stop_a_move_where_it_meets_them():
    env = placed(1.0, 9.75)  # the wall is in columns 10 and 11
    env.step(RIGHT)
    assert 9.9 < env.y < 10.0 and env.x == 1.0
    env = placed(0.25, 21.75, noise=(-1.0, 1.0))
    env.step(STAY)
    assert 0.0 <= env.x < 0.1 and 21.9 < env.y <= 22.0
    env = placed(1.0, 9.75, noise=(0.5, 0.0))  # along a wall it slides
    env.step(RIGHT)
    assert env.x == pytest.approx(1.5)


def test_the_first_axis_moves_first():
    # Towards the corner of the wall in rows 6.., column 10: down is free only while the column is below 10.
    env = placed(5.95, 9.95, noise=(0.0, 1.0))  # moves (1, 1) in tenths: (6.05, 9.95), then column 10 is blocked
    env.step(DOWN)
    assert env.x == pytest.approx(6.95) and env.y == pytest.approx(9.95)


def test_the_noise_is_normal_with_standard_deviation_one_half():
    env = iql.Pointmass()
    env.reset(seed=3)
    moves = []
    for _ in range(4_000):
        env.x, env.y = 5.0, 5.0
        env.step(DOWN)
        moves.append((env.x - 6.0, env.y - 5.0))
    moves = np.array(moves)
    assert np.abs(moves.mean(0)).max() < 0.04 and np.abs(moves.std(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(moves.T)[0, 1]) < 0.06


def test_the_goal_is_a_disc_of_radius_two():
    *_, reward, terminated, truncated, _ = placed(20.0, 18.01).step(STAY)
    assert (reward, terminated, truncated) == (0.0, True, False)
    *_, reward, terminated, truncated, _ = placed(20.0, 17.99).step(STAY)
    assert (reward, terminated, truncated) == (-1.0, False, False)


@pytest.mark.parametrize(("task", "limit"), [("PointmassEasy", 50), ("PointmassMedium", 150), ("PointmassHard", 100)])
def test_the_time_limit_truncates(task, limit):
    env = iql.Pointmass(task)
    env.reset(seed=0)
    ends = []
    for _ in range(limit):
        env.x, env.y = env.start
        ends.append(env.step(STAY)[2:4])
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]


def test_random_actions_return_about_minus_100():
    env, rng, total = iql.Pointmass(), np.random.default_rng(0), 0.0
    env.reset(seed=0)
    for action in rng.integers(5, size=10_000):
        _, reward, terminated, truncated, _ = env.step(action)
        total += reward
        if terminated or truncated:
            env.reset()
    assert -100 <= total / 100 < -99


def test_a_seed_decides_everything_and_an_episode_without_one_goes_on():
    def walk(env, seed):
        env.reset(seed=seed)
        return [env.step(DOWN)[0].tolist() for _ in range(5)]

    env = iql.Pointmass()
    first = walk(env, 7)
    second = walk(env, None)
    assert first != second
    assert walk(env, 7) == first  # the noise drawn ahead is thrown away
    assert walk(iql.Pointmass(), 7) == first


# ---- the losses


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.9, 0.99])
def test_expectile_loss_against_its_closed_form(expectile):
    difference = torch.tensor([-2.0, 0.5, 3.0])
    by_hand = ((1 - expectile) * 4 + expectile * 0.25 + expectile * 9) / 3
    assert iql.expectile_loss(difference, expectile).item() == pytest.approx(by_hand)
    # The expectile v of a fair coin between 0 and 1 solves expectile * (1 - v) = (1 - expectile) * v.
    v = torch.tensor(0.3, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(iql.expectile_loss(torch.tensor([0.0, 1.0]) - v, expectile), v)
        v = (v - gradient).detach().requires_grad_()
    assert v.item() == pytest.approx(expectile, abs=1e-4)


def table(outputs: int) -> nn.Linear:
    """A network that is a table over three states."""
    return nn.Linear(3, outputs, bias=False)


def test_fixed_point_of_the_three_updates_on_a_chain():
    """States 0, 1, 2. Action 0 stays for -1; action 1 moves on for -1, from state 2 to the end for 0."""
    gamma, tau, beta = 0.9, 0.7, 1.5
    state, action = torch.arange(6) // 2, torch.arange(6) % 2
    one_hot = torch.eye(3)
    end = (state == 2) & (action == 1)
    next_state = torch.minimum(state + action, torch.tensor(2))
    reward = torch.where(end, 0.0, -1.0)
    columns = (one_hot[state], action, reward, one_hot[next_state], end, end)
    batch = iql.Batch(*(column.reshape(6, -1) for column in columns))

    torch.manual_seed(0)
    q, target_network, v, actor = table(2), table(2), table(1), table(2)
    args = SimpleNamespace(gamma=gamma, expectile=tau, beta=beta)
    parameters = [network.weight for network in (q, v, actor)]
    for _ in range(800):
        losses = iql.iql_losses(q, target_network, v, actor, batch, args)
        for parameter, gradient in zip(parameters, torch.autograd.grad(sum(losses[:3]), parameters)):
            parameter.data -= gradient
        iql.polyak_update(target_network, q, 0.5)

    # By hand, from the end backwards: the two actions are equally frequent, so V = tau * Q(on) + (1 - tau) * Q(stay),
    # for moving on is better; and Q(stay) = -1 + gamma * V. Solved for V:
    onward = 0.0
    for s in (2, 1, 0):
        value = (tau * onward - (1 - tau)) / (1 - (1 - tau) * gamma)
        stay = -1 + gamma * value
        assert q.weight[:, s].tolist() == pytest.approx([stay, onward], abs=1e-4)
        assert target_network.weight[:, s].tolist() == pytest.approx([stay, onward], abs=1e-4)
        assert v.weight[0, s].item() == pytest.approx(value, abs=1e-4)
        odds = math.exp(beta * (onward - value)) / math.exp(beta * (stay - value))
        assert actor.weight[:, s].softmax(0)[1].item() == pytest.approx(odds / (1 + odds), abs=1e-4)
        onward = -1 + gamma * value


def test_the_actor_clips_its_weights_at_100():
    q, v, actor = table(2), table(1), table(2)
    q.weight.data.fill_(0.0), v.weight.data.fill_(-9.0), actor.weight.data.fill_(0.0)
    columns = (torch.eye(3)[:1], torch.tensor([0]), torch.zeros(1), torch.eye(3)[:1], *[torch.tensor([False])] * 2)
    batch = iql.Batch(*(column.reshape(1, -1) for column in columns))
    args = SimpleNamespace(gamma=0.9, expectile=0.7, beta=1.0)
    assert iql.iql_losses(q, q, v, actor, batch, args)[2].item() == pytest.approx(100 * math.log(2), rel=1e-5)


def test_truncation_bootstraps_and_termination_does_not():
    q, v, actor = table(2), table(1), table(2)
    q.weight.data.fill_(0.0), v.weight.data.fill_(2.0)
    args = SimpleNamespace(gamma=0.9, expectile=0.7, beta=1.0)
    for terminated, truncated, td_target in ((False, True, -1 + 0.9 * 2), (True, False, -1.0)):
        columns = (torch.eye(3)[:1], torch.tensor([0]), torch.tensor([-1.0]), torch.eye(3)[:1])
        flags = (torch.tensor([terminated]), torch.tensor([truncated]))
        batch = iql.Batch(*(column.reshape(1, -1) for column in columns + flags))
        assert iql.iql_losses(q, q, v, actor, batch, args)[1].item() == pytest.approx(td_target**2, rel=1e-5)


# ---- acting and evaluation


def test_actions_are_sampled_from_the_actor():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -9.0])
    actor = nn.Linear(2, 5)
    actor.weight.data.zero_(), actor.bias.data.copy_(logits)
    actions = iql.sample_actions(actor, np.zeros((20_000, 2), np.float32), np.random.default_rng(0))
    assert np.allclose(np.bincount(actions, minlength=5) / 20_000, logits.softmax(0), atol=0.01)


class RightThenDown(nn.Linear):
    """The way through PointmassEasy."""

    def forward(self, obs):
        turned = obs[:, 1] > 0.88
        return 100.0 * nn.functional.one_hot(torch.where(turned, DOWN, RIGHT), 5)


def test_an_evaluation_plays_whole_episodes():
    args = iql.Args(env="PointmassEasy")
    mean_return, positions = iql.evaluate(RightThenDown(2, 5), args, 7, episodes=30)
    lengths = (~np.isnan(positions[:, :, 0])).sum(1) - 1
    reached = np.array([np.hypot(*(track[n] - 9)) < 2 for track, n in zip(positions, lengths)])
    assert positions.shape == (30, 51, 2) and (positions[:, 0] == 1).all() and reached.mean() > 0.8
    assert mean_return == pytest.approx((reached - lengths).mean()) and (lengths[~reached] == 50).all()
    assert iql.evaluate(RightThenDown(2, 5), args, 7, episodes=30)[0] == mean_return


# ---- injection


def recorded(args: iql.Args, monkeypatch) -> list[list[torch.Tensor]]:
    """A run's values of Q, target Q, V and actor on the same states, as each update finds them."""
    probe, outputs, losses = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)), [], iql.iql_losses

    def recording_losses(*networks_and_more):
        with torch.no_grad():
            outputs.append([network(probe) for network in networks_and_more[:4]])
        return losses(*networks_and_more)

    with monkeypatch.context() as patch:
        patch.setattr(iql, "iql_losses", recording_losses)
        iql.train(args)
    return outputs


def test_an_injection_changes_nothing_at_that_moment_and_only_the_critic_after_it(monkeypatch):
    plain = recorded(small_args(offline_steps=10, online_steps=5), monkeypatch)
    injected = recorded(small_args(offline_steps=10, online_steps=5, injections=2), monkeypatch)
    for step in range(1, 12):  # injections before the updates of steps 11 and 13
        for before, after in zip(plain[step - 1], injected[step - 1]):
            assert torch.equal(before, after)
    for first_update in (10, 12):  # which reaches the fresh network, and through it both Q and its target
        for i in (0, 1):
            assert not torch.equal(injected[first_update][i], injected[first_update + 1][i])
            assert not torch.equal(plain[first_update + 1][i], injected[first_update + 1][i])
    assert torch.equal(plain[11][2], injected[11][2]) and torch.equal(plain[11][3], injected[11][3])


def test_injected_networks_train_f1_alone_and_agree_on_the_fresh_network():
    args = small_args()
    h, lagging = iql.fresh_network(args, 0), iql.fresh_network(args, 1).requires_grad_(False)
    obs = torch.rand(64, 2)
    q_before, target_before = h(obs), lagging(obs)
    q, target_network = iql.inject(h, lagging, iql.fresh_network(args, 2))
    q, target_network = iql.inject(q, target_network, iql.fresh_network(args, 3))
    assert torch.equal(q(obs), q_before) and torch.equal(target_network(obs), target_before)
    for a, b in zip(q.f1.parameters(), target_network.f1.parameters()):
        assert torch.equal(a, b) and a is not b
    assert {id(p) for p in q.parameters() if p.requires_grad} == {id(p) for p in q.f1.parameters()}
    assert not any(p.requires_grad for p in target_network.parameters())

    frozen = [p.clone() for part in (q.h, q.f2) for p in part.parameters()]
    optimizer = iql.adam(args, iql.trained(q))
    q(obs).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(frozen, [p for part in (q.h, q.f2) for p in part.parameters()]))
    assert not torch.equal(q(obs), q_before)


def test_an_injected_network_is_not_the_first_one_again(monkeypatch):
    injected, inject = [], iql.inject

    def recording_inject(q, target_network, fresh):
        injected.append((q[0].weight - fresh[0].weight).abs().max())
        return inject(q, target_network, fresh)

    monkeypatch.setattr(iql, "inject", recording_inject)
    iql.train(small_args(injection_steps=(3,), online_steps=0, eval_every=20))
    assert len(injected) == 1 and injected[0] > 0.1


def test_both_scripts_hold_the_same_code():
    def definitions(name):
        source = SCRIPT.with_name(name).read_text()
        return {
            node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if hasattr(node, "name")
        }

    ours, theirs = definitions("iql_pointmass_finetune.py"), definitions("dqn_plasticity.py")
    same = "Injected trained inject smooth injection_due l2_coefficient squared_norm Architecture UserError refuse "
    same += "check_numbers check_injections variant run_folder open_run replace_file save_checkpoint "
    same += "load_checkpoint parse main"
    assert [name for name in same.split() if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(("count", "steps"), [(0, ()), (1, (101,)), (2, (101, 151)), (3, (101, 134, 167))])
def test_injections_spread_over_the_online_phase(count, steps):
    assert iql.Args(offline_steps=100, online_steps=100, injections=count).injection_steps == steps


# ---- the data


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data.pop("next_obs"), "lacks next_obs"),
        (lambda data: data.update(action=data["action"].astype(np.float32)), "action is float32"),
        (lambda data: data.update(obs=data["obs"][:, :1]), "obs is float32 of shape (300, 1)"),
        (lambda data: data.update(reward=data["reward"][:-1]), "reward is float32 of shape (299,)"),
        (lambda data: data.update(action=data["action"] + 1), "action must lie in 0..4, but lies in 1..5"),
        (lambda data: data.update(next_obs=data["next_obs"] * 22), "next_obs must lie in 0..1"),
        (lambda data: data["reward"].__setitem__(7, np.nan), "reward must lie in"),
        (lambda data: data.update({name: array[:0] for name, array in data.items()}), "of shape (0, 2)"),
        (lambda data: data.update(obs=np.array([{}] * 300)), "cannot be read"),  # needs pickle
    ],
)
def test_a_bad_data_set_is_refused_before_anything_is_written(spoil, message, tmp_path):
    args, data = small_args(), transitions(300)
    spoil(data)
    np.savez("data.npz", **data)
    with pytest.raises(iql.UserError) as error:
        iql.train(args)
    assert message in str(error.value) and "data.npz" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not really"])
def test_an_unreadable_data_set_is_refused(content):
    if content is not None:
        Path("other.npz").write_bytes(content)
    with pytest.raises(iql.UserError, match="other.npz cannot be read"):
        iql.check(iql.Args(dataset="other.npz"))


def test_the_explorer_collects_a_valid_data_set_and_the_same_one_again():
    args = iql.Args(collect_steps=105)
    first, second = iql.collect(args), iql.collect(args)
    assert all(np.array_equal(first[name], second[name]) for name in iql.FIELDS)
    iql.save_arrays(Path("runs.npz"), first)
    data = iql.read_dataset(Path("runs.npz"))
    assert len(data["obs"]) == 105 and np.array_equal(data["truncated"].nonzero()[0], [99])
    assert np.array_equal(data["obs"][1:100], data["next_obs"][:99]) and np.allclose(data["obs"][100], 2 / 22)
    assert iql.coverage(args, data).sum() == 105


# ---- runs


def test_a_run_through_the_command_line():
    flags = "--collect-steps 150 --offline-steps 250 --online-steps 250 --eval-every 200 --eval-episodes 3 --device cpu"
    flags += " --injections 1 --l2 constant --layer-norm --leaky-relu"
    command = [sys.executable, SCRIPT, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path("runs/PointmassHard__l2-constant+layer-norm+leaky-relu+injection-1__seed1")
    assert "free cells visited, goal reached in 0 of 1 episodes" in done.stdout and str(folder) in done.stdout
    rows = log_of(folder)
    assert [(row["step"], row["phase"], row["injections"]) for row in rows] == [
        ("200", "offline", "0"),
        ("400", "online", "1"),
        ("500", "online", "1"),
    ]
    assert all(-100 <= float(row["eval_return"]) <= -20 and float(row["updated_units"]) == 100 for row in rows)
    assert [row["train_return"] for row in rows] == ["", "-100", "-100"]  # step 400 cuts an episode
    picture = np.load(folder / "picture.npz")
    assert picture["coverage"].sum() == 150 and picture["maze"].shape == picture["value"].shape == (22, 22)
    assert np.isnan(picture["value"][picture["maze"]]).all() and (picture["policy"][picture["maze"]] == -1).all()
    assert np.isfinite(picture["value"][~picture["maze"]]).all() and set(picture["policy"][~picture["maze"]]) <= set(
        range(5)
    )
    assert picture["trajectories"].shape == (10, 101, 2) and picture["trajectories"].dtype == np.float32
    assert (picture["trajectories"][:, 0] == picture["start"]).all()


def test_l2_shrinks_the_critic():
    plain = log_of(iql.train(small_args()))[-1]
    shrunk = log_of(iql.train(small_args(l2="constant", l2_lambda=1.0)))[-1]
    assert float(shrunk["weight_magnitude"]) < float(plain["weight_magnitude"])
    assert (plain["l2_lambda"], shrunk["l2_lambda"]) == ("0", "1")


def test_a_triggered_injection():
    settings = {
        "injection_trigger": "weight_magnitude",
        "injection_threshold": 0.0,
        "injections": 1,
        "online_steps": 40,
    }
    rows = log_of(iql.train(small_args(**settings)))
    assert [row["injections"] for row in rows] == ["0"] + ["1"] * 5  # measured at step 10, so injected at step 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--expectile 1.5", "--expectile 1.5 must lie between 0 and 1"),
        ("--batch-size 0", "--batch-size 0 must be above 0"),
        ("--injections 1 --injection-steps 300000", "must lie in 1..200000"),
        ("--offline-steps 0 --online-steps 0", "must not both be 0"),
        ("--env Pointmass", "PointmassHard"),
        ("--dataset nowhere.npz", "nowhere.npz cannot be read"),
        ("--beta -1", "--beta -1.0 must be 0 or more"),
    ],
)
def test_a_mistake_ends_with_one_line_and_writes_nothing(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["iql_pointmass_finetune.py", *flags.split()])
    monkeypatch.setattr(iql, "open_run", lambda args: pytest.fail("the run was started"))
    assert iql.main() == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and shown.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_diverged_run_says_so_and_keeps_its_log(monkeypatch):
    with pytest.raises(FloatingPointError, match="diverged"):
        iql.train(small_args(learning_rate=1e30))
