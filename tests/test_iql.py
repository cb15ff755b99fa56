"""The maze against its facts, IQL against what can be solved by hand, and whole runs.

The last section holds the tests of what both scripts share: injection, L2, LayerNorm, their checks
and the help.
"""

import ast
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import call, check_defaults, check_mistake, mistakes, rows
from gymnasium.utils.env_checker import check_env
from PIL import Image
from torch import nn

import dqn_plasticity as dqn
import iql_pointmass_finetune as iql
import metrics

STAY, LEFT, RIGHT, UP, DOWN = range(5)


def random_walk(count: int) -> dict[str, np.ndarray]:
    """So many transitions of random actions."""
    env = iql.Pointmass()
    rng = np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    columns = {name: [] for name in iql.FIELDS}
    for action in rng.integers(5, size=count):
        next_obs, reward, terminated, truncated, _ = env.step(action)
        columns["obs"].append(obs)
        columns["action"].append(action)
        columns["reward"].append(reward)
        columns["next_obs"].append(next_obs)
        columns["terminated"].append(terminated)
        columns["truncated"].append(truncated)
        obs = next_obs
        if terminated or truncated:
            obs, _ = env.reset()
    return {name: np.array(column, iql.FIELDS[name][0]) for name, column in columns.items()}


def small_args(**settings) -> iql.Args:
    """The settings of a run of a second, on a data set of its own."""
    np.savez("data.npz", **random_walk(300))
    small = {
        "dataset": "data.npz",
        "offline_steps": 20,
        "online_steps": 20,
        "eval_every": 10,
        "eval_episodes": 2,
        "plasticity_updates": 10,
        "device": "cpu",
    }
    return iql.Args(**{**small, **settings})


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt")


# ---- the maze
def placed(x: float, y: float, noise: tuple[float, float] = (0.0, 0.0)) -> iql.Pointmass:
    """An environment with the point put somewhere, and its next noise known."""
    env = iql.Pointmass()
    env.reset(seed=0)
    env.x = x
    env.y = y
    env.noise = [noise]
    return env


@pytest.mark.parametrize("name", iql.MAZES)
def test_gymnasium_accepts_the_maze_and_its_picture_shows_walls_goal_and_point(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"{name}-v0", render_mode="rgb_array")
        check_env(env.unwrapped)
    env.reset(seed=0)
    maze = env.unwrapped
    maze.y += 1
    picture = env.render()
    walls = maze.walls.repeat(16, 0).repeat(16, 1)  # axis 0 downwards
    grey = (picture == 60).all(2)
    white = (picture == 255).all(2)
    assert walls[grey].all()
    assert not walls[white].any()
    assert (grey | white).mean() > 0.8

    def colour(x, y):
        return picture[int(16 * x), int(16 * y)].tolist()

    assert colour(*maze.goal) == [90, 190, 90]
    assert colour(maze.x, maze.y) == [220, 50, 50]


def test_the_hard_maze_is_the_one_of_the_paper():
    env = iql.Pointmass()
    assert env.walls.shape == (22, 22)
    assert (~env.walls).sum() == 416
    drawn = ["".join(map(str, row)) for row in env.walls[[0, 4, 10, 12], ::2].astype(int)]
    assert drawn == ["00000100000", "00000000000", "10111100000", "00000111011"]
    obs, _ = env.reset(seed=0)
    assert np.allclose(obs, 2 / 22)


# Where the point is, its noise, the action, and where it is afterwards.
STEPS = [
    ((5, 5), (0, 0), STAY, (5, 5)),
    ((5, 5), (0, 0), LEFT, (5, 4)),
    ((5, 5), (0, 0), RIGHT, (5, 6)),
    ((5, 5), (0, 0), UP, (4, 5)),
    ((5, 5), (0, 0), DOWN, (6, 5)),
    ((1, 9.75), (0, 0), RIGHT, (1, 9.95)),  # the wall is in columns 10 and 11
    ((1, 9.75), (0.5, 0), RIGHT, (1.5, 9.95)),  # along it the point slides
    ((0.25, 21.75), (-1, 1), STAY, (0.05, 21.95)),  # the border
    # The first axis moves first: in tenths of (1, 1) to (6.05, 9.95), where the wall in rows 6..
    # blocks column 10.
    ((5.95, 9.95), (0, 1), DOWN, (6.95, 9.95)),
]


