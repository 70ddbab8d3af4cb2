"""The report of the miniature: verdicts, tables in the papers' layout, plots and answers, in one file."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from weft.evaluation.miniature.arms import ARMS, PRINTED, Alphabet, Budget
from weft.evaluation.miniature.aspects import ASPECTS, RANGES
from weft.evaluation.miniature.claims import CLAIMS, Claim
from weft.evaluation.miniature.verdicts import Finding, Values, interval, judge, judge_all, values_of

COLUMNS = (*ASPECTS, "overall", "image_loss", "text_loss", "wellformed", "picture_1", "picture_2", "picture_3")
HEADS = (
    "text", "perceptual", "image coherence", "text-image", "helpfulness", "mean of five",
    "image loss", "text loss", "well formed", "picture 1", "picture 2", "picture 3",
)  # fmt: skip
Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Arm -> its runs by seed."""
Cells = Mapping[str, Mapping[str, float]]
"""Measure -> mean, low, high."""


def make_report(
    results: Results, alphabets: Mapping[str, Mapping[str, Any]], budget: Budget, name: str, seconds: float
) -> tuple[dict[str, Any], str, str]:
    """(`report.json`, `report.html`, `table.md`)."""
    values = values_of(results)
    findings = judge_all(CLAIMS, values, resamples=budget.resamples)
    cells: dict[str, Cells] = {}
    for arm in budget.arms:
        cells[arm] = {measure: _cell(measure, each, budget.resamples) for measure, each in values[arm].items()}
    arms = {
        arm: {
            "about": ARMS[arm].about,
            "alphabet": ARMS[arm].alphabet,
            "adapter": ARMS[arm].adapter,
            "trained_parameters": results[arm][0]["trained_parameters"],
            "seeds": len(results[arm]),
            "stories": budget.stories,
            "skipped_steps": sum(run["skipped_steps"] for run in results[arm]),
            "values": cells[arm],
        }
        for arm in budget.arms
    }
    judged = {finding.claim.name for finding in findings}
    report = {
        "seconds": seconds,
        "budget": name,
        "steps": budget.steps,
        "seeds": budget.seeds,
        "stories": budget.stories,
        "arms": arms,
        "alphabets": alphabets,
        "claims": {finding.claim.name: finding.to_json() for finding in findings},
        "not_run": [claim.name for claim in CLAIMS if claim.name not in judged],
    }
    return report, _page(report, results, findings, budget.resamples), _markdown(report, findings)


