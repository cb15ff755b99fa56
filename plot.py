"""Figures and tables from the logs of both agents, also while runs are still going on: python plot.py runs/

A line is the mean (or interquartile mean: Agarwal et al. 2021) over the seeds of a variant, of each run's moving
average (thin: unsmoothed); its band is the 95 % bootstrap interval over the seeds. Where only some have arrived, the
line is of those and has no band. Runs whose settings differ are never averaged: the line of each says what differs.
"""

import argparse
import io
import json
import os
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
COLUMNS = {"score": "correct actions in a task (%)", "eval_return": "evaluation return (sum of rewards)"}
COLUMNS |= {"train_return": "training return (sum of rewards)", "erank": "average effective rank"}
COLUMNS |= {"feature_erank": "effective rank of the features", "weight_magnitude": "weight magnitude (mean |w|)"}
COLUMNS |= {"updated_units": "updated units (%)", "dormant_units": "dormant units (%)", "plasticity": "plasticity (%)"}
# The colour of all variants that begin like this, in every figure; in the order of the legends; "": all others.
blue, orange, green, red, purple, brown, pink, grey, yellow, sky = sns.color_palette("colorblind")
COLOURS = {"standard": "black", "injection-1": blue, "injection-2": orange, "injection-3-plasticity": yellow}
COLOURS |= {"injection-3": green, "l2-constant": purple, "l2-incremental": pink, "l2-periodic": brown}
COLOURS |= {"layer-norm": red, "leaky-relu": sky, "": grey}
LEVELS = {"MsPacman": {"human": 6951.6, "random actions": 307.3}}  # Mnih et al. 2015, Wang et al. 2016
LEVELS |= {"LunarLander": {"solved": 200}, "PointmassHard": {"optimum": -33}}  # by definition; dynamic programming
DIGITS_TASK = 1_500  # steps of a task of Digits, which is one episode; a correct action has reward 1
CENTRES = {"mean": np.nanmean, "iqm": lambda runs, axis: scipy.stats.trim_mean(runs, 0.25, axis, nan_policy="omit")}


