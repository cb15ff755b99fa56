"""plot.py on small logs of real runs (logs/) and on logs written here."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import plot

LOGS = Path(__file__).parent / "logs"
DQN = ["step", "train_return", "eval_return", "injections", "erank", "updated_units"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `python plot.py ...` and returns its exit code, stdout and stderr.

    It draws a single column, and coarsely, so that it is quick."""
    savefig = plt.Figure.savefig

    def save_coarsely(figure, path, **_):
        savefig(figure, path, dpi=80)

    monkeypatch.setattr(plt.Figure, "savefig", save_coarsely)

    def run(*arguments, columns=("eval_return",)):
        monkeypatch.setattr(plot, "COLUMNS", {column: column for column in columns})
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        try:
            plot.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def write_run(root, name, returns, erank=10.0, total=None, **settings):
    """A DQN run with a row every 1,000 steps: evaluation returns, and their negatives as training
    returns."""
    folder = Path(root) / name
    folder.mkdir(parents=True)
    settings["seed"] = int(name[-1])
    settings["total_steps"] = total or 1_000 * len(returns)
    settings["device"] = "cpu"
    (folder / "config.json").write_text(json.dumps(settings))
    rows = []
    for i, value in enumerate(returns):
        rows.append([1_000 * (i + 1), -value, value, 0, erank, 50])
    write_log(folder, DQN, rows)
    return folder


def write_digits_run(root, name, scores):
    folder = write_run(root, name, [0] * len(scores), total=1_500 * len(scores))
    rows = []
    for i, score in enumerate(scores):
        rows.append([1_500 * (i + 1), 15 * score, "", 0, 10, 50])
    write_log(folder, DQN, rows)
    return folder


def write_log(folder, columns, rows):
    lines = [",".join(map(str, row)) for row in [columns, *rows]]
    (folder / "log.csv").write_text("\n".join([*lines, ""]))


def draw(log, columns, smooth=0.8):
    return plot.draw_figure(log, columns, smooth)


def read(*folders):
    return plot.read_runs(tuple(Path(folder) for folder in folders))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line_ends(figure):
    """What is written at the ends of the lines of a figure with one panel."""
    return [text.get_text() for text in figure.axes[0].texts]


def line(ax, name):
    """The drawn points of a legend entry."""
    (drawn,) = [line for line in ax.lines if line.get_label() == name]
    return np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())


def table(*folders):
    """The table of results, a row per variant."""
    log = plot.finished_runs(read(*folders))
    return plot.by_variant(plot.results(log), log).set_index("variant")


def difference_table(*folders):
    log = plot.finished_runs(read(*folders))
    differences = plot.minus_standard(plot.results(log).T, log).T
    return plot.by_variant(differences, log, "+").set_index("variant")


def moving_average(values, weight):
    """TensorBoard's: debiased, so that the first value is the first measurement."""
    total = 0.0
    smoothed = []
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight ** (i + 1)))
    return np.array(smoothed)


def test_a_line_is_the_mean_of_the_moving_averages_of_real_runs():
    logs = [pd.read_csv(LOGS / f"CartPole__standard__seed{seed}" / "log.csv") for seed in (1, 2)]
    figure = draw(read(*LOGS.glob("CartPole*")), ["eval_return"])
    steps, values = line(figure.axes[0], "standard")
    smooth = [moving_average(log.eval_return, 0.8) for log in logs]
    np.testing.assert_allclose(steps, [1_000, 2_000, 3_000, 4_000])
    np.testing.assert_allclose(values, np.mean(smooth, axis=0))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for step, first, second in zip(steps, *smooth):
        # Student's t for one degree of freedom, times the standard error.
        margin = 12.7062 * abs(first - second) / 2
        drawn = band[band[:, 0] == step, 1]
        middle = (first + second) / 2
        np.testing.assert_allclose(drawn.min(), middle - margin, rtol=1e-5)
        np.testing.assert_allclose(drawn.max(), middle + margin, rtol=1e-5)
    title = "CartPole: mean over 2 seeds, 95 % t-interval; returns: moving average 0.8"
    assert figure.get_suptitle() == title
    assert line_ends(figure) == ["standard"]
    raw = figure.axes[0].lines[1]
    np.testing.assert_allclose(raw.get_ydata(), np.mean([log.eval_return for log in logs], axis=0))


def test_without_smoothing_the_line_is_the_raw_mean_alone():
    figure = draw(read(*LOGS.glob("CartPole*")), ["eval_return"], smooth=0.0)
    logs = [pd.read_csv(folder / "log.csv") for folder in LOGS.glob("CartPole*")]
    mean = np.mean([log.eval_return for log in logs], axis=0)
    np.testing.assert_allclose(line(figure.axes[0], "standard")[1], mean)
    assert len(figure.axes[0].lines) == 1
    assert "moving average" not in figure.get_suptitle()
    assert legend(figure) == []


METRICS = ["erank", "feature_erank", "weight_magnitude", "updated_units", "dormant_units"]
METRICS += ["plasticity", "plasticity_fresh"]


def write_full_run(root, name, seed, shift=0, **settings):
    """A run of 40 rows in which every column is measured in every row, and is noisy."""
    folder = write_run(root, name, [0], total=60_000, **settings)
    columns = ["step", "train_return", "eval_return", "injections", *METRICS]
    random = np.random.default_rng(seed)
    rows = []
    for step in range(1_500, 61_500, 1_500):
        noise = 50 + random.normal(size=len(columns) - 2) + shift
        rows.append([step, *noise[:2], 0, *noise[2:]])
    write_log(folder, columns, rows)
    return folder


@pytest.mark.parametrize("env", ["Task", "Digits"])
def test_only_returns_are_smoothed_and_the_figure_names_its_thin_lines(tmp_path, env):
    write_full_run(tmp_path, f"{env}__standard__seed1", seed=1)
    log = read(tmp_path)
    columns = [column for column in plot.COLUMNS if column in log]
    assert len(columns) == 8
    for column in columns:
        figure = draw(log, [column], smooth=0.8)
        drawn = line(figure.axes[0], "standard")[1]
        smoothed = column in ("eval_return", "train_return")
        raw = log[column].to_numpy()
        np.testing.assert_allclose(drawn, moving_average(raw, 0.8) if smoothed else raw)
        assert ("not smoothed" in legend(figure)) == smoothed
        assert ("returns: moving average 0.8" in figure.get_suptitle()) == smoothed


def test_the_interval_covers_the_truth_as_often_as_it_says_even_with_five_seeds():
    worlds = np.random.default_rng(1).normal(loc=3, size=(4_000, 5))
    summary = plot.summarise(pd.DataFrame(worlds))
    np.testing.assert_allclose(summary["mean"], worlds.mean(axis=1))
    covered = (summary.low <= 3) & (3 <= summary.high)
    # The percentile bootstrap, which was here before, covers 0.83.
    assert 0.94 < covered.mean() < 0.96


def test_the_interval_of_a_known_example():
    summary = plot.summarise(pd.DataFrame([[1.0, 2, 3, 4, 5]]))
    margin = 2.776445 * np.sqrt(2.5 / 5)  # from a table of Student's t, four degrees of freedom
    np.testing.assert_allclose(summary.iloc[0], [3, 3 - margin, 3 + margin], rtol=1e-6)


