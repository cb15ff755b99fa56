"""Figures and tables from the logs of both agents, also of unfinished runs: python plot.py runs/

A line is the mean over the seeds of a variant, of the moving averages of its runs. The thin line
is not smoothed. The band is the 95 % t-interval over the seeds. Where only some of the seeds have
arrived, the line is their mean and has no band.

Runs whose settings differ are never averaged: each gets a line of its own, which names the
settings that differ. The table compares a variant with the standard agent seed by seed: each run
with the standard run of the same seed and otherwise the same settings.
"""

import argparse
import io
import json
import os
import signal
import sys
import textwrap
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns

from metrics import DIRECTION_WHEN_LOST

# What is drawn, where the logs hold it
COLUMNS = {
    "score": "correct actions in a task (%)",
    "eval_return": "evaluation return (sum of rewards)",
    "train_return": "training return (sum of rewards)",
    "erank": "average effective rank",
    "feature_erank": "effective rank of the features",
    "weight_magnitude": "weight magnitude (mean |w|)",
    "updated_units": "updated units (%)",
    "dormant_units": "dormant units (%)",
    "plasticity": "plasticity (%)",
}

# All variants whose names begin like this have this colour, in every figure. The legends have this
# order. A variant that begins like none of them has the last colour.
blue, orange, green, red, purple, brown, pink, grey, yellow, sky = sns.color_palette("colorblind")
COLOURS = {
    "standard": "black",
    "injection-1": blue,
    "injection-2": orange,
    "injection-3-plasticity": yellow,
    "injection-3": green,
    "l2-constant": purple,
    "l2-incremental": pink,
    "l2-periodic": brown,
    "layer-norm": red,
    "leaky-relu": sky,
    "": grey,
}

# Returns that are known from elsewhere, drawn as horizontal lines
LEVELS = {
    "MsPacman": {"human": 6951.6, "random actions": 307.3},  # Mnih et al. 2015, Wang et al. 2016
    "LunarLander": {"solved": 200},  # by definition
    "PointmassHard": {"optimum": -33},  # by dynamic programming
}
DIGITS_TASK = (
    1_500  # steps of a task of Digits, which is one episode; a correct action has reward 1
)

# Settings that begin like this belong to a remedy. Only they may differ between a run and the
# standard run that it is compared with.
REMEDIES = ("injection", "l2", "layer_norm", "leaky_relu")


# ---- reading


def read_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Returns the log and the settings of a run. Raises an error if the folder is no run."""
    # A link may have any name: what counts is the name of the folder it leads to.
    parts = Path(os.path.realpath(folder)).name.rsplit("__", 2)  # an env's name may hold "__", too
    if len(parts) != 3 or not parts[2].startswith("seed"):
        raise ValueError("its name is not <env>__<variant>__seed<k>")
    env, variant, _ = parts
    settings = json.loads((folder / "config.json").read_text())
    log = read_log(folder / "log.csv")

    total_steps = settings.get("total_steps")
    if total_steps is None:
        total_steps = settings["offline_steps"] + settings["online_steps"]
    finished = log.step.max() >= total_steps
    if not finished:
        step = f"{log.step.max():,.0f}"
        print(f"{folder}: unfinished at step {step}, not in the table", file=sys.stderr)

    log["final"] = finished & (log.step > 0.9 * total_steps)  # the last 10 % of a finished run
    log["injected"] = False
    if "injections" in log:
        log["injected"] = log.injections > log.injections.shift(fill_value=0)
    if env == "Digits" and "train_return" in log:
        log["score"] = 100 * log.pop("train_return") / DIGITS_TASK

    settings["device"] = ""  # the same run on another device is not another variant
    settings["env"] = env
    settings["variant"] = variant
    settings = {key: str(value) for key, value in settings.items()}
    log = log.assign(run=str(folder), env=env, variant=variant, pair=pair_of(settings))
    return log, settings


def read_log(path: Path) -> pd.DataFrame:
    """Returns the rows of a log without those that are damaged or not yet written to their end."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if not lines:
        raise ValueError("log.csv is empty")
    commas = lines[0].count(",")
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == commas]
    left_out = len(lines) - len(whole)

    numbers = ["step", "injections", *COLUMNS]
    log = pd.read_csv(io.StringIO("".join(whole)), dtype=dict.fromkeys(numbers, float))
    if "step" not in log:
        raise ValueError("log.csv has no column step")
    log = log.dropna(subset="step")
    if log.empty:
        raise ValueError("log.csv has no row yet")
    if left_out:
        print(f"{path}: left out {left_out} damaged or half-written line(s)", file=sys.stderr)
    return log


