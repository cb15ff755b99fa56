"""The protocol of the experiments: every number of it is observed where it acts.

A test of an equation does not notice that the agent explores twice as much, or skips three frames
instead of four. So nothing here is read back from the settings. Runs with the default settings are
watched: what reaches the environment, the networks and the optimiser, and at which step. What costs
time and is not the question, such as a convolutional network, is replaced by a stand-in, and a run
starts shortly before the step of interest.
"""

import functools
import inspect
import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.utils import parameters_to_vector
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dqn_plasticity as dqn
import iql_pointmass_finetune as iql
import metrics


# ---- watching a run of the DQN agent
class Seen(Exception):
    """What is of interest has been seen; the rest of the run is left out."""


class StandInEnvs(gym.vector.VectorEnv):
    """Environments that cost nothing: observations are noise, and every reward is the same."""

    def __init__(self, env_id, num_envs, episode_length, reward, before_step):
        self.num_envs = num_envs
        self.episode_length = episode_length
        self.reward = reward
        self.before_step = before_step
        self.rng = np.random.default_rng(0)
        self.elapsed = 0
        if env_id == "MsPacman":
            self.single_observation_space = gym.spaces.Box(0, 255, (4, 1, 1), np.uint8)
            self.single_action_space = gym.spaces.Discrete(9)
        elif env_id == "Digits":
            self.single_observation_space = gym.spaces.Box(0, 1, (3,), np.float32)
            self.single_action_space = gym.spaces.Discrete(10)
        else:
            self.single_observation_space = gym.spaces.Box(0, 1, (3,), np.float32)
            self.single_action_space = gym.spaces.Discrete(4)

    def observations(self):
        space = self.single_observation_space
        noise = self.rng.random((self.num_envs, *space.shape), np.float32)
        return (noise * space.high).astype(space.dtype)

    def reset(self, *, seed=None, options=None):
        self.elapsed = 0
        return self.observations(), {}

    def step(self, actions):
        self.before_step(actions)
        self.elapsed += 1
        rewards = np.full(self.num_envs, self.reward)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.full(self.num_envs, self.elapsed == self.episode_length)
        return self.observations(), rewards, terminated, truncated, {}

    def render(self):
        return [np.zeros((2, 2, 3), np.uint8)] * self.num_envs