@pytest.mark.parametrize(("here", "noise", "action", "there"), STEPS)
def test_a_step_moves_along_its_axis_until_a_wall_or_the_border_stops_it(
    here, noise, action, there
):
    obs, reward, terminated, truncated, _ = placed(*here, noise).step(action)
    assert obs * 22 == pytest.approx(there, abs=1e-5)
    assert reward == -1.0
    assert not terminated
    assert not truncated


def test_the_noise_is_normal_with_standard_deviation_one_half():
    env = iql.Pointmass()
    env.reset(seed=3)
    moves = []
    for _ in range(4_000):
        env.x = 5.0
        env.y = 5.0
        env.step(DOWN)
        moves.append((env.x - 6.0, env.y - 5.0))
    moves = np.array(moves)
    assert np.abs(moves.mean(0)).max() < 0.04
    assert np.abs(moves.std(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(moves.T)[0, 1]) < 0.06


def test_the_goal_is_a_disc_of_radius_two():
    assert placed(20.0, 18.01).step(STAY)[1:4] == (0.0, True, False)
    assert placed(20.0, 17.99).step(STAY)[1:4] == (-1.0, False, False)


@pytest.mark.parametrize(
    ("task", "limit"), [("PointmassEasy", 50), ("PointmassMedium", 150), ("PointmassHard", 100)]
)
def test_a_time_limit_truncates(task, limit):
    env = iql.Pointmass(task)
    env.reset(seed=0)
    ends = []
    for _ in range(limit):
        env.x, env.y = env.start
        _, _, terminated, truncated, _ = env.step(STAY)
        assert not terminated
        ends.append(truncated)
    assert ends == [False] * (limit - 1) + [True]


def test_random_actions_return_about_minus_100():
    mean_return = random_walk(10_000)["reward"].sum() / 100
    assert -100 <= mean_return < -99


def test_a_seed_decides_everything_and_an_episode_without_one_continues():
    env = iql.Pointmass()

    def walk(maze, seed):
        maze.reset(seed=seed)
        return [maze.step(DOWN)[0].tolist() for _ in range(5)]

    first = walk(env, 7)
    assert walk(env, None) != first
    assert walk(env, 7) == first  # the noise drawn ahead is thrown away
    assert walk(iql.Pointmass(), 7) == first


# ---- the losses
def table(outputs: int, value: float = 0.0) -> nn.Linear:
    """A network that is a table over three states."""
    network = nn.Linear(3, outputs, bias=False)
    network.weight.data.fill_(value)
    return network


def batch_of(**columns: torch.Tensor) -> iql.Batch:
    return iql.Batch(**{name: column.reshape(len(column), -1) for name, column in columns.items()})


def test_the_expectile_loss_by_hand():
    for expectile in (0.1, 0.5, 0.9, 0.99):
        by_hand = ((1 - expectile) * 4 + expectile * 0.25 + expectile * 9) / 3
        loss = iql.expectile_loss(torch.tensor([-2.0, 0.5, 3.0]), expectile)
        assert loss.item() == pytest.approx(by_hand)


def test_the_weights_of_the_actor_are_clipped_at_100():
    state = torch.eye(3)[:1]
    no = torch.tensor([False])
    batch = batch_of(
        obs=state,
        action=torch.tensor([0]),
        reward=torch.zeros(1),
        next_obs=state,
        terminated=no,
        truncated=no,
    )
    # The advantage is that of the target network, 0, over V, -9; exp(9) is 8,103.
    _, _, actor_loss, _ = iql.iql_losses(
        q=table(2, -99.0),
        target_network=table(2, 0.0),
        v=table(1, -9.0),
        actor=table(2, 0.0),
        batch=batch,
        args=iql.Args(beta=1.0),
    )
    assert actor_loss.item() == pytest.approx(100 * math.log(2), rel=1e-5)


def test_fixed_point_of_the_three_updates_on_a_chain():
    """States 0, 1, 2. Action 0 stays for -1; action 1 moves on, from state 2 to the end for 0."""
    gamma = 0.9
    tau = 0.7
    beta = 1.5
    state = torch.arange(6) // 2
    action = torch.arange(6) % 2
    one_hot = torch.eye(3)
    end = (state == 2) & (action == 1)
    next_state = torch.minimum(state + action, torch.tensor(2))
    batch = batch_of(
        obs=one_hot[state],
        action=action,
        reward=torch.where(end, 0.0, -1.0),
        next_obs=one_hot[next_state],
        terminated=end,
        truncated=~end,  # which ends no future
    )

    torch.manual_seed(0)
    q = nn.Linear(3, 2, bias=False)
    target_network = nn.Linear(3, 2, bias=False)
    v = nn.Linear(3, 1, bias=False)
    actor = nn.Linear(3, 2, bias=False)
    args = SimpleNamespace(gamma=gamma, expectile=tau, beta=beta)
    parameters = [network.weight for network in (q, v, actor)]
    for _ in range(800):
        losses = iql.iql_losses(q, target_network, v, actor, batch, args)
        gradients = torch.autograd.grad(sum(losses[:3]), parameters)
        for parameter, gradient in zip(parameters, gradients):
            parameter.data -= gradient
        iql.polyak_update(q, target_network, 0.3)

    # By hand, from the end backwards. The two actions are equally frequent, and moving on is
    # better, so V = tau * Q(on) + (1 - tau) * Q(stay); and Q(stay) = -1 + gamma * V. Solved for V:
    onward = 0.0
    for s in (2, 1, 0):
        value = (tau * onward - (1 - tau)) / (1 - (1 - tau) * gamma)
        stay = -1 + gamma * value
        assert q.weight[:, s].tolist() == pytest.approx([stay, onward], abs=1e-4)
        assert target_network.weight[:, s].tolist() == pytest.approx([stay, onward], abs=1e-4)
        assert v.weight[0, s].item() == pytest.approx(value, abs=1e-4)
        odds = math.exp(beta * (onward - value)) / math.exp(beta * (stay - value))
        probability = actor.weight[:, s].softmax(0)[1].item()
        assert probability == pytest.approx(odds / (1 + odds), abs=1e-4)
        onward = -1 + gamma * value


def test_the_target_network_moves_by_the_polyak_share_towards_q():
    q = table(2, 1.0)
    target_network = table(2, 0.0)
    iql.polyak_update(q, target_network, 0.25)
    assert (q.weight == 1).all()
    assert (target_network.weight == 0.25).all()


# ---- acting and evaluation
def test_actions_are_sampled_from_the_actor():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -9.0])
    actor = nn.Linear(2, 5)
    actor.weight.data.zero_()
    actor.bias.data.copy_(logits)
    obs = np.zeros((20_000, 2), np.float32)
    actions = iql.sample_actions(actor, obs, np.random.default_rng(0))
    shares = np.bincount(actions, minlength=5) / 20_000
    assert np.allclose(shares, logits.softmax(0), atol=0.01)


