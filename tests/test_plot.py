"""plot.py on small logs of real runs (logs/) and on logs written here."""

import json
import re
import shutil
import sys
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
    """Runs `python plot.py ...`, with a single column so that it is quick: exit code, stdout, stderr."""

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
    """A DQN run with an evaluation at every row, 1,000 steps apart, and training returns of the other sign."""
    folder = Path(root) / name
    folder.mkdir(parents=True)
    settings |= {"seed": int(name[-1]), "total_steps": total or 1_000 * len(returns), "device": "cpu"}
    (folder / "config.json").write_text(json.dumps(settings))
    rows = [f"{1_000 * (i + 1)},{-value},{value},0,{erank},50" for i, value in enumerate(returns)]
    (folder / "log.csv").write_text("\n".join([",".join(DQN), *rows, ""]))
    return folder


def draw(log, columns, smooth=0.8, estimator="mean"):
    return plot.draw_figure(log, columns, smooth, estimator)


def read(*folders):
    return plot.read_runs(tuple(Path(folder) for folder in folders))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def line(ax, name):
    """The drawn points of a legend entry."""
    (drawn,) = [line for line in ax.lines if line.get_label() == name]
    return np.asarray(drawn.get_xdata()), np.asarray(drawn.get_ydata())


def moving_average(values, weight):
    """TensorBoard's: debiased, so that the first value is the first measurement."""
    total, smoothed = 0.0, []
    for i, value in enumerate(values):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight ** (i + 1)))
    return np.array(smoothed)


def test_a_line_is_the_mean_of_the_moving_averages_of_real_runs():
    logs = [pd.read_csv(LOGS / f"CartPole__standard__seed{seed}" / "log.csv") for seed in (1, 2)]
    figure = draw(read(*LOGS.glob("CartPole*")), ["eval_return"])
    steps, values = line(figure.axes[0], "standard (2 seeds)")
    smooth = [moving_average(log.eval_return, 0.8) for log in logs]
    np.testing.assert_allclose(steps, [1, 2, 3, 4])  # thousands
    np.testing.assert_allclose(values, np.mean(smooth, axis=0))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for step in steps:  # two runs: a resample has the mean of a, b or both, so the interval is from a to b
        low, high = band[band[:, 0] == step, 1].min(), band[band[:, 0] == step, 1].max()
        np.testing.assert_allclose([low, high], sorted(run[int(step) - 1] for run in smooth))
    raw = figure.axes[0].lines[1]
    np.testing.assert_allclose(raw.get_ydata(), np.mean([log.eval_return for log in logs], axis=0))


def test_without_smoothing_the_line_is_the_raw_mean_alone():
    figure = draw(read(*LOGS.glob("CartPole*")), ["erank"], smooth=0.0)
    logs = [pd.read_csv(folder / "log.csv") for folder in LOGS.glob("CartPole*")]
    np.testing.assert_allclose(line(figure.axes[0], "standard (2 seeds)")[1], np.mean([x.erank for x in logs], axis=0))
    assert len(figure.axes[0].lines) == 1 and "moving average" not in figure.get_suptitle()


@pytest.mark.parametrize("estimator", ["mean", "iqm"])
def test_centre_and_interval_of_many_runs(estimator):
    values = np.random.default_rng(1).normal(size=(3, 8)) ** 3

    def centre(rows):  # of 8 values the interquartile mean is that of the middle 4
        return (np.sort(rows, axis=-1)[..., 2:6] if estimator == "iqm" else rows).mean(-1)

    resampled = centre(values[:, np.random.default_rng(2).integers(8, size=(20_000, 8))])
    summary = plot.summarise(pd.DataFrame(values), estimator)
    np.testing.assert_allclose(summary.centre, centre(values))
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    np.testing.assert_allclose(summary[["low", "high"]], np.transpose([low, high]), atol=0.1 * (high - low).max())
    pd.testing.assert_frame_equal(summary, plot.summarise(pd.DataFrame(values), estimator))  # the same resamples