def stand_in_network(inputs, actions, value):
    """A network that gives every action the same value, the first one a hair more."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 2), nn.ReLU(), nn.Linear(2, actions))
    nn.init.ones_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    nn.init.zeros_(network[-1].weight)
    nn.init.constant_(network[-1].bias, value)
    network[-1].bias.data[0] += 1e-6 * value
    return network


class Watch:
    """What a run does, and at which of its steps."""

    def __init__(self):
        self.step = 0
        self.tasks = set()
        self.actions = {}  # by step
        self.epsilons = {}  # likewise
        self.updates = []
        self.copies = []  # into the target network
        self.evaluations = []
        self.evaluation_episodes = []
        self.evaluation_returns = []
        self.saves = []
        self.measurements = []
        self.measured_observations = set()
        self.probes = Counter()
        self.probe_updates = Counter()
        self.probe_batches = set()
        self.batch_sizes = set()
        self.autocast = set()
        self.optimizers = set()  # of training
        self.probe_optimizers = set()
        self.l2 = {}  # lambda by step
        self.gradient_norms = []
        self.losses = []
        self.fresh_networks = []
        self.stored_rewards = set()
        self.evaluating = False
        self.probing = False


def optimizer_settings(optimizer):
    group = optimizer.param_groups[0]
    extras = (group["weight_decay"], group["amsgrad"], group["maximize"])
    assert type(optimizer) is torch.optim.Adam
    assert extras == (0, False, False)
    return group["lr"], group["eps"], *group["betas"]


def watch_dqn(args, start=0, until=None, value=1.0, learns=False, reward=0.0):
    """Train from step `start` to step `until`, or to the end of the run, in a folder of its own.

    Every action has the value `value`. Unless the network `learns`, the gradient of its loss is
    zero but for L2, and it never changes. All rewards are `reward`.
    """
    watch = Watch()
    watch.step = start
    real_epsilon_greedy = dqn.epsilon_greedy
    real_loss = dqn.td_loss
    real_copy = dqn.copy_to_target
    real_evaluate = dqn.evaluate
    real_save = metrics.Run.save
    real_measure = metrics.measure
    real_plasticity = metrics.plasticity
    real_add = dqn.Replay.add

    def before_training_step(actions):
        if watch.step == until:
            raise Seen
        watch.step += 1
        watch.actions[watch.step] = int(actions[0])

    def make_env(env_id, num_envs=1, **options):
        watch.tasks.add(env_id)
        if watch.evaluating:
            watch.evaluation_episodes.append(num_envs)
            return StandInEnvs(env_id, num_envs, 3, reward, lambda actions: None)
        length = 1_500 if env_id == "Digits" else None
        return StandInEnvs(env_id, num_envs, length, reward, before_training_step)

    def fresh_network(envs, args, step):
        watch.fresh_networks.append(watch.step + 1)  # before which step
        inputs = int(np.prod(envs.single_observation_space.shape))
        return stand_in_network(inputs, int(envs.single_action_space.n), value)

    def epsilon_greedy(q, obs, epsilon, rng):
        if not watch.evaluating:
            watch.epsilons[watch.step + 1] = epsilon
        return real_epsilon_greedy(q, obs, epsilon, rng)

    def td_loss(q, target_network, batch, gamma):
        watch.batch_sizes.add(len(batch.obs))
        watch.autocast.add(torch.is_autocast_enabled("cpu"))
        loss, *others = real_loss(q, target_network, batch, gamma)
        watch.losses.append(loss.item())
        return loss if learns else 0 * loss, *others

    def copy_to_target(*networks):
        watch.copies.append(watch.step)
        real_copy(*networks)

    def evaluate(*arguments):
        watch.evaluations.append(watch.step)
        watch.evaluating = True
        result = real_evaluate(*arguments)
        watch.evaluation_returns.append(result)
        watch.evaluating = False
        return result

    def save(run, *arguments, **parts):
        watch.saves.append(watch.step)
        real_save(run, *arguments, **parts)

    def measure(network, obs):
        watch.measurements.append(watch.step)
        watch.measured_observations.add(len(obs))
        return real_measure(network, obs)

    def plasticity(*arguments, **settings):
        watch.probes[watch.step] += 1
        watch.probing = True
        result = real_plasticity(*arguments, **settings)
        watch.probing = False
        return result

    def add(replay, obs, action, reward, *others):
        watch.stored_rewards.add(float(reward))
        real_add(replay, obs, action, reward, *others)

    def before_update(optimizer, *_):
        if watch.probing:
            watch.probe_optimizers.add(optimizer_settings(optimizer))
            watch.probe_updates[watch.step, watch.probes[watch.step]] += 1
            return
        parameters = optimizer.param_groups[0]["params"]
        gradients = [parameter.grad for parameter in parameters]
        watch.updates.append(watch.step)
        watch.optimizers.add(optimizer_settings(optimizer))
        watch.gradient_norms.append(nn.utils.get_total_norm(gradients).item())
        output_bias = parameters[-1]
        watch.l2[watch.step] = (output_bias.grad / (2 * output_bias)).mean().item()

    def before_forward(module, inputs):
        if watch.probing and torch.is_grad_enabled():
            watch.probe_batches.add(len(inputs[0]))

    class LaterRun(metrics.Run):
        def __enter__(self):
            super().__enter__()
            self.step = start
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tempfile.mkdtemp(dir=os.getcwd()))
        patch.setattr(dqn, "make_env", make_env)
        patch.setattr(dqn, "fresh_network", fresh_network)
        patch.setattr(dqn, "epsilon_greedy", epsilon_greedy)
        patch.setattr(dqn, "td_loss", td_loss)
        patch.setattr(dqn, "copy_to_target", copy_to_target)
        patch.setattr(dqn, "evaluate", evaluate)
        patch.setattr(dqn.Replay, "add", add)
        patch.setattr(LaterRun, "save", save)
        patch.setattr(metrics, "Run", LaterRun)
        patch.setattr(metrics, "measure", measure)
        patch.setattr(metrics, "plasticity", plasticity)
        if not learns:
            patch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
        update_hook = register_optimizer_step_pre_hook(before_update)
        forward_hook = register_module_forward_pre_hook(before_forward)
        try:
            dqn.train(args)
        except Seen:
            pass
        finally:
            update_hook.remove()
            forward_hook.remove()
    return watch


def dqn_args(env, **settings):
    return dqn.Args(env=env, device="cpu", **settings)


@functools.cache
def default_run(env):
    """The first steps of a run with all defaults, until everything has happened."""
    until = {"MsPacman": 25_000, "LunarLander": 20_100, "Digits": 1_550}
    return watch_dqn(dqn_args(env), until=until[env], reward=5.0)


# ---- DQN: when it learns, copies, evaluates, saves and measures
def test_mspacman_learns_after_20_000_steps_at_every_4th():
    updates = default_run("MsPacman").updates
    assert updates == list(range(20_004, 25_001, 4))


def test_lunar_lander_learns_after_20_000_steps_at_every_2nd():
    updates = default_run("LunarLander").updates
    assert updates == list(range(20_002, 20_101, 2))


def test_digits_learns_after_32_steps_of_each_task_at_every_step():
    updates = default_run("Digits").updates
    assert updates == [*range(33, 1_501), *range(1_533, 1_551)]


COPIES = {"MsPacman": 2_000, "LunarLander": 250, "Digits": 100}


@pytest.mark.parametrize("env", COPIES)
def test_the_target_network_gets_a_copy_every_so_many_steps(env):
    every = COPIES[env]
    run = default_run(env)
    assert run.copies == list(range(every, run.step + 1, every))


def test_mspacman_is_evaluated_and_saved_every_25_000_steps():
    run = default_run("MsPacman")
    assert run.evaluations == run.saves == [25_000]


def test_the_task_is_mspacman_unless_another_one_is_asked_for():
    assert watch_dqn(dqn.Args(device="cpu"), until=1).tasks == {"MsPacman"}


def test_lunar_lander_is_evaluated_and_saved_every_10_000_steps():
    run = default_run("LunarLander")
    assert run.evaluations == run.saves == [10_000, 20_000]


def test_digits_is_saved_after_every_task_and_never_evaluated():
    run = default_run("Digits")
    assert run.saves == [1_500]
    assert run.evaluation_episodes == []


LENGTHS = {"MsPacman": 2_000_000, "LunarLander": 300_000, "Digits": 60_000}


@pytest.mark.parametrize("env", LENGTHS)
def test_a_run_ends_at_its_last_step(env):
    length = LENGTHS[env]
    every = 1_500 if env == "Digits" else 100
    args = dqn_args(env, eval_every=every, train_frequency=50)
    run = watch_dqn(args, start=length - every)
    assert run.step == run.saves[-1] == length


def test_an_evaluation_has_ten_episodes_and_rewards_as_the_environment_gives_them():
    for env in ("MsPacman", "LunarLander"):
        run = default_run(env)
        assert set(run.evaluation_episodes) == {10}
        assert set(run.evaluation_returns) == {3 * 5.0}  # an evaluation in this world takes 3 steps


def test_rewards_in_training_are_signs_on_atari_and_as_they_are_elsewhere():
    assert default_run("MsPacman").stored_rewards == {1.0}
    assert default_run("LunarLander").stored_rewards == {5.0}
    assert default_run("Digits").stored_rewards == {5.0}


@pytest.mark.parametrize("env", LENGTHS)
def test_metrics_are_taken_every_1_000_steps_and_at_an_evaluation_of_512_observations(env):
    run = default_run(env)
    due = set(range(1_000, run.step + 1, 1_000)) | set(run.saves)
    assert run.measurements == sorted(due)
    assert run.measured_observations == {512}


def test_plasticity_is_measured_every_2_000_steps_on_lunar_lander_and_after_every_task_of_digits():
    assert list(default_run("LunarLander").probes) == list(range(2_000, 20_001, 2_000))
    assert list(default_run("Digits").probes) == [1_500]


@pytest.mark.parametrize(("step", "due"), [(25_000, False), (50_000, False), (100_000, True)])
def test_plasticity_is_measured_every_100_000_steps_on_mspacman(step, due):
    for border in (step, step + 100_000):
        run = watch_dqn(dqn_args("MsPacman", eval_every=50), start=border - 50, until=border + 50)
        assert list(run.probes) == ([border] if due else [])


# Learning rate, epsilon and both betas of Adam
ADAM = {
    "MsPacman": (1e-4, 1e-4, 0.9, 0.999),
    "LunarLander": (1e-3, 1e-4, 0.9, 0.999),
    "Digits": (1e-3, 1e-8, 0.9, 0.999),
}
BATCH_SIZES = {"MsPacman": 32, "LunarLander": 128, "Digits": 32}
PROBE_UPDATES = {"MsPacman": 700, "LunarLander": 25, "Digits": 150}


@pytest.mark.parametrize("env", ADAM)
def test_the_optimiser_and_its_batches(env):
    run = default_run(env)
    assert run.optimizers == {ADAM[env]}
    assert run.batch_sizes == {BATCH_SIZES[env]}
    assert run.autocast == {False}


@pytest.mark.parametrize("env", ADAM)
def test_the_probe_of_plasticity_trains_like_the_agent(env):
    """A network and its twin are probed, both in the same way."""
    run = default_run(env)
    if env == "MsPacman":
        run = watch_dqn(dqn_args(env, eval_every=50), start=99_950, until=100_000)
    assert set(run.probe_updates.values()) == {PROBE_UPDATES[env]}
    assert set(run.probes.values()) == {2}
    assert run.probe_optimizers == {ADAM[env]}
    assert run.probe_batches == {BATCH_SIZES[env]}


DISCOUNTS = {"MsPacman": 0.99, "LunarLander": 0.99, "Digits": 0.5}


@pytest.mark.parametrize("env", DISCOUNTS)
def test_the_discount_in_the_target(env):
    """All values are 100 and all rewards 0, so that each error is 100 - gamma * 100."""
    run = watch_dqn(dqn_args(env, learning_starts=64), until=150, value=100.0)
    expected = (100 - DISCOUNTS[env] * 100) ** 2
    assert run.losses[0] == pytest.approx(expected, rel=1e-3)


def test_gradients_are_clipped_to_a_norm_of_10_but_not_on_digits():
    for env in ("MsPacman", "LunarLander"):
        run = watch_dqn(dqn_args(env, learning_starts=64), until=150, value=1e5, learns=True)
        assert run.gradient_norms == pytest.approx([10.0] * len(run.gradient_norms), rel=1e-4)
        assert run.gradient_norms
    run = watch_dqn(dqn_args("Digits"), until=150, value=1e5, learns=True)
    assert min(run.gradient_norms) > 1e4


def test_a_gradient_shorter_than_that_stays_as_it_is():
    """It grows with the values, and just as much."""
    norms = []
    for value in (150, 300):
        args = dqn_args("LunarLander", learning_starts=64)
        run = watch_dqn(args, until=70, value=value, learns=True)
        norms.append(run.gradient_norms[0])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)
    assert 8 < norms[1] < 10


# ---- DQN: how often actions are random
def check_share_of_random_actions(run, steps, epsilon, number_of_actions):
    """Both what the schedule says and what reaches the environment.

    One in so many random actions is the first one, which the network prefers, too.
    """
    scheduled = np.mean([run.epsilons[step] for step in steps])
    assert scheduled == pytest.approx(epsilon, rel=1e-3)
    others = np.mean([run.actions[step] != 0 for step in steps])
    expected = epsilon * (1 - 1 / number_of_actions)
    deviation = np.sqrt(expected * (1 - expected) / len(steps))
    assert others == pytest.approx(expected, abs=3.5 * deviation + 1e-9)


# Around which step, how many steps, and the mean epsilon there
EPSILONS = [
    ("MsPacman", 1_000, 2_000, 1.0),
    ("MsPacman", 265_000, 2_000, 0.7525),
    ("MsPacman", 510_000, 2_000, 0.505),
    ("MsPacman", 902_000, 2_000, 0.109),
    ("MsPacman", 1_010_000, 5_000, 0.01),
    ("MsPacman", 1_990_000, 5_000, 0.01),
    ("LunarLander", 1_000, 2_000, 0.97),
    ("LunarLander", 15_000, 2_000, 0.55),
    ("LunarLander", 27_000, 2_000, 0.19),
    ("LunarLander", 33_000, 2_000, 0.1),
    ("LunarLander", 299_000, 2_000, 0.1),
]


@pytest.mark.parametrize(("env", "middle", "count", "epsilon"), EPSILONS)
def test_the_share_of_random_actions_in_training(env, middle, count, epsilon):
    start = middle - count // 2
    number_of_actions = 9 if env == "MsPacman" else 4
    args = dqn_args(env, eval_every=500, plasticity_every=10**9, train_frequency=10**9)
    run = watch_dqn(args, start=start, until=start + count)
    check_share_of_random_actions(
        run, range(start + 1, start + count + 1), epsilon, number_of_actions
    )


def test_all_actions_are_random_on_mspacman_until_learning_starts():
    run = default_run("MsPacman")
    check_share_of_random_actions(run, range(1, 20_001), 1.0, 9)
    assert run.epsilons[20_000] == 1.0
    assert run.epsilons[25_000] == pytest.approx(1 - 0.99 * 5 / 980)


def test_a_task_of_digits_starts_with_32_random_actions_and_then_explores_at_0_05():
    settings = {"plasticity_every": 10**9, "train_frequency": 10**9}
    run = watch_dqn(dqn_args("Digits", **settings), until=9_000)
    late = watch_dqn(dqn_args("Digits", **settings), start=57_000)
    random_steps = [step for step in run.actions if (step - 1) % 1_500 < 32]
    check_share_of_random_actions(run, random_steps, 1.0, 10)
    other_steps = [step for step in run.actions if (step - 1) % 1_500 >= 32]
    check_share_of_random_actions(run, other_steps, 0.05, 10)
    late_steps = [step for step in late.actions if (step - 1) % 1_500 >= 32]
    check_share_of_random_actions(late, late_steps, 0.05, 10)
    first_steps = [step for step in run.actions if (step - 1) % 1_500 == 32]
    assert (
        sum(run.actions[step] != 0 for step in first_steps) <= 2
    )  # most of these six are not random


def test_random_actions_are_as_frequent_as_epsilon_says_and_uniform():
    q = stand_in_network(3, 5, value=1.0)
    obs = np.zeros((100_000, 3), np.float32)
    actions = dqn.epsilon_greedy(q, obs, 0.1, np.random.default_rng(0))
    shares = np.bincount(actions, minlength=5) / len(actions)
    assert shares == pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02], abs=2e-3)


class Endless(Exception):
    """An episode that should have been given up."""


def endless_envs(actions):
    """A `make_env` whose episodes never end; their actions are collected."""

    def before_step(chosen):
        actions.append(chosen.copy())
        if len(actions) > 27_000:
            raise Endless

    def make_env(env_id, num_envs=1, **options):
        return StandInEnvs(env_id, num_envs, None, 1.0, before_step)

    return make_env


def test_an_evaluation_explores_at_0_02_and_is_given_up_after_27_000_steps(monkeypatch):
    actions = []
    monkeypatch.setattr(dqn, "make_env", endless_envs(actions))
    q = stand_in_network(4, 9, value=1.0)
    result = dqn.evaluate(q, dqn_args("MsPacman"), 1_000)
    actions = np.array(actions)
    assert actions.shape == (27_000, 10)
    assert result == 27_000  # a reward of 1 in every step
    assert (actions != 0).mean() == pytest.approx(0.02 * 8 / 9, abs=1e-3)


def test_the_film_of_a_run_shows_an_episode_like_those_of_evaluations(monkeypatch):
    """The last step of a run is enough, with all others left out."""
    actions = []
    shown = []

    def save_gif(path, frames, fps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dqn, "make_env", endless_envs(actions))
            shown.extend(frame.shape for frame in frames)

    monkeypatch.setattr(metrics, "save_gif", save_gif)
    watch_dqn(dqn_args("LunarLander", eval_every=10), start=299_990)
    assert len(shown) == len(actions) == 27_000
    share = (np.array(actions) != 0).mean()
    assert share == pytest.approx(0.02 * (1 - 1 / 4), abs=0.003)


def test_evaluating_and_measuring_change_nothing_in_training(monkeypatch):
    settings = {
        "eval_every": 100,
        "plasticity_every": 50,
        "plasticity_updates": 10,
        "learning_starts": 50,
        "exploration_fraction": 1.0,
    }
    args = dqn_args("LunarLander", **settings)
    run = watch_dqn(args, until=400, learns=True)
    one_episode = dqn_args("LunarLander", **settings, eval_episodes=1)
    other = watch_dqn(one_episode, until=400, learns=True)
    monkeypatch.setattr(dqn, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(metrics, "plasticity", lambda *_, **__: 0.0)
    neither = watch_dqn(args, until=400, learns=True)
    assert run.actions == other.actions == neither.actions
    assert run.gradient_norms == other.gradient_norms == neither.gradient_norms


# ---- DQN: L2 in the loss
def l2_in_steps(env, steps, **settings):
    """lambda, from the gradient of the loss in the updates of these steps."""
    every = 1_500 if env == "Digits" else 10
    start = (steps[0] - 5) // every * every
    settings = {
        **settings,
        "eval_every": every,
        "plasticity_every": 10**9,
        "learning_starts": steps[0] - start - 2,
        "train_frequency": 1,
    }
    run = watch_dqn(dqn_args(env, **settings), start=start, until=steps[-1])
    return [run.l2[step] for step in steps]


L2 = {"MsPacman": 1e-5, "LunarLander": 1e-3, "Digits": 1e-4}
# Steps with lambda (N) and without it (M)
PERIODS = {"MsPacman": (500_000, 100_000), "LunarLander": (75_000, 15_000), "Digits": (4_000, 800)}


@pytest.mark.parametrize("env", L2)
def test_constant_l2(env):
    expected = pytest.approx([L2[env]] * 2, rel=1e-3)
    assert l2_in_steps(env, [100, 101], l2="constant") == expected
    assert l2_in_steps(env, [100, 101]) == [0, 0]
    end = LENGTHS[env]
    assert l2_in_steps(env, [end - 1, end], l2="constant") == expected


@pytest.mark.parametrize("env", L2)
def test_incremental_l2_grows_from_nothing_to_twice_the_constant(env):
    end = LENGTHS[env]
    for step in (150, end // 2, end):
        expected = 2 * L2[env] * step / end
        assert l2_in_steps(env, [step], l2="incremental") == pytest.approx([expected], rel=1e-3)


@pytest.mark.parametrize("env", L2)
def test_periodic_l2_has_n_steps_with_lambda_and_m_without(env):
    on, off = PERIODS[env]
    last_with = l2_in_steps(env, [on, on + 1], l2="periodic")
    assert last_with == pytest.approx([L2[env], 0], rel=1e-3)
    last_without = l2_in_steps(env, [on + off, on + off + 1], l2="periodic")
    assert last_without == pytest.approx([0, L2[env]], rel=1e-3)
    first = l2_in_steps(env, [100], l2="periodic")
    assert first == pytest.approx([L2[env]], rel=1e-3)


# ---- DQN: replay
class AlwaysTheOldest:
    """A random stream that draws the lowest number."""

    def integers(self, low, high=None, size=None):
        return np.full(size, low)


CAPACITIES = {"MsPacman": 1_000_000, "LunarLander": 300_000, "Digits": 1_500}


@pytest.mark.parametrize("env", CAPACITIES)
def test_the_replay_keeps_so_many_transitions(env):
    envs = StandInEnvs(env, 1, None, 0.0, None)
    obs = envs.observations()[0]
    replay = dqn.Replay(Path("replay"), envs.single_observation_space, dqn_args(env))
    for number in range(1, 6):
        replay.add(obs, 0, float(number), obs, False, False)
    state = replay.state_dict()
    skipped = CAPACITIES[env] - 5  # as if they had been added, without taking the time
    state["next"] += skipped
    state["added"] += skipped
    replay.load_state_dict(state)
    oldest = []
    for _ in range(3):
        batch = replay.sample(2, AlwaysTheOldest(), "cpu")
        oldest.append(batch.reward.tolist())
        replay.add(obs, 0, -1.0, obs, False, False)
    assert oldest == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


# ---- DQN: when to inject
def injected_before(args, start, until):
    return watch_dqn(args, start=start, until=until).fresh_networks[1:]


@pytest.mark.parametrize("env", LENGTHS)
def test_one_injection_takes_place_in_the_middle_of_the_run_two_at_half_and_three_quarters(env):
    half = LENGTHS[env] // 2
    every = 1_500 if env == "Digits" else 100
    settings = {"eval_every": every, "plasticity_every": 10**9, "train_frequency": 10**9}
    three_quarters = half * 3 // 2
    cases = [({}, []), ({"injections": 1}, [half]), ({"injections": 2}, [half, three_quarters])]
    for injections, steps in cases:
        args = dqn_args(env, **settings, **injections)
        for step in (half, three_quarters):
            start = step - every
            injected = injected_before(args, start, step + 50)
            assert injected == [at for at in steps if at == step]


def test_a_trigger_averages_with_weight_0_8_and_waits_for_5_percent_of_the_run(monkeypatch):
    """The averages are 0, 20, 36 and 48.8 in the rows of steps 1,000, 1,500, 2,000 and 3,000.

    After the injection the average starts anew and is above the threshold at once.
    """
    values = itertools.chain([0.0], itertools.repeat(100.0))

    def measure(network, obs):
        others = ("erank", "feature_erank", "weight_magnitude", "updated_units")
        return {**dict.fromkeys(others, 1.0), "dormant_units": next(values)}

    monkeypatch.setattr(metrics, "measure", measure)
    trigger = {"injection_trigger": "dormant_units", "injection_threshold": 48.0, "injections": 3}
    args = dqn_args("Digits", **trigger, plasticity_every=10**9, train_frequency=50)
    assert injected_before(args, 0, 6_100) == [3_001, 6_001]


# ---- networks
def outputs_and_activations(network, obs):
    """The shape of what each layer with weights outputs, and the activations of -1 and 2."""
    shapes = []
    activations = []

    def after_forward(module, inputs, output):
        if isinstance(module, nn.Conv2d | nn.Linear):
            shapes.append(tuple(output.shape[1:]))
        elif not isinstance(module, nn.Flatten | nn.LayerNorm):
            activations.append(module)

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(after_forward) for module in leaves]
    network(obs)
    for hook in hooks:
        hook.remove()
    curves = {tuple(layer(torch.tensor([-1.0, 2.0])).tolist()) for layer in activations}
    assert len(activations) == len(shapes) - 1
    return shapes, list(curves)


def q_network(env, **settings):
    return dqn.QNetwork(dqn.make_env(env), dqn_args(env, **settings))


def observations_of(env, count=3):
    shape = {"MsPacman": (4, 84, 84), "LunarLander": (8,), "Digits": (64,)}[env]
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, *shape), generator=generator)


WIDTHS = {
    "MsPacman": [(32, 20, 20), (64, 9, 9), (64, 7, 7), (512,), (9,)],
    "LunarLander": [(256,), (256,), (4,)],
    "Digits": [(64,), (64,), (10,)],
}
KERNELS = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]


@pytest.mark.filterwarnings("ignore:builtin type")  # of Box2D
@pytest.mark.parametrize("env", WIDTHS)
def test_the_q_network_has_these_layers_and_relu_or_leaky_relu_of_slope_0_01(env):
    obs = observations_of(env)
    assert outputs_and_activations(q_network(env), obs) == (WIDTHS[env], [(0.0, 2.0)])
    shapes, curves = outputs_and_activations(q_network(env, leaky_relu=True), obs)
    assert shapes == WIDTHS[env]
    assert curves == [(pytest.approx(-0.01), 2.0)]
    kernels = [tuple(p.shape) for p in q_network("MsPacman").parameters() if p.dim() == 4]
    assert kernels == KERNELS


def test_the_networks_of_iql():
    """The critic and V have two layers of 64 units, the actor two of 128.

    They have tanh, and the critic LeakyReLU on request.
    """
    obs = torch.rand(3, 2)
    shapes, curves = outputs_and_activations(iql.fresh_network(iql_args(), 0), obs)
    assert shapes == [(64,), (64,), (5,)]
    assert curves == [pytest.approx((np.tanh(-1), np.tanh(2)))]
    leaky = iql.fresh_network(iql_args(leaky_relu=True), 0)
    assert outputs_and_activations(leaky, obs)[1] == [(pytest.approx(-0.01), 2.0)]
    v, actor = watch_iql(until=2, learns=True).v_and_actor
    assert outputs_and_activations(v, obs) == ([(64,), (64,), (1,)], curves)
    assert outputs_and_activations(actor, obs) == ([(128,), (128,), (5,)], curves)


def normalised(values):
    """Whether each observation's values in a layer have mean 0 and variance 1."""
    values = values.flatten(1)
    means = values.mean(1)
    deviations = values.std(1, correction=0)
    zero = torch.zeros_like(means)
    return torch.allclose(means, zero, atol=1e-3) and torch.allclose(
        deviations, zero + 1, atol=0.02
    )