def read_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Log and settings of a run. Raises an error that says why for a folder that is none."""
    if folder.name.count("__") != 2:
        raise ValueError("its name is not <env>__<variant>__seed<k>")
    env, variant, _ = folder.name.split("__")
    settings = json.loads((folder / "config.json").read_text())
    total = settings.get("total_steps") or settings["offline_steps"] + settings["online_steps"]
    lines = (folder / "log.csv").read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == lines[0].count(",")]
    log = pd.read_csv(io.StringIO("".join(whole)), dtype=dict.fromkeys(["step", "injections", *COLUMNS], float))
    if log.empty:
        raise ValueError("log.csv has no row yet")
    log["final"] = (log.step > 0.9 * total) & (log.step.max() >= total)  # only of a finished run
    log["injected"] = log.injections > log.injections.shift(fill_value=0)
    if env == "Digits":
        log["score"] = 100 * log.pop("train_return") / DIGITS_TASK
    if len(whole) < len(lines):
        print(f"{folder}/log.csv: left out {len(lines) - len(whole)} damaged or half-written line(s)", file=sys.stderr)
    if not log.final.any():
        print(f"{folder}: unfinished at step {log.step.max():,.0f}, not in the table", file=sys.stderr)
    settings |= {"device": "", "env": env, "variant": variant}  # the same run on another device is no other variant
    return log.assign(run=str(folder), env=env), {key: str(value) for key, value in settings.items()}


def read_runs(folders: list[Path]) -> pd.DataFrame:
    """The logs of all runs in and below the folders; `label` names the line that shows a run, in legend order."""
    logs, settings, left_out = {}, {}, []
    for folder in sorted({path for root in folders for path in (root, *root.glob("**/"))}):
        try:
            if not (folder / "log.csv").exists() and any(path.is_dir() for path in folder.iterdir()):
                continue  # a folder of runs
            log, config = read_run(folder)
            if config in settings.values():
                raise ValueError("another folder holds the same run")
            logs[folder], settings[folder] = log, config
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # what damaged files lead to
            left_out.append(f"left out {folder}: {error}")
    if not logs:
        raise ValueError("; ".join([f"no run in {', '.join(map(str, folders))}", *left_out]))
    sys.stderr.writelines(f"{reason}\n" for reason in left_out)
    for (_, variant), runs in pd.DataFrame(settings).T.groupby(["env", "variant"]):
        differing = [key for key in runs if key != "seed" and runs[key].nunique(dropna=False) > 1]
        for run, values in runs[differing].iterrows():
            logs[run]["label"] = ", ".join([variant, *(f"{key}={value}" for key, value in values.items())])
    log = pd.concat(logs.values(), ignore_index=True)
    return log.assign(label=pd.Categorical(log.label, list(line_styles(log.label.unique()))))


def read_pictures(log: pd.DataFrame) -> dict[str, dict]:
    """What the picture of the maze needs, of one run of each variant."""
    pictures = {}
    for label, run in log.groupby("label").run.unique().explode().items():
        try:
            if Path(run, "picture.npz").exists():  # not for other tasks, nor while the run goes on
                pictures[label] = dict(np.load(Path(run, "picture.npz")))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            print(f"left out {run}/picture.npz: {error}", file=sys.stderr)
    return pictures


def line_styles(labels: list[str]) -> dict[str, dict]:
    """A style per label, in the order of the legends; combinations and other settings are darker and dashed."""
    styles = {}
    for start, colour in COLOURS.items():
        for k, label in enumerate(sorted(i for i in labels if i.startswith(start) and i not in styles)):
            shade = sns.dark_palette(colour, 4, reverse=True)[k % 3]
            styles[label] = {"color": shade, "linestyle": ("-", "--", "-.", ":")[k % 4]}
    return styles


def curves(log: pd.DataFrame, column: str, smooth: float) -> pd.DataFrame:
    """A column per run and a row for every step where one of them was measured."""
    runs = log.pivot_table(index="step", columns="run", values=column)
    runs = runs.apply(lambda run: run.dropna().ewm(alpha=1 - smooth).mean())
    # Runs may be measured at different steps: a run is straight between two of its values, and absent outside of them.
    return runs.interpolate("index", limit_area="inside")


def summarise(runs: pd.DataFrame, estimator: str) -> pd.DataFrame:
    """For each row of `runs`, a column per run: the centre, and its 95 % bootstrap interval where no run lacks one."""
    centre, complete = CENTRES[estimator], runs.dropna()
    line = pd.DataFrame({"centre": centre(runs.to_numpy(), axis=1), "low": np.nan, "high": np.nan}, runs.index)
    if len(complete) and runs.shape[1] > 1:
        interval = scipy.stats.bootstrap([complete], centre, axis=1, n_resamples=1_000, method="percentile", rng=0)
        line.loc[complete.index, ["low", "high"]] = np.transpose(interval.confidence_interval)
    return line


def draw(ax: plt.Axes, log: pd.DataFrame, column: str, smooth: float, estimator: str) -> None:
    """One panel: lines with bands, injections, known levels and the offline part."""
    styles = line_styles(log.label.cat.categories)
    smooth = 0 if column == "score" else smooth  # a score is a mean over a whole task already
    for label, runs in log.dropna(subset=column).groupby("label"):
        seeds, colour = runs.run.nunique(), styles[label]["color"]
        name = f"{label} ({seeds} seeds)" if seeds > 1 else f"{label} (1 seed: no band)"
        line = summarise(curves(runs, column, smooth), estimator)
        ax.plot(line.centre, label=name, marker="o" if len(line) == 1 else None, **styles[label])
        ax.fill_between(line.index, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        if column == "plasticity":
            twin = CENTRES[estimator](curves(runs, "plasticity_fresh", smooth).to_numpy(), axis=1)
            ax.plot(line.index, twin, color=colour, linestyle="--", linewidth=0.7, label="freshly initialised twin")
        if smooth:
            raw = CENTRES[estimator](curves(runs, column, 0).to_numpy(), axis=1)
            ax.plot(line.index, raw, color=colour, alpha=0.3, linewidth=0.7)
    for step, labels in log[log.injected].groupby("step").label.unique().items():
        for turn, label in enumerate(labels):  # dashes of variants that inject at the same step take turns
            dashes = (4 * turn, (4, 4 * max(1, len(labels) - 1)))
            ax.axvline(step, color=styles[label]["color"], linestyle=dashes, linewidth=1.2, label="injection")
    levels = LEVELS.get(log.env.iloc[0], {}) if column.endswith("return") else {}
    if column == "score":
        first = log[log.label.str.startswith("standard")].groupby("run").score.first()
        levels = {"fresh network": round(first.mean(), 1)}
    bottom, top = ax.get_ylim()
    for (name, level), dashes in zip(levels.items(), ("--", ":")):
        if bottom <= level <= top or name in ("solved", "optimum"):  # the human level would flatten all curves
            ax.axhline(level, color="0.2", linestyle=dashes, linewidth=1.2, label=f"{name}: {level:g}")
    if "phase" in log and (log.phase == "offline").any():
        end = log.step[log.phase == "offline"].max()
        ax.axvspan(0, end, color="0.93", zorder=0, label="offline part")  # behind the bands


def draw_figure(log: pd.DataFrame, columns: list[str], smooth: float, estimator: str) -> plt.Figure:
    """One column, or several as small multiples with a shared x axis; the legend is to the right of the last panel."""
    several = log.groupby("label").run.nunique().max() > 1
    estimate = f"{estimator.replace('iqm', 'interquartile mean')} over seeds, 95 % bootstrap interval"
    title = f"{log.env.iloc[0]}: {estimate if several else 'single runs'}"
    x_label = "offline updates, then environment steps" if "phase" in log else "environment steps"
    unit, letter = (1_000_000, "M") if log.step.max() >= 1_000_000 else (1_000, "k")
    if columns == ["score"]:
        log = log.assign(step=log.step // DIGITS_TASK)  # the score is in the first row after the end of its task
        unit, letter, x_label = 1, "", "task (1,500 steps each)"
    elif smooth:
        title += f", moving average {smooth:g}"
    rows, across = min(len(columns), 2), (len(columns) + 1) // 2
    figure = plt.figure(figsize=(7, 4) if rows == 1 else (3.5 * across, 6.5), layout="constrained")
    ax, entries = None, {}
    for place, column in enumerate(columns, 1):
        ax = figure.add_subplot(rows, across, place, sharex=ax)
        draw(ax, log.assign(step=log.step / unit), column, smooth, estimator)
        ax.set(xlabel=x_label, ylabel=COLUMNS[column])
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}{letter}" if x else "0")
        entries |= {name: handle for handle, name in zip(*ax.get_legend_handles_labels())}
    beside = {"loc": "upper left", "bbox_to_anchor": (1.03, 1), "bbox_transform": ax.transAxes}
    figure.legend(entries.values(), [textwrap.fill(name, 34) for name in entries], frameon=False, **beside)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def draw_picture(pictures: dict[str, dict]) -> plt.Figure:
    """Where the offline data has been, and the values and trajectories of one run of each variant, in the maze."""
    figure, axes = plt.subplots(1, len(pictures) + 1, figsize=(3.2 * len(pictures) + 3.2, 2.8), layout="constrained")
    for ax, (label, picture) in zip(axes, [("", next(iter(pictures.values()))), *pictures.items()]):
        cells, title = np.log10(1 + picture["coverage"]), "offline data: log10(1 + visits)"
        if label:
            cells, title = picture["value"], f"{label}: value, {len(picture['trajectories'])} episodes"
            ax.plot(*picture["trajectories"].T[::-1], color=red, linewidth=0.7)  # axis 0 of the maze is downwards
        cells = np.where(picture["maze"], np.nan, cells)  # walls show as background
        sns.heatmap(cells, ax=ax, cmap="Blues", square=True, xticklabels=False, yticklabels=False)
        ax.plot(*picture["start"][::-1], "ow", *picture["goal"][::-1], "*w", markersize=12, markeredgecolor="black")
        ax.set(title=textwrap.fill(title, 34), facecolor="0.4")
    return figure


def table(log: pd.DataFrame, estimator: str) -> pd.DataFrame:
    """For each variant's finished runs: means over the last 10 %, of the return also over all, with 95 % intervals."""

    def cell(runs: pd.Series) -> str:
        if runs.isna().all():
            return "-"
        centre, low, high = summarise(runs.dropna().to_frame().T, estimator).iloc[0]
        interval = f" [{low:.4g}, {high:.4g}]" if runs.name.startswith(("eval", "score")) and low <= high else ""
        return f"{centre:.4g}{interval}"

    columns = [column for column in COLUMNS if column in log and column != "score"]
    runs = log[log.final].groupby(["label", "run"])[columns].mean()
    result = "score" if "score" in log else "eval_return"
    values = log.dropna(subset=result).groupby(["label", "run"])[result]
    runs.insert(0, f"{result}, whole run", values.mean())
    if result == "score":
        runs.insert(0, "score, last 8 tasks", values.apply(lambda score: score.tail(8).mean()))
        runs.insert(0, "score, first 8 tasks", values.apply(lambda score: score.head(8).mean()))
    seeds = runs.groupby("label").size().astype(str).rename("seeds")
    return pd.concat([seeds, runs.groupby("label").agg(cell)], axis=1).reset_index(names="variant")


