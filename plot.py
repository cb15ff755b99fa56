"""Figures and a table from the logs of both agents, also while runs are still going on.

    python plot.py runs/                       figures/<env>_<column>.png, <env>_overview.png, and a table on the terminal
    python plot.py results/ --table            the table as Markdown
    python plot.py runs/A runs/B --smooth 0    chosen runs, without the moving average

A line is the mean (or interquartile mean: Agarwal et al. 2021) over the seeds of a variant, of each run's moving average;
its band is the 95 % bootstrap interval over the seeds. Where only some of the seeds have arrived, the line is of those and
has no band. Runs of one variant whose settings differ are never averaged: each has a line that names what differs.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
import tyro

# What is drawn, where the logs hold it
COLUMNS = {"score": "correct actions in a task (%)", "eval_return": "evaluation return (sum of rewards)"}
COLUMNS |= {"train_return": "training return (sum of rewards)", "erank": "average effective rank"}
COLUMNS |= {"feature_erank": "effective rank of the features", "weight_magnitude": "weight magnitude (mean |w|)"}
COLUMNS |= {"updated_units": "updated units (%)", "dormant_units": "dormant units (%)"}
# The colour of all variants that begin like this, the same in every figure; in the order of the legends; "": all others.
PALETTE = [*sns.color_palette("colorblind"), (0.1, 0.1, 0.1)]
COLOURS = {"standard": 10, "injection-1": 1, "injection-2": 3, "injection-3": 0, "l2-constant": 4, "l2-incremental": 6}
COLOURS |= {"l2-periodic": 7, "layer-norm": 2, "leaky-relu": 9, "": 5}
REFERENCES = {"MsPacman": {"human": 6951.6, "random actions": 307.3}}  # Mnih et al. 2015, Wang et al. 2016
REFERENCES |= {"LunarLander": {"solved": 200}, "PointmassHard": {"optimum": -33}}  # by definition; dynamic programming
DIGITS_TASK = 1_500  # steps of a task of Digits, which is one episode; a correct action has reward 1
IQM = functools.partial(scipy.stats.trim_mean, proportiontocut=0.25, nan_policy="omit")  # interquartile mean
CENTRES = {"mean": np.nanmean, "iqm": IQM}


@dataclass
class Args:
    """Draw the logs of any number of runs."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # runs, or folders with runs anywhere below them
    out: Path = Path("figures")  # folder for the figures
    smooth: float = 0.8  # weight of the exponential moving average (paper: 0.8); 0 turns it off
    estimator: Literal["mean", "iqm"] = "mean"  # over the seeds: mean or interquartile mean
    format: Literal["png", "pdf", "svg"] = "png"  # of the figures
    table: bool = False  # print the table as Markdown