def places_of_layer_norm(network, obs):
    """Whether the inputs of the activations, and those of the next layers, are normalised."""
    before = []
    after = []

    def before_forward(module, inputs):
        if isinstance(module, nn.Conv2d | nn.Linear):
            after.append(normalised(inputs[0]))
        elif isinstance(module, nn.ReLU | nn.Tanh):
            before.append(normalised(inputs[0]))

    for module in network.modules():
        module.register_forward_pre_hook(before_forward)
    network(obs)
    return before, after[1:]  # without the observations


@pytest.mark.parametrize("env", ["MsPacman", "Digits", "PointmassHard"])
def test_layer_norm_stands_before_or_after_every_activation_of_a_hidden_layer(env):
    """By default nowhere."""
    layers = 4 if env == "MsPacman" else 2
    yes = [True] * layers
    no = [False] * layers
    places = [(None, (no, no)), ("before", (yes, no)), ("after", (no, yes))]
    for place, expected in places:
        settings = {"layer_norm": place} if place else {}
        if env == "PointmassHard":
            network = iql.fresh_network(iql_args(**settings), 0)
            obs = torch.rand(3, 2)
        else:
            network = q_network(env, **settings)
            obs = observations_of(env)
        # The variance of the first layer's outputs has to be large beside the epsilon of LayerNorm.
        nn.init.normal_(network[0].weight, std=10.0)
        assert places_of_layer_norm(network, obs) == expected