def test_where_not_all_seeds_have_arrived_the_line_has_no_band(tmp_path):
    write_run(tmp_path, "Task__standard__seed1", [1, 2, 3, 4], total=4_000)
    write_run(tmp_path, "Task__standard__seed2", [3, 4], total=4_000)
    summary = plot.summarise(plot.curves(read(tmp_path), "eval_return", 0), "mean")
    np.testing.assert_allclose(summary.centre, [2, 3, 3, 4])
    np.testing.assert_allclose(summary.low, [1, 2, np.nan, np.nan])


def test_runs_measured_at_different_steps_are_joined_by_straight_lines():
    log = pd.DataFrame({"run": list("aaabb"), "step": [0, 10, 20, 5, 15], "erank": [0.0, 10, 20, 5, 15]})
    runs = plot.curves(log, "erank", 0)
    np.testing.assert_allclose(runs["a"], [0, 5, 10, 15, 20])
    np.testing.assert_allclose(runs["b"], [np.nan, 5, 10, 15, np.nan])  # nothing beyond its own measurements


def test_digits_score_per_task():
    figure = draw(read(*LOGS.glob("Digits*")), ["score"])  # never smoothed
    (ax,) = figure.axes
    logs = [pd.read_csv(LOGS / f"Digits__standard__seed{seed}" / "log.csv") for seed in (1, 2)]
    scores = np.array([log.train_return.dropna() for log in logs]) / 15
    tasks, values = line(ax, "standard (2 seeds)")
    np.testing.assert_allclose(tasks, [1, 2, 3, 4])
    np.testing.assert_allclose(values, scores.mean(0))
    fresh = scores[:, 0].mean()
    np.testing.assert_allclose(line(ax, f"fresh network: {fresh:.1f}")[1], fresh, atol=0.05)
    assert ax.get_xlabel() == "task (1,500 steps each)" and "%" in ax.get_ylabel()


def test_digits_table_has_the_first_and_the_last_tasks(tmp_path):
    scores = {1: np.arange(20) + 10.0, 2: np.arange(20) + 30.0}
    for seed, values in scores.items():
        folder = write_run(tmp_path, f"Digits__standard__seed{seed}", [0] * 20)
        rows = [f"{1_500 * (i + 1)},{15 * value},,0,10,50" for i, value in enumerate(values)]
        (folder / "log.csv").write_text("\n".join([",".join(DQN), *rows, ""]))
    (row,) = plot.table(read(tmp_path), "mean").to_dict("records")
    assert row["score, first 8 tasks"] == "23.5 [13.5, 33.5]"  # 10..17 and 30..37
    assert row["score, last 8 tasks"] == "35.5 [25.5, 45.5]"
    assert row["score, whole run"] == "29.5 [19.5, 39.5]"
    assert row["seeds"] == "2" and row["erank"] == "10"


def test_iql_figure_shows_the_offline_part_the_injection_and_the_optimum():
    figure = draw(read(*LOGS.glob("Pointmass*")), ["eval_return"])
    assert legend(figure) == [
        "standard (1 seed: no band)",
        "injection-1 (1 seed: no band)",
        "injection",
        "optimum: -33",
        "offline part",
    ]
    (ax,) = figure.axes
    assert set(line(ax, "injection")[0]) == {4}  # the first row with an injection is that of step 4,000
    assert set(line(ax, "optimum: -33")[1]) == {-33}
    assert ax.patches[0].get_x() == 0 and ax.patches[0].get_width() == 3
    assert ax.patches[0].get_zorder() < min(drawn.get_zorder() for drawn in [*ax.lines, *ax.collections])
    bands = [band for band in ax.collections if band.get_paths() and len(band.get_paths()[0].vertices)]
    assert not bands  # of a single run there is none
    assert "single runs" in figure.get_suptitle() and "updates" in ax.get_xlabel()
    online = read(*LOGS.glob("Pointmass*")).assign(phase="online")  # as with --offline-steps 0
    assert "offline part" not in legend(draw(online, ["eval_return"]))


