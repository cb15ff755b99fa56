"""Draws figures and prints tables from the logs of both agents: python plot.py runs/

Unfinished runs are drawn, too. A line is the mean over the seeds of a variant, its band the 95 %
t-interval. Where only some of the seeds have a value, the line is their mean and has no band.
Returns are smoothed by a moving average, and a thin line shows them unsmoothed. Where a run has 400
values or more, each point is the mean of several, for the eye cannot follow so many.

Runs whose settings differ are never averaged: each gets a line of its own, which names the
settings that differ. Variants are compared with the standard agent seed by seed: each run with
the standard run of the same seed and otherwise the same settings.
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
from matplotlib.ticker import EngFormatter

from metrics import DIRECTION_WHEN_LOST, PROBED

# The columns that are drawn, where a log has them, and their titles. read_run adds "score".
COLUMNS = {
    "score": "Score: correct answers in a task (%)",
    "eval_return": "Evaluation return",
    "train_return": "Training return",
    "erank": "Effective rank of the weights",
    "feature_erank": "Effective rank of the features",
    "weight_magnitude": "Mean absolute weight",
    "updated_units": "Updated units (%)",
    "dormant_units": "Dormant units (%)",
    "plasticity": "Plasticity (%)",
}
SMOOTHED = ("eval_return", "train_return")
RESULTS = ("score", *SMOOTHED)  # a figure shows their differences from the standard agent

# A variant has the colour of the first of these that its name begins with, so the longer names come
# first; "" matches every name. The legends have the same order.
blue, orange, green, red, purple, brown, pink, grey, yellow, sky = sns.color_palette("colorblind")
COLOURS = {
    "standard": "black",
    "injection-1": blue,
    "injection-2": orange,
    "injection-3-plasticity": yellow,
    "injection-3-updated_units": "olive",
    "injection-3": green,
    "l2-constant": purple,
    "l2-incremental": pink,
    "l2-periodic": brown,
    "layer-norm-after": "maroon",
    "layer-norm": red,
    "leaky-relu": sky,
    "": grey,
}
FONT_SCALE = 0.9
NEUTRAL = "0.5"  # grey, for legend entries that apply to all variants

# Returns that are known from elsewhere, drawn as horizontal lines. Those of MsPacman: Wang et al.,
# Dueling network architectures, ICML 2016, and Mnih et al. 2015.
LEVELS = {
    "MsPacman": {"human": 6951.6, "random actions": 307.3},
    "LunarLander": {"solved": 200},  # by definition
    "PointmassHard": {"optimum": -33},  # by dynamic programming
}
# Steps of a task of Digits: one episode, with reward 1 for each correct action.
DIGITS_TASK = 1_500

# Settings whose names begin with one of these belong to a remedy. Only they may differ between a
# run and the standard run that it is compared with.
REMEDIES = ("variant", "injection", "l2", "layer_norm", "leaky_relu")

# What the picture of a run in the maze holds.
PICTURE = ("maze", "start", "goal", "coverage", "value", "trajectories")


# ---- reading


def read_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Returns the log and the settings of a run. Raises an error if the folder is no run."""
    # A link may have any name: what counts is the name of the folder it leads to.
    parts = Path(os.path.realpath(folder)).name.rsplit("__", 2)  # an env's name may hold "__", too
    if len(parts) != 3 or not parts[2].startswith("seed"):
        raise ValueError("its name is not <env>__<variant>__seed<k>")
    env, variant, _ = parts
    settings = json.loads((folder / "config.json").read_text())
    if not isinstance(settings, dict) or "seed" not in settings:
        raise TypeError("config.json does not hold settings")
    log = read_log(folder / "log.csv")

    total = settings.get("total_steps") or settings["offline_steps"] + settings["online_steps"]
    finished = log.step.max() >= total
    if not finished:
        step = f"{log.step.max():,.0f}"
        print(f"{folder}: unfinished at step {step}, not in the tables", file=sys.stderr)

    log["final"] = finished & (log.step > 0.9 * total)  # the last 10 % of a finished run
    log["injected"] = False
    if "injections" in log:
        log["injected"] = log.injections > log.injections.shift(fill_value=0)
    log["triggered"] = settings.get("injection_trigger") is not None
    if env == "Digits" and "train_return" in log:
        log["score"] = 100 * log.pop("train_return") / DIGITS_TASK

    settings.pop("device", None)  # the same run on another device is not another variant
    settings["env"] = env
    settings["variant"] = variant
    settings = {key: str(value) for key, value in settings.items()}
    shared = {key: value for key, value in settings.items() if not key.startswith(REMEDIES)}
    # The run is compared with the standard run of the same pair.
    pair = json.dumps(shared, sort_keys=True)
    return log.assign(run=str(folder), env=env, variant=variant, pair=pair), settings