# ---- Atari, on the emulator itself
def coverage(length):
    """Which share of each of 84 pixels the old ones are, whose number is `length`."""
    parts = np.eye(84).repeat(length, 1).reshape(84, length, 84)
    return parts.sum(2) / length


class Emulator:
    """The game itself, and the preprocessing of Mnih et al. 2015 written out by hand."""

    def __init__(self, rom):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)  # no sticky actions
        self.ale.loadROM(str(ale_py.roms.get_rom_path(rom)))
        self.actions = self.ale.getMinimalActionSet()

    def shrunk(self, screen):
        """84 x 84 pixels, each the mean of the area that it covers."""
        height, width = screen.shape
        return coverage(height) @ screen @ coverage(width).T

    def play(self, action):
        """Four frames: the larger of the last two at each pixel, and the sum of the rewards."""
        reward = 0
        screens = []
        for _ in range(4):
            reward += self.ale.act(self.actions[action])
            screens.append(self.ale.getScreenGrayscale())
        return self.shrunk(np.maximum(screens[2], screens[3])), reward


def test_a_step_of_mspacman_is_four_frames_of_the_emulator():
    """The last two of them are merged, shrunk to 84 x 84 and put on a stack of four.

    No action is sticky, all belong to the minimal set, and rewards are the game's own.
    """
    envs = dqn.make_env("MsPacman")
    obs, info = envs.reset(seed=5)
    emulator = Emulator("ms_pacman")
    for _ in range(int(info["episode_frame_number"][0])):  # no-ops
        emulator.ale.act(ale_py.Action.NOOP)
    screens = [np.zeros((84, 84))] * 3 + [emulator.shrunk(emulator.ale.getScreenGrayscale())]
    assert obs.shape == (1, 4, 84, 84)
    assert np.abs(obs[0] - screens).max() <= 0.51  # rounded
    assert int(envs.single_action_space.n) == len(emulator.actions) == 9
    rng = np.random.default_rng(0)
    rewards = []
    for _ in range(100):
        action = rng.integers(9)
        obs, reward, *_ = envs.step(np.array([action]))
        screen, expected_reward = emulator.play(action)
        screens = [*screens[1:], screen]
        assert np.abs(obs[0] - screens).max() <= 0.51
        assert reward[0] == expected_reward
        rewards.append(expected_reward)
    assert max(rewards) == 10