def correlations(log: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlation of each metric with plasticity, in Digits also with the next task's score: over all
    rows of all runs, and the median of those within a run. A metric that tells has the expected sign."""
    rows, table = log.dropna(subset="plasticity"), []
    aims = {"plasticity": rows.plasticity}
    if "score" in rows:
        aims["next task's score"] = rows.groupby("run").score.shift(-1)
    for metric in (name for name in DIRECTION_WHEN_LOST if name in rows):
        row = {"metric": metric, "expected sign": "-" if DIRECTION_WHEN_LOST[metric] > 0 else "+"}
        for aim, values in aims.items():
            pairs = pd.DataFrame({"x": rows[metric], "y": values}).dropna()
            overall, within = pairs.corr("spearman").x.y, pairs.groupby(rows.run).corr("spearman").x.xs("y", level=1)
            for name, value in ((aim, overall), (f"{aim}, within runs", within.median())):
                row[name] = "itself" if metric == aim else "constant" if np.isnan(value) else f"{value:.2f}"
        table.append(row)
    return pd.DataFrame(table if len(aims) > 1 else table[:-1])


def draw_correlations(log: pd.DataFrame) -> plt.Figure:
    """A panel per metric: its value and the plasticity, for each row in which both were measured."""
    metrics = [metric for metric in DIRECTION_WHEN_LOST if metric != "plasticity" and metric in log]
    points = log.dropna(subset="plasticity").melt(["label", "plasticity"], metrics, "metric")
    colours = {label: style["color"] for label, style in line_styles(log.label.unique()).items()}
    look = {"s": 9, "alpha": 0.5, "linewidth": 0, "height": 2.6, "facet_kws": {"sharex": False}}
    hues = {"hue": points.label.astype(str).rename("variant"), "hue_order": list(colours), "palette": colours}
    grid = sns.relplot(points, x="value", y="plasticity", col="metric", **hues, **look)
    return grid.set_axis_labels("", COLUMNS["plasticity"]).set_titles("{col_name}").figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the logs of any number of runs.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # one line, without the usage
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs (runs)")
    parser.add_argument("--out", type=Path, default="figures", help="folder for the figures (figures)")
    parser.add_argument("--smooth", type=float, default=0.8, help="weight of the moving average, 0 turns it off (0.8)")
    parser.add_argument("--estimator", choices=CENTRES, default="mean", help="over seeds: mean or interquartile mean")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="of the figures (png)")
    parser.add_argument("--table", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    if not 0 <= args.smooth < 1:
        parser.error(f"--smooth has to be at least 0 and below 1, not {args.smooth:g}")
    try:
        logs = read_runs(args.folders)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(error)
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # no dates in the files: the same logs give the same bytes
    sns.set_theme(style="whitegrid", font_scale=0.85, rc={"svg.hashsalt": "plot", "lines.linewidth": 1.5})
    tables = {}
    for env, log in logs.groupby("env"):
        log = log.dropna(axis="columns", how="all")
        columns = [column for column in COLUMNS if column in log]
        figures = {column: draw_figure(log, [column], args.smooth, args.estimator) for column in columns}
        figures["overview"] = draw_figure(log, columns, args.smooth, args.estimator)
        if pictures := read_pictures(log):
            figures["picture"] = draw_picture(pictures)
        if log.final.any():
            tables[env] = table(log, args.estimator)
        if "plasticity" in log:
            figures["correlations"] = draw_correlations(log)
            tables[f"{env}: which metric tells of plasticity?"] = correlations(log)
        for name, figure in figures.items():
            figure.savefig(args.out / f"{env}_{name}.{args.format}", dpi=150, bbox_inches="tight")
        plt.close("all")
    for title, rows in tables.items():
        if args.table:
            lines = [list(rows), ["---"] * len(rows.columns), *rows.to_numpy()]
            print(f"### {title}\n", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")
        else:
            print(title, rows.to_string(index=False), "", sep="\n")


if __name__ == "__main__":
    main()