class RightThenDown(nn.Linear):
    """The way through PointmassEasy."""

    def forward(self, obs):
        action = torch.where(obs[:, 1] > 0.88, DOWN, RIGHT)
        return 100.0 * nn.functional.one_hot(action, 5)


def test_an_evaluation_plays_whole_episodes():
    actor = RightThenDown(2, 5)
    args = iql.Args(env="PointmassEasy", eval_episodes=30)
    mean_return, positions = iql.play(actor, args, 7, episodes=30)
    assert positions.shape == (30, 51, 2)
    assert (positions[:, 0] == 1).all()
    lengths = (~np.isnan(positions[:, :, 0])).sum(1) - 1
    last = positions[range(30), lengths]
    reached = np.linalg.norm(last - 9, axis=1) < 2
    assert reached.mean() > 0.8
    assert (lengths[~reached] == 50).all()
    assert mean_return == pytest.approx((reached - lengths).mean())
    assert iql.evaluate(actor, args, 7) == mean_return


# ---- injection
def test_injection_invariance_of_all_networks_and_training_of_the_critic_alone(monkeypatch):
    states = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    iql_losses = iql.iql_losses

    def recorded(args):
        """A run's values of Q, target Q, V and actor, as each update finds them."""
        values = []

        def recording_losses(*arguments):
            networks = arguments[:4]
            values.append([network(states).tolist() for network in networks])
            return iql_losses(*arguments)

        monkeypatch.setattr(iql, "iql_losses", recording_losses)
        return iql.train(args), values

    plain_args = small_args(offline_steps=10, online_steps=5)
    injected_args = small_args(offline_steps=10, online_steps=5, injections=2)
    assert injected_args.injection_steps == (11, 13)
    _, plain = recorded(plain_args)
    folder, injected = recorded(injected_args)

    # All four networks learn.
    for before, after in zip(plain[0], plain[1]):
        assert before != after
    # The values that the update of step 11 finds are those of a run without an injection.
    assert injected[:11] == plain[:11]
    # Each update after an injection reaches the fresh network, and through it Q and its target.
    for update in (10, 12):
        for i in (0, 1):
            assert injected[update + 1][i] != injected[update][i]
            assert injected[update + 1][i] != plain[update + 1][i]
    # V and the actor learn from the same values as without it.
    assert injected[11][2:] == plain[11][2:]

    # The frozen networks were fresh ones, the same in Q and its target.
    checkpoint = checkpoint_of(folder)
    first = iql.fresh_network(injected_args, 11)[0].weight
    second = iql.fresh_network(injected_args, 13)[0].weight
    for network in (checkpoint["q"], checkpoint["target_network"]):
        assert torch.equal(network["h.f2.0.weight"], first)
        assert torch.equal(network["f2.0.weight"], second)