def test_an_atari_episode_starts_after_0_to_29_no_ops():
    """Uniform: of 120 starts, 4 are expected at any one number."""
    envs = dqn.make_env("MsPacman")
    envs.reset(seed=0)
    counts = Counter(int(envs.reset()[1]["episode_frame_number"][0]) for _ in range(120))
    assert min(counts) == 0
    assert max(counts) == 29
    assert max(counts.values()) < 15


def test_an_atari_episode_ends_with_the_game_and_not_with_a_life():
    envs = dqn.make_env("MsPacman")
    _, info = envs.reset(seed=0)
    lives = [3]
    for _ in range(2_000):
        _, _, terminated, truncated, info = envs.step(np.array([0]))
        if info["lives"][0] != lives[-1]:
            lives.append(int(info["lives"][0]))
        assert (terminated[0], truncated[0]) == (lives[-1] == 0, False)
        if terminated[0]:
            break
    assert lives == [3, 2, 1, 0]


def test_fire_is_pressed_where_a_game_waits_for_it():
    envs = dqn.make_env("Breakout")
    obs, _ = envs.reset(seed=0)
    assert int(envs.single_action_space.n) == 4
    screens = [obs[0, 3]]
    for _ in range(8):
        obs, *_ = envs.step(np.array([0]))
        screens.append(obs[0, 3])
    changes = [np.any(before != after) for before, after in itertools.pairwise(screens)]
    assert all(changes)  # the ball flies


def test_an_atari_episode_is_cut_after_108_000_frames(monkeypatch):
    """To play so long would take too much time, so this looks at what the emulator is told."""
    told = []
    signature = inspect.signature(dqn.AtariVectorEnv)

    def atari_vector_env(*arguments, **settings):
        bound = signature.bind(*arguments, **settings)
        bound.apply_defaults()
        told.append(bound.arguments["max_num_frames_per_episode"])

    monkeypatch.setattr(dqn, "AtariVectorEnv", atari_vector_env)
    dqn.make_env("MsPacman")
    dqn.make_env("Breakout", 10)
    assert told == [108_000, 108_000]


