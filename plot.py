"""Figures and tables from the logs of both agents, also while runs are still going on: python plot.py runs/

A line is the mean over the seeds of a variant, of each run's moving average (thin: unsmoothed); its band is the 95 %
t-interval over the seeds. Where only some have arrived, the line is of those and has no band. Runs whose settings
differ are never averaged: the line of each says what differs. A variant is compared with the standard agent seed by
seed: each run with the standard run of the same seed and otherwise the same settings.
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
# Settings that begin like this belong to a remedy. The standard run that a run is compared with may differ in them.
REMEDIES = ("injection", "l2", "layer_norm", "leaky_relu")


def read_run(folder: Path) -> tuple[pd.DataFrame, dict]:
    """Log and settings of a run. Raises an error that says why for a folder that is none."""
    # A link may have any name; the name of the folder that it leads to counts. The name of an env may hold "__".
    parts = Path(os.path.realpath(folder)).name.rsplit("__", 2)
    if len(parts) != 3 or not parts[2].startswith("seed"):
        raise ValueError("its name is not <env>__<variant>__seed<k>")
    env, variant, _ = parts
    settings = json.loads((folder / "config.json").read_text())
    total = settings.get("total_steps") or settings["offline_steps"] + settings["online_steps"]
    lines = (folder / "log.csv").read_text(errors="replace").splitlines(keepends=True)
    if not lines:
        raise ValueError("log.csv is empty")
    whole = [line for line in lines if line.endswith("\n") and line.count(",") == lines[0].count(",")]
    log = pd.read_csv(io.StringIO("".join(whole)), dtype=dict.fromkeys(["step", "injections", *COLUMNS], float))
    if "step" not in log:
        raise ValueError("log.csv has no column step")
    log = log.dropna(subset="step")
    if log.empty:
        raise ValueError("log.csv has no row yet")
    log["final"] = (log.step > 0.9 * total) & (log.step.max() >= total)  # only of a finished run
    log["injected"] = False
    if "injections" in log:
        log["injected"] = log.injections > log.injections.shift(fill_value=0)
    if env == "Digits" and "train_return" in log:
        log["score"] = 100 * log.pop("train_return") / DIGITS_TASK
    if len(whole) < len(lines):
        print(f"{folder}/log.csv: left out {len(lines) - len(whole)} damaged or half-written line(s)", file=sys.stderr)
    if not log.final.any():
        print(f"{folder}: unfinished at step {log.step.max():,.0f}, not in the table", file=sys.stderr)
    settings |= {"device": "", "env": env, "variant": variant}  # the same run on another device is no other variant
    settings = {key: str(value) for key, value in settings.items()}
    return log.assign(run=str(folder), env=env, variant=variant, pair=pair_of(settings)), settings


def pair_of(settings: dict[str, str]) -> str:
    """What a run has in common with the standard run that it is compared with: the seed and all but the remedy."""
    shared = {}
    for key, value in settings.items():
        if key != "variant" and not key.startswith(REMEDIES):
            shared[key] = value
    return json.dumps(shared, sort_keys=True)


def folders_below(roots: list[Path]) -> list[Path]:
    """All folders at and below the roots, each once, also those behind links, even if the links form a loop."""
    found = {}
    waiting = list(roots)
    while waiting:
        folder = waiting.pop(0)
        place = os.path.realpath(folder)
        if place in found:
            continue
        found[place] = folder
        if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK):
            # A link that leads nowhere is no folder, but its reader wants to know.
            waiting.extend(path for path in sorted(folder.iterdir()) if path.is_dir() or not path.exists())
    return sorted(found.values())


def read_runs(folders: list[Path]) -> pd.DataFrame:
    """The logs of all runs in and below the folders; `label` names the line that shows a run, in legend order."""
    logs, settings, left_out = {}, {}, []
    for folder in folders_below(folders):
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


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """For each row of `runs`, a column per run: the mean, and its 95 % t-interval where two runs or more have a value
    and none lacks it."""
    seeds = runs.shape[1]
    mean = runs.mean(axis=1)
    standard_error = runs.std(axis=1, skipna=False) / max(seeds, 1) ** 0.5
    margin = scipy.stats.t.ppf(0.975, seeds - 1) * standard_error
    return pd.DataFrame({"mean": mean, "low": mean - margin, "high": mean + margin})


def draw(ax: plt.Axes, log: pd.DataFrame, column: str, smooth: float) -> None:
    """One panel: lines with bands, injections, known levels and the offline part."""
    styles = line_styles(log.label.cat.categories)
    smooth = 0 if column == "score" else smooth  # a score is a mean over a whole task already
    for label, runs in log.dropna(subset=column).groupby("label"):
        seeds, colour = runs.run.nunique(), styles[label]["color"]
        name = f"{label} ({seeds} seeds)" if seeds > 1 else f"{label} (1 seed: no band)"
        line = summarise(curves(runs, column, smooth))
        marker = "o" if len(line) == 1 else None
        ax.plot(line["mean"], label=name, marker=marker, **styles[label])
        ax.fill_between(line.index, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        if column == "plasticity" and "plasticity_fresh" in runs:
            twin, look = curves(runs, "plasticity_fresh", smooth).mean(axis=1), {"linestyle": "--", "linewidth": 0.7}
            ax.plot(twin, color=colour, marker=marker, **look, label="freshly initialised twin")
        if smooth:
            ax.plot(curves(runs, column, 0).mean(axis=1), color=colour, alpha=0.3, linewidth=0.7)
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


def draw_figure(log: pd.DataFrame, columns: list[str], smooth: float) -> plt.Figure:
    """One column, or several as small multiples with a shared x axis; the legend is to the right of the last panel."""
    several = log.groupby("label").run.nunique().max() > 1
    title = f"{log.env.iloc[0]}: {'mean over seeds, 95 % t-interval' if several else 'single runs'}"
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
        draw(ax, log.assign(step=log.step / unit), column, smooth)
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


def results(log: pd.DataFrame) -> pd.DataFrame:
    """A row per finished run, a column per result: evaluation returns, and of Digits the scores of tasks."""
    finished = log[log.run.isin(log.run[log.final])]
    columns = {}
    if "score" in log:
        tasks = finished.dropna(subset="score")
        columns["score, first 8 tasks"] = tasks.groupby("run").head(8).groupby("run").score.mean()
        columns["score, last 8 tasks"] = tasks.groupby("run").tail(8).groupby("run").score.mean()
        columns["score, whole run"] = tasks.groupby("run").score.mean()
    if "eval_return" in log:
        columns["eval_return, whole run"] = finished.groupby("run").eval_return.mean()
        columns["eval_return, last 10 %"] = log[log.final].groupby("run").eval_return.mean()
    return pd.DataFrame(columns, index=finished.run.unique())


def minus_standard(values: pd.DataFrame, log: pd.DataFrame) -> pd.DataFrame:
    """The same columns for each run, less those of the standard run of its pair; NaN where there is none."""
    runs = log.groupby("run")[["variant", "pair"]].first().loc[values.index]
    standard = runs.variant == "standard"
    baseline = values[standard].groupby(runs.pair).mean()
    return values - baseline.reindex(runs.pair).set_axis(values.index)


def cell(values: pd.Series, sign: str = "") -> str:
    """The mean over the runs that have a value, and its 95 % t-interval if there are two or more."""
    values = values.dropna()
    if values.empty:
        return "-"
    mean, low, high = summarise(values.to_frame().T).iloc[0]
    text = f"{mean:{sign}.4g}"
    if len(values) > 1:
        text += f" [{low:{sign}.4g}, {high:{sign}.4g}]"
    return text


def table(log: pd.DataFrame) -> pd.DataFrame:
    """For each variant's finished runs: the results, their difference from the standard agent, and the metrics."""
    of_runs = results(log)
    differences = minus_standard(of_runs, log)
    metrics = [column for column in COLUMNS if column in log and column not in ("score", "eval_return")]
    last = log[log.final].groupby("run")[metrics].mean()
    about = log.groupby("run")[["label", "variant"]].first().loc[last.index]
    # There is something to compare only where there are standard runs and others.
    compare = (about.variant == "standard").nunique() == 2
    rows = []
    for label, runs in about.groupby("label"):
        row = {"variant": label, "seeds": str(len(runs))}
        for column in of_runs:
            row[column] = cell(of_runs[column][runs.index])
            if not compare:
                continue
            difference = differences[column][runs.index].dropna()
            text = cell(difference, sign="+")
            if len(difference):
                text += f" ({len(difference)})"
            if runs.variant.iloc[0] == "standard":
                text = "baseline"
            row[f"{column}, minus standard (shared seeds)"] = text
        for column in metrics:
            # A return is logged as the mean of the episodes since the last row, however many they were.
            name = "train_return (mean over rows)" if column == "train_return" else column
            mean = last[column][runs.index].mean()
            row[name] = "-" if np.isnan(mean) else f"{mean:.4g}"
        rows.append(row)
    return pd.DataFrame(rows)