def pair_of(settings: dict[str, str]) -> str:
    """Returns what a run shares with the standard run it is compared with: all but the remedy."""
    shared = {}
    for key, value in settings.items():
        if key != "variant" and not key.startswith(REMEDIES):
            shared[key] = value
    return json.dumps(shared, sort_keys=True)


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


def holds_only_folders(folder: Path) -> bool:
    """Whether this is a folder of runs, which is no run itself."""
    if (folder / "log.csv").exists():
        return False
    return any(path.is_dir() for path in folder.iterdir())


def read_runs(roots: list[Path]) -> pd.DataFrame:
    """Returns the logs of all runs below the roots; `label` names the line that shows a run."""
    logs = {}
    settings = {}
    left_out = []
    for folder in folders_below(roots):
        try:
            if holds_only_folders(folder):
                continue
            log, config = read_run(folder)
            if config in settings.values():
                raise ValueError("another folder holds the same run")
            logs[folder] = log
            settings[folder] = config
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            # These are the errors that damaged files lead to.
            left_out.append(f"left out {folder}: {error}")
    if not logs:
        searched = ", ".join(map(str, roots))
        raise ValueError("; ".join([f"no run in {searched}", *left_out]))
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
    log["label"] = pd.Categorical(log.label, in_order)
    return log


def read_pictures(log: pd.DataFrame) -> dict[str, dict]:
    """Returns what the picture of the maze needs, from one run of each variant."""
    pictures = {}
    for label, run in log.groupby("label").run.unique().explode().items():
        path = Path(run, "picture.npz")
        if not path.exists():  # another task, or a run that is not finished
            continue
        try:
            pictures[label] = dict(np.load(path))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            print(f"left out {path}: {error}", file=sys.stderr)
    return pictures


# ---- figures


def line_styles(labels: list[str]) -> dict[str, dict]:
    """Returns a style for each label, in the order of the legends. Combinations and other settings
    of a variant have darker shades of its colour, and dashes."""
    styles = {}
    for start, colour in COLOURS.items():
        shades = sns.dark_palette(colour, 4, reverse=True)
        alike = [label for label in labels if label.startswith(start) and label not in styles]
        for k, label in enumerate(sorted(alike)):
            dashes = ("-", "--", "-.", ":")[k % 4]
            styles[label] = {"color": shades[k % 3], "linestyle": dashes}
    return styles