def read_log(path: Path) -> pd.DataFrame:
    """Returns the rows of a log without those that are damaged or not yet written to their end."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if not lines:
        raise ValueError("log.csv is empty")
    commas = lines[0].count(",")
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == commas]
    numbers = ["step", "injections", *COLUMNS, *PROBED]
    log = pd.read_csv(io.StringIO("".join(whole)), dtype=dict.fromkeys(numbers, float))
    log = log.replace([np.inf, -np.inf], np.nan)  # no run writes infinity
    if "step" not in log or log.step.isna().all():
        raise ValueError("log.csv has no row yet")
    if len(whole) < len(lines):
        left_out = len(lines) - len(whole)
        print(f"{path}: left out {left_out} damaged or half-written line(s)", file=sys.stderr)
    return log.dropna(subset="step")


def folders_below(roots: list[Path]) -> list[Path]:
    """Returns all folders at and below the roots, each once. Links are followed, loops ended."""
    found = {}
    waiting = list(roots)
    while waiting:
        folder = waiting.pop(0)
        place = os.path.realpath(folder)
        if place in found:
            continue
        found[place] = folder
        if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
            continue
        for path in sorted(folder.iterdir()):
            # A link that leads nowhere is not a folder, but the reader wants to know of it.
            if path.is_dir() or not path.exists():
                waiting.append(path)
    return sorted(found.values())


def read_runs(roots: list[Path]) -> pd.DataFrame:
    """Returns the logs of all runs below the roots; `label` names the line that shows a run."""
    logs = {}
    settings = {}
    left_out = []
    for folder in folders_below(roots):
        try:
            is_run = (folder / "log.csv").exists()
            if not is_run and any(path.is_dir() for path in folder.iterdir()):
                continue  # a folder of runs
            log, config = read_run(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            # These are the errors that damaged files lead to.
            left_out.append(f"left out {folder}: {error}")
            continue
        same = [other for other in settings if settings[other] == config]
        if same and log.step.max() <= logs[same[0]].step.max():
            left_out.append(f"left out {folder}: {same[0]} holds the same run")
            continue
        if same:  # the longer log counts
            left_out.append(f"left out {same[0]}: {folder} holds the same run")
            logs.pop(same[0])
            settings.pop(same[0])
        logs[folder] = log
        settings[folder] = config
    if not logs:
        searched = ", ".join(map(str, roots))
        raise ValueError("; ".join([f"no run found in {searched}", *left_out]))
    for reason in left_out:
        print(reason, file=sys.stderr)

    # The label of a run is its variant, and the settings in which runs of that variant differ.
    for (_, variant), runs in pd.DataFrame(settings).T.groupby(["env", "variant"]):
        counts = runs.drop(columns="seed").nunique(dropna=False)
        differing = list(counts.index[counts > 1])
        for folder, values in runs[differing].iterrows():
            named = [f"{key}={value}" for key, value in values.items()]
            logs[folder]["label"] = ", ".join([variant, *named])
    log = pd.concat(logs.values(), ignore_index=True)
    in_order = list(line_styles(log.label.unique()))
    return log.assign(label=pd.Categorical(log.label, in_order))


def read_pictures(log: pd.DataFrame) -> dict[str, dict]:
    """Returns what the picture of the maze needs, of the first run of each variant that has it."""
    pictures = {}
    runs = log[["label", "run"]].drop_duplicates().sort_values("label", kind="stable")
    for label, run in runs.itertuples(index=False):
        path = Path(run, "picture.npz")
        # Other environments and unfinished runs have none.
        if label in pictures or not path.exists():
            continue
        try:
            with np.load(path) as file:
                pictures[label] = {name: file[name] for name in PICTURE}
        except Exception as error:  # noqa: BLE001 - a damaged file raises all kinds of errors
            print(f"left out {path}: {error}", file=sys.stderr)
    return pictures


# ---- from runs to lines


def line_styles(labels: list[str]) -> dict[str, dict]:
    """Returns a style for each label, in the order of the legends.

    Labels that share a colour differ in shade and dashes."""
    styles = {}
    for start, colour in COLOURS.items():
        shades = sns.dark_palette(colour, 4, reverse=True)  # the fourth is too dark to tell
        layer = 2.5 if start == "standard" else 2  # the standard agent lies on top of the others
        alike = [label for label in labels if label.startswith(start) and label not in styles]
        for k, label in enumerate(sorted(alike)):
            dashes = ("-", "--", "-.", ":")[k % 4]
            styles[label] = {"color": shades[k % 3], "linestyle": dashes, "zorder": layer}
    return styles


def curves(log: pd.DataFrame, column: str, smooth: float) -> pd.DataFrame:
    """Returns a column per run and a row for every step where one of them has a point."""
    # A run that has no value yet keeps its column, for it belongs to its variant's seeds.
    runs = log.pivot_table(index="step", columns="run", values=column, dropna=False)
    for run in runs:
        values = in_windows(runs[run].dropna())
        # Each value goes to its step; the run has none at the other steps.
        runs[run] = values.ewm(alpha=1 - smooth).mean()
    runs = runs.dropna(how="all")
    # Runs may be measured at different steps. Between two of its measurements a run is
    # interpolated; before its first and after its last it is missing.
    return runs.interpolate("index", limit_area="inside")


def in_windows(values: pd.Series) -> pd.Series:
    """Returns the means over windows of equally many values, each at its window's last step.

    There are 200 to 300 windows, and the last may be shorter. Fewer than 400 values are returned as
    they are."""
    size = max(1, len(values) // 200)
    windows = np.arange(len(values)) // size
    steps = values.index.to_series().groupby(windows).last()
    return values.groupby(windows).mean().set_axis(steps)


def minus_standard(runs: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """Returns `runs`, a column per run, less the standard run that each is compared with.

    Standard runs, and runs without a matching standard run, are left out."""
    about = log.groupby("run")[["variant", "pair"]].first().loc[runs.columns]
    standard = {}
    for run, variant, pair in about.itertuples():
        if variant == "standard":
            standard[pair] = runs[run]
    differences = {}
    for run, variant, pair in about.itertuples():
        if variant != "standard" and pair in standard:
            differences[run] = runs[run] - standard[pair]
    return pd.DataFrame(differences, index=runs.index)


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean of each row of `runs`, a column per run, and its 95 % t-interval.

    There is no interval where a run lacks a value, nor for a single run."""
    seeds = runs.shape[1]
    mean = runs.mean(axis=1)
    standard_error = runs.std(axis=1, skipna=False) / max(seeds, 1) ** 0.5
    margin = scipy.stats.t.ppf(0.975, seeds - 1) * standard_error
    return pd.DataFrame({"mean": mean, "low": mean - margin, "high": mean + margin})