# ---- Digits
def test_a_task_of_digits_is_1_500_steps_among_100_images():
    envs = dqn.make_env("Digits")
    obs, _ = envs.reset(seed=0)
    assert int(envs.single_action_space.n) == 10
    seen = {obs.tobytes()}
    rewards = []
    labels = set()
    rng = np.random.default_rng(0)
    for step in range(1, 1_501):
        action = rng.integers(10, size=1)
        obs, reward, terminated, truncated, _ = envs.step(action)
        seen.add(obs.tobytes())
        rewards.append(float(reward[0]))
        if reward[0] == 1:
            labels.add(int(action[0]))
        assert (terminated[0], truncated[0]) == (False, step == 1_500)
    digits = {(digit / 16).astype(np.float32).tobytes() for digit in load_digits().data}
    assert len(seen) == 100
    assert seen <= digits
    assert set(rewards) == {0.0, 1.0}
    assert labels == set(range(10))
    assert 110 < sum(rewards) < 190  # chance is 150


# ---- PointmassHard
MAZE = """
00000100000
00000100000
00000000000
00000100000
00000100000
10111100000
00000111011
00000100000
00000100000
00000000000
00000100000
"""
STAY, LEFT, RIGHT, UP, DOWN = range(5)


def point_at(x, y, noise=(0.0, 0.0)):
    """The maze with the point put somewhere, and its next noise known."""
    maze = iql.Pointmass()
    maze.reset(seed=0)
    maze.x = x
    maze.y = y
    maze.noise = [noise]
    return maze


def test_the_maze_is_that_of_the_course_each_cell_doubled():
    small = np.array([list(row) for row in MAZE.split()]) == "1"
    large = np.kron(small, np.ones((2, 2))).astype(bool)
    maze = iql.Pointmass()
    assert np.array_equal(maze.walls, large)
    assert maze.reset(seed=0)[0] * 22 == pytest.approx([2, 2])
    for x, y in itertools.product(range(22), repeat=2):
        # A small step away from the border and from other cells is made where there is no wall.
        obs, *_ = point_at(x + 0.5, y + 0.5, noise=(0.1, 0.0)).step(STAY)
        moved = obs[0] * 22 > x + 0.55
        assert moved != large[x, y]


def test_actions_move_by_one_and_the_noise_has_a_standard_deviation_of_one_half():
    moves = {STAY: (0, 0), LEFT: (0, -1), RIGHT: (0, 1), UP: (-1, 0), DOWN: (1, 0)}
    maze = iql.Pointmass()
    maze.reset(seed=0)
    for action, move in moves.items():
        there = []
        for _ in range(4_000):
            maze.x = 5.0
            maze.y = 16.0  # far from any wall
            maze.step(action)
            there.append((maze.x - 5.0, maze.y - 16.0))
        assert np.mean(there, 0) == pytest.approx(move, abs=0.04)
        assert np.std(there, 0) == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_step_has_ten_substeps():
    """The wall is in columns 10 and 11. A tenth of a step fits in front of it, a fifth does not."""
    for start, end in {9.85: 9.95, 9.93: 9.93, 9.05: 9.95}.items():
        obs, *_ = point_at(1.0, start).step(RIGHT)
        assert obs[1] * 22 == pytest.approx(end, abs=1e-4)
    obs, *_ = point_at(1.0, 9.97, noise=(0.0, -0.8)).step(
        RIGHT
    )  # a fiftieth, and then another would not fit
    assert obs[1] * 22 == pytest.approx(9.99, abs=1e-4)


def test_the_goal_has_a_radius_of_2_and_an_episode_100_steps():
    assert point_at(20.0, 18.01).step(STAY)[1:4] == (0.0, True, False)
    assert point_at(20.0, 17.99).step(STAY)[1:4] == (-1.0, False, False)
    assert point_at(18.01, 20.0).step(STAY)[1:4] == (0.0, True, False)
    maze = gym.make("PointmassHard-v0")
    maze.reset(seed=0)
    ends = [maze.step(UP)[1:4] for _ in range(100)]
    assert ends == [(-1.0, False, False)] * 99 + [(-1.0, False, True)]


# ---- IQL: the losses with the default settings
def table_network(value, outputs):
    """A network of one state."""
    network = nn.Linear(1, outputs, bias=False)
    nn.init.constant_(network.weight, value)
    return network


def losses_of(q=0.0, target=0.0, v=0.0, reward=0.0):
    """The losses of V, Q and the actor, which is indifferent, for one transition."""
    networks = (
        table_network(q, 5),
        table_network(target, 5),
        table_network(v, 1),
        table_network(0.0, 5),
    )
    one = torch.ones(1, 1)
    no = torch.zeros(1, 1, dtype=torch.bool)
    batch = iql.Batch(
        obs=one,
        action=torch.zeros(1, 1, dtype=torch.int64),
        reward=reward * one,
        next_obs=one,
        terminated=no,
        truncated=no,
    )
    v_loss, q_loss, actor_loss, *_ = iql.iql_losses(*networks, batch, iql_args())
    return v_loss.item(), q_loss.item(), actor_loss.item()


def test_the_expectile_of_v_is_0_99():
    assert losses_of(target=1.0)[0] == pytest.approx(0.99)
    assert losses_of(target=-1.0)[0] == pytest.approx(0.01)


def test_the_discount_of_q_is_0_95():
    assert losses_of(v=10.0, reward=-1.0)[1] == pytest.approx((0.95 * 10 - 1) ** 2)


def test_the_weight_of_an_action_is_the_exponential_of_10_times_its_advantage_at_most_100():
    indifferent = np.log(5)
    for advantage, weight in {
        -0.2: np.exp(-2),
        0.0: 1,
        0.1: np.exp(1),
        0.46: np.exp(4.6),
        0.47: 100,
    }.items():
        assert losses_of(target=advantage)[2] == pytest.approx(weight * indifferent, rel=1e-4)


# ---- watching a run of the IQL agent
def iql_args(**settings):
    return iql.Args(device="cpu", **settings)


class WatchIQL(Watch):
    """What a run does, and at which of its updates; and what happens in the maze."""

    def __init__(self):
        super().__init__()
        self.moves = []  # before which update
        self.mazes = set()  # their sizes
        self.shapes = set()  # of what an optimiser trains
        self.polyak_shares = []
        self.v_and_actor = None
        self.largest_other_gradient = 0.0  # of V and the actor


def random_data(count):
    rng = np.random.default_rng(0)
    return {
        "obs": rng.random((count, 2), np.float32),
        "action": rng.integers(5, size=count),
        "reward": np.full(count, -1, np.float32),
        "next_obs": rng.random((count, 2), np.float32),
        "terminated": np.zeros(count, bool),
        "truncated": np.zeros(count, bool),
    }