def test_injections_spread_over_the_online_phase():
    for count, steps in enumerate([(), (101,), (101, 151), (101, 134, 167)]):
        args = iql.Args(offline_steps=100, online_steps=100, injections=count)
        assert args.injection_steps == steps


# ---- the data
def cut_off_next_obs(data):
    data.pop("next_obs")


def make_actions_floats(data):
    data["action"] = data["action"].astype(np.float32)


def cut_off_a_coordinate(data):
    data["obs"] = data["obs"][:, :1]


def cut_off_a_reward(data):
    data["reward"] = data["reward"][:-1]


def count_actions_from_one(data):
    data["action"] = data["action"] + 1


def forget_to_divide_by_the_size(data):
    data["next_obs"] = data["next_obs"] * 22


def lose_a_reward(data):
    data["reward"][7] = np.nan


def need_pickle(data):
    data["obs"] = np.array([{}] * 300)


def cut_off_everything(data):
    for name in data:
        data[name] = data[name][:0]


def make_everything_one_number(data):
    for name, (dtype, _) in iql.FIELDS.items():
        data[name] = np.array(0, dtype)


SPOILS = {
    cut_off_next_obs: "lacks next_obs",
    make_actions_floats: "action is float32",
    cut_off_a_coordinate: "obs is float32 of shape (300, 1)",
    cut_off_a_reward: "reward is float32 of shape (299,)",
    count_actions_from_one: "action must lie in 0..4, but lies in 1..5",
    forget_to_divide_by_the_size: "next_obs must lie in 0..1",
    lose_a_reward: "reward must lie in",
    need_pickle: "cannot be read",
    cut_off_everything: "of shape (0, 2)",
    make_everything_one_number: "obs is float32 of shape (); it must be float32 of shape (t",
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_bad_data_set_is_refused_before_anything_is_written(spoil, tmp_path):
    args = small_args()
    data = random_walk(300)
    spoil(data)
    np.savez("data.npz", **data)
    with pytest.raises(iql.UserError) as error:
        iql.train(args)
    message = str(error.value)
    assert SPOILS[spoil] in message
    assert "data.npz" in message
    assert "\n" not in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not really"])
def test_an_unreadable_data_set_is_refused(content):
    if content is not None:
        Path("other.npz").write_bytes(content)
    with pytest.raises(iql.UserError, match=r"other.npz cannot be read"):
        iql.check(iql.Args(dataset="other.npz"))


def test_the_explorer_collects_a_valid_data_set_and_the_same_one_again():
    args = iql.Args(collect_steps=105)
    first = iql.collect(args)
    second = iql.collect(args)
    for name in iql.FIELDS:
        assert np.array_equal(first[name], second[name])
    iql.save_arrays(Path("runs.npz"), first)
    data = iql.read_dataset(Path("runs.npz"))
    assert len(data["obs"]) == 105
    assert data["truncated"].nonzero()[0].tolist() == [99]
    assert np.array_equal(data["obs"][1:100], data["next_obs"][:99])
    assert np.allclose(data["obs"][100], 2 / 22)

    visits = iql.coverage(args, data)
    x, y = (22 * data["next_obs"].T).astype(int)
    assert visits.sum() == 105
    assert visits[x[0], y[0]] == ((x == x[0]) & (y == y[0])).sum()


# ---- runs
def test_a_run_through_the_command_line():
    flags = (
        "--collect-steps 150 --offline-steps 250 --online-steps 250 --eval-every 200 "
        "--eval-episodes 3 --device cpu --plasticity-every 200 --plasticity-updates 10 "
        "--injections 1 --l2 constant --layer-norm before --leaky-relu"
    )
    command = [sys.executable, iql.__file__, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    variant = "l2-constant+layer-norm-before+leaky-relu+injection-1"
    folder = Path(f"runs/PointmassHard__{variant}__seed1")
    assert "This run collects it, or waits for one that does." in done.stdout
    assert "free cells visited, goal reached in 0 of 1 episodes" in done.stdout
    assert str(folder) in done.stdout

    log = rows(folder)
    assert [row["step"] for row in log] == ["200", "400", "500"]
    assert [row["phase"] for row in log] == ["offline", "online", "online"]
    assert [row["injections"] for row in log] == ["0", "1", "1"]
    # The end of the interval at step 400 cuts an episode.
    assert [row["train_return"] for row in log] == ["", "-100", "-100"]
    for row in log:
        assert -100 <= float(row["eval_return"]) <= -20
        assert float(row["updated_units"]) == 100
        assert row["grad_norm"]
        for name in metrics.METRICS:
            if name != "plasticity":
                assert row[name], name
    assert list(log[0]) == [
        "step",
        "phase",
        "train_return",
        "eval_return",
        "q_loss",
        "v_loss",
        "actor_loss",
        "q_mean",
        "grad_norm",
        "l2_lambda",
        "injections",
        "erank",
        "feature_erank",
        "weight_magnitude",
        "updated_units",
        "dormant_units",
        "plasticity",
        "plasticity_fresh",
        "feature_erank_fresh",
        "dormant_units_fresh",
    ]

    with Image.open(folder / "episode.gif") as gif:
        assert gif.size == (352, 352)
        assert 2 <= gif.n_frames <= 101
    picture = np.load(folder / "picture.npz")
    assert picture["coverage"].sum() == 150
    assert picture["maze"].shape == (22, 22)
    assert picture["value"].shape == (22, 22)
    assert np.array_equal(np.isfinite(picture["value"]), ~picture["maze"])
    assert picture["trajectories"].shape == (10, 101, 2)
    assert picture["trajectories"].dtype == np.float32
    assert (picture["trajectories"][:, 0] == picture["start"]).all()


def test_remedies_change_the_critic_alone():
    folder = iql.train(small_args(layer_norm="after", leaky_relu=True))
    assert folder.name == "PointmassHard__layer-norm-after+leaky-relu__seed1"
    checkpoint = checkpoint_of(folder)
    layers = {}
    for name in ("q", "v", "actor"):
        layers[name] = [key for key in checkpoint[name] if key.endswith("weight")]
    # The layers are Linear, activation, LayerNorm, and so on; V and the actor have no LayerNorm.
    assert layers["q"] == [f"{i}.weight" for i in (0, 2, 3, 5, 6)]
    assert layers["v"] == [f"{i}.weight" for i in (0, 2, 4)]
    assert layers["actor"] == [f"{i}.weight" for i in (0, 2, 4)]


def test_online_transitions_join_the_replay_and_measuring_changes_nothing(monkeypatch):
    args = small_args(online_steps=120, eval_every=60, plasticity_every=30)
    measured = checkpoint_of(iql.train(args).rename("measured"))

    def no_measurements(*_):
        return {}

    monkeypatch.setattr(iql, "measurements", no_measurements)
    unmeasured = checkpoint_of(iql.train(args))
    for part in ("q", "target_network", "v", "actor"):
        for name, tensor in measured[part].items():
            assert torch.equal(unmeasured[part][name], tensor), (part, name)

    replay = measured["replay"]
    for name in iql.FIELDS:
        assert torch.equal(unmeasured["replay"][name], replay[name])
    # The interval that ends at step 60 holds 40 online steps; those after it hold 60 and 20, and
    # no episode ends.
    assert len(replay["obs"]) == 120
    follows = (replay["obs"][1:] == replay["next_obs"][:-1]).all(1)
    assert (~follows).nonzero().flatten().tolist() == [39, 99]
    assert set(replay["action"].tolist()) == {0, 1, 2, 3, 4}
    assert (replay["reward"] == -1).all()


def test_l2_shrinks_the_critic():
    plain = rows(iql.train(small_args()))[-1]
    shrunk = rows(iql.train(small_args(l2="constant", l2_lambda=1.0)))[-1]
    assert float(shrunk["weight_magnitude"]) < float(plain["weight_magnitude"])
    assert plain["l2_lambda"] == "0"
    assert shrunk["l2_lambda"] == "1"


def test_a_triggered_injection():
    args = small_args(
        injections=1,
        injection_trigger="weight_magnitude",
        injection_threshold=0.0,
        online_steps=40,
    )
    # It is measured at step 10, and so the injection takes place at step 11.
    log = rows(iql.train(args))
    assert [row["injections"] for row in log] == ["0", "1", "1", "1", "1", "1"]


def test_dormant_units_of_the_tanh_critic_are_empty_and_those_of_leaky_relu_are_not():
    tanh = rows(iql.train(small_args(plasticity_every=20)))
    leaky = rows(iql.train(small_args(plasticity_every=20, leaky_relu=True)))
    assert [row["step"] for row in tanh] == ["10", "20", "30", "40"]
    assert [row["dormant_units"] for row in tanh] == [""] * 4
    assert [row["dormant_units_fresh"] for row in tanh] == [""] * 4
    assert [row["feature_erank_fresh"] != "" for row in tanh] == [False, True, False, True]
    for row in leaky:
        assert 0 <= float(row["dormant_units"]) <= 100
    assert [row["dormant_units_fresh"] != "" for row in leaky] == [False, True, False, True]


def test_plasticity_and_its_twin_fill_a_row_every_plasticity_every_steps():
    log = rows(iql.train(small_args(plasticity_every=15, leaky_relu=True)))
    assert [row["step"] for row in log] == ["10", "15", "20", "30", "40"]
    for row in log:
        probed = int(row["step"]) % 15 == 0
        for name in metrics.PROBED:
            assert (row[name] != "") == probed, name
    assert [row["eval_return"] != "" for row in log] == [True, False, True, True, True]


def test_a_diverged_run_says_so():
    with pytest.raises(FloatingPointError, match="training has diverged"):
        iql.train(small_args(learning_rate=1e30))


MISTAKES = """--expectile 1.5 => --expectile 1.5 must lie in 0..1;
--batch-size 0 => --batch-size 0 must lie in 1..inf;
--injections 1 --injection-steps 300000 => must lie in 1..200000;
--offline-steps 0 --online-steps 0 => not both be 0;
--dataset nowhere.npz => nowhere.npz cannot be read;
--beta -1 => --beta -1.0 must lie in 0..inf;
--layer-norm True => before;
--injections 1 --injection-trigger dormant_units --injection-threshold 5 => needs --leaky-relu;
--env Pointmass => PointmassHard"""


@pytest.mark.parametrize(("mistake", "message"), mistakes(MISTAKES))
def test_a_mistake_ends_with_one_message_before_anything_is_written(mistake, message, capsys):
    check_mistake(iql, mistake, message, capsys)


def test_injection_trigger_dormant_units_is_allowed_for_leaky_relu():
    args = iql.Args(
        injections=1,
        injection_trigger="dormant_units",
        injection_threshold=5.0,
        leaky_relu=True,
    )
    iql.check(args)


DEFAULTS = """env PointmassHard, seed 1, dataset None, collect_steps 10000, offline_steps 100000,
online_steps 100000, eval_every 5000, eval_episodes 50, plasticity_every 2000,
plasticity_updates 120, learning_rate 0.0003, gamma 0.95, batch_size 128, expectile 0.99,
beta 10.0, polyak 0.005, injections 0, injection_steps (), injection_trigger None,
injection_threshold None, l2 none, l2_lambda 0.0001, l2_start 0.0, l2_end 0.0002,
l2_on_steps 50000, l2_off_steps 10000, layer_norm none, leaky_relu False"""


def test_every_setting_its_default_and_the_help_that_shows_it(capsys):
    check_defaults(iql, DEFAULTS, 0, "", capsys)


# ---- what both scripts share
def both_scripts(test):
    return pytest.mark.parametrize("script", [dqn, iql])(test)


# A run of 12 steps, with an update at each and, where it is 1, a row after each.
TWELVE_STEPS = {
    dqn: "--env CartPole --total-steps 12 --learning-starts 0 --train-frequency 1 --eval-every 12 "
    "--eval-episodes 1 --batch-size 4 --plasticity-updates 10 --device cpu",
    iql: "--collect-steps 20 --offline-steps 6 --online-steps 6 --eval-every 12 "
    "--eval-episodes 1 --batch-size 4 --plasticity-updates 10 --device cpu",
}


def twelve_steps(script, *flags) -> Path:
    """The folder of the run of 12 steps with further flags."""
    assert call(script, *TWELVE_STEPS[script].split(), *flags) == 0
    (folder,) = [path for path in Path("runs").iterdir() if path.is_dir()]
    return folder


@pytest.mark.skipif(os.name == "nt", reason="a shell that can close a stream")
@both_scripts
def test_a_run_needs_no_output(script):
    """Both streams are closed, as under some job schedulers."""
    command = shlex.join([sys.executable, script.__file__, *TWELVE_STEPS[script].split()])
    done = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], check=False)
    assert done.returncode == 0