def test_where_not_all_seeds_have_arrived_the_line_has_no_band(tmp_path):
    write_run(tmp_path, "Task__standard__seed1", [1, 2, 3, 4], total=4_000)
    write_run(tmp_path, "Task__standard__seed2", [3, 4], total=4_000)
    summary = plot.summarise(plot.curves(read(tmp_path), "eval_return", 0))
    np.testing.assert_allclose(summary["mean"], [2, 3, 3, 4])
    assert summary.low.isna().tolist() == summary.high.isna().tolist() == [False, False, True, True]
    one = read(tmp_path / "Task__standard__seed1")
    alone = plot.summarise(plot.curves(one, "eval_return", 0))
    assert alone["mean"].tolist() == [1, 2, 3, 4]
    assert alone[["low", "high"]].isna().all(axis=None)


def test_runs_measured_at_different_steps_are_joined_by_straight_lines():
    log = pd.DataFrame(
        {"run": list("aaabb"), "step": [0, 10, 20, 5, 15], "erank": [0.0, 10, 20, 5, 15]}
    )
    runs = plot.curves(log, "erank", 0)
    np.testing.assert_allclose(runs["a"], [0, 5, 10, 15, 20])
    # Nothing beyond its own measurements.
    np.testing.assert_allclose(runs["b"], [np.nan, 5, 10, 15, np.nan])


def test_each_point_of_a_long_run_is_the_mean_of_several_values(tmp_path):
    write_run(tmp_path / "long", "Task__standard__seed1", list(range(2_005)))
    run = plot.curves(read(tmp_path / "long"), "eval_return", 0).iloc[:, 0]
    steps = [*range(10_000, 2_001_000, 10_000), 2_005_000]
    means = [*np.arange(4.5, 2_000, 10), 2_002]
    np.testing.assert_allclose(run.index, steps)
    np.testing.assert_allclose(run, means)
    write_run(tmp_path / "short", "Task__standard__seed1", list(range(399)))
    run = plot.curves(read(tmp_path / "short"), "eval_return", 0).iloc[:, 0]
    np.testing.assert_allclose(run, range(399))


def test_digits_score_per_task():
    figure = draw(read(*LOGS.glob("Digits*")), ["score"])  # never smoothed
    (ax,) = figure.axes
    # Not all variants have as many seeds, so each says how many it has.
    names = ["injection-1 (seeds: 1)", "layer-norm (seeds: 1)", "standard (seeds: 2)"]
    assert sorted(line_ends(figure)) == names
    logs = [pd.read_csv(LOGS / f"Digits__standard__seed{seed}" / "log.csv") for seed in (1, 2)]
    scores = np.array([log.train_return.dropna() for log in logs]) / 15
    tasks, values = line(ax, "standard (seeds: 2)")
    np.testing.assert_allclose(tasks, [1, 2, 3, 4])
    np.testing.assert_allclose(values, scores.mean(0))
    fresh = scores[:, 0].mean()
    first_task = line(ax, f"standard agent's first task: {fresh:.1f}")[1]
    np.testing.assert_allclose(first_task, fresh, atol=0.05)
    # Chance is shown although no score is as low.
    np.testing.assert_allclose(line(ax, "chance: 10")[1], 10)
    assert scores.min() > 10 > ax.get_ylim()[0]
    assert ax.get_xlabel() == "task (1,500 steps each)"
    assert "%" in ax.get_title(loc="left")


def test_digits_table_has_the_first_and_the_last_tasks(tmp_path):
    scores = {1: np.arange(20) + 10.0, 2: np.arange(20) + 30.0}
    for seed, values in scores.items():
        write_digits_run(tmp_path, f"Digits__standard__seed{seed}", values)
    row = table(tmp_path).loc["standard"]
    # Tasks 10..17 and 30..37. The margin is Student's t for two seeds that differ by 20, 127.062.
    assert row["score, first 8 tasks"] == "24 [-104, 151]"
    assert row["score, last 8 tasks"] == "36 [-92, 163]"
    assert row["score, whole run"] == "30 [-98, 157]"
    assert row["seeds"] == "2"


def test_iql_figure_shows_the_offline_part_the_injection_and_the_optimum():
    figure = draw(read(*LOGS.glob("Pointmass*")), ["eval_return"])
    assert sorted(line_ends(figure)) == ["injection-1", "standard"]
    assert legend(figure) == [
        "optimum: -33",
        "not smoothed",
        "injection (vertical)",
        "offline phase",
    ]
    (ax,) = figure.axes
    (injection,) = [drawn for drawn in ax.lines if set(drawn.get_xdata()) == {4_000}]
    assert list(injection.get_ydata()) == [0, 1]  # from edge to edge, at the first row with it
    assert set(line(ax, "optimum: -33")[1]) == {-33}
    assert ax.patches[0].get_x() == 0
    assert ax.patches[0].get_width() == 3_000
    drawn = [*ax.lines, *ax.collections]
    assert ax.patches[0].get_zorder() < min(artist.get_zorder() for artist in drawn)
    bands = [band for band in ax.collections if band.get_paths()]
    assert not any(len(band.get_paths()[0].vertices) for band in bands)  # of a single run: none
    assert "single runs" in figure.get_suptitle()
    assert "offline" in ax.get_xlabel()
    online = read(*LOGS.glob("Pointmass*")).assign(phase="online")  # as with --offline-steps 0
    assert "offline phase" not in legend(draw(online, ["eval_return"]))


def test_dashes_of_injections_at_the_same_step_take_turns(monkeypatch):
    one = read(*LOGS.glob("PointmassHard__injection-1*"))
    copies = []
    for i in range(3):
        copies.append(one.assign(run=str(i), label=f"injection-{i + 1}"))
    log = pd.concat(copies)
    log = log.assign(label=pd.Categorical(log.label))
    dashes = []

    def note_dashes(ax, step, linestyle, **_):
        dashes.append(linestyle)

    monkeypatch.setattr(plt.Axes, "axvline", note_dashes)
    draw(log, ["eval_return"])
    assert dashes == [(4 * i, (4, 8)) for i in range(3)]


def test_overview_has_every_column_and_no_empty_panel():
    log = read(*LOGS.glob("CartPole*")).dropna(axis="columns", how="all")
    columns = [column for column in plot.COLUMNS if column in log]
    figure = draw(log, columns)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [plot.COLUMNS[column] for column in columns]
    assert len(titles) == 7
    assert all(len(ax.lines) for ax in figure.axes)
    assert [ax.get_xlabel() for ax in figure.axes[-3:]] == ["environment steps"] * 3
    assert legend(figure) == ["standard", "not smoothed"]
    first = figure.axes[0]
    assert all(first.get_shared_x_axes().joined(first, ax) for ax in figure.axes)


@pytest.mark.parametrize(("steps", "ticks"), [(2_000_000, ["500k", "2M"]), (300_000, ["50k"])])
def test_step_counts(tmp_path, steps, ticks):
    folder = write_run(tmp_path, "Task__standard__seed1", [1, 2], total=steps)
    text = (folder / "log.csv").read_text()
    text = text.replace("\n2000,", f"\n{steps},")
    text = text.replace("\n1000,", "\n0,")
    (folder / "log.csv").write_text(text)
    figure = draw(read(tmp_path), ["erank"])
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "0" in shown
    assert set(ticks) <= set(shown)