def curves(log: pd.DataFrame, column: str, smooth: float) -> pd.DataFrame:
    """Returns a column per run and a row for every step where one of them was measured."""
    runs = log.pivot_table(index="step", columns="run", values=column)
    for run in runs:
        runs[run] = runs[run].dropna().ewm(alpha=1 - smooth).mean()
    # Runs may be measured at different steps. A run is straight between two of its values, and
    # absent before its first and after its last.
    return runs.interpolate("index", limit_area="inside")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean of each row of `runs`, a column per run, and its 95 % t-interval.

    There is no interval where a run lacks a value, nor for a single run."""
    seeds = runs.shape[1]
    mean = runs.mean(axis=1)
    standard_error = runs.std(axis=1, skipna=False) / max(seeds, 1) ** 0.5
    margin = scipy.stats.t.ppf(0.975, seeds - 1) * standard_error
    return pd.DataFrame({"mean": mean, "low": mean - margin, "high": mean + margin})


def draw(ax: plt.Axes, log: pd.DataFrame, column: str, smooth: float) -> None:
    """Draws one panel: lines with bands, injections, known levels and the offline part."""
    if column == "score":  # a mean over a whole task already
        smooth = 0
    styles = line_styles(log.label.cat.categories)
    for label, runs in log.dropna(subset=column).groupby("label"):
        draw_variant(ax, label, runs, column, smooth, styles[label])
    draw_injections(ax, log, styles)
    draw_levels(ax, log, column)
    if "phase" in log and (log.phase == "offline").any():
        end = log.step[log.phase == "offline"].max()
        ax.axvspan(0, end, color="0.93", zorder=0, label="offline part")  # behind the bands


def draw_variant(
    ax: plt.Axes, label: str, runs: pd.DataFrame, column: str, smooth: float, style: dict
) -> None:
    """Draws the line of a variant with its band, the unsmoothed line, and that of the twin."""
    seeds = runs.run.nunique()
    name = f"{label} (1 seed: no band)"
    if seeds > 1:
        name = f"{label} ({seeds} seeds)"
    line = summarise(curves(runs, column, smooth))
    marker = "o" if len(line) == 1 else None  # a line needs two points to be seen
    ax.plot(line["mean"], label=name, marker=marker, **style)
    ax.fill_between(line.index, line.low, line.high, color=style["color"], alpha=0.2, linewidth=0)

    thin = {"color": style["color"], "linewidth": 0.7}
    if column == "plasticity" and "plasticity_fresh" in runs:
        twin = curves(runs, "plasticity_fresh", smooth).mean(axis=1)
        ax.plot(twin, linestyle="--", marker=marker, label="freshly initialised twin", **thin)
    if smooth:
        unsmoothed = curves(runs, column, 0).mean(axis=1)
        ax.plot(unsmoothed, alpha=0.3, **thin)


def draw_injections(ax: plt.Axes, log: pd.DataFrame, styles: dict[str, dict]) -> None:
    """Draws a vertical line at each step where some variant injects."""
    for step, labels in log[log.injected].groupby("step").label.unique().items():
        # The dashes of variants that inject at the same step take turns.
        gap = 4 * max(1, len(labels) - 1)
        for turn, label in enumerate(labels):
            dashes = (4 * turn, (4, gap))
            colour = styles[label]["color"]
            ax.axvline(step, color=colour, linestyle=dashes, linewidth=1.2, label="injection")


def draw_levels(ax: plt.Axes, log: pd.DataFrame, column: str) -> None:
    """Draws the levels that the returns or scores are read against."""
    levels = {}
    if column in ("eval_return", "train_return"):
        levels = LEVELS.get(log.env.iloc[0], {})
    if column == "score":
        standard = log[log.variant == "standard"].dropna(subset="score")
        if len(standard):
            first_task = standard.groupby("run").score.first()
            levels = {"fresh network": round(first_task.mean(), 1)}
    bottom, top = ax.get_ylim()
    for (name, level), dashes in zip(levels.items(), ("--", ":")):
        # The human level of MsPacman would flatten all curves that are far below it.
        if bottom <= level <= top or name in ("solved", "optimum"):
            text = f"{name}: {level:g}"
            ax.axhline(level, color="0.2", linestyle=dashes, linewidth=1.2, label=text)


def draw_figure(log: pd.DataFrame, columns: list[str], smooth: float) -> plt.Figure:
    """Draws one panel, or several with a shared x axis. The legend is right of the last panel."""
    title = f"{log.env.iloc[0]}: single runs"
    if log.groupby("label").run.nunique().max() > 1:
        title = f"{log.env.iloc[0]}: mean over seeds, 95 % t-interval"
    if smooth and columns != ["score"]:
        title += f", moving average {smooth:g}"

    x_label = "environment steps"
    if "phase" in log:
        x_label = "offline updates, then environment steps"
    unit = 1_000
    letter = "k"
    if log.step.max() >= 1_000_000:
        unit = 1_000_000
        letter = "M"
    if columns == ["score"]:
        # The score is in the first row after the end of its task.
        log = log.assign(step=log.step // DIGITS_TASK)
        x_label = "task (1,500 steps each)"
        unit = 1
        letter = ""
    log = log.assign(step=log.step / unit)

    def tick_text(x, _):
        return f"{x:g}{letter}" if x else "0"

    rows = min(len(columns), 2)
    across = (len(columns) + 1) // 2
    size = (7, 4) if rows == 1 else (3.5 * across, 6.5)
    figure = plt.figure(figsize=size, layout="constrained")
    ax = None
    entries = {}
    for place, column in enumerate(columns, 1):
        ax = figure.add_subplot(rows, across, place, sharex=ax)
        draw(ax, log, column, smooth)
        ax.set(xlabel=x_label, ylabel=COLUMNS[column])
        ax.xaxis.set_major_formatter(tick_text)
        handles, names = ax.get_legend_handles_labels()
        entries.update(zip(names, handles))  # each name once in the legend
    names = [textwrap.fill(name, 34) for name in entries]
    figure.legend(
        entries.values(),
        names,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.03, 1),
        bbox_transform=ax.transAxes,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def draw_picture(pictures: dict[str, dict]) -> plt.Figure:
    """Draws the maze: where the offline data has been, then each variant's values and episodes."""
    panels = len(pictures) + 1
    figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels, 2.8), layout="constrained")
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