def test_both_scripts_hold_the_same_code_of_injection_and_l2():
    names = (
        "Injected",
        "trainable",
        "inject",
        "smooth",
        "injection_due",
        "l2_coefficient",
        "squared_norm",
        "check_injections",
    )

    def definitions(script):
        source = inspect.getsource(script)
        nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
        return {node.name: ast.get_source_segment(source, node) for node in nodes}

    in_dqn = definitions(dqn)
    in_iql = definitions(iql)
    for name in names:
        assert in_dqn[name] == in_iql[name], name


@both_scripts
def test_l2_is_a_norm_over_all_parameters(script):
    network = nn.Sequential(nn.Linear(1, 2), nn.LayerNorm(2))
    for value, parameter in enumerate(network.parameters(), start=1):
        nn.init.constant_(parameter, value)
    assert script.squared_norm(network).item() == 2 * (1 + 4 + 9 + 16)


PERIODS = [
    (dqn, {"env": "MsPacman"}, 500_000, 100_000),
    (dqn, {"env": "LunarLander"}, 75_000, 15_000),
    (dqn, {"env": "Digits"}, 4_000, 800),
    (iql, {}, 50_000, 10_000),
    (dqn, {"l2_on_steps": 7, "l2_off_steps": 3}, 7, 3),
    (iql, {"l2_on_steps": 7, "l2_off_steps": 3}, 7, 3),
    (dqn, {"l2_on_steps": 1, "l2_off_steps": 1}, 1, 1),
    (dqn, {"l2_on_steps": 5, "l2_off_steps": 0}, 5, 0),
]