def summarise_variants(log: pd.DataFrame, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the summary of the runs of each variant, where they have any value."""
    labels = log.groupby("run").label.first()[runs.columns]
    lines = {}
    for label in log.label.cat.categories:
        of_label = runs.loc[:, labels == label].dropna(how="all")
        if len(of_label):
            lines[label] = summarise(of_label)
    return lines


# ---- figures


def draw(
    ax: plt.Axes, log: pd.DataFrame, column: str, smooth: float, difference: bool = False
) -> None:
    """Draws one panel: a column of the logs, or its difference from the standard agent's."""
    if column not in SMOOTHED:
        smooth = 0
    runs = curves(log, column, smooth)
    if difference:
        runs = minus_standard(runs, log)
        ax.axhline(0, color="black", label="standard")
    lines = summarise_variants(log, runs)
    styles = line_styles(log.label.cat.categories)
    for label, line in lines.items():
        marker = "o" if len(line) == 1 else None  # a line needs two points to be seen
        ax.plot(line["mean"], label=label, marker=marker, **styles[label])
    if column == "plasticity" and "plasticity_fresh" in log:
        twins = curves(log, "plasticity_fresh", 0)
        look = {"linestyle": "--", "linewidth": 0.7}
        draw_thin(ax, log, twins, styles, look, "freshly initialised twin")
    if not difference:
        draw_levels(ax, log, column)
        # The limits are fixed now, so that bands and thin lines, which may be far wider, are cut
        # off. In a figure of differences the band matters, so there they are left free.
        ax.set_ylim(ax.get_ylim())
    for label, line in lines.items():
        colour = styles[label]["color"]
        ax.fill_between(line.index, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    if smooth and not difference:
        look = {"alpha": 0.3, "linewidth": 0.7}
        draw_thin(ax, log, curves(log, column, 0), styles, look, "not smoothed")
    draw_injections(ax, log, styles)
    if "phase" in log and (log.phase == "offline").any():
        end = log.step[log.phase == "offline"].max()
        ax.axvspan(0, end, color="0.93", zorder=0, label="offline phase")  # behind the bands


def draw_thin(
    ax: plt.Axes, log: pd.DataFrame, runs: pd.DataFrame, styles: dict, look: dict, name: str
) -> None:
    """Draws a thin line for each variant, and one entry of the legend for all of them."""
    for label, line in summarise_variants(log, runs).items():
        marker = "." if len(line) == 1 else None
        ax.plot(line["mean"], color=styles[label]["color"], marker=marker, zorder=1.9, **look)
    ax.plot([], [], color=NEUTRAL, label=name, **look)


def draw_injections(ax: plt.Axes, log: pd.DataFrame, styles: dict) -> None:
    """Draws a line at each step where a variant injects. Triggered injections differ from seed to
    seed: each is a short tick at the lower edge."""
    injections = log[log.injected & ~log.triggered]
    for step, labels in injections.groupby("step").label.unique().items():
        # The dashes of variants that inject at the same step take turns.
        gap = 4 * max(1, len(labels) - 1)
        for turn, label in enumerate(labels):
            dashes = (4 * turn, (4, gap))
            colour = styles[label]["color"]
            ax.axvline(step, color=colour, linestyle=dashes, linewidth=1, zorder=1.8)
    if len(injections):
        ax.plot([], [], color=NEUTRAL, linestyle="--", linewidth=1, label="injection (vertical)")

    triggered = log[log.injected & log.triggered]
    for row, (label, injections) in enumerate(triggered.groupby("label")):
        edge = ax.get_xaxis_transform()  # heights are parts of the panel's
        colour = styles[label]["color"]
        foot = 0.01 + 0.045 * row
        ax.vlines(injections.step, foot, foot + 0.035, color=colour, transform=edge)
    if len(triggered):
        ax.plot([], [], "|", color=NEUTRAL, markeredgewidth=1.5, label="triggered injection")


def draw_levels(ax: plt.Axes, log: pd.DataFrame, column: str) -> None:
    """Draws the levels that the returns or scores are read against."""
    levels = {}
    if column in SMOOTHED:
        levels = LEVELS.get(log.env.iloc[0], {})
    elif column == "score":
        standard = log[log.variant == "standard"].dropna(subset="score")
        if standard.label.nunique() == 1:  # otherwise there are several kinds of agents
            first_task = standard.groupby("run").score.first()
            levels["standard agent's first task"] = round(first_task.mean(), 1)
        levels["chance"] = 10
    bottom, top = ax.get_ylim()
    for (name, level), dashes in zip(levels.items(), ("--", ":")):
        # Goals and chance are always shown. Others are not where they would flatten the curves.
        if bottom <= level <= top or name in ("solved", "optimum", "chance"):
            text = f"{name}: {level:g}"
            ax.axhline(level, color="0.2", linestyle=dashes, linewidth=1, label=text)


def name_line_ends(ax: plt.Axes, labels: list[str]) -> None:
    """Writes the names of the lines at their right ends, none over another."""
    lines = [line for line in ax.lines if line.get_label() in labels]
    lines.sort(key=lambda line: line.get_ydata()[-1])
    bottom, top = ax.get_ylim()
    lowest = 0.0  # all heights are parts of the panel's
    for place, line in enumerate(lines):
        above = len(lines) - 1 - place
        height = (line.get_ydata()[-1] - bottom) / (top - bottom)
        height = min(max(height, lowest), 1 - 0.055 * above)
        lowest = height + 0.055
        look = {"color": line.get_color(), "va": "center"}
        ax.text(1.01, height, line.get_label(), transform=ax.transAxes, **look)


def new_figure(panels: int) -> tuple[plt.Figure, list[plt.Axes]]:
    """Returns a figure that is legible where a page is 850 pixels wide, and its panels."""
    across = min(panels, 3)
    if panels == 4:
        across = 2
    rows = math.ceil(panels / across)
    figure = plt.figure(figsize=(9, max(4.6, 2.4 * rows + 1.2)), layout="constrained")
    axes = [figure.add_subplot(rows, across, place + 1) for place in range(panels)]
    return figure, axes


def add_legend(figure: plt.Figure) -> None:
    """Puts one legend below all panels, without what is named at the ends of lines."""
    entries = {}
    for ax in figure.axes:
        named = [text.get_text() for text in ax.texts]
        for handle, name in zip(*ax.get_legend_handles_labels()):
            if name not in named:
                entries[textwrap.fill(name, 34)] = handle
    place = {"loc": "outside lower center", "ncols": 3, "frameon": False, "markerscale": 1.5}
    legend = figure.legend(entries.values(), entries.keys(), **place)
    # new_figure leaves 1.2 inches for the legend. If it needs more, the figure grows, so that the
    # panels keep their size.
    height = legend.get_window_extent().height / figure.dpi
    figure.set_figheight(figure.get_figheight() + max(0, height - 1.2))
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def draw_figure(
    log: pd.DataFrame, columns: list[str], smooth: float, difference: bool = False
) -> plt.Figure:
    """Draws a panel per column. Few variants are named at the ends of their lines."""
    seeds = log.groupby("label").run.nunique()
    over = "mean over seeds, 95 % t-interval"
    if seeds.max() == 1:
        over = "single runs"
    elif difference:
        over = "mean over shared seeds, 95 % t-interval"
    elif seeds.nunique() == 1:
        over = f"mean over {seeds.max()} seeds, 95 % t-interval"
    else:
        names = {label: f"{label} (seeds: {count})" for label, count in seeds.items()}
        log = log.assign(label=log.label.cat.rename_categories(names))
    title = f"{log.env.iloc[0]}: {over}"
    if difference:
        title = f"{log.env.iloc[0]}, difference from the standard agent: {over}"
    if smooth and set(columns) & set(SMOOTHED):
        title += f"; returns: moving average {smooth:g}"

    x_label = "environment steps"
    if "phase" in log:
        x_label = "steps, first offline, then online"
    if columns == ["score"]:
        # A score is logged after its task has ended, so this is the task's number, from 1.
        log = log.assign(step=log.step // DIGITS_TASK)
        x_label = f"task ({DIGITS_TASK:,} steps each)"

    figure, axes = new_figure(len(columns))
    for ax, column in zip(axes, columns):
        if ax is not axes[0]:
            ax.sharex(axes[0])
        draw(ax, log, column, smooth, difference)
        ax.set_title(COLUMNS[column], loc="left")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    panels_across = axes[0].get_gridspec().ncols
    for ax in axes[-panels_across:]:  # the lowest in each column
        ax.set_xlabel(x_label)
    labels = list(log.label.unique())
    if len(columns) == 1 and len(labels) <= 6 and max(map(len, labels)) <= 34:
        name_line_ends(axes[0], labels)
    add_legend(figure)
    figure.suptitle(textwrap.fill(title, 100), x=0.01, ha="left", fontsize="medium")
    return figure


def draw_correlations(log: pd.DataFrame) -> plt.Figure:
    """Draws a panel per metric: its values and the relative plasticity of the same rows."""
    metrics = relative_metrics(log)
    plasticity = metrics.pop("plasticity")
    styles = line_styles(log.label.cat.categories)
    figure, axes = new_figure(len(metrics))
    for ax, (metric, values) in zip(axes, metrics.items()):
        if ax is not axes[0]:
            ax.sharey(axes[0])
        for label, rows in log.loc[values.index].groupby("label"):
            x = values[rows.index]
            y = plasticity[rows.index]
            colour = styles[label]["color"]
            ax.scatter(x, y, s=9, alpha=0.5, linewidth=0, color=colour, label=label)
        name = values.name.replace(metric, COLUMNS[metric])
        ax.set(xlabel=textwrap.fill(name, 30))
    add_legend(figure)
    figure.supylabel("relative plasticity", fontsize="medium")
    title = f"{log.env.iloc[0]}: each metric and plasticity, a point for each measurement"
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def draw_picture(pictures: dict[str, dict]) -> plt.Figure:
    """Draws the maze: where the offline data has been, then each variant's values and episodes."""
    figure, axes = new_figure(len(pictures) + 1)
    data = next(iter(pictures.values()))
    visits = np.log10(1 + data["coverage"])
    draw_maze(axes[0], data, visits, "offline data: log10(1 + visits)")
    for ax, (label, picture) in zip(axes[1:], pictures.items()):
        # Axis 0 of the maze points downwards.
        ax.plot(*picture["trajectories"].T[::-1], color=red, linewidth=0.7)
        episodes = len(picture["trajectories"])
        draw_maze(ax, picture, picture["value"], f"{label}: value, {episodes} episodes")
    return figure


def draw_maze(ax: plt.Axes, picture: dict, cells: np.ndarray, title: str) -> None:
    """Draws a number per cell as a colour, with the start as a circle and the goal as a star."""
    cells = np.where(picture["maze"], np.nan, cells)  # walls show as background
    sns.heatmap(cells, ax=ax, cmap="Blues", square=True, xticklabels=False, yticklabels=False)
    for name, marker in (("start", "o"), ("goal", "*")):
        y, x = picture[name]
        ax.plot(x, y, marker, color="white", markersize=12, markeredgecolor="black")
    ax.set(title=textwrap.fill(title, 34), facecolor="0.4")


# ---- tables


def decimals(size: float) -> int:
    """Returns how many decimals give a number of this size three significant digits."""
    if size == 0:
        return 0
    return max(0, 2 - math.floor(math.log10(size)))


def cell(values: pd.Series, sign: str = "") -> str:
    """The mean over the runs that have a value, and its 95 % t-interval if there are several."""
    values = values.dropna()
    numbers = summarise(values.to_frame().T).iloc[0].dropna()
    if numbers.empty:
        return "-"
    places = decimals(numbers.abs().max())
    mean, *interval = [f"{value:{sign}.{places}f}" for value in numbers]
    if not interval:
        return mean
    return f"{mean} [{', '.join(interval)}]"


def finished_runs(log: pd.DataFrame) -> pd.DataFrame:
    """Returns all rows of the runs that are finished. Only these are in the tables."""
    return log[log.groupby("run").final.transform("any")]


def results(log: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per run: its scores or returns, and its relative plasticity."""
    final = log[log.final]
    columns = {}
    if "score" in log:
        tasks = log.dropna(subset="score")
        first = tasks.groupby("run").head(8)
        last = tasks.groupby("run").tail(8)
        columns["score, first 8 tasks"] = first.groupby("run").score.mean()
        columns["score, last 8 tasks"] = last.groupby("run").score.mean()
        columns["score, whole run"] = tasks.groupby("run").score.mean()
    if "eval_return" in log:
        columns["eval_return, whole run"] = log.groupby("run").eval_return.mean()
        columns["eval_return, last 10 %"] = final.groupby("run").eval_return.mean()
    if "train_return" in log:
        # A row holds the mean over its episodes, so rows of few episodes count as much as others.
        name = "train_return, last 10 % (mean over rows)"
        columns[name] = final.groupby("run").train_return.mean()
    metrics = relative_metrics(final)
    if "plasticity" in metrics:
        of_runs = metrics["plasticity"].groupby(final.run).mean()
        columns["relative plasticity, last 10 %"] = of_runs
    return pd.DataFrame(columns, index=log.run.unique())


def runs_of_variants(of_runs: pd.DataFrame, log: pd.DataFrame) -> Iterable:
    """Returns pairs of a variant's label and its rows of `of_runs`, which has a row per run."""
    labels = log.groupby("run").label.first()[of_runs.index]
    return of_runs.groupby(labels, observed=True)


def by_variant(of_runs: pd.DataFrame, log: pd.DataFrame, sign: str = "") -> pd.DataFrame:
    """Returns a row per variant: the mean and interval of each column of `of_runs`."""
    rows = []
    for label, runs in runs_of_variants(of_runs, log):
        row = {"variant": label, "seeds": str(len(runs))}
        for name, values in runs.items():
            row[name] = cell(values, sign)
        rows.append(row)
    return pd.DataFrame(rows)


def metrics_by_variant(log: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per variant: the means of the metrics over the last 10 % of its runs."""
    names = [name for name in DIRECTION_WHEN_LOST if name in log]
    of_runs = log[log.final].groupby("run")[names].mean()
    rows = []
    for label, runs in runs_of_variants(of_runs, log):
        row = {"variant": label}
        for name in names:
            row[name] = cell(runs[[name]].mean())  # of one number, so without an interval
        rows.append(row)
    return pd.DataFrame(rows)


def relative_metrics(log: pd.DataFrame) -> dict[str, pd.Series]:
    """Returns the metrics in those rows in which plasticity was measured.

    Plasticity is divided by its twin's value. If another metric has a twin's value, that value is
    subtracted, and the name of the series says so. In older logs only plasticity has one."""
    if "plasticity" not in log or "plasticity_fresh" not in log:
        return {}
    rows = log[log.plasticity.notna() & (log.plasticity_fresh > 0)]
    compared = {}
    for metric in DIRECTION_WHEN_LOST:
        if metric not in rows or rows[metric].isna().all():
            continue
        values = rows[metric]
        twin = f"{metric}_fresh"
        if metric == "plasticity":
            values = (values / rows[twin]).rename("relative plasticity")
        elif twin in rows and rows[twin].notna().any():
            values = (values - rows[twin]).rename(f"{metric} minus its twin's")
        compared[metric] = values
    return compared


def spearman(pairs: pd.DataFrame) -> float:
    """Spearman's rank correlation of x and y. NaN if one of them is constant, and for fewer than
    three pairs: for two it would always be 1 or -1."""
    return pairs.corr("spearman", min_periods=3).loc["x", "y"]


def correlations(log: pd.DataFrame) -> pd.DataFrame:
    """Returns the rank correlation of each metric with relative plasticity, in Digits also with
    the score of the task that follows. A metric that tracks plasticity has the expected sign.

    There are two numbers: the correlation over all rows, and the median over the runs of the
    correlation of changes from row to row. Two trends always correlate; their changes need not."""
    metrics = relative_metrics(log)
    aims = {"relative plasticity": metrics["plasticity"]}
    if "score" in log:
        # A task's score stands in the row at its end, where plasticity is measured, too.
        scores = log.dropna(subset="score").groupby("run").score
        aims["next task's score"] = scores.shift(-1)
    rows = []
    for metric, values in metrics.items():
        if metric == "plasticity" and len(aims) == 1:
            continue
        sign = "-" if DIRECTION_WHEN_LOST[metric] > 0 else "+"
        row = {"metric": values.name, "expected sign": sign}
        for aim, target in aims.items():
            pairs = pd.DataFrame({"x": values, "y": target}).dropna()
            changes = pairs.groupby(log.run).diff().dropna()
            within = [spearman(of_run) for _, of_run in changes.groupby(log.run)]
            median = pd.Series(within, dtype=float).median()
            row[aim] = f"{spearman(pairs):.2f}"
            row[f"{aim}, changes within runs"] = f"{median:.2f}"
        rows.append(row)
    return pd.DataFrame(rows).replace("nan", "-")


# ---- the command


def print_table(title: str, rows: pd.DataFrame, markdown: bool) -> None:
    if not markdown:
        print(title, rows.to_string(index=False), "", sep="\n")
        return
    print(f"### {title}\n")
    for line in [list(rows), ["---"] * len(rows.columns), *rows.to_numpy()]:
        print(f"| {' | '.join(line)} |")
    print()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw the logs of any number of runs, and print tables of the finished ones. "
        "Defaults are in parentheses.",
        allow_abbrev=False,
    )
    option = parser.add_argument
    runs = [Path("runs")]
    option("folders", nargs="*", type=Path, default=runs, help="runs, or folders of runs (runs)")
    option("--out", type=Path, default="figures", help="folder for the figures (figures)")
    option(
        "--smooth",
        type=float,
        default=0.8,
        help="moving average of returns: weight of the past (0.8)",
    )
    option(
        "--format",
        choices=("png", "pdf", "svg"),
        default="png",
        help="file format of the figures (png)",
    )
    option("--table", action="store_true", help="print the tables as Markdown, and no other text")

    def exit_with_one_line(message):
        parser.exit(2, f"error: {message} (see --help)\n")

    parser.error = exit_with_one_line  # argparse's own prints the usage, too
    args = parser.parse_args()
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth has to be at least 0 and below 1, not {args.smooth:g}")
    try:
        args.logs = read_runs(args.folders)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(error)
    return args


def main() -> None:
    args = parse_arguments()
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # no dates in the files: the same logs, the same bytes
    # Names are drawn as they are: a $ does not begin a formula.
    look = {"svg.hashsalt": "plot", "lines.linewidth": 1.6, "text.parse_math": False}
    sns.set_theme(style="whitegrid", font_scale=FONT_SCALE, rc=look)
    tables = {}
    for env, log in args.logs.groupby("env"):
        log = log.dropna(axis="columns", how="all")
        columns = [column for column in COLUMNS if column in log]
        if not columns:
            print(f"{env}: nothing has been measured yet", file=sys.stderr)
            continue

        figures = {}
        for column in columns:
            figures[column] = draw_figure(log, [column], args.smooth)
        figures["overview"] = draw_figure(log, columns, args.smooth)
        compared = []
        for column in RESULTS:
            if column in columns:
                differences = minus_standard(curves(log, column, 0), log)
                if differences.notna().any(axis=None):
                    compared.append(column)
        if compared:
            figures["differences"] = draw_figure(log, compared, args.smooth, difference=True)
        pictures = read_pictures(log)
        if pictures:
            figures["picture"] = draw_picture(pictures)
        if len(relative_metrics(log)) > 1:  # plasticity, and something to compare it with
            figures["correlations"] = draw_correlations(log)

        finished = finished_runs(log)
        if len(finished):
            of_runs = results(finished)
            tables[env] = by_variant(of_runs, finished)
            differences = minus_standard(of_runs.T, finished).T  # it expects a column per run
            if len(differences):
                title = f"{env}: difference from the standard agent, paired by seed"
                tables[title] = by_variant(differences, finished, "+")
            tables[f"{env}: metrics, mean over the last 10 %"] = metrics_by_variant(finished)
            if len(relative_metrics(finished)) > 1:
                tables[f"{env}: which metric tracks plasticity?"] = correlations(finished)

        for name, figure in figures.items():
            path = args.out / f"{env}_{name}.{args.format}"
            figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close("all")
        if not args.table:  # with it, all output is Markdown, to be used as it is
            print(f"{env}: {len(figures)} figures in {args.out}\n")
    for title, rows in tables.items():
        print_table(title, rows, markdown=args.table)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        # End silently when the reader of the tables, such as `head`, closes the pipe.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