@pytest.mark.parametrize(
    ("env", "returns", "levels"),
    [
        ("MsPacman", [300, 2_000], ["random actions: 307.3"]),
        ("MsPacman", [6_000, 9_000], ["human: 6951.6"]),
        ("MsPacman", [1_000, 2_000], []),
        ("LunarLander", [-300, -100], ["solved: 200"]),
        ("CartPole", [10, 500], []),
    ],
)
def test_reference_levels(tmp_path, env, returns, levels):
    write_run(tmp_path, f"{env}__standard__seed1", returns)
    figure = draw(read(tmp_path), ["eval_return"], smooth=0)
    assert legend(figure) == levels
    assert line_ends(figure) == ["standard"]
    assert legend(draw(read(tmp_path), ["erank"])) == []


def test_a_variant_has_the_same_look_in_every_figure():
    variants = ["standard", "injection-1", "injection-2", "injection-3", "injection-3-plasticity"]
    variants += ["injection-3-updated_units", "l2-constant", "l2-incremental", "l2-periodic"]
    variants += ["layer-norm-before", "layer-norm-after", "leaky-relu"]
    together = plot.line_styles(variants)
    for variant in variants:
        assert plot.line_styles([variant]) == {variant: together[variant]}
    assert len({plt.matplotlib.colors.to_rgb(style["color"]) for style in together.values()}) == 12
    # Combinations and other settings change nothing of the others, and differ from them.
    more = ["l2-constant, l2_lambda=0.1", "layer-norm-before+injection-2", "layer-norm", "new"]
    styles = plot.line_styles([*variants, *more])
    looks = {(*plt.matplotlib.colors.to_rgb(s["color"]), s["linestyle"]) for s in styles.values()}
    assert len(looks) == 16


@pytest.mark.parametrize(
    "columns",
    [["eval_return"], ["eval_return", "erank"], ["eval_return", "erank", "updated_units"]],
)
def test_the_legend_is_outside_of_all_panels_however_long_and_many_the_labels(tmp_path, columns):
    longest = "l2-incremental+layer-norm+leaky-relu+injection-2-weight_magnitude"
    for variant in [*plot.COLOURS][:-1] + [longest]:
        write_run(tmp_path, f"Task__{variant}__seed1", [1, 2])
    figure = draw(read(tmp_path), columns)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(legend(figure)) == 14
    assert "\n" in " ".join(legend(figure))
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_other_settings_are_another_line_and_the_same_run_counts_once(tmp_path, command):
    for folder, value in (("a", 0.001), ("b", 0.01)):
        for seed in (1, 2):
            name = f"Task__l2-constant__seed{seed}"
            write_run(tmp_path / folder, name, [1, 2], l2_lambda=value, gamma=0.9)
    write_run(tmp_path / "c", "Task__l2-constant__seed1", [1, 2], l2_lambda=0.01)
    shutil.copytree(tmp_path / "b", tmp_path / "copy of b")
    assert command(tmp_path)[2].count("holds the same run") == 2
    runs = read(tmp_path).groupby("label").run.nunique()
    assert runs.to_dict() == {
        "l2-constant, l2_lambda=0.001, gamma=0.9": 2,
        "l2-constant, l2_lambda=0.01, gamma=0.9": 2,
        "l2-constant, l2_lambda=0.01, gamma=nan": 1,
    }


def test_damaged_logs_do_not_stop_the_others(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2, 3])
    half = write_run(tmp_path, "Task__standard__seed2", [1, 2, 3], total=9_000)
    for seed in (3, 4, 5, 6):
        write_run(tmp_path, f"Task__standard__seed{seed}", [1])
    write_run(tmp_path, "Task__standard__seed7", [1, 2], erank="1~.5")
    unnamed = write_run(tmp_path, "Task__standard__seed8", [1])
    (unnamed / "config.json").write_text('{"total_steps": 1000}')
    twin = write_probed_run(tmp_path, "Task__standard__seed9", [1, 2], [1, 2])
    log = (twin / "log.csv").read_text()
    (twin / "log.csv").write_text(log.replace(",100\n", ",1~0\n"))
    with (half / "log.csv").open("a") as file:
        # The last line is being written.
        file.write('garbage\n\0\0"\n3500,,6\n4000,,7,0,10,50\n5000,,8,0,10,5')
    (tmp_path / "Task__standard__seed3" / "log.csv").write_text("")
    (tmp_path / "Task__standard__seed4" / "log.csv").write_text(",".join(DQN) + "\n")
    (tmp_path / "Task__standard__seed5" / "config.json").write_text("{")
    (tmp_path / "Task__standard__seed6" / "log.csv").write_bytes(bytes(range(256)))
    (tmp_path / "notes").mkdir()
    code, tables, notes = command(tmp_path, columns=("eval_return", "erank"))
    # Where the figures are, and two tables, each of a name, a head and the standard agent; between
    # them empty lines.
    assert code == 0
    assert len(tables.strip().splitlines()) == 9
    assert "seed2/log.csv: left out 4 damaged or half-written line(s)" in notes
    assert "seed2: unfinished at step 4,000, not in the tables" in notes
    for seed in (3, 4, 5, 6, 7, 8, 9):
        assert f"seed{seed}: " in notes
    assert "notes: " in notes
    assert "seed1" not in notes
    assert len(notes.splitlines()) == 10
    runs = plot.curves(read(tmp_path), "eval_return", 0)
    np.testing.assert_allclose(runs[str(half)], [1, 2, 3, 7])
    assert Path("figures/Task_eval_return.png").stat().st_size > 10_000


def test_infinity_counts_as_no_value(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, np.inf, 3])
    assert read(tmp_path).eval_return.dropna().tolist() == [1, 3]
    assert command(tmp_path)[0] == 0