def watch_iql(start=0, until=None, learns=False, **settings):
    """Train from step `start` to step `until`, or to the end of the run, in a folder of its own.

    The data are random. Unless the agent `learns`, the gradients of its losses are zero but for L2,
    and its networks never change.
    """
    watch = WatchIQL()
    watch.step = start
    real_losses = iql.iql_losses
    real_polyak_update = iql.polyak_update
    real_evaluate = iql.evaluate
    real_fresh_network = iql.fresh_network
    real_step = iql.Pointmass.step
    real_save = metrics.Run.save
    real_measure = metrics.measure
    real_plasticity = metrics.plasticity

    def iql_losses(q, target_network, v, actor, batch, args):
        if watch.step == until:
            raise Seen
        watch.step += 1
        watch.batch_sizes.add(len(batch.obs))
        watch.v_and_actor = v, actor
        if learns:
            return real_losses(q, target_network, v, actor, batch, args)
        v_loss = 0 * next(v.parameters()).sum()
        q_loss = 0 * parameters_to_vector(q.parameters()).sum()
        actor_loss = 0 * next(actor.parameters()).sum()
        return v_loss, q_loss, actor_loss, torch.zeros(1)

    def polyak_update(q, target_network, polyak):
        if not learns:
            return
        before = parameters_to_vector(target_network.parameters())
        real_polyak_update(q, target_network, polyak)
        after = parameters_to_vector(target_network.parameters())
        way = parameters_to_vector(q.parameters()) - before
        watch.polyak_shares.append(((after - before).norm() / way.norm()).item())

    def evaluate(*arguments, **settings):
        watch.evaluations.append(watch.step)
        watch.evaluation_episodes.append(0)
        watch.evaluating = True
        result = real_evaluate(*arguments, **settings)
        watch.evaluating = False
        return result

    def step(maze, action):
        result = real_step(maze, action)
        watch.mazes.add(maze.walls.shape)
        if not watch.evaluating:
            watch.moves.append(watch.step + 1)
            watch.actions[watch.step + 1] = int(action)
        elif result[2] or result[3]:
            watch.evaluation_episodes[-1] += 1
        return result

    def fresh_network(*arguments, **settings):
        watch.fresh_networks.append(watch.step + 1)
        return real_fresh_network(*arguments, **settings)

    def save(run, *arguments, **parts):
        watch.saves.append(watch.step)
        real_save(run, *arguments, **parts)

    def measure(network, obs):
        watch.measurements.append(watch.step)
        watch.measured_observations.add(len(obs))
        return real_measure(network, obs)

    def plasticity(*arguments, **settings):
        watch.probes[watch.step] += 1
        watch.probing = True
        result = real_plasticity(*arguments, **settings)
        watch.probing = False
        return result

    def before_update(optimizer, *_):
        if watch.probing:
            watch.probe_optimizers.add(optimizer_settings(optimizer))
            watch.probe_updates[watch.step, watch.probes[watch.step]] += 1
            return
        parameters = optimizer.param_groups[0]["params"]
        watch.optimizers.add(optimizer_settings(optimizer))
        watch.shapes.add(tuple(tuple(parameter.shape) for parameter in parameters))
        output_bias = parameters[-1]
        if len(parameters) == 6:
            watch.updates.append(watch.step)
            watch.gradient_norms.append(parameters[0].grad.norm().item())
            if not learns:
                watch.l2[watch.step] = (output_bias.grad / (2 * output_bias)).mean().item()
        else:
            gradients = [p.grad.abs().max().item() for p in parameters if p.grad is not None]
            watch.largest_other_gradient = max(watch.largest_other_gradient, *gradients)

    def before_forward(module, inputs):
        if watch.probing and torch.is_grad_enabled():
            watch.probe_batches.add(len(inputs[0]))

    class LaterRun(metrics.Run):
        def __enter__(self):
            super().__enter__()
            self.step = start
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tempfile.mkdtemp(dir=os.getcwd()))
        np.savez("data.npz", **random_data(300))
        patch.setattr(iql, "iql_losses", iql_losses)
        patch.setattr(iql, "polyak_update", polyak_update)
        patch.setattr(iql, "evaluate", evaluate)
        patch.setattr(iql, "fresh_network", fresh_network)
        patch.setattr(iql.Pointmass, "step", step)
        patch.setattr(LaterRun, "save", save)
        patch.setattr(metrics, "Run", LaterRun)
        patch.setattr(metrics, "measure", measure)
        patch.setattr(metrics, "plasticity", plasticity)
        if not learns:
            patch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
        update_hook = register_optimizer_step_pre_hook(before_update)
        forward_hook = register_module_forward_pre_hook(before_forward)
        try:
            iql.train(iql_args(dataset="data.npz", **settings))
        except Seen:
            pass
        finally:
            update_hook.remove()
            forward_hook.remove()
    return watch


@functools.cache
def default_iql_run():
    """The first steps of a run with all defaults but for its data."""
    return watch_iql(until=5_001)


# ---- IQL: when it learns, acts, evaluates, saves and measures
def test_iql_is_evaluated_and_saved_every_5_000_steps_in_50_episodes():
    run = default_iql_run()
    assert run.evaluations == run.saves == [5_000]
    assert run.evaluation_episodes == [50]
    assert run.mazes == {(22, 22)}  # PointmassHard


def test_iql_is_measured_every_1_000_steps_and_its_plasticity_every_2_000():
    run = default_iql_run()
    assert run.measurements == [1_000, 2_000, 3_000, 4_000, 5_000]
    assert run.measured_observations == {512}
    assert list(run.probes) == [2_000, 4_000]


def test_iql_updates_from_its_first_step_on_128_transitions_by_adam():
    run = default_iql_run()
    assert run.updates == list(range(1, 5_002))
    assert run.batch_sizes == {128}
    assert run.optimizers == {(3e-4, 1e-8, 0.9, 0.999)}


def test_the_probe_of_plasticity_trains_like_the_critic():
    run = default_iql_run()
    assert run.probe_optimizers == {(3e-4, 1e-8, 0.9, 0.999)}
    assert run.probe_batches == {128}
    assert set(run.probe_updates.values()) == {120}
    assert set(run.probes.values()) == {2}  # the network and its twin


def test_an_optimiser_for_the_critic_and_one_for_v_and_the_actor():
    def mlp(inputs, width, outputs):
        hidden = (width, inputs), (width,), (width, width), (width,)
        return *hidden, (outputs, width), (outputs,)

    critic = mlp(2, 64, 5)
    v_and_actor = mlp(2, 64, 1) + mlp(2, 128, 5)
    assert default_iql_run().shapes == {critic, v_and_actor}


def test_the_target_moves_by_0_005_of_the_way_at_every_update():
    run = watch_iql(until=3, learns=True)
    assert run.polyak_shares == pytest.approx([0.005] * 3, rel=0.01)


def test_iql_acts_after_100_000_updates_once_per_update_and_for_100_000_steps():
    first = watch_iql(start=99_990, until=100_010, eval_every=10, eval_episodes=1)
    assert first.moves == list(range(100_001, 100_012))
    last = watch_iql(start=199_990, eval_every=10, eval_episodes=1)
    assert last.step == last.saves[-1] == 200_000
    steps = list(range(199_991, 200_001))
    assert last.updates == steps
    assert last.moves[:11] == [*steps, 200_001]  # what follows are the trajectories in the pictures


def test_the_injections_of_iql_are_spread_over_the_online_phase():
    cases = [({}, []), ({"injections": 1}, [100_001]), ({"injections": 2}, [100_001, 150_001])]
    for injections, steps in cases:
        for start in (99_990, 149_990):
            settings = {"eval_every": 10, "eval_episodes": 1, **injections}
            run = watch_iql(start=start, until=start + 20, **settings)
            assert run.fresh_networks[1:] == [step for step in steps if step == start + 11]