def test_dashes_of_injections_at_the_same_step_take_turns(monkeypatch):
    log = pd.concat([read(*LOGS.glob("PointmassHard__injection-1*")).assign(variant=i) for i in range(3)])
    log = log.assign(label=pd.Categorical("injection-" + (log.variant + 1).astype(str)), run=log.variant.astype(str))
    dashes = []
    monkeypatch.setattr(plt.Axes, "axvline", lambda ax, step, linestyle, **_: dashes.append(linestyle))
    draw(log, ["eval_return"])
    assert dashes == [(4 * i, (4, 8)) for i in range(3)]


def test_overview_has_every_column_and_no_empty_panel():
    log = read(*LOGS.glob("CartPole*")).dropna(axis="columns", how="all")
    columns = [column for column in plot.COLUMNS if column in log]
    figure = draw(log, columns)
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_ylabel() for ax in panels] == [plot.COLUMNS[column] for column in columns] and len(panels) == 7
    assert all(len(ax.lines) and ax.get_xlabel() == "environment steps" for ax in panels)
    assert legend(figure) == ["standard (2 seeds)"]
    assert all(panels[0].get_shared_x_axes().joined(panels[0], ax) for ax in panels)


@pytest.mark.parametrize(("steps", "tick"), [(2_000_000, "0.5M"), (300_000, "50k")])
def test_step_counts(tmp_path, steps, tick):
    folder = write_run(tmp_path, "Task__standard__seed1", [1, 2], total=steps)
    text = (folder / "log.csv").read_text()
    (folder / "log.csv").write_text(text.replace("\n2000,", f"\n{steps},").replace("\n1000,", "\n0,"))
    figure = draw(read(tmp_path), ["erank"])
    figure.canvas.draw()
    assert tick in [label.get_text() for label in figure.axes[0].get_xticklabels()]


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
    figure = draw(read(tmp_path), ["eval_return"])
    assert legend(figure)[1:] == levels
    assert legend(draw(read(tmp_path), ["erank"]))[1:] == []


def test_a_variant_has_the_same_colour_in_every_figure():
    some, all_of_them = plot.line_styles(["layer-norm"]), plot.line_styles([*plot.COLOURS][:-1])
    assert some["layer-norm"] == all_of_them["layer-norm"]
    assert len({style["color"] for style in all_of_them.values()}) == len(all_of_them) == 10
    sweep = plot.line_styles(
        ["l2-constant", "l2-constant, l2_lambda=0.1", "layer-norm", "layer-norm+injection-2", "new"]
    )
    assert len({(*style["color"],) for style in sweep.values()}) == 5
    assert sweep["layer-norm"] == some["layer-norm"]


@pytest.mark.parametrize(
    "columns", [["eval_return"], ["eval_return", "erank"], ["eval_return", "erank", "updated_units"]]
)
def test_the_legend_is_outside_of_all_panels_however_long_and_many_the_labels(tmp_path, columns):
    longest = "l2-incremental+layer-norm+leaky-relu+injection-2-weight_magnitude"
    for variant in [*plot.COLOURS][:-1] + [longest]:
        write_run(tmp_path, f"Task__{variant}__seed1", [1, 2])
    figure = draw(read(tmp_path), columns)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(legend(figure)) == 11 and "\n" in " ".join(legend(figure))
    assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes)
    assert box.width < 400  # of 100 pixels per inch


def test_the_overview_smooths_everything_but_the_score():
    log = read(*LOGS.glob("Digits__standard*"))
    alone, both = draw(log, ["score"]), draw(log, ["score", "erank"])
    np.testing.assert_allclose(line(both.axes[0], "standard (2 seeds)")[1], alone.axes[0].lines[0].get_ydata())
    assert len(both.axes[0].lines) == 2 and len(both.axes[1].lines) == 2  # the score and its level; a line and its raw