@pytest.mark.parametrize(("script", "settings", "on", "off"), PERIODS)
def test_periodic_l2_has_lambda_in_n_steps_and_none_in_the_m_that_follow(script, settings, on, off):
    args = script.Args(l2="periodic", l2_lambda=0.5, **settings)
    for start in (0, on + off, 2 * (on + off)):
        assert script.l2_coefficient(args, start + 1) == 0.5
        assert script.l2_coefficient(args, start + on) == 0.5
        if off > 0:
            assert script.l2_coefficient(args, start + on + 1) == 0
            assert script.l2_coefficient(args, start + on + off) == 0
        assert script.l2_coefficient(args, start + on + off + 1) == 0.5


@both_scripts
def test_periodic_l2_in_a_run(script, monkeypatch):
    """Of 12 steps with N = 4 and M = 2, the steps 5, 6, 11 and 12 have no L2 term."""
    regularised = []
    squared_norm = script.squared_norm
    l2_coefficient = script.l2_coefficient
    latest = SimpleNamespace(step=None)

    def recording_coefficient(args, step):
        latest.step = step
        return l2_coefficient(args, step)

    def recording_norm(network):
        regularised.append(latest.step)
        return squared_norm(network)

    monkeypatch.setattr(script, "l2_coefficient", recording_coefficient)
    monkeypatch.setattr(script, "squared_norm", recording_norm)
    flags = "--l2 periodic --l2-lambda 0.5 --l2-on-steps 4 --l2-off-steps 2 --plasticity-every 1"
    log = rows(twelve_steps(script, *flags.split()))
    assert regularised == [1, 2, 3, 4, 7, 8, 9, 10]
    assert [row["step"] for row in log] == [str(step) for step in range(1, 13)]
    shown = [row["l2_lambda"] for row in log]
    assert shown == (["0.5"] * 4 + ["0"] * 2) * 2


