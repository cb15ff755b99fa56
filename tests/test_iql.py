"""The maze against its facts, IQL against what can be solved by hand, injection to the last bit, and whole runs."""

import ast
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
from conftest import check_defaults, check_mistake, mistakes, rows
from gymnasium.utils.env_checker import check_env
from PIL import Image
from torch import nn

import iql_pointmass_finetune as iql
import metrics

STAY, LEFT, RIGHT, UP, DOWN = range(5)


def transitions(count: int) -> dict[str, np.ndarray]:
    """Of a random walk."""
    env, rng, walk = iql.Pointmass(), np.random.default_rng(0), []
    obs, _ = env.reset(seed=0)
    for action in rng.integers(5, size=count):
        next_obs, reward, terminated, truncated, _ = env.step(action)
        walk.append((obs, action, reward, next_obs, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    return {name: np.array(column, iql.FIELDS[name][0]) for name, column in zip(iql.FIELDS, zip(*walk))}


def small_args(**settings) -> iql.Args:
    """A run of a second on a data set of its own."""
    np.savez("data.npz", **transitions(300))
    small = {"dataset": "data.npz", "offline_steps": 20, "online_steps": 20, "eval_every": 10, "eval_episodes": 2}
    return iql.Args(**small | {"device": "cpu", "plasticity_updates": 2} | settings)


# ---- the maze
def placed(x: float, y: float, noise: tuple[float, float] = (0.0, 0.0)) -> iql.Pointmass:
    """An environment with the point put somewhere, and its next noise known."""
    env = iql.Pointmass()
    env.reset(seed=0)
    env.x, env.y, env.noise = x, y, [noise]
    return env


@pytest.mark.parametrize("task", iql.TASKS)
def test_gymnasium_accepts_the_task_and_its_picture_shows_walls_goal_and_point(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(f"{task}-v0", render_mode="rgb_array")
        check_env(env.unwrapped)
    env.reset(seed=0)
    env.unwrapped.y += 1
    picture, maze = env.render(), env.unwrapped
    walls = maze.walls.repeat(16, 0).repeat(16, 1)  # axis 0 downwards
    grey, white = ((picture == shade).all(2) for shade in (60, 255))
    assert walls[grey].all() and not walls[white].any() and (grey | white).mean() > 0.8
    seen = [picture[int(16 * x), int(16 * y)].tolist() for x, y in (maze.goal, (maze.x, maze.y))]
    assert seen == [[90, 190, 90], [220, 50, 50]]


def test_the_hard_maze_is_the_one_of_the_paper():
    env = iql.Pointmass()
    assert env.walls.shape == (22, 22) and (~env.walls).sum() == 416
    drawn = ["".join(map(str, row)) for row in env.walls[[0, 4, 10, 12], ::2].astype(int)]
    assert drawn == ["00000100000", "00000000000", "10111100000", "00000111011"]
    assert np.allclose(env.reset(seed=0)[0], 2 / 22)


STEPS = [((5, 5), (0, 0), action, there) for action, there in enumerate([(5, 5), (5, 4), (5, 6), (4, 5), (6, 5)])]
STEPS += [((1, 9.75), (0, 0), RIGHT, (1, 9.95))]  # the wall is in columns 10 and 11
STEPS += [((1, 9.75), (0.5, 0), RIGHT, (1.5, 9.95))]  # along it the point slides
STEPS += [((0.25, 21.75), (-1, 1), STAY, (0.05, 21.95))]  # the border
# The first axis moves first: in tenths of (1, 1) to (6.05, 9.95), where the wall in rows 6.. blocks column 10
STEPS += [((5.95, 9.95), (0, 1), DOWN, (6.95, 9.95))]


@pytest.mark.parametrize(("here", "noise", "action", "there"), STEPS)
def test_a_step_moves_along_its_axis_until_a_wall_or_the_border_stops_it(here, noise, action, there):
    obs, *rest, _ = placed(*here, noise).step(action)
    assert obs * 22 == pytest.approx(there, abs=1e-5) and rest == [-1.0, False, False]


def test_the_noise_is_normal_with_standard_deviation_one_half():
    env, moves = iql.Pointmass(), []
    env.reset(seed=3)
    for _ in range(4_000):
        env.x, env.y = 5.0, 5.0
        env.step(DOWN)
        moves.append((env.x - 6.0, env.y - 5.0))
    moves = np.array(moves)
    assert np.abs(moves.mean(0)).max() < 0.04 and np.abs(moves.std(0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(moves.T)[0, 1]) < 0.06


def test_the_goal_is_a_disc_of_radius_two_a_time_limit_truncates_and_random_actions_return_about_minus_100():
    assert placed(20.0, 18.01).step(STAY)[1:4] == (0.0, True, False)
    assert placed(20.0, 17.99).step(STAY)[1:4] == (-1.0, False, False)
    for task, limit in {"PointmassEasy": 50, "PointmassMedium": 150, "PointmassHard": 100}.items():
        env, ends = iql.Pointmass(task), []
        env.reset(seed=0)
        for _ in range(limit):
            env.x, env.y = env.start
            ends.append(env.step(STAY)[2:4])
        assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    assert -100 <= transitions(10_000)["reward"].sum() / 100 < -99


def test_a_seed_decides_everything_and_an_episode_without_one_goes_on():
    env, other = iql.Pointmass(), iql.Pointmass()
    resets = [(env, 7), (env, None), (env, 7), (other, 7)]
    walks = [(maze.reset(seed=seed), [maze.step(DOWN)[0].tolist() for _ in range(5)])[1] for maze, seed in resets]
    assert walks[1] != walks[0] == walks[2] == walks[3]  # the noise drawn ahead is thrown away


# ---- the losses
def test_the_critic_has_layer_norm_and_leaky_relu_where_the_paper_puts_them():
    for settings, hidden in {(): ["Tanh"], ("layer_norm", "leaky_relu"): ["LayerNorm", "LeakyReLU"]}.items():
        critic = iql.fresh_network(iql.Args(device="cpu", **dict.fromkeys(settings, True)), 0)
        assert [type(layer).__name__ for layer in critic] == ["Linear", *hidden] * 2 + ["Linear"]


def table(outputs: int) -> nn.Linear:
    """A network that is a table over three states."""
    return nn.Linear(3, outputs, bias=False)


def batch_of(*columns: torch.Tensor) -> iql.Batch:
    return iql.Batch(*(column.reshape(len(column), -1) for column in columns))


def test_the_expectile_loss_and_the_clipped_weights_of_the_actor_by_hand():
    for expectile in (0.1, 0.5, 0.9, 0.99):
        by_hand = ((1 - expectile) * 4 + expectile * 0.25 + expectile * 9) / 3
        assert iql.expectile_loss(torch.tensor([-2.0, 0.5, 3.0]), expectile).item() == pytest.approx(by_hand)
    q, target_network, v, actor = table(2), table(2), table(1), table(2)
    state, no = torch.eye(3)[:1], torch.tensor([False])
    for network, value in {q: -99.0, target_network: 0.0, v: -9.0, actor: 0.0}.items():
        network.weight.data.fill_(value)
    batch, args = batch_of(state, torch.tensor([0]), torch.zeros(1), state, no, no), iql.Args(beta=1.0)
    actor_loss = iql.iql_losses(q, target_network, v, actor, batch, args)[2]
    assert actor_loss.item() == pytest.approx(100 * math.log(2), rel=1e-5)


def test_fixed_point_of_the_three_updates_on_a_chain():
    """States 0, 1, 2. Action 0 stays for -1; action 1 moves on for -1, from state 2 to the end for 0."""
    gamma, tau, beta = 0.9, 0.7, 1.5
    state, action, one_hot = torch.arange(6) // 2, torch.arange(6) % 2, torch.eye(3)
    end = (state == 2) & (action == 1)
    next_state = torch.minimum(state + action, torch.tensor(2))
    batch = batch_of(
        one_hot[state], action, torch.where(end, 0.0, -1.0), one_hot[next_state], end, ~end
    )  # truncation ends no future

    torch.manual_seed(0)
    q, target_network, v, actor = table(2), table(2), table(1), table(2)
    args = SimpleNamespace(gamma=gamma, expectile=tau, beta=beta)
    parameters = [network.weight for network in (q, v, actor)]
    for _ in range(800):
        losses = iql.iql_losses(q, target_network, v, actor, batch, args)
        for parameter, gradient in zip(parameters, torch.autograd.grad(sum(losses[:3]), parameters)):
            parameter.data -= gradient
        iql.polyak_update(q, target_network, 0.3)

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


def test_the_target_network_moves_by_the_polyak_share_towards_q():
    q, target_network = table(2), table(2)
    q.weight.data.fill_(1.0), target_network.weight.data.zero_()
    iql.polyak_update(q, target_network, 0.25)
    assert (q.weight == 1).all() and (target_network.weight == 0.25).all()


# ---- acting and evaluation
def test_actions_are_sampled_from_the_actor():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -9.0])
    actor = nn.Linear(2, 5)
    actor.weight.data.zero_(), actor.bias.data.copy_(logits)
    actions = iql.sample_actions(actor, np.zeros((20_000, 2), np.float32), np.random.default_rng(0))
    assert np.allclose(np.bincount(actions, minlength=5) / 20_000, logits.softmax(0), atol=0.01)


class RightThenDown(nn.Linear):  # the way through PointmassEasy
    def forward(self, obs):
        return 100.0 * nn.functional.one_hot(torch.where(obs[:, 1] > 0.88, DOWN, RIGHT), 5)


def test_an_evaluation_plays_whole_episodes():
    args = iql.Args(env="PointmassEasy")
    mean_return, positions = iql.evaluate(RightThenDown(2, 5), args, 7, episodes=30)
    lengths = (~np.isnan(positions[:, :, 0])).sum(1) - 1
    reached = np.array([np.hypot(*(track[n] - 9)) < 2 for track, n in zip(positions, lengths)])
    assert positions.shape == (30, 51, 2) and (positions[:, 0] == 1).all() and reached.mean() > 0.8
    assert mean_return == pytest.approx((reached - lengths).mean()) and (lengths[~reached] == 50).all()
    assert iql.evaluate(RightThenDown(2, 5), args, 7, episodes=30)[0] == mean_return


# ---- injection
def test_an_injection_changes_nothing_at_that_moment_and_only_the_critic_after_it(monkeypatch):
    def recorded(args):
        """A run's values of Q, target Q, V and actor on the same states, as each update finds them."""
        values, states = [], torch.rand(64, 2, generator=torch.Generator().manual_seed(0))

        def recording_losses(*arguments):
            values.append([network(states).tolist() for network in arguments[:4]])
            return losses(*arguments)

        monkeypatch.setattr(iql, "iql_losses", recording_losses)
        return torch.load(iql.train(args) / "checkpoint.pt"), values

    losses, args = iql.iql_losses, small_args(offline_steps=10, online_steps=5, injections=2)
    (_, plain), (checkpoint, injected) = recorded(small_args(offline_steps=10, online_steps=5)), recorded(args)
    assert all(before != after for before, after in zip(plain[0], plain[1]))  # all four networks learn
    assert plain[:11] == injected[:11]  # injections before the updates of steps 11 and 13
    for first_update in (10, 12):  # which reaches the fresh network, and through it both Q and its target
        for i in (0, 1):
            assert injected[first_update][i] != injected[first_update + 1][i] != plain[first_update + 1][i]
    assert plain[11][2:] == injected[11][2:]
    for name, step in {"h.f2.0.weight": 11, "f2.0.weight": 13}.items():  # fresh ones, the same in both, and frozen
        for network in (checkpoint["q"], checkpoint["target_network"]):
            assert torch.equal(network[name], iql.fresh_network(args, step)[0].weight)


def test_both_scripts_hold_the_same_code():
    def definitions(name):
        source = Path(iql.__file__).with_name(name).read_text()
        nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
        return {node.name: ast.get_source_segment(source, node) for node in nodes}

    ours, theirs = definitions("iql_pointmass_finetune.py"), definitions("dqn_plasticity.py")
    same = "Injected trained inject smooth injection_due l2_coefficient squared_norm check_injections"
    assert [name for name in same.split() if ours[name] != theirs[name]] == []


def test_injections_spread_over_the_online_phase():
    for count, steps in enumerate([(), (101,), (101, 151), (101, 134, 167)]):
        assert iql.Args(offline_steps=100, online_steps=100, injections=count).injection_steps == steps


# ---- the data
SPOILS = {
    "lacks next_obs": lambda data: data.pop("next_obs"),
    "action is float32": lambda data: data.update(action=data["action"].astype(np.float32)),
    "obs is float32 of shape (300, 1)": lambda data: data.update(obs=data["obs"][:, :1]),
    "reward is float32 of shape (299,)": lambda data: data.update(reward=data["reward"][:-1]),
    "action must lie in 0..4, but lies in 1..5": lambda data: data.update(action=data["action"] + 1),
    "next_obs must lie in 0..1": lambda data: data.update(next_obs=data["next_obs"] * 22),
    "reward must lie in": lambda data: data["reward"].__setitem__(7, np.nan),
    "cannot be read": lambda data: data.update(obs=np.array([{}] * 300)),  # needs pickle
    "of shape (0, 2)": lambda data: data.update({name: array[:0] for name, array in data.items()}),
}


@pytest.mark.parametrize("message", SPOILS)
def test_a_bad_data_set_is_refused_before_anything_is_written(message, tmp_path):
    args, data = small_args(), transitions(300)
    SPOILS[message](data)
    np.savez("data.npz", **data)
    with pytest.raises(iql.UserError) as error:
        iql.train(args)
    assert message in str(error.value) and "data.npz" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_data_set_is_refused():
    for content in (None, b"", b"PK\x03\x04 not really"):
        if content is not None:
            Path("other.npz").write_bytes(content)
        with pytest.raises(iql.UserError, match=r"other.npz cannot be read"):
            iql.check(iql.Args(dataset="other.npz"))


def test_the_explorer_collects_a_valid_data_set_and_the_same_one_again():
    args = iql.Args(collect_steps=105)
    first, second = iql.collect(args), iql.collect(args)
    assert all(np.array_equal(first[name], second[name]) for name in iql.FIELDS)
    iql.save_arrays(Path("runs.npz"), first)
    data = iql.read_dataset(Path("runs.npz"))
    assert len(data["obs"]) == 105 and np.array_equal(data["truncated"].nonzero()[0], [99])
    assert np.array_equal(data["obs"][1:100], data["next_obs"][:99]) and np.allclose(data["obs"][100], 2 / 22)
    visits, (x, y) = iql.coverage(args, data), (22 * data["next_obs"].T).astype(int)
    assert visits.sum() == 105 and visits[x[0], y[0]] == ((x == x[0]) & (y == y[0])).sum()


# ---- runs
def test_a_run_through_the_command_line():
    flags = "--collect-steps 150 --offline-steps 250 --online-steps 250 --eval-every 200 --eval-episodes 3 --device cpu"
    flags += " --plasticity-updates 5 --injections 1 --l2 constant --layer-norm --leaky-relu"
    command = [sys.executable, iql.__file__, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path("runs/PointmassHard__l2-constant+layer-norm+leaky-relu+injection-1__seed1")
    assert "free cells visited, goal reached in 0 of 1 episodes" in done.stdout and str(folder) in done.stdout
    log = rows(folder)
    shown = [" ".join(row[name] for name in ("step", "phase", "injections", "train_return")) for row in log]
    assert shown == ["200 offline 0 ", "400 online 1 -100", "500 online 1 -100"]  # step 400 cuts an episode
    assert all(-100 <= float(row["eval_return"]) <= -20 and float(row["updated_units"]) == 100 for row in log)
    assert [bool(row["plasticity"] and row["plasticity_fresh"]) for row in log] == [True, True, False]
    assert tuple(log[0]) == iql.COLUMNS
    assert all(row[name] for row in log for name in ("grad_norm", *metrics.METRICS) if name != "plasticity")
    with Image.open(folder / "episode.gif") as gif:
        assert gif.size == (352, 352) and 2 <= gif.n_frames <= 101
    picture = np.load(folder / "picture.npz")
    assert picture["coverage"].sum() == 150 and picture["maze"].shape == picture["value"].shape == (22, 22)
    assert np.array_equal(np.isfinite(picture["value"]), ~picture["maze"])
    assert picture["trajectories"].shape == (10, 101, 2) and picture["trajectories"].dtype == np.float32
    assert (picture["trajectories"][:, 0] == picture["start"]).all()


def test_online_transitions_join_the_replay_and_measuring_changes_nothing(monkeypatch):
    args = small_args(online_steps=120, eval_every=60)
    state = torch.load(iql.train(args).rename("measured") / "checkpoint.pt")
    monkeypatch.setattr(iql, "measurements", lambda *_: {})
    unmeasured = torch.load(iql.train(args) / "checkpoint.pt")
    for part in ("q", "target_network", "v", "actor", "replay"):
        assert all(torch.equal(unmeasured[part][name], tensor) for name, tensor in state[part].items())
    replay = {name: array.numpy() for name, array in state["replay"].items()}
    follows = (replay["obs"][1:] == replay["next_obs"][:-1]).all(1)
    # The interval that ends at step 60 holds 40 online steps; those after it hold 60 and 20, and no episode ends
    assert len(replay["obs"]) == 120 and np.array_equal((~follows).nonzero()[0], [39, 99])
    assert np.ptp(replay["action"]) == 4 and (replay["reward"] == -1).all()


def test_l2_shrinks_the_critic():
    plain = rows(iql.train(small_args()))[-1]
    shrunk = rows(iql.train(small_args(l2="constant", l2_lambda=1.0)))[-1]
    assert float(shrunk["weight_magnitude"]) < float(plain["weight_magnitude"])
    assert (plain["l2_lambda"], shrunk["l2_lambda"]) == ("0", "1")


def test_a_triggered_injection():
    trigger = {"injection_trigger": "weight_magnitude", "injection_threshold": 0.0, "injections": 1}
    log = rows(iql.train(small_args(**trigger, online_steps=40)))
    assert [row["injections"] for row in log] == ["0"] + ["1"] * 5  # measured at step 10, so injected at step 11


MISTAKES = """--expectile 1.5 => --expectile 1.5 must lie in 0..1; --batch-size 0 => --batch-size 0 must lie in 1..inf;
--injections 1 --injection-steps 300000 => must lie in 1..200000; --offline-steps 0 --online-steps 0 => not both be 0;
--dataset nowhere.npz => nowhere.npz cannot be read; --beta -1 => --beta -1.0 must lie in 0..inf;
--env Pointmass => PointmassHard"""


@pytest.mark.parametrize(("mistake", "message"), mistakes(MISTAKES))
def test_a_mistake_ends_with_one_message_and_exit_code_2_before_anything_is_written(mistake, message, capsys):
    check_mistake(iql, mistake, message, capsys)


DEFAULTS = """env PointmassHard, seed 1, dataset None, collect_steps 10000, offline_steps 100000, online_steps 100000,
eval_every 5000, plasticity_every 1, plasticity_updates 100, eval_episodes 50, learning_rate 0.0003, gamma 0.95,
batch_size 128, expectile 0.99, beta 10.0, polyak 0.005, injections 0, injection_steps (), injection_trigger None,
injection_threshold None, l2 none, l2_lambda 0.0001, l2_start 0.0, l2_end 0.0002, l2_on_steps 50000, l2_off_steps 10000,
layer_norm False, leaky_relu False"""


def test_every_setting_its_default_and_the_help_that_shows_it(capsys):
    check_defaults(iql, DEFAULTS, 0, "", capsys)


def test_a_diverged_run_says_so():
    with pytest.raises(FloatingPointError):
        iql.train(small_args(learning_rate=1e30))