def test_other_settings_are_another_line_and_the_same_run_counts_once(tmp_path, command):
    for folder, value in (("a", 0.001), ("b", 0.01)):
        for seed in (1, 2):
            write_run(tmp_path / folder, f"Task__l2-constant__seed{seed}", [1, 2], l2_lambda=value, gamma=0.9)
    write_run(tmp_path / "c", "Task__l2-constant__seed1", [1, 2], l2_lambda=0.01)
    shutil.copytree(tmp_path / "b", tmp_path / "copy of b")
    assert command(tmp_path)[2].count("another folder holds the same run") == 2
    runs = read(tmp_path).groupby("label").run.nunique()
    one, other, lacking = "l2_lambda=0.001, gamma=0.9", "l2_lambda=0.01, gamma=0.9", "l2_lambda=0.01, gamma=nan"
    assert runs.to_dict() == {f"l2-constant, {one}": 2, f"l2-constant, {other}": 2, f"l2-constant, {lacking}": 1}


def test_damaged_logs_do_not_stop_the_others(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2, 3])
    half = write_run(tmp_path, "Task__standard__seed2", [1, 2, 3], total=9_000)
    for seed in (3, 4, 5, 6):
        write_run(tmp_path, f"Task__standard__seed{seed}", [1])
    write_run(tmp_path, "Task__standard__seed7", [1, 2], erank="1~.5")
    with (half / "log.csv").open("a") as file:
        file.write('garbage\n\0\0"\n3500,,6\n4000,,7,0,10,50\n5000,,8,0,10,5')  # the last one is being written
    (tmp_path / "Task__standard__seed3" / "log.csv").write_text("")
    (tmp_path / "Task__standard__seed4" / "log.csv").write_text(",".join(DQN) + "\n")
    (tmp_path / "Task__standard__seed5" / "config.json").write_text("{")
    (tmp_path / "Task__standard__seed6" / "log.csv").write_bytes(bytes(range(256)))
    (tmp_path / "notes").mkdir()
    code, table, notes = command(tmp_path, columns=("eval_return", "erank"))
    assert code == 0 and len(table.strip().splitlines()) == 3  # the name, the head, standard
    assert "seed2/log.csv: left out 4 damaged or half-written line(s)" in notes
    assert "seed2: unfinished at step 4,000, not in the table" in notes
    assert all(f"seed{seed}: " in notes for seed in (3, 4, 5, 6, 7)) and "notes: " in notes and "seed1" not in notes
    assert len(notes.splitlines()) == 8
    np.testing.assert_allclose(plot.curves(read(tmp_path), "eval_return", 0)[str(half)], [1, 2, 3, 7])
    assert Path("figures/Task_eval_return.png").stat().st_size > 10_000