def network_with_a_silent_unit(script, layer_norm: str) -> nn.Sequential:
    """The first unit of its first layer has the same output for every observation."""
    if script is dqn:
        args = dqn.Args(env="CartPole", layer_norm=layer_norm)
        network = dqn.QNetwork(dqn.make_env("CartPole"), args)
        silencing_bias = -9.0  # far in the flat half of ReLU
    else:
        network = iql.mlp(2, 64, 64, 5, layer_norm=layer_norm)
        silencing_bias = 99.0  # where tanh is 1 to the last bit
    with torch.no_grad():
        network[0].weight[0] = 0
        network[0].bias[0] = silencing_bias
    return network


@both_scripts
@pytest.mark.parametrize("layer_norm", ["none", "before", "after"])
def test_updated_units_are_all_with_layer_norm_before_but_not_after(script, layer_norm):
    torch.manual_seed(0)
    network = network_with_a_silent_unit(script, layer_norm)
    obs = torch.randn(256, network[0].in_features)
    network(obs).square().mean().backward()
    gradient = network[0].bias.grad[0]
    if layer_norm == "before":
        assert gradient != 0
        assert metrics.updated_units(network) == 100
    else:
        assert gradient == 0
        assert metrics.updated_units(network) < 100


@both_scripts
@pytest.mark.parametrize("layer_norm", ["before", "after"])
def test_layer_norm_shows_in_the_folder_and_in_its_network(script, layer_norm):
    folder = twelve_steps(script, "--layer-norm", layer_norm)
    env = {dqn: "CartPole", iql: "PointmassHard"}[script]
    assert folder.name == f"{env}__layer-norm-{layer_norm}__seed1"
    # Layers 0, 1 and 2 are Linear, LayerNorm and activation, in the order that is asked for.
    norm = {"before": 1, "after": 2}[layer_norm]
    weights = checkpoint_of(folder)["q"]
    width = len(weights["0.weight"])
    assert weights[f"{norm}.weight"].shape == (width,)
    assert f"{3 - norm}.weight" not in weights