def results(log: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per finished run: its evaluation returns, and of Digits its scores."""
    finished = log[log.run.isin(log.run[log.final])]
    columns = {}
    if "score" in log:
        tasks = finished.dropna(subset="score")
        first = tasks.groupby("run").head(8)
        last = tasks.groupby("run").tail(8)
        columns["score, first 8 tasks"] = first.groupby("run").score.mean()
        columns["score, last 8 tasks"] = last.groupby("run").score.mean()
        columns["score, whole run"] = tasks.groupby("run").score.mean()
    if "eval_return" in log:
        final = log[log.final]
        columns["eval_return, whole run"] = finished.groupby("run").eval_return.mean()
        columns["eval_return, last 10 %"] = final.groupby("run").eval_return.mean()
    return pd.DataFrame(columns, index=finished.run.unique())


def minus_standard(values: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """Returns `values`, a row per run, less those of the standard run that each is compared with.

    They are NaN where there is no such run."""
    runs = log.groupby("run")[["variant", "pair"]].first().loc[values.index]
    standard = values[runs.variant == "standard"].groupby(runs.pair).mean()
    compared_with = standard.reindex(runs.pair).set_axis(values.index)
    return values - compared_with


def cell(values: pd.Series, sign: str = "") -> str:
    """The mean over the runs that have a value, and its 95 % t-interval if there are several."""
    values = values.dropna()
    if values.empty:
        return "-"
    mean, low, high = summarise(values.to_frame().T).iloc[0]
    text = f"{mean:{sign}.4g}"
    if len(values) > 1:
        text += f" [{low:{sign}.4g}, {high:{sign}.4g}]"
    return text


def table(log: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per variant: the results of its finished runs, compared with the standard
    agent's, and the means of the metrics over the last 10 % of the run."""
    of_runs = results(log)
    differences = minus_standard(of_runs, log)
    metrics = [name for name in COLUMNS if name in log and name not in ("score", "eval_return")]
    last = log[log.final].groupby("run")[metrics].mean()
    about = log.groupby("run")[["label", "variant"]].first().loc[last.index]
    is_standard = about.variant == "standard"
    compare = is_standard.any() and not is_standard.all()

    rows = []
    for label, runs in about.groupby("label"):
        row = {"variant": label, "seeds": str(len(runs))}
        for name in of_runs:
            row[name] = cell(of_runs.loc[runs.index, name])
            if not compare:
                continue
            difference = differences.loc[runs.index, name].dropna()
            text = cell(difference, sign="+")
            if len(difference):
                text += f" ({len(difference)})"
            if is_standard[runs.index].all():
                text = "baseline"
            row[f"{name}, minus standard (shared seeds)"] = text
        for name in metrics:
            mean = last.loc[runs.index, name].mean()
            # A row of the log has the mean of the episodes since the last row, be they one or many.
            heading = name.replace("train_return", "train_return (mean over rows)")
            row[heading] = "-" if np.isnan(mean) else f"{mean:.4g}"
        rows.append(row)
    return pd.DataFrame(rows)


def relative_metrics(log: pd.DataFrame) -> dict[str, pd.Series]:
    """Returns each metric in the rows with plasticity, compared with its twin's where it has one.

    Plasticity is divided by its twin's; from another metric its twin's is subtracted. In logs of
    older versions plasticity alone has a twin's: the names say what the values are."""
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


def over_rows_and_changes(x: pd.Series, y: pd.Series, run: pd.Series) -> tuple[str, str]:
    """Returns the rank correlation over all rows, and within runs that of the changes from a row
    to the next, as the median over the runs.

    Two trends in time always correlate; their changes need not."""
    pairs = pd.DataFrame({"x": x, "y": y}).dropna()
    changes = pairs.groupby(run).diff().dropna().groupby(run)
    within = [spearman(changes_of_run) for _, changes_of_run in changes]
    median = pd.Series(within, dtype=float).median()

    texts = []
    for value, available in ((spearman(pairs), len(pairs)), (median, changes.size().max())):
        if not np.isnan(value):
            texts.append(f"{value:.2f}")
        elif available >= 3:
            texts.append("constant")
        else:
            texts.append("-")
    return tuple(texts)


def correlations(log: pd.DataFrame) -> pd.DataFrame:
    """Returns the rank correlation of each metric with relative plasticity, in Digits also with
    the score of the task that follows. A metric that tracks plasticity has the expected sign."""
    metrics = relative_metrics(log)
    aims = {"relative plasticity": metrics["plasticity"]}
    if "score" in log:
        scores = log.dropna(subset="score").groupby("run").score
        aims["next task's score"] = scores.shift(-1)
    rows = []
    for metric, values in metrics.items():
        if metric == "plasticity" and len(aims) == 1:
            continue
        sign = "-" if DIRECTION_WHEN_LOST[metric] > 0 else "+"
        row = {"metric": values.name, "expected sign": sign}
        for aim, target in aims.items():
            over_rows, within = over_rows_and_changes(values, target, log.run)
            if aim == values.name:
                over_rows = "itself"
                within = "itself"
            row[aim] = over_rows
            row[f"{aim}, changes within runs"] = within
        rows.append(row)
    return pd.DataFrame(rows)


def draw_correlations(log: pd.DataFrame) -> plt.Figure:
    """Draws a panel per metric: its values and the relative plasticity of the same rows."""
    metrics = relative_metrics(log)
    plasticity = metrics.pop("plasticity")
    styles = line_styles(log.label.unique())
    size = (2.6 * len(metrics), 2.6)
    figure, axes = plt.subplots(
        1, len(metrics), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, values in zip(axes[0], metrics.values()):
        for label, rows in log.loc[values.index].groupby("label"):
            x = values[rows.index]
            y = plasticity[rows.index]
            colour = styles[label]["color"]
            ax.scatter(x, y, s=9, alpha=0.5, linewidth=0, color=colour, label=label)
        ax.set(xlabel=values.name)
    axes[0, 0].set(ylabel="plasticity / that of its twin")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


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
        description="Draw the logs of any number of runs.", allow_abbrev=False
    )
    option = parser.add_argument
    runs = [Path("runs")]
    option("folders", nargs="*", type=Path, default=runs, help="runs, or folders of runs (runs)")
    option("--out", type=Path, default="figures", help="folder for the figures (figures)")
    option("--smooth", type=float, default=0.8, help="weight of the moving average, 0: none (0.8)")
    option("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures (png)")
    option("--table", action="store_true", help="print the table as Markdown")

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
    look = {"svg.hashsalt": "plot", "lines.linewidth": 1.5}
    sns.set_theme(style="whitegrid", font_scale=0.85, rc=look)
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
        pictures = read_pictures(log)
        if pictures:
            figures["picture"] = draw_picture(pictures)
        if log.final.any():
            tables[env] = table(log)
        if len(relative_metrics(log)) > 1:  # plasticity, and something to compare it with
            figures["correlations"] = draw_correlations(log)
            tables[f"{env}: which metric tracks plasticity?"] = correlations(log)

        for name, figure in figures.items():
            path = args.out / f"{env}_{name}.{args.format}"
            figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close("all")
    for title, rows in tables.items():
        print_table(title, rows, markdown=args.table)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        # End without a word when the reader of the tables, such as `head`, has seen enough.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