def test_a_variant_without_any_value_yet_is_left_out_of_its_panel(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2])
    write_run(tmp_path, "Task__layer-norm__seed1", [np.nan, np.nan], total=9_000)
    figure = draw(read(tmp_path), ["eval_return", "erank"])
    assert [len(ax.lines) for ax in figure.axes if ax.axison] == [2, 4]
    assert command(tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty"], "no run in empty"),
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
    assert code == 2 and output == "" and error.count("\n") == 1
    assert error.startswith("error: ") and message in error


def test_table_and_markdown(tmp_path, command, monkeypatch):
    monkeypatch.setattr(plot, "draw_figure", lambda *_: plt.figure())
    returns = {1: np.arange(20.0), 2: np.arange(20.0) * 2}  # the last 10 % of 20,000 steps: steps 19,000 and 20,000
    for seed, values in returns.items():
        write_run(tmp_path, f"Task__standard__seed{seed}", values, erank=seed)
    write_run(tmp_path, "Task__layer-norm__seed1", [7] * 20)
    columns = ("eval_return", "train_return", "erank")
    _, text, _ = command(tmp_path, columns=columns)
    assert re.search(r"standard +2 +14\.25 \[9\.5, 19\] +27\.75 \[18\.5, 37\] +-27\.75 +1\.5\n", text)
    _, markdown, _ = command(tmp_path, "--table", columns=columns)
    assert markdown.splitlines() == [
        "### Task",
        "",
        "| variant | seeds | eval_return, whole run | eval_return | train_return | erank |",
        "| --- | --- | --- | --- | --- | --- |",
        "| standard | 2 | 14.25 [9.5, 19] | 27.75 [18.5, 37] | -27.75 | 1.5 |",
        "| layer-norm | 1 | 7 | 7 | -7 | 10 |",
        "",
    ]


def test_only_unfinished_runs_are_drawn_without_a_table(tmp_path, command):
    write_run(tmp_path, "Task__standard__seed1", [1, 2], total=9_000)
    write_run(tmp_path, "Task__standard__seed2", range(39), total=39_500)  # in its last 10 %
    code, output, notes = command(tmp_path)
    assert "seed1: unfinished at step 2,000" in notes and "seed2: unfinished at step 39,000" in notes
    assert code == 0 and output == "" and Path("figures/Task_eval_return.png").exists()


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_the_same_logs_give_the_same_bytes(command, kind):
    for out in ("first", "second"):
        assert command(*LOGS.glob("CartPole*"), "--format", kind, "--out", out)[0] == 0
    names = [f"CartPole_eval_return.{kind}", f"CartPole_overview.{kind}"]
    assert sorted(file.name for file in Path("first").iterdir()) == names
    assert all(Path("first", name).read_bytes() == Path("second", name).read_bytes() for name in names)


def test_the_picture_shows_data_values_and_trajectories_in_the_maze():
    with np.load(LOGS / "PointmassHard__injection-1__seed1" / "picture.npz") as file:
        picture = dict(file)
    figure = plot.draw_picture({"injection-1": picture})
    data, agent = figure.axes[:2]
    assert data.get_title().startswith("offline data") and agent.get_title() == "injection-1: value, 10 episodes"
    visits, drawn = (ax.collections[0].get_array().reshape(picture["maze"].shape) for ax in (data, agent))
    assert all((np.ma.getmaskarray(cells) == picture["maze"]).all() for cells in (visits, drawn))
    np.testing.assert_allclose(10 ** visits[~picture["maze"]] - 1, picture["coverage"][~picture["maze"]], atol=1e-9)
    np.testing.assert_allclose(drawn[~picture["maze"]], picture["value"][~picture["maze"]])
    np.testing.assert_allclose(agent.lines[3].get_xydata()[:, ::-1], picture["trajectories"][3])  # axis 0 is y
    assert agent.get_ylim() == (22, 0) and agent.get_xlim() == (0, 22)


def test_the_picture_is_made_where_the_run_folder_has_one_and_stray_files_stop_nothing(command, tmp_path):
    assert command(*LOGS.glob("Pointmass*"))[0] == 0
    names = {f"PointmassHard_{name}.png" for name in ("eval_return", "overview", "picture")}
    assert {file.name for file in Path("figures").iterdir()} == names
    damaged = shutil.copytree(LOGS / "PointmassHard__standard__seed1", tmp_path / "PointmassHard__standard__seed1")
    (damaged / "picture.npz").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "sweep.txt").touch()
    code, _, notes = command(*tmp_path.glob("*"))  # as a shell expands runs/*
    assert code == 0 and f"left out {damaged}/picture.npz: " in notes and "sweep.txt: [Errno" in notes


# ---- which metric tells of plasticity