def relative_metrics(log: pd.DataFrame) -> dict[str, pd.Series]:
    """Each metric in the rows with plasticity, compared with that of the freshly initialised twin where it has one:
    plasticity as its share, the others as the difference. Logs of older versions have a twin of plasticity alone."""
    compared = {}
    if not {"plasticity", "plasticity_fresh"} <= set(log):
        return compared
    rows = log[log.plasticity.notna() & (log.plasticity_fresh > 0)]
    if rows.empty:
        return compared
    for metric in DIRECTION_WHEN_LOST:
        twin = f"{metric}_fresh"
        if metric == "plasticity":
            compared[metric] = (rows.plasticity / rows.plasticity_fresh).rename("relative plasticity")
        elif metric not in rows or rows[metric].isna().all():
            continue
        elif twin in rows and rows[twin].notna().any():
            compared[metric] = (rows[metric] - rows[twin]).rename(f"{metric} minus its twin's")
        else:
            compared[metric] = rows[metric]
    return compared


def spearman(x: pd.Series, y: pd.Series, run: pd.Series) -> tuple[str, str]:
    """Spearman's rank correlation over all rows, and the median over the runs of that of the changes from a row to the
    next: a trend in time correlates with any other trend, changes do not."""
    pairs = pd.DataFrame({"x": x, "y": y}).dropna()
    changes = pairs.groupby(run).diff().dropna()
    within = [correlation(of_run) for _, of_run in changes.groupby(run)]
    overall, median = correlation(pairs), pd.Series(within, dtype=float).median()
    largest = changes.groupby(run).size().max()
    return show(overall, len(pairs) >= 3), show(median, largest >= 3)