def test_a_trigger_of_iql_averages_and_waits_in_the_same_way(monkeypatch):
    """Here a row is 5 steps, and 5 % of the run are 20."""
    values = itertools.chain([0.0], itertools.repeat(100.0))

    def measure(network, obs):
        others = ("erank", "feature_erank", "dormant_units", "updated_units")
        return {**dict.fromkeys(others, 1.0), "weight_magnitude": next(values)}

    monkeypatch.setattr(metrics, "measure", measure)
    length = {"offline_steps": 100, "online_steps": 300, "eval_every": 5, "eval_episodes": 1}
    trigger = {"injection_trigger": "weight_magnitude", "injection_threshold": 48.0}
    run = watch_iql(until=65, **length, **trigger, injections=2)
    assert run.fresh_networks[1:] == [21, 41]  # and no third one at step 61


def test_evaluating_and_measuring_change_nothing_in_iql(monkeypatch):
    settings = {
        "start": 99_990,
        "until": 100_040,
        "learns": True,
        "eval_every": 10,
        "plasticity_every": 5,
    }
    run = watch_iql(**settings, plasticity_updates=10, eval_episodes=5)
    other = watch_iql(**settings, plasticity_updates=20, eval_episodes=2)
    monkeypatch.setattr(iql, "evaluate", lambda *_, **__: (0.0, None))
    monkeypatch.setattr(metrics, "plasticity", lambda *_, **__: 0.0)
    neither = watch_iql(**settings)
    assert len(set(run.actions.values())) > 1
    assert run.actions == other.actions == neither.actions
    assert run.gradient_norms == other.gradient_norms == neither.gradient_norms


# ---- IQL: L2 in the loss
def iql_l2_in_steps(steps, **settings):
    """lambda, from the gradient of the loss in the updates of these steps.

    The gradients of V and the actor are zero, for L2 moves the critic alone.
    """
    start = (steps[0] - 1) // 10 * 10
    run = watch_iql(start=start, until=steps[-1], eval_every=10, eval_episodes=1, **settings)
    assert run.largest_other_gradient == 0
    return [run.l2[step] for step in steps]


def test_the_l2_of_iql():
    assert iql_l2_in_steps([5, 6]) == [0, 0]
    assert iql_l2_in_steps([5, 6], l2="constant") == pytest.approx([1e-4] * 2, rel=1e-3)
    for step in (10, 100_000, 200_000):
        expected = 2e-4 * step / 200_000
        assert iql_l2_in_steps([step], l2="incremental") == pytest.approx([expected], rel=1e-3)


def test_the_periodic_l2_of_iql_has_50_000_steps_with_lambda_and_10_000_without():
    assert iql_l2_in_steps([1, 2], l2="periodic") == pytest.approx([1e-4, 1e-4], rel=1e-3)
    last_with = iql_l2_in_steps([50_000, 50_001], l2="periodic")
    assert last_with == pytest.approx([1e-4, 0], rel=1e-3)
    last_without = iql_l2_in_steps([60_000, 60_001], l2="periodic")
    assert last_without == pytest.approx([0, 1e-4], rel=1e-3)


# ---- the explorer that collects IQL's data
def test_the_explorer_collects_10_000_transitions_at_random_in_30_percent_of_the_steps(monkeypatch):
    """Its networks are stand-ins that prefer one action and do not learn.

    The target network gets a copy every 300 steps.
    """
    actions = []
    batch_sizes = set()
    copies = []
    real_step = iql.Pointmass.step
    real_sample = iql.Replay.sample
    real_load = nn.Module.load_state_dict

    def step(maze, action):
        actions.append(int(action))
        return real_step(maze, action)

    def sample(replay, batch_size, *others):
        batch_sizes.add(batch_size)
        return real_sample(replay, 1, *others)

    def load_state_dict(network, *arguments):
        copies.append(len(actions))
        return real_load(network, *arguments)

    monkeypatch.setattr(iql.Pointmass, "step", step)
    monkeypatch.setattr(iql.Replay, "sample", sample)
    monkeypatch.setattr(nn.Module, "load_state_dict", load_state_dict)
    monkeypatch.setattr(
        nn.Sequential, "forward", lambda network, obs: network[-1].bias.expand(len(obs), -1)
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
    data = iql.collect(iql_args())
    assert len(actions) == len(data["obs"]) == 10_000
    assert batch_sizes == {128}
    assert copies == list(range(300, 10_000, 300))
    shares = sorted(np.bincount(actions, minlength=5) / len(actions))
    assert shares == pytest.approx([0.06] * 4 + [0.76], abs=0.012)


def test_the_explorers_networks_and_its_losses(monkeypatch):
    """Its reward is the error of the predictor, divided by the root of its mean square.

    That is the mean of the latest 100 updates or so. Here all values are 1,000, and the error is 1
    until step 150, then 2. So the gradient, of (1,000 - (reward + discount * 1,000))^2, shows the
    reward and the discount. No network learns.
    """
    shapes = set()
    optimizers = set()
    gradients = []
    random_weights = []
    real_sample = iql.Replay.sample

    def sample(replay, batch_size, *others):
        return real_sample(replay, 1, *others)

    def after_forward(module, inputs, output):
        if not isinstance(module, nn.Linear) or module.out_features != 5:
            return None
        moved = output - output.detach()  # zero, but with a gradient
        if module.in_features == 64:
            return moved + 1_000
        if module.weight.requires_grad:
            error = 1.0 if len(gradients) < 150 else 2.0
            return moved + np.sqrt(error)
        random_weights.append(module.weight)
        return moved

    def before_update(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        shapes.add(tuple(tuple(parameter.shape) for parameter in parameters))
        optimizers.add(optimizer_settings(optimizer))
        gradients.append(parameters[5].grad.sum().item())

    monkeypatch.setattr(iql.Replay, "sample", sample)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer: None)
    forward_hook = register_module_forward_hook(after_forward)
    update_hook = register_optimizer_step_pre_hook(before_update)
    iql.collect(iql_args(collect_steps=152))
    forward_hook.remove()
    update_hook.remove()

    q = ((64, 2), (64,), (64, 64), (64,), (5, 64), (5,))
    predictor = ((400, 2), (400,), (400, 400), (400,), (5, 400), (5,))
    assert shapes == {q + predictor}
    assert optimizers == {(1e-3, 1e-8, 0.9, 0.999)}
    assert random_weights[0].shape == (5, 400)
    assert random_weights[0].std().item() == pytest.approx(1.0, abs=0.06)
    rewards = [1.0] * 150 + [2 / np.sqrt(1.03)]
    expected = [2 * (1_000 - (reward + 0.95 * 1_000)) for reward in rewards]
    assert gradients[:151] == pytest.approx(expected, rel=1e-4)


# ---- metrics
def test_a_unit_is_dormant_at_a_fortieth_of_the_mean_of_its_layer():
    """The mean is 1 in both layers."""
    below = torch.tensor([[0.0249, 1.9751]])
    above = torch.tensor([[0.0251, 1.9749]])
    assert metrics.dormant_units([below]) == 50
    assert metrics.dormant_units([above]) == 0