def write_probed_run(root, name, erank, plasticity, score=None):
    """A run with both measured in every second row; updated units are always 100."""
    folder = write_run(root, name, [0] * 2 * len(plasticity))
    rows = [",".join([*DQN, "plasticity", "plasticity_fresh"])]
    for i, value in enumerate(plasticity):
        rows.append(f"{1_500 * i + 1_000},,,0,{erank[i]},100,,")
        rows.append(f"{1_500 * i + 1_500},{15 * score[i] if score else ''},,0,{erank[i]},100,{value},{value + 1}")
    (folder / "log.csv").write_text("\n".join([*rows, ""]))
    return folder


def test_rank_correlations_over_all_rows_and_within_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DIRECTION_WHEN_LOST", {"erank": 1, "absent": 1, "updated_units": -1, "plasticity": -1})
    write_probed_run(tmp_path, "Task__standard__seed1", [1, 2, 4], [10, 20, 30])  # within the run 1
    write_probed_run(tmp_path, "Task__standard__seed2", [5, 9, 7], [1, 2, 3])  # within the run 1/2
    write_probed_run(tmp_path, "Task__standard__seed3", [3, 3, 3], [4, 5, 6])  # constant: no part of the median
    write_probed_run(tmp_path, "Task__standard__seed4", [12, 11, 10], [40, 50, 60])  # within the run -1
    ranks = [1, 2, 6, 7, 9, 8, 4, 4, 4, 12, 11, 10], [7, 8, 9, 1, 2, 3, 4, 5, 6, 10, 11, 12]
    by_hand = np.corrcoef(*ranks)[0, 1]
    assert plot.correlations(read(tmp_path)).to_dict("records") == [
        {"metric": "erank", "expected sign": "-", "plasticity": f"{by_hand:.2f}", "plasticity, within runs": "0.50"},
        {"metric": "updated_units", "expected sign": "+", "plasticity": "constant", "plasticity, within runs": "constant"},
    ]  # fmt: skip


def test_in_digits_the_metrics_and_the_probe_are_held_against_the_task_that_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "DIRECTION_WHEN_LOST", {"erank": -1, "plasticity": -1})
    scores = [50, 10, 20, 30]  # after its first three tasks erank has the order of the next score, plasticity not
    write_probed_run(tmp_path, "Digits__standard__seed1", [1, 2, 3, 0], [9, 8, 7, 6], scores)
    erank, probe = plot.correlations(read(tmp_path)).to_dict("records")
    assert erank["next task's score"] == erank["next task's score, within runs"] == "1.00"
    assert probe["next task's score"] == "-1.00" and probe["plasticity"] == probe["plasticity, within runs"] == "itself"


def test_plasticity_has_its_fresh_twin_beside_it_a_scatter_and_a_table(tmp_path, command, monkeypatch):
    for name, column in (("standard", [1, 2, 3]), ("layer-norm", [3, 5, 4])):
        write_probed_run(tmp_path, f"Task__{name}__seed1", column, [10, 20, 30])
    (ax,) = draw(read(tmp_path), ["plasticity"], smooth=0).axes
    twins = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_color() for line in twins] == [line.get_color() for line in ax.lines if line not in twins]
    assert len(twins) == 2 and all(line.get_ydata().tolist() == [11, 21, 31] for line in twins)
    monkeypatch.setattr(plot, "DIRECTION_WHEN_LOST", {"erank": -1, "absent": 1, "updated_units": -1, "plasticity": -1})
    erank = plot.draw_correlations(read(tmp_path)).axes[0]
    np.testing.assert_allclose(sorted(erank.collections[0].get_offsets().tolist()),
                               sorted(zip([1, 2, 3, 3, 5, 4], [10, 20, 30] * 2)))  # fmt: skip
    code, tables, _ = command(tmp_path, "--table", columns=("plasticity", "erank", "updated_units"))
    assert code == 0 and Path("figures/Task_correlations.png").stat().st_size > 10_000
    assert "| erank | + | 0.49 | 0.75 |" in tables  # 8 / sqrt(17 * 16); the median of 1 and 1/2