def correlation(pairs: pd.DataFrame) -> float:
    """NaN if x or y is constant, or of fewer than three pairs: of two it would always be 1 or -1."""
    return pairs.corr("spearman", min_periods=3).loc["x", "y"]


def show(value: float, enough: bool) -> str:
    if np.isnan(value):
        return "constant" if enough else "-"
    return f"{value:.2f}"


def correlations(log: pd.DataFrame) -> pd.DataFrame:
    """The rank correlation of each metric with relative plasticity, in Digits also with the next task's score. A metric
    that tracks it has the expected sign."""
    metrics = relative_metrics(log)
    aims = {"relative plasticity": metrics["plasticity"]}
    if "score" in log:
        aims["next task's score"] = log.dropna(subset="score").groupby("run").score.shift(-1)
    rows = []
    for metric, values in metrics.items():
        row = {"metric": values.name, "expected sign": "-" if DIRECTION_WHEN_LOST[metric] > 0 else "+"}
        for aim, target in aims.items():
            overall, within = spearman(values, target, log.run)
            if aim == values.name:
                overall = within = "itself"
            row[aim] = overall
            row[f"{aim}, changes within runs"] = within
        rows.append(row)
    return pd.DataFrame(rows if len(aims) > 1 else rows[:-1])


def draw_correlations(log: pd.DataFrame) -> plt.Figure:
    """A panel per metric: its value and the relative plasticity, for each row in which both were measured."""
    metrics = relative_metrics(log)
    plasticity = metrics.pop("plasticity")
    styles = line_styles(log.label.unique())
    across = max(len(metrics), 1)
    figure, axes = plt.subplots(
        1, across, figsize=(2.6 * across, 2.6), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, values in zip(axes[0], metrics.values()):
        for label, rows in log.loc[values.index].groupby("label"):
            x, y = values[rows.index], plasticity[rows.index]
            ax.scatter(x, y, s=9, alpha=0.5, linewidth=0, color=styles[label]["color"], label=label)
        ax.set(xlabel=values.name)
    axes[0, 0].set(ylabel="plasticity / that of its twin")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the logs of any number of runs.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # one line, without the usage
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs (runs)")
    parser.add_argument("--out", type=Path, default="figures", help="folder for the figures (figures)")
    parser.add_argument("--smooth", type=float, default=0.8, help="weight of the moving average, 0 turns it off (0.8)")
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
        if not columns:
            print(f"{env}: nothing has been measured yet", file=sys.stderr)
            continue
        figures = {column: draw_figure(log, [column], args.smooth) for column in columns}
        figures["overview"] = draw_figure(log, columns, args.smooth)
        if pictures := read_pictures(log):
            figures["picture"] = draw_picture(pictures)
        if log.final.any():
            tables[env] = table(log)
        if len(relative_metrics(log)) > 1:  # plasticity, and something to compare it with
            tables[f"{env}: which metric tracks plasticity?"] = correlations(log)
            figures["correlations"] = draw_correlations(log)
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
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when a reader such as `head` has seen enough
    main()