def read_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Log and settings of a run. Raises an error that says why for a folder that is none."""
    if folder.name.count("__") != 2:
        raise ValueError("its name is not <env>__<variant>__seed<k>")
    settings = json.loads((folder / "config.json").read_text())
    total = settings.get("total_steps") or settings["offline_steps"] + settings["online_steps"]
    header, *rows = [line.split(",") for line in (folder / "log.csv").read_text(errors="replace").split("\n")]
    log = pd.DataFrame([row for row in rows[:-1] if len(row) == len(header)], columns=header)
    numbers = log.columns.drop("phase", errors="ignore")
    log[numbers] = log[numbers].apply(pd.to_numeric, errors="coerce")
    log = log.reindex(columns=log.columns.union(["step"])).dropna(subset="step").drop_duplicates("step", keep="last")
    if log.empty:
        raise ValueError("log.csv has no row yet")
    if damaged := len(rows) - (rows[-1] == [""]) - len(log):  # a whole file ends with an empty line
        print(f"{folder}/log.csv: left out {damaged} damaged or half-written line(s)", file=sys.stderr)
    env, variant, _ = folder.name.split("__")
    log = log.assign(run=str(folder), env=env, variant=variant, final=log.step > 0.9 * total)
    log["finished"] = log.step.max() > total - 1_000  # there is a row every 1,000 steps
    log["injected"] = log.injections.diff().fillna(log.injections) > 0
    if env == "Digits":
        log["task_end"] = log.train_return.notna().cumsum() * DIGITS_TASK
        log["score"] = 100 * log.pop("train_return") / DIGITS_TASK
    return log, {key: str(settings[key]) for key in settings if key != "device"} | {"line": f"{env}__{variant}"}


def read_runs(folders: tuple[Path, ...]) -> pd.DataFrame:
    """The logs of all runs in and below the folders in one table; `label` names the line in which a run is drawn."""
    logs, settings, left_out = {}, {}, []
    for folder, subfolders, files in itertools.chain.from_iterable(map(os.walk, folders)):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if subfolders and "log.csv" not in files:
            continue
        try:
            log, config = read_run(Path(folder))
            if config in settings.values():
                raise ValueError("another folder holds the same run")
            logs[folder], settings[folder] = log, config
            if not log.finished.all():
                print(f"{folder}: unfinished at step {log.step.max():,.0f}, not in the table", file=sys.stderr)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # what damaged files lead to
            left_out.append(f"left out {folder}: {error}")
    if not logs:
        raise ValueError("; ".join([f"no run in {', '.join(map(str, folders))}", *left_out]))
    print(*left_out, sep="\n", end="\n" * bool(left_out), file=sys.stderr)
    for line, group in pd.DataFrame(settings).T.groupby("line"):
        differing = [key for key in group if key != "seed" and group[key].nunique() > 1]
        for run, row in group.iterrows():
            extra = ", ".join(f"{key}={row[key]}" for key in differing)
            logs[run]["label"] = line.split("__")[1] + (f" ({extra})" if extra else "")
    return pd.concat(logs.values(), ignore_index=True)


def line_styles(labels: list[str]) -> dict[str, dict]:
    """A style per label, in the order of the legends; combinations and other settings are darker and dashed."""
    styles = {}
    for start, colour in COLOURS.items():
        for k, label in enumerate(sorted(i for i in labels if i.startswith(start) and i not in styles)):
            shade = sns.dark_palette(PALETTE[colour], 4, reverse=True)[k % 3]
            styles[label] = {"color": shade, "linestyle": ("-", "--", "-.", ":")[k % 4]}
    return styles


def summarise(runs: pd.DataFrame, estimator: str) -> pd.DataFrame:
    """For each row of `runs`, a column per run: the centre, and where no run lacks a value its 95 % bootstrap interval."""
    centre, complete = CENTRES[estimator], runs.dropna()
    line = pd.DataFrame({"centre": centre(runs.to_numpy(), axis=1), "low": np.nan, "high": np.nan}, runs.index)
    if len(complete) and runs.shape[1] > 1:
        how = {"axis": 1, "n_resamples": 1_000, "batch": 100, "method": "percentile", "rng": np.random.default_rng(0)}
        interval = scipy.stats.bootstrap((complete.to_numpy(),), centre, **how).confidence_interval
        line.loc[complete.index, ["low", "high"]] = np.transpose(interval)
    return line


def curves(log: pd.DataFrame, column: str, smooth: float) -> pd.DataFrame:
    """A column per run and a row for every step where one of them was measured."""
    runs = log.pivot_table(index="task_end" if column == "score" else "step", columns="run", values=column)
    runs = runs.apply(lambda run: run.dropna().ewm(alpha=1 - smooth).mean())
    # Runs may be measured at different steps: a run is straight between two of its values, and absent outside of them.
    return runs.interpolate("index", limit_area="inside")


def draw(ax: plt.Axes, log: pd.DataFrame, column: str, names: dict, styles: dict, unit: int, args: Args) -> None:
    """One panel: lines with bands, injections, the offline part and known levels; `unit` steps are 1 on the x axis."""
    smooth = 0 if column == "score" else args.smooth  # a score is a mean over a whole task already
    for place, (label, name) in enumerate(names.items()):
        runs, colour = log[log.label == label], styles[label]["color"]
        if runs[column].isna().all():
            continue
        line = summarise(curves(runs, column, smooth), args.estimator)
        x, marker = line.index / unit, "o" if len(line) == 1 else None  # a line of one point would not be seen
        ax.plot(x, line.centre, label=name, marker=marker, **styles[label])
        ax.fill_between(x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        if smooth:
            raw = CENTRES[args.estimator](curves(runs, column, 0).to_numpy(), axis=1)
            ax.plot(x, raw, color=colour, alpha=0.3, linewidth=0.7)
        for step in runs.step[runs.injected].unique():  # dashes take turns where variants inject at the same step
            ax.axvline(step / unit, color=colour, linestyle=(4 * place, (4, 4)), linewidth=1.2, label="injection")
    env = log.env.iloc[0].split("-v")[0]
    levels = REFERENCES.get(env, {}) if column.endswith("return") else {}
    if column == "score" and "standard" in set(log.variant):
        first = log[(log.variant == "standard") & (log.task_end == DIGITS_TASK)]
        levels = {"fresh network": round(first.score.mean(), 1)}
    bottom, top = ax.get_ylim()
    for (name, level), dashes in zip(levels.items(), ("--", ":")):
        if bottom <= level <= top or env != "MsPacman":  # its human level would flatten all curves
            ax.axhline(level, color="0.2", linestyle=dashes, linewidth=1.2, label=f"{name}: {level:g}")
    if "phase" in log:
        ax.axvspan(0, log.step[log.phase == "offline"].max() / unit, color="0.93", label="offline part")


def draw_figure(log: pd.DataFrame, columns: list[str], styles: dict, args: Args) -> plt.Figure:
    """One column, or several as small multiples with a shared x axis; the legend is outside of the data."""
    seeds = log.dropna(subset=columns, how="all").groupby("label").run.nunique()
    names = {i: f"{i} ({seeds[i]} seeds)" if seeds[i] > 1 else f"{i} (1 seed: no band)" for i in styles if i in seeds}
    title = (
        "single runs"
        if seeds.max() == 1
        else f"{args.estimator.replace('iqm', 'interquartile mean')} over seeds, 95 % bootstrap interval"
    )
    unit, letter = (1_000_000, "M") if log.step.max() >= 1_000_000 else (1_000, "k")
    x = "offline updates, then environment steps" if "phase" in log else "environment steps"
    if columns == ["score"]:
        unit, letter, x = DIGITS_TASK, "", "task (1,500 steps each)"
    elif args.smooth:
        title += f", moving average {args.smooth:g}"
    alone = len(columns) == 1
    grid = {"nrows": 2 - alone, "ncols": len(columns) // 2 + 1, "figsize": (9, 4) if alone else (14, 6.5)}
    figure, axes = plt.subplots(**grid, sharex=True, squeeze=False, layout="constrained")
    entries = dict.fromkeys(names.values())  # the lines first
    for ax, column in itertools.zip_longest(axes.flat, columns):
        if column is None:
            ax.set_axis_off()
            continue
        draw(ax, log, column, names, styles, unit, args)
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels())))
        ax.set(xlabel=x, ylabel=COLUMNS[column])
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}{letter}" if x else "0")
    place = {"loc": "outside right upper"} if alone else {"loc": "upper right", "bbox_to_anchor": (0.99, 0.48)}
    figure.legend(entries.values(), entries.keys(), frameon=False, **place)
    figure.suptitle(f"{log.env.iloc[0]}: {title}", x=0.01, ha="left", fontsize="medium")
    return figure


def draw_picture(pictures: dict[str, dict]) -> plt.Figure:
    """Where the offline data has been, and the values and trajectories of one run of each variant, in the maze."""
    figure, axes = plt.subplots(1, len(pictures) + 1, figsize=(3.2 * len(pictures) + 3.2, 2.8), layout="constrained")
    data = next(iter(pictures.values()))
    panels = [("offline data: log10(1 + visits)", data, np.log10(1 + data["coverage"]), np.empty((2, 0)))]
    panels += [
        (f"{label}: value, {len(p['trajectories'])} episodes", p, p["value"], p["trajectories"].T)
        for label, p in pictures.items()
    ]
    for ax, (title, picture, cells, trajectories) in zip(axes, panels):
        cells = np.where(picture["maze"], np.nan, cells)  # walls show as background
        sns.heatmap(cells, ax=ax, cmap="viridis", square=True, xticklabels=False, yticklabels=False)
        ax.plot(trajectories[1], trajectories[0], color="tab:red", linewidth=0.7)  # axis 0 is downwards
        ax.plot(*picture["start"][::-1], "ow", *picture["goal"][::-1], "*w", markersize=12, markeredgecolor="black")
        ax.set(title=title, facecolor="0.4")
    return figure


def table(log: pd.DataFrame, styles: dict, estimator: str) -> pd.DataFrame:
    """For each variant, of finished runs: means over the last 10 % of the run, and the 95 % interval of the return."""
    columns = [column for column in COLUMNS if column in log and column != "train_return"]
    runs = log[log.final].groupby(["label", "run"])[columns].mean()
    if "score" in log:
        tasks = log.dropna(subset="score").groupby(["label", "run"]).score
        runs["score"] = tasks.apply(lambda score: score.head(8).mean())
        runs.insert(1, "score, last 8 tasks", tasks.apply(lambda score: score.tail(8).mean()))
    rows = []
    for label in (label for label in styles if label in runs.index):
        rows.append({"variant": label, "seeds": str(len(runs.loc[label]))})
        for column, values in runs.loc[label].dropna(axis="columns", how="all").items():
            centre, low, high = summarise(values.dropna().to_frame().T, estimator).iloc[0]
            interval = f" [{low:.4g}, {high:.4g}]" if column.startswith(("eval", "score")) and low <= high else ""
            rows[-1][column] = f"{centre:.4g}{interval}"
    return pd.DataFrame(rows).rename(columns={"score": "score, first 8 tasks"}).fillna("-")


def main() -> int:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
        if not 0 <= args.smooth < 1:
            raise ValueError(f"--smooth has to be at least 0 and below 1, not {args.smooth:g}")
        if missing := [folder for folder in args.folders if not folder.is_dir()]:
            raise ValueError(f"{missing[0]} is no folder")
        logs = read_runs(args.folders)
        args.out.mkdir(parents=True, exist_ok=True)
    except SystemExit as stop:
        if stop.code:  # tyro draws a box around an error: only its text, in one line
            text = itertools.takewhile(lambda line: "──" not in line, box.getvalue().splitlines()[1:])
            print("error:", *" ".join(text).replace("│", "").split(), "(see --help)", file=sys.stderr)
        return stop.code
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # no dates in the files: the same logs give the same bytes
    sns.set_theme(style="whitegrid", font_scale=0.85, rc={"svg.hashsalt": "plot", "lines.linewidth": 1.5})
    styles = line_styles(list(logs.label.unique()))
    for env, log in logs.groupby("env"):
        log = log.dropna(axis="columns", how="all")
        columns = [column for column in COLUMNS if column in log]
        figures = {column: draw_figure(log, [column], styles, args) for column in columns}
        figures["overview"] = draw_figure(log, columns, styles, args)
        runs = [(label, Path(run, "picture.npz")) for label, run in log[["label", "run"]].drop_duplicates().to_numpy()]
        if pictures := {label: np.load(file) for label, file in reversed(runs) if file.exists()}:
            figures["picture"] = draw_picture({label: pictures[label] for label in styles if label in pictures})
        for name, figure in figures.items():
            figure.savefig(args.out / f"{env}_{name}.{args.format}", dpi=150, bbox_inches="tight")
        plt.close("all")
        if not log.finished.any():
            continue
        rows = table(log[log.finished], styles, args.estimator)
        if args.table:
            lines = [list(rows), ["---"] * len(rows.columns), *rows.to_numpy()]
            print(f"### {env}\n", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
        else:
            print(env, rows.to_string(index=False), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