def _cell(measure: str, values: np.ndarray, resamples: int) -> dict[str, float]:
    # few seeds are stretched, beyond what a measure can be
    low, high = np.clip(interval(values, resamples=resamples), *RANGES.get(measure, (0.0, 1.0)))
    return {"mean": round(float(values.mean()), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _page(report: Mapping[str, Any], results: Results, findings: Sequence[Finding], resamples: int) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.evaluation.miniature"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.verdict] = counts.get(finding.verdict, 0) + 1
    return environment.get_template("miniature.html").render(
        report=report,
        claims=CLAIMS,
        counts=counts,
        heads=HEADS,
        columns=COLUMNS,
        printed=PRINTED,
        charts=list(_charts(report, results, findings, resamples)),
        stories=_gallery(report, results),
    )


def _gallery(report: Mapping[str, Any], results: Results) -> list[dict[str, Any]]:
    """The first answers of the first seed of arms on the generalist's own alphabet."""
    from weft.evaluation.tasks.picturebook import held_out_stories

    arms = [arm for arm in report["arms"] if arm in PRINTED]
    shown = min(len(results[arm][0]["answers"]) for arm in arms) if arms else 0
    return [
        {
            "asked": story.instruction(),
            "arms": [{"name": arm, "parts": results[arm][0]["answers"][i]} for arm in arms],
        }
        for i, story in enumerate(held_out_stories(shown))
    ]


def _markdown(report: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """What is committed as a result."""
    lines = [
        f"# The papers in miniature, budget {report['budget']}",
        "",
        f"`weft eval miniature --budget {report['budget']}`: {report['steps']} steps, {report['seeds']} seeds, "
        f"{report['stories']} held-out stories, {report['seconds']:.0f} s. Intervals are 95 %, stories and seeds drawn "
        "again.",
        "",
        "| claim | verdict | measure | estimate | interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for found in findings:
        lines.append(
            f"| {found.claim.statement} | **{found.verdict}** | {found.claim.measure} | {found.estimate:+.4f} | "
            f"[{found.low:+.4f}, {found.high:+.4f}] | {found.seeds} x {found.stories} |"
        )
    lines += ["", f"| arm | trained | {' | '.join(HEADS)} |", "|---" * (len(HEADS) + 2) + "|"]
    for name, arm in report["arms"].items():
        cells = " | ".join(_short(arm["values"][column]) for column in COLUMNS)
        lines.append(f"| {name} | {arm['trained_parameters']:,} | {cells} |")
    if report["alphabets"]:
        keys = list(next(iter(report["alphabets"].values())))
        lines += [
            "",
            f"| alphabet | {' | '.join(key.replace('_', ' ') for key in keys)} |",
            "|---" * (len(keys) + 1) + "|",
        ]
        lines += [
            f"| {name} | {' | '.join(str(each[key]) for key in keys)} |" for name, each in report["alphabets"].items()
        ]
    return "\n".join(lines) + "\n"


def _short(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


# --- plots ----------------------------------------------------------------------------------------------------------


def _charts(
    report: Mapping[str, Any], results: Results, findings: Sequence[Finding], resamples: int
) -> Iterator[dict[str, str]]:
    arms = report["arms"]
    if findings:
        title = "Claims: contrast and 95 % interval, right of zero as stated"
        yield _chart(title, _draw_claims(findings), height=0.8 + 0.3 * len(findings))
    yield _chart("Mean of the five aspects, and image loss", _draw_arms(arms), height=0.9 + 0.26 * len(arms))
    ranks = {
        kind: [(rank, name) for rank in (4, 8, 16, 32) if (name := kind if rank == 8 else f"{kind}_r{rank}") in arms]
        for kind in ("lora", "moe_lora", "moss")
    }
    if any(len(found) > 1 for found in ranks.values()):
        yield _chart("By trained parameters: ranks 4, 8, 16, 32", _draw_ranks(arms, ranks))
    kernels = [
        name for name in ("moe_lora", "moss", "moss_k3", "moss_raster", "moe_equal", "moss_k3_equal") if name in arms
    ]
    if "moss_k3" in arms:
        yield _chart(
            "Windows: kernels 1, 2, 3, to the upper right, and with equal parameters", _draw_bars(arms, kernels)
        )
    gains = list(_gains(values_of(results), resamples))
    if gains:
        title = "Gain of MoSS over MoE-LoRA with as many parameters, by alphabet (0.1 of log image loss is 10 % of it)"
        yield _chart(title, _draw_claims(gains), height=0.8 + 0.3 * len(gains))
    if any(runs[0]["curve"] for runs in results.values()):
        yield _chart("Losses while tuning, first seed", _draw_curves(results))


def _gains(values: Values, resamples: int) -> Iterator[Finding]:
    """The one contrast that the paper does not make, in every alphabet that was run."""
    for measure in ("overall", "log_image_loss"):
        for alphabet in get_args(Alphabet):
            end = "" if alphabet == "patch" else f"_{alphabet}"
            claim = Claim(alphabet, "", "", {f"moss{end}": 1.0, f"moe_equal{end}": -1.0}, measure)
            found = judge(claim, values, resamples=resamples)
            if found is not None:
                yield found


def _chart(title: str, draw: Callable[[Any], None], *, height: float = 3.4) -> dict[str, str]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": title, "font.size": 9}):
        figure = Figure(figsize=(10, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return {"title": title, "svg": svg[svg.index("<svg") :]}


def _reach(cells: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [[max(0.0, c["mean"] - c["low"]) for c in cells], [max(0.0, c["high"] - c["mean"]) for c in cells]]


def _draw_claims(findings: Sequence[Finding]) -> Callable[[Any], None]:
    colors = {"holds": "#2a8f4d", "does not hold": "#c0392b", "not resolved at this n": "#7f8c8d"}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, found in enumerate(findings):
            axes.plot([found.low, found.high], [i, i], color=colors[found.verdict], lw=2)
            axes.plot([found.estimate], [i], "o", color=colors[found.verdict], ms=5)
        axes.axvline(0, color="black", lw=0.8)
        names = [f"{found.claim.name} ({found.claim.measure})".replace("_", " ") for found in findings]
        axes.set_yticks(range(len(findings)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)

    return draw


def _draw_arms(arms: Mapping[str, Any]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, measure in zip(figure.subplots(1, 2, sharey=True), ("overall", "image_loss"), strict=True):
            cells = [arm["values"][measure] for arm in arms.values()]
            axes.errorbar([c["mean"] for c in cells], range(len(cells)), xerr=_reach(cells), fmt="o", ms=4)
            axes.set_title(measure.replace("_", " "))
            axes.set_yticks(range(len(cells)), list(arms))
            axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
        axes.set_xscale("log")

    return draw


def _draw_ranks(arms: Mapping[str, Any], ranks: Mapping[str, Sequence[tuple[int, str]]]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, measure in zip(figure.subplots(1, 2), ("overall", "image_loss"), strict=True):
            for kind, found in ranks.items():
                cells = [arms[name]["values"][measure] for _, name in found]
                sizes = [arms[name]["trained_parameters"] for _, name in found]
                axes.errorbar(sizes, [c["mean"] for c in cells], yerr=_reach(cells), marker="o", ms=4, label=kind)
            axes.set(title=measure.replace("_", " "), xlabel="trained parameters", xscale="log")
            axes.grid(alpha=0.3)
        axes.set_yscale("log")
        axes.legend(frameon=False)

    return draw


def _draw_bars(arms: Mapping[str, Any], names: Sequence[str]) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, measure in zip(figure.subplots(1, 2), ("overall", "image_loss"), strict=True):
            cells = [arms[name]["values"][measure] for name in names]
            axes.errorbar(range(len(names)), [c["mean"] for c in cells], yerr=_reach(cells), fmt="o", ms=5)
            axes.set_xticks(range(len(names)), names, rotation=25)
            axes.set_title(measure.replace("_", " "))
            axes.grid(axis="y", alpha=0.3)

    return draw


def _draw_curves(results: Results) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        for axes, key in zip(figure.subplots(1, 2), ("image_loss", "text_loss"), strict=True):
            for arm, runs in results.items():
                curve = runs[0]["curve"]
                # alphabets have losses of their own
                if curve and ARMS[arm].alphabet == "patch" and arm in (*PRINTED, "lora_equal", "moe_equal"):
                    axes.plot([row["step"] for row in curve], [row[key] for row in curve], label=arm, lw=1.2)
            axes.set(title=key.replace("_", " "), xlabel="step", yscale="log")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(frameon=False, ncols=2, fontsize=8)

    return draw