@pytest.mark.parametrize("layer_norm", ["none", "before", "after"])
@pytest.mark.parametrize("leaky_relu", [False, True])
def test_layer_norm_of_the_critic_stands_before_or_after_every_activation(layer_norm, leaky_relu):
    activation = "LeakyReLU" if leaky_relu else "Tanh"
    hidden = {
        "none": [activation],
        "before": ["LayerNorm", activation],
        "after": [activation, "LayerNorm"],
    }[layer_norm]
    args = iql.Args(device="cpu", layer_norm=layer_norm, leaky_relu=leaky_relu)
    critic = iql.fresh_network(args, 0)
    assert [type(layer).__name__ for layer in critic] == ["Linear", *hidden] * 2 + ["Linear"]


@both_scripts
def test_injection_steps_alone_are_as_many_injections(script):
    folder = twelve_steps(script, "--injection-steps", 5)
    assert folder.name.endswith("__injection-1__seed1")
    assert [row["injections"] for row in rows(folder)] == ["1"]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["injections"] == 1
    assert settings["injection_steps"] == [5]


INJECTION_MISTAKES = """--injections 101 => 0..100; --injections 1000000000000 => 0..100;
--injections 0 --injection-steps 9 => 0 contradicts --injection-steps 9;
--injections 2 --injection-steps 100 => 2 contradicts --injection-steps 100;
--injections 1 --injection-steps 100 200 => 1 contradicts --injection-steps 100 200;
--injections 0 --injection-trigger erank --injection-threshold 3 => --injections;
--injections 1 --injection-trigger erank => --injection-threshold;
--injections 1 --injection-threshold 3 => --injection-trigger;
--injections 1 --injection-trigger erank --injection-threshold 3 --injection-steps 9 => without"""


@both_scripts
@pytest.mark.parametrize(("mistake", "message"), mistakes(INJECTION_MISTAKES))
def test_wrong_injection_settings_are_refused(script, mistake, message, capsys):
    check_mistake(script, mistake, message, capsys)


@both_scripts
@pytest.mark.parametrize("injections", [0, 2])
def test_contradictory_injection_settings_are_refused_from_python(
    script, injections, tmp_path, monkeypatch
):
    started = mock.Mock(side_effect=AssertionError("the run was started"))
    monkeypatch.setattr(metrics, "Run", started)
    args = script.Args(injections=injections, injection_steps=(100,))
    with pytest.raises(metrics.UserError, match=f"--injections {injections} contradicts"):
        script.train(args)
    assert not list(tmp_path.iterdir())


def sentences_of_settings(script) -> dict[str, str]:
    """The comment above each setting in the source of Args."""
    sentences = {}
    comment = []
    for line in inspect.getsource(script.Args).splitlines():
        field = re.match(r"    (\w+): ", line)
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
        elif field:
            sentences[field[1]] = " ".join(comment)
            comment = []
    return sentences


@pytest.mark.parametrize(
    ("script", "flags"),
    [(dqn, ""), (dqn, "--env LunarLander"), (dqn, "--env Digits"), (iql, "")],
)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_the_sentence_and_the_default_of_each_setting(
    script, flags, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert call(script, *flags.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    shown = " ".join(" ".join(lines).replace("│", " ").split())

    defaults = script.Args(**({"env": flags.split()[-1]} if flags else {}))
    defaults.injections = None  # until it is known whether injection steps are given
    sentences = sentences_of_settings(script)
    assert list(sentences) == list(vars(defaults))
    for name, default in vars(defaults).items():
        sentence = sentences[name]
        assert sentence.endswith("."), name
        value = "" if default == () else default
        ending = re.escape(f"{sentence} (default: {value})")
        start = re.escape(metrics.flag(name))
        assert re.search(rf"{start} (?:(?! --).)*{ending}", shown), name