def test_a_name_may_hold_dollars(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    write_run(tmp_path, "Task__a$b_$c^__seed1", [1, 2])
    assert command(tmp_path)[0] == 0


def test_a_variant_without_any_value_yet_is_left_out_of_its_panel(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    write_run(tmp_path, "Task__layer-norm__seed1", [np.nan, np.nan], total=9_000)
    returns, ranks = draw(read(tmp_path), ["eval_return", "erank"], smooth=0).axes
    assert [drawn.get_label() for drawn in returns.lines] == ["standard"]
    assert [drawn.get_label() for drawn in ranks.lines] == ["standard", "layer-norm"]
    assert command(tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no run found in empty"),
        (["missing"], "No such file or directory: 'missing'"),
        (["empty", "--smooth", "1"], "--smooth has to be at least 0 and below 1, not 1"),
        (["empty", "--smooth", "much"], "argument --smooth: invalid float value: 'much'"),
        (["empty", "--colour", "red"], "unrecognized arguments: --colour"),
        (["runs", "--out", "file/figures"], "Not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(command, arguments, message):
    Path("empty").mkdir()
    Path("file").touch()
    write_run("runs", "Task__standard__seed1", [1, 2])
    code, output, error = command(*arguments)
    assert code == 2
    assert output == ""
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error


def test_table_and_markdown(tmp_path, command, monkeypatch):
    monkeypatch.setattr(plot, "draw_figure", lambda *_: plt.figure())
    # The last 10 % of 20,000 steps are steps 19,000 and 20,000.
    write_run(tmp_path, "Task__standard__seed1", np.arange(20.0), erank=1)
    write_run(tmp_path, "Task__standard__seed2", np.arange(20.0) * 2, erank=2)
    columns = ("eval_return", "train_return", "erank")
    names = ["variant", "seeds", "eval_return, whole run", "eval_return, last 10 %"]
    names += ["train_return, last 10 % (mean over rows)"]
    # Student's t is 12.7062: the margins are 12.7062 * 4.75 and 12.7062 * 9.25.
    values = ["standard", "2", "14.2 [-46.1, 74.6]", "28 [-90, 145]", "-28 [-145, 90]"]
    _, text, _ = command(tmp_path, columns=columns)
    assert re.search(" +".join(map(re.escape, values)), text)
    assert re.search(r"variant +erank +updated_units\n *standard +1\.50 +50\.0\n", text)
    _, markdown, _ = command(tmp_path, "--table", columns=columns)
    rule = ["---"] * len(names)
    rows = [f"| {' | '.join(row)} |" for row in (names, rule, values)]
    metrics = ["### Task: metrics, mean over the last 10 %", ""]
    metrics += ["| variant | erank | updated_units |", "| --- | --- | --- |"]
    metrics += ["| standard | 1.50 | 50.0 |", ""]
    assert markdown.splitlines() == ["### Task", "", *rows, "", *metrics]


@pytest.mark.parametrize(
    "values, text",
    [
        ([1168.4], "1168"),
        ([99.97], "100.0"),
        ([0.02346], "0.0235"),
        ([0.0], "0"),
        ([np.nan], "-"),
        # Student's t of two values is 12.706: the margin is that of half their difference. All
        # three numbers have the decimals of the largest.
        ([-153, -151, np.nan], "-152 [-165, -139]"),
        ([9.6, 9.8], "9.7 [8.4, 11.0]"),
    ],
)
def test_a_cell_has_three_significant_digits(values, text):
    assert plot.cell(pd.Series(values)) == text


DIFFERENCE = "eval_return, whole run"


def test_differences_from_the_standard_agent_are_paired_by_seed(tmp_path):
    for seed, level in enumerate((10, 200, 3_000), 1):  # seeds differ by far more than variants
        write_run(tmp_path, f"Task__standard__seed{seed}", [level, level])
        higher = level + seed
        write_run(tmp_path, f"Task__l2-constant__seed{seed}", [higher, higher], l2="constant")
    write_run(tmp_path, "Task__layer-norm-after__seed3", [2_990, 2_990], layer_norm="after")
    write_run(tmp_path, "Task__layer-norm-after__seed4", [7, 7], layer_norm="after")
    write_run(tmp_path, "Task__leaky-relu__seed5", [8, 8], leaky_relu=True)
    rows = difference_table(tmp_path)
    # The margin is Student's t of three seeds, 4.302653, over sqrt(3).
    assert rows[DIFFERENCE].to_dict() == {
        "l2-constant": "+2.00 [-0.48, +4.48]",
        "layer-norm-after": "-10.0",
    }
    assert rows["eval_return, last 10 %"]["layer-norm-after"] == "-10.0"
    # Of its two seeds it shares one.
    assert rows.seeds["layer-norm-after"] == "1"
    assert table(tmp_path).seeds["layer-norm-after"] == "2"


def test_a_run_is_compared_only_with_a_standard_run_of_the_same_other_settings(tmp_path):
    for gamma, level in ((0.5, 10), (0.9, 20)):
        folder = tmp_path / str(gamma)
        higher = level + 1
        write_run(folder, "Task__standard__seed1", [level, level], gamma=gamma, l2_lambda=0)
        write_run(folder, "Task__l2-constant__seed1", [higher, higher], gamma=gamma, l2_lambda=0.1)
    write_run(tmp_path, "Task__l2-constant__seed1", [5, 5], gamma=0.99, l2_lambda=0.1)
    rows = difference_table(tmp_path)[DIFFERENCE]
    assert rows.to_dict() == {"l2-constant, gamma=0.5": "+1.00", "l2-constant, gamma=0.9": "+1.00"}


def test_scores_of_digits_are_compared_with_the_standard_agent(tmp_path):
    for name, scores in (("standard", [40] * 8 + [10] * 8), ("injection-1", [43] * 8 + [30] * 8)):
        write_digits_run(tmp_path, f"Digits__{name}__seed1", scores)
    row = difference_table(tmp_path).loc["injection-1"]
    assert row["score, first 8 tasks"] == "+3.00"
    assert row["score, last 8 tasks"] == "+20.0"
    assert row["score, whole run"] == "+11.5"


def test_an_unfinished_standard_run_is_no_baseline(tmp_path):
    write_run(tmp_path, "Task__standard__seed1", [1, 2], total=9_000)
    write_run(tmp_path, "Task__standard__seed2", [1, 2], total=2_000)
    write_run(tmp_path, "Task__l2-constant__seed1", [5, 6], total=2_000)
    write_run(tmp_path, "Task__l2-constant__seed2", [5, 6], total=2_000)
    assert difference_table(tmp_path)[DIFFERENCE]["l2-constant"] == "+4.00"


def test_only_unfinished_runs_are_drawn_without_a_table(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2], total=9_000)
    write_run(tmp_path, "Task__standard__seed2", range(39), total=39_500)  # in its last 10 %
    code, output, notes = command(tmp_path)
    assert "seed1: unfinished at step 2,000" in notes
    assert "seed2: unfinished at step 39,000" in notes
    figures = list(Path("figures").iterdir())
    assert code == 0
    assert Path("figures/Task_eval_return.png") in figures
    assert output == f"Task: {len(figures)} figures in figures\n\n"
    # With --table the output is Markdown and no other text.
    assert command(tmp_path, "--table")[1] == ""


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_logs_give_the_same_bytes(command, kind):
    for out in ("first", "second"):
        assert command(*LOGS.glob("CartPole*"), "--format", kind, "--out", out)[0] == 0
    names = [f"CartPole_eval_return.{kind}", f"CartPole_overview.{kind}"]
    assert sorted(file.name for file in Path("first").iterdir()) == names
    for name in names:
        assert Path("first", name).read_bytes() == Path("second", name).read_bytes()


def test_the_picture_shows_data_values_and_trajectories_in_the_maze():
    with np.load(LOGS / "PointmassHard__injection-1__seed1" / "picture.npz") as file:
        picture = dict(file)
    figure = plot.draw_picture({"injection-1": picture})
    data, agent = figure.axes[:2]
    assert data.get_title().startswith("offline data")
    assert agent.get_title() == "injection-1: value, 10 episodes"
    walls = picture["maze"]
    visits = data.collections[0].get_array().reshape(walls.shape)
    values = agent.collections[0].get_array().reshape(walls.shape)
    np.testing.assert_array_equal(np.ma.getmaskarray(visits), walls)
    np.testing.assert_array_equal(np.ma.getmaskarray(values), walls)
    counts = 10 ** visits[~walls] - 1
    np.testing.assert_allclose(counts, picture["coverage"][~walls], atol=1e-9)
    np.testing.assert_allclose(values[~walls], picture["value"][~walls])
    # Axis 0 of the maze is y.
    positions = agent.lines[3].get_xydata()[:, ::-1]
    np.testing.assert_allclose(positions, picture["trajectories"][3])
    assert agent.get_ylim() == (22, 0)
    assert agent.get_xlim() == (0, 22)


def test_the_picture_is_made_where_the_run_folder_has_one_and_stray_files_stop_nothing(
    command, tmp_path
):
    assert command(*LOGS.glob("Pointmass*"))[0] == 0
    kinds = ("eval_return", "overview", "differences", "picture")
    names = {f"PointmassHard_{kind}.png" for kind in kinds}
    assert {file.name for file in Path("figures").iterdir()} == names
    name = "PointmassHard__standard__seed1"
    damaged = shutil.copytree(LOGS / name, tmp_path / name)
    (damaged / "picture.npz").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "sweep.txt").touch()
    code, _, notes = command(*tmp_path.glob("*"))  # as a shell expands runs/*
    assert code == 0
    assert f"left out {damaged}/picture.npz: " in notes
    assert "sweep.txt: [Errno" in notes


# ---- figures for people


def write_variants(root, *variants):
    for shift, variant in enumerate(variants):
        for seed in (1, 2):
            name = f"Task__{variant}__seed{seed}"
            write_full_run(root, name, seed=10 * shift + seed, shift=3 * shift)


def extent(figure, artist):
    return artist.get_window_extent(figure.canvas.get_renderer())


def test_the_standard_agent_lies_on_top_of_the_others(tmp_path):
    write_variants(tmp_path, "standard", "injection-1", "l2-constant", "new")
    for ax in draw(read(tmp_path), ["eval_return", "plasticity"]).axes:
        (standard,) = [drawn for drawn in ax.lines if drawn.get_label() == "standard"]
        others = [drawn for drawn in ax.lines if drawn is not standard]
        assert len(others) > 3
        assert standard.get_zorder() > max(drawn.get_zorder() for drawn in others)


def test_few_variants_are_named_at_the_ends_of_their_lines_and_many_in_the_legend(tmp_path):
    few = ["standard", "injection-1", "injection-3", "l2-constant", "layer-norm-before", "new"]
    for variant in few:  # all end alike, so that their names have to make room for each other
        write_run(tmp_path, f"Task__{variant}__seed1", [1, 2])
    write_run(tmp_path / "low", "Task__leaky-relu__seed1", [1, 1.2])
    log = read(*tmp_path.glob("Task__*"))
    figure = draw(log, ["eval_return"], smooth=0)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert sorted(line_ends(figure)) == sorted(few)
    assert legend(figure) == []
    boxes = [extent(figure, text) for text in ax.texts]
    boxes.sort(key=lambda box: box.y0)
    for below, above in pairwise(boxes):
        assert below.y1 <= above.y0
    panel = extent(figure, ax.patch)
    for box in boxes:
        assert panel.x1 <= box.x0
        assert box.x1 <= figure.bbox.x1
    assert panel.y0 - 10 <= boxes[0].y0
    assert boxes[-1].y1 <= panel.y1 + 10
    for text in ax.texts:
        (drawn,) = [drawn for drawn in ax.lines if drawn.get_label() == text.get_text()]
        assert text.get_color() == drawn.get_color()
    figure = draw(read(tmp_path), ["eval_return"], smooth=0)  # a seventh
    assert line_ends(figure) == []
    assert sorted(legend(figure)) == sorted([*few, "leaky-relu"])
    overview = draw(log, ["eval_return", "erank"], smooth=0)
    assert sorted(legend(overview)) == sorted(few)


def test_the_name_of_a_line_is_where_the_line_ends(tmp_path):
    ends = {"standard": 10, "injection-1": 20, "l2-constant": 30}
    for variant, last in ends.items():
        write_run(tmp_path, f"Task__{variant}__seed1", [0, last])
    figure = draw(read(tmp_path), ["eval_return"], smooth=0)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert len(ax.texts) == 3
    for text in ax.texts:
        box = extent(figure, text)
        last = ends[text.get_text()]
        end = ax.transData.transform((2_000, last))[1]
        assert box.y0 <= end <= box.y1


def write_injected_run(root, name, steps, **settings):
    folder = write_run(root, name, [0], total=6_000, **settings)
    rows = []
    for step in range(0, 7_000, 1_000):
        injections = sum(at <= step for at in steps)
        rows.append([step, 0, step, injections, 1, 50])
    write_log(folder, DQN, rows)


def test_injections_at_fixed_steps_are_lines_and_triggered_ones_ticks_at_the_lower_edge(tmp_path):
    for seed in (1, 2):
        write_injected_run(tmp_path, f"Task__injection-1__seed{seed}", [3_000])
        trigger = {"injection_trigger": "plasticity", "injection_threshold": 40}
        steps = [1_000 * seed, 4_000 + 1_000 * (seed - 1)]
        write_injected_run(tmp_path, f"Task__injection-3-plasticity__seed{seed}", steps, **trigger)
    figure = draw(read(tmp_path), ["eval_return"], smooth=0)
    figure.canvas.draw()
    (ax,) = figure.axes
    panel = extent(figure, ax.patch)
    lines = [drawn for drawn in ax.lines if len({*drawn.get_xdata()}) == 1]
    assert [drawn.get_xdata()[0] for drawn in lines] == [3_000]
    assert extent(figure, lines[0]).height >= 0.99 * panel.height
    ticks = [drawn for drawn in ax.collections if len(drawn.get_paths()) == 4]
    assert len(ticks) == 1
    segments = ticks[0].get_segments()
    assert sorted(segment[0, 0] for segment in segments) == [1_000, 2_000, 4_000, 5_000]
    heights = ticks[0].get_transform().transform(np.concatenate(segments))[:, 1]
    assert panel.y0 <= heights.min()
    assert heights.max() <= panel.y0 + 0.1 * panel.height
    assert legend(figure) == ["injection (vertical)", "triggered injection"]


def test_legend_entries_that_stand_for_all_variants_are_grey(tmp_path):
    for seed in (1, 2):
        write_full_run(tmp_path, f"Task__standard__seed{seed}", seed=seed)
    for name, trigger in (("injection-1", None), ("injection-3-plasticity", "plasticity")):
        folder = write_full_run(tmp_path, f"Task__{name}__seed1", seed=3, injection_trigger=trigger)
        log = pd.read_csv(folder / "log.csv")
        log["injections"] = (log.step > 20_000).astype(int)
        log.to_csv(folder / "log.csv", index=False)
    figure = draw(read(tmp_path), ["eval_return", "plasticity"])
    colours = dict(zip(legend(figure), figure.legends[0].legend_handles))
    of_all = ["not smoothed", "freshly initialised twin", "injection (vertical)"]
    of_all.append("triggered injection")
    for name in of_all:
        red, green, blue = plt.matplotlib.colors.to_rgb(colours[name].get_color())
        assert red == green == blue
        assert 0.3 < red < 0.7
    standard = plt.matplotlib.colors.to_rgb(colours["standard (seeds: 2)"].get_color())
    assert standard == (0, 0, 0)


def all_texts(figure):
    return [text for text in figure.findobj(plt.Text) if text.get_text().strip()]


def test_overviews_are_legible_on_a_page_of_850_pixels(tmp_path):
    write_variants(tmp_path, *[*plot.COLOURS][:-1])
    log = read(tmp_path)
    plot.sns.set_theme(style="whitegrid", font_scale=plot.FONT_SCALE)
    figures = [draw(log, [column for column in plot.COLUMNS if column in log])]
    figures += [plot.draw_correlations(log), plot.draw_figure(log, ["eval_return"], 0.8, True)]
    for figure in figures:
        figure.canvas.draw()
        scale = 850 / (figure.get_figwidth() * 72)
        assert min(text.get_size() for text in all_texts(figure)) * scale > 12
        assert min(extent(figure, ax).width for ax in figure.axes) * 850 / figure.bbox.width > 200
        boxes = [ax.get_tightbbox() for ax in figure.axes]
        for k, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[k + 1 :])


@pytest.mark.filterwarnings("error")  # Matplotlib warns where it finds no room for the panels
def test_long_names_in_the_legend_do_not_shrink_the_panels(tmp_path):
    settings = "adam_eps=1e-08, train_frequency=2, target_network_frequency=250, max_grad_norm=10"
    write_variants(tmp_path, *[f"standard, {settings}, end_e=0.{k}" for k in range(12)])
    figure = draw(read(tmp_path), ["eval_return"])
    figure.canvas.draw()
    assert extent(figure, figure.axes[0]).height / figure.dpi > 2


def test_panels_have_the_names_that_a_person_uses(tmp_path):
    write_variants(tmp_path, "standard", "l2-constant")
    log = read(tmp_path)
    overview = draw(log, [column for column in plot.COLUMNS if column in log])
    correlations = plot.draw_correlations(log)
    for figure in (overview, correlations):
        assert not any("_" in text.get_text() for text in all_texts(figure))
    assert [ax.get_xlabel() for ax in correlations.axes] == [
        "Effective rank of the weights",
        "Effective rank of the features",
        "Mean absolute weight",
        "Updated units (%)",
        "Dormant units (%)",
    ]


def test_bands_and_thin_lines_do_not_decide_the_limits_of_an_axis(tmp_path):
    spiky = [10, 11, 900, 12, 11, 13, 12, 14, 13, 15]
    write_run(tmp_path, "Task__standard__seed1", spiky)
    write_run(tmp_path, "Task__standard__seed2", spiky[::-1])
    (ax,) = draw(read(tmp_path), ["eval_return"], smooth=0.8).axes
    thick = line(ax, "standard")[1]
    bottom, top = ax.get_ylim()
    assert bottom < thick.min()
    assert thick.max() < top
    assert top - bottom < 1.3 * (thick.max() - thick.min())


def test_the_figure_of_differences_is_paired_by_seed(tmp_path, command):
    returns = {1: [1, 5, 2], 2: [100, 300, 200], 3: [9, 9, 9]}
    gains = {1: [1, 2, 3], 2: [3, 4, 7]}
    for seed, values in returns.items():
        write_run(tmp_path, f"Task__standard__seed{seed}", values)
    for seed, values in gains.items():
        better = np.add(returns[seed], values)
        write_run(tmp_path, f"Task__l2-constant__seed{seed}", better, l2="constant")
    write_run(tmp_path, "Task__leaky-relu__seed4", [1, 2, 3], leaky_relu=True)  # has no partner
    figure = plot.draw_figure(read(tmp_path), ["eval_return"], 0, difference=True)
    (ax,) = figure.axes
    assert sorted(line_ends(figure)) == ["l2-constant", "standard"]
    assert set(line(ax, "standard")[1]) == {0}
    np.testing.assert_allclose(line(ax, "l2-constant")[1], [2, 3, 5])
    band = ax.collections[0].get_paths()[0].vertices
    margins = 12.7062 * np.array([1, 1, 2])
    for step, middle, margin in zip((1_000, 2_000, 3_000), (2, 3, 5), margins):
        drawn = band[band[:, 0] == step, 1]
        np.testing.assert_allclose(drawn.min(), middle - margin, rtol=1e-5)
        np.testing.assert_allclose(drawn.max(), middle + margin, rtol=1e-5)
    low, high = ax.get_ylim()
    assert low < band[:, 1].min()
    assert band[:, 1].max() < high  # here the band is what matters
    assert "difference from the standard agent" in figure.get_suptitle()
    assert command(tmp_path)[0] == 0
    assert Path("figures/Task_differences.png").exists()


def test_without_a_shared_seed_there_is_no_figure_of_differences(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    write_run(tmp_path, "Task__l2-constant__seed2", [1, 2], l2="constant")
    assert command(tmp_path)[0] == 0
    assert not Path("figures/Task_differences.png").exists()


# ---- which metric tracks plasticity


def write_probed_run(root, name, metric, plasticity, twin=None, score=None, fresh_metric=None):
    """A run with `metric` in every row, as erank and as feature_erank.

    Plasticity stands in every second row."""
    folder = write_run(root, name, [0], total=1_500 * len(plasticity))
    columns = ["step", "train_return", "injections", "erank", "feature_erank"]
    columns += ["plasticity", "plasticity_fresh"]
    if fresh_metric is not None:
        columns.append("feature_erank_fresh")
    rows = []
    for i, value in enumerate(plasticity):
        between = [1_500 * i + 1_000, "", 0, metric[i], metric[i], "", ""]
        reward = 15 * score[i] if score else ""
        fresh = twin[i] if twin else 100
        probed = [1_500 * i + 1_500, reward, 0, metric[i], metric[i], value, fresh]
        if fresh_metric is not None:
            between.append("")
            probed.append(fresh_metric[i])
        rows += [between, probed]
    write_log(folder, columns, rows)
    return folder


def correlation_table(*folders):
    return plot.correlations(read(*folders)).set_index("metric")


def test_rank_correlations_are_over_all_rows_and_over_the_changes_within_runs(tmp_path):
    # Metric and plasticity rise in the first three runs. Within a run their changes count.
    first, second, third, fourth = [f"Task__standard__seed{seed}" for seed in (1, 2, 3, 4)]
    # They go together: correlation 1.
    write_probed_run(tmp_path, first, [1, 2, 4, 8, 16], [10, 11, 13, 17, 30])
    # They are opposed: -1.
    write_probed_run(tmp_path, second, [1, 9, 13, 15, 16], [20, 21, 23, 27, 40])
    # They are 1 2 4 8 and 1 4 2 8: 0.8.
    write_probed_run(tmp_path, third, [1, 2, 4, 8, 16], [50, 51, 55, 57, 65])
    # A metric that is constant does not count.
    write_probed_run(tmp_path, fourth, [3, 3, 3, 3, 3], [40, 41, 45, 50, 60])
    row = correlation_table(tmp_path).loc["erank"]
    log = read(tmp_path).dropna(subset="plasticity")
    by_hand = np.corrcoef(log.erank.rank(), log.plasticity.rank())[0, 1]
    assert row["expected sign"] == "+"
    assert row["relative plasticity"] == f"{by_hand:.2f}"
    assert row["relative plasticity, changes within runs"] == "0.80"  # the median of 1, -1 and 0.8


def test_plasticity_counts_as_a_share_of_its_fresh_twins(tmp_path):
    metric = [1, 2, 3, 4, 5]
    # It falls, while the observations become harder still, so that its share rises.
    plasticity = [50, 40, 30, 20, 10]
    twin = [100, 70, 45, 25, 11]
    write_probed_run(tmp_path, "Task__standard__seed1", metric, plasticity, twin)
    assert correlation_table(tmp_path).loc["erank", "relative plasticity"] == "1.00"
    panel = plot.draw_correlations(read(tmp_path)).axes[0]
    heights = panel.collections[0].get_offsets()[:, 1]
    np.testing.assert_allclose(heights, np.divide(plasticity, twin))


def test_the_table_holds_the_relative_plasticity_of_the_last_tenth_of_the_run(tmp_path):
    twin = [100] * 18 + [50, 40]
    write_probed_run(tmp_path, "Task__standard__seed1", range(20), [99] * 18 + [10, 12], twin)
    column = "relative plasticity, last 10 %"
    assert table(tmp_path).loc["standard", column] == "0.250"  # of 10 / 50 and 12 / 40
    write_probed_run(tmp_path, "Task__l2-constant__seed1", range(20), [99] * 18 + [35, 28], twin)
    assert difference_table(tmp_path).loc["l2-constant", column] == "+0.450"


def test_a_metric_of_the_data_counts_as_difference_from_its_twins(tmp_path):
    metric = [5, 4, 3, 2, 1]
    fresh_metric = [9, 7, 5, 3, 1]  # so the difference rises: -4, -3, -2, -1, 0
    newest = tmp_path / "newest"
    plasticity = [1, 2, 3, 4, 5]
    name = "Task__standard__seed1"
    write_probed_run(newest, name, metric, plasticity, fresh_metric=fresh_metric)
    rows = correlation_table(newest)
    assert rows.loc["feature_erank minus its twin's", "relative plasticity"] == "1.00"
    assert rows.loc["erank", "relative plasticity"] == "-1.00"  # weights have no data in them
    panels = plot.draw_correlations(read(newest)).axes
    (panel,) = [ax for ax in panels if "twin" in ax.get_xlabel()]
    np.testing.assert_allclose(panel.collections[0].get_offsets()[:, 0], [-4, -3, -2, -1, 0])
    # A log of an older version has no such column. The name says that the plain value was taken.
    write_probed_run(tmp_path / "older", name, metric, plasticity)
    rows = correlation_table(tmp_path / "older")
    assert rows.loc["feature_erank", "relative plasticity"] == "-1.00"
    assert len(rows) == 2


def test_in_digits_the_metrics_and_the_probe_are_compared_with_the_task_that_follows(tmp_path):
    # After each of the first four tasks erank has the order of the next score, plasticity the
    # opposite.
    scores = [50, 10, 20, 40, 80]
    erank = [1, 2, 4, 8, 0]
    plasticity = [9, 7, 4, 0.1, 0]
    write_probed_run(tmp_path, "Digits__standard__seed1", erank, plasticity, score=scores)
    rows = correlation_table(tmp_path)
    assert rows.loc["erank", "next task's score"] == "1.00"
    # The changes are 1, 2, 4 and 10, 20, 40.
    assert rows.loc["erank", "next task's score, changes within runs"] == "1.00"
    probe = rows.loc["relative plasticity"]
    assert probe["next task's score"] == "-1.00"
    assert probe["next task's score, changes within runs"] == "-1.00"
    assert probe["relative plasticity"] == "1.00"  # with itself


def test_what_cannot_be_correlated_has_a_dash(tmp_path):
    for seed in (1, 2):  # a metric that never changes
        name = f"Task__standard__seed{seed}"
        write_probed_run(tmp_path, name, [3, 3, 3, 3], [10, 20, 30, 45])
    row = correlation_table(tmp_path).loc["erank"]
    assert row["relative plasticity"] == row["relative plasticity, changes within runs"] == "-"
    # Two points always lie on a line.
    write_probed_run(tmp_path / "short", "Task__standard__seed1", [1, 2], [10, 20])
    row = correlation_table(tmp_path / "short").loc["erank"]
    assert row["relative plasticity"] == row["relative plasticity, changes within runs"] == "-"


def test_plasticity_has_its_fresh_twin_beside_it_a_scatter_and_a_table(tmp_path, command):
    plasticity = [10, 20, 30, 40]
    twin = [11, 21, 31, 41]
    for name, metric in (("standard", [1, 2, 3, 5]), ("layer-norm-after", [3, 5, 4, 9])):
        write_probed_run(tmp_path, f"Task__{name}__seed1", metric, plasticity, twin)
    (ax,) = draw(read(tmp_path), ["plasticity"], smooth=0).axes
    lines = [drawn for drawn in ax.lines if len(drawn.get_xdata())]
    twins = [drawn for drawn in lines if drawn.get_linestyle() == "--"]
    variants = [drawn for drawn in lines if drawn not in twins]
    assert [drawn.get_color() for drawn in twins] == [drawn.get_color() for drawn in variants]
    assert len(twins) == 2
    for drawn in twins:
        assert drawn.get_ydata().tolist() == twin
    columns = ("plasticity", "erank", "feature_erank")
    code, tables, _ = command(tmp_path, "--table", columns=columns)
    assert code == 0
    assert Path("figures/Task_correlations.png").stat().st_size > 10_000
    assert "### Task: which metric tracks plasticity?" in tables
    assert "\n| erank | + | 0." in tables


def test_an_unfinished_run_is_in_no_table(tmp_path, command):
    columns = ("plasticity", "erank", "feature_erank")
    for seed in (1, 2):
        write_probed_run(tmp_path, f"Task__standard__seed{seed}", [1, 2, 3, 5], [10, 20, 30, 40])
    tables = command(tmp_path, "--table", columns=columns)[1]
    assert tables.count("###") == 3
    for name in ("standard", "l2-constant"):
        folder = write_probed_run(tmp_path, f"Task__{name}__seed3", [9, 5, 4, 1], [1, 2, 3, 4])
        lines = (folder / "log.csv").read_text().splitlines(keepends=True)
        (folder / "log.csv").write_text("".join(lines[:-1]))
    code, output, notes = command(tmp_path, "--table", columns=columns)
    assert code == 0
    assert notes.count("not in the tables") == 2
    assert output == tables


# ---- logs in which there is little or nothing


def write_sparse_run(root, name, rows, columns=None, total=5_000):
    """A run whose log has these rows: a dict each of what is not empty."""
    folder = write_run(root, name, [0], total=total)
    if columns is None:
        columns = ["step", "train_return", "eval_return", "injections", "erank", "updated_units"]
        columns += ["plasticity", "plasticity_fresh"]
    write_log(folder, columns, [[row.get(column, "") for column in columns] for row in rows])
    return folder


ALL = ("score", "eval_return", "train_return", "erank", "updated_units", "plasticity")
PROBE = {"plasticity": 30, "plasticity_fresh": 60}
SPARSE = {
    # As of `--env LunarLander --total-steps 25000`
    "no row with both": [
        {"step": 2_000, "eval_return": 1, **PROBE},
        {"step": 3_000, "erank": 9, "updated_units": 50},
        {"step": 5_000, "eval_return": 2, **PROBE},
    ],
    "one measurement of plasticity": [
        {"step": 4_000, "eval_return": 1, "erank": 9, **PROBE},
        {"step": 5_000, "eval_return": 2, "erank": 8},
    ],
    "plasticity alone": [
        {"step": 2_000, **PROBE},
        {"step": 4_000, **PROBE},
        {"step": 5_000, **PROBE},
    ],
    "one row": [
        {"step": 5_000, "eval_return": 1, "erank": 9, **PROBE},
    ],
    "no evaluation": [
        {"step": 4_000, "erank": 9},
        {"step": 5_000, "erank": 8},
    ],
    "nothing in the last tenth": [
        {"step": 1_000, "eval_return": 1, "erank": 9, **PROBE},
        {"step": 5_000},
    ],
    "nothing measured": [
        {"step": 4_000},
        {"step": 5_000},
    ],
    "a twin that learns nothing": [
        {"step": 3_000, "erank": 1, "plasticity": 0, "plasticity_fresh": 0},
        {"step": 4_000, "erank": 2, "plasticity": 0, "plasticity_fresh": 0},
        {"step": 5_000, "erank": 3, "plasticity": 0, "plasticity_fresh": 0},
    ],
    "no twin": [
        {"step": 3_000, "erank": 1, "plasticity": 1},
        {"step": 4_000, "erank": 2, "plasticity": 2},
        {"step": 5_000, "erank": 3, "plasticity": 3},
    ],
}


@pytest.fixture
def only_overviews(monkeypatch):
    """They hold every panel: figures of single columns are left out, and no file is written."""
    draw_figure = plot.draw_figure

    def draw_overview(log, columns, *more, **flags):
        if len(columns) == 1 and not flags:
            return plt.figure()
        return draw_figure(log, columns, *more, **flags)

    monkeypatch.setattr(plot, "draw_figure", draw_overview)
    monkeypatch.setattr(plt.Figure, "savefig", lambda *_, **__: None)


CASES = [("Task", case) for case in SPARSE]
CASES += [("Digits", "one row"), ("Digits", "no evaluation"), ("Digits", "no row with both")]


@pytest.mark.parametrize(("env", "case"), CASES)
def test_a_log_with_little_in_it_stops_nothing(command, only_overviews, env, case):
    for name in ("injection-1__seed1", "injection-1__seed2", "standard__seed3"):
        write_sparse_run("runs", f"{env}__{name}", SPARSE[case])
    code, output, notes = command("runs", columns=ALL)
    assert code == 0
    assert ("injection-1" in output) == (case != "nothing measured")
    write_run("runs", f"{env}__standard__seed1", [3] * 5)  # beside a whole run
    code, output, notes = command("runs", columns=ALL)
    assert code == 0
    assert "\nstandard" in output.replace(" ", "")
    assert notes == ""


@pytest.mark.parametrize("case", ["no row with both", "plasticity alone", "no twin", "one row"])
def test_a_log_with_little_in_it_stops_nothing_while_the_run_continues(
    tmp_path, command, only_overviews, case
):
    write_sparse_run(tmp_path, "Task__injection-1__seed1", SPARSE[case], total=9_000)
    code, output, notes = command(tmp_path, columns=ALL)
    assert code == 0
    assert "\ninjection-1" not in output
    assert "unfinished at step" in notes


@pytest.mark.parametrize(
    "column", ["train_return", "eval_return", "injections", "erank", "plasticity_fresh"]
)
@pytest.mark.parametrize("env", ["Task", "Digits"])
def test_a_column_that_is_missing_or_empty_is_left_out(
    tmp_path, command, only_overviews, env, column
):
    row = {"train_return": 750, "eval_return": 4, "injections": 0, "erank": 3, **PROBE}
    rows = [{"step": step, **row, column: ""} for step in range(1_000, 6_000, 1_000)]
    write_sparse_run(tmp_path, f"{env}__standard__seed1", rows, columns=["step", *row])
    others = [name for name in row if name != column]
    write_sparse_run(tmp_path, f"{env}__standard__seed2", rows, columns=["step", *others])
    code, output, notes = command(tmp_path, columns=ALL)
    assert code == 0
    assert notes == ""
    assert "\nstandard2" in output.replace(" ", "")


def test_of_digits_without_a_standard_agent_there_is_no_level_of_its_first_task(tmp_path):
    write_digits_run(tmp_path, "Digits__injection-1__seed1", [30, 20])
    figure = draw(read(tmp_path), ["score"])
    assert legend(figure) == ["chance: 10"]
    assert line_ends(figure) == ["injection-1"]


# ---- where the runs lie


def test_runs_behind_links_are_read_once_each_also_where_links_form_a_loop(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    run = write_run(elsewhere / "one", "Task__standard__seed1", [1, 2])
    write_run(elsewhere / "many", "Task__standard__seed2", [1, 2])
    write_run(elsewhere / "many", "Task__standard__seed3", [1, 2])
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "a link to a run").symlink_to(run)
    (runs / "Task__standard__seed1").symlink_to(run)
    (runs / "a link to a folder of runs").symlink_to(elsewhere / "many")
    (elsewhere / "many" / "back").symlink_to(runs)
    (runs / "self").symlink_to(runs / "self")
    (tmp_path / "linked").symlink_to(runs)
    for folders in (["runs"], ["linked"], ["linked", "runs", "elsewhere"]):
        log = read(*(tmp_path / folder for folder in folders))
        assert log.run.nunique() == 3
        assert len(log) == 6
        assert log.groupby("label").run.nunique().to_dict() == {"standard": 3}


def test_a_link_that_leads_nowhere_is_reported(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    (tmp_path / "Task__standard__seed2").symlink_to("/a/disk/that/is/not/mounted")
    code, _, notes = command(tmp_path)
    assert code == 0
    assert notes.startswith(f"left out {tmp_path}/Task__standard__seed2: ")


@pytest.mark.parametrize("env", ["Task", "My__Env", "My__Other__Env-v0"])
def test_the_name_of_an_env_may_hold_two_underscores(tmp_path, env):
    write_run(tmp_path, f"{env}__l2-constant__seed1", [1, 2])
    log = read(tmp_path)
    assert log.env.unique().tolist() == [env]
    assert log.label.unique().tolist() == ["l2-constant"]


def test_a_name_without_a_seed_is_no_run(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    (tmp_path / "Task__standard__seed1").rename(tmp_path / "My__Task__standard")
    assert "its name is not <env>__<variant>__seed<k>" in command(tmp_path)[2]


def test_a_reader_that_has_seen_enough_leaves_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    write_run("runs", "Task__standard__seed1", [1, 2])
    command = [sys.executable, plot.__file__, "--table"]
    done = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_a_seed_without_a_value_yet_leaves_its_variant_without_a_band(tmp_path):
    """Three seeds run, and only two of them have been evaluated."""
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    write_run(tmp_path, "Task__standard__seed2", [3, 4])
    unmeasured = write_run(tmp_path, "Task__standard__seed3", [0, 0])
    write_log(unmeasured, DQN, [[1_000, -1, "", 0, 10, 50], [2_000, -1, "", 0, 10, 50]])
    log = read(tmp_path)
    (line,) = plot.summarise_variants(log, plot.curves(log, "eval_return", 0)).values()
    np.testing.assert_allclose(line["mean"], [2, 3])
    assert line.low.isna().all()
    assert line.high.isna().all()


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5])
def test_a_picture_with_a_few_damaged_bytes_is_left_out(command, tmp_path, place):
    source = LOGS / "PointmassHard__injection-1__seed1"
    damaged = shutil.copytree(source, tmp_path / source.name)
    content = bytearray((damaged / "picture.npz").read_bytes())
    start = int(place * len(content))
    for i in range(start, start + 8):
        content[i] ^= 0xFF
    (damaged / "picture.npz").write_bytes(content)
    code, _, notes = command(damaged)
    assert code == 0
    assert f"left out {damaged}/picture.npz: " in notes


def test_of_two_folders_with_the_same_run_the_longer_log_counts(tmp_path, capsys):
    write_run(tmp_path / "a", "Task__standard__seed1", [1, 2], total=4_000)
    write_run(tmp_path / "b", "Task__standard__seed1", [1, 2, 3, 4], total=4_000)
    write_run(tmp_path / "c", "Task__standard__seed1", [1], total=4_000)
    log = read(tmp_path)
    assert log.step.tolist() == [1_000, 2_000, 3_000, 4_000]
    assert capsys.readouterr().err.count("b/Task__standard__seed1 holds the same run") == 2


def test_the_level_of_the_first_task_is_not_drawn_for_standard_agents_of_several_kinds(tmp_path):
    for gamma in (0.5, 0.9):
        folder = write_digits_run(tmp_path / str(gamma), "Digits__standard__seed1", [30, 20])
        config = folder / "config.json"
        settings = json.loads(config.read_text())
        settings["gamma"] = gamma
        config.write_text(json.dumps(settings))
    figure = draw(read(tmp_path), ["score"])
    assert legend(figure) == ["chance: 10"]
