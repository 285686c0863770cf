"""The picture of a sweep over loads: what DeepSpeed-FastGen's figures show, in four panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mii.benchmark.serving.report import short_name
from mii.errors import UnsupportedFeatureError

__all__ = ["check_can_plot", "draw"]

_PERCENTILES = (("p50", "-"), ("p90", "--"), ("p99", ":"))
_ROOM = 1.08  # above the highest point
_INK, _COLOURS = "#333333", ("#2a6fbb", "#c8553d", "#3a8f5c")


def check_can_plot() -> None:
    """Makes sure, before anything is measured, that a picture can be drawn.

    Raises:
        UnsupportedFeatureError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedFeatureError(
            "--plot needs matplotlib, which is not installed; get it with: pip install 'mii[plot]', or leave --plot out"
        ) from None


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Writes the picture; the file's ending says the format.

    Args:
        report: see `mii.benchmark.serving.report.make_report`.
        file: where to; its folder is made.

    Raises:
        ValueError: matplotlib has no such format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    points = report["points"]
    figure.suptitle(_title(report), fontsize=11, color=_INK)
    _throughput_and_latency(panels[0][0], points)
    _effective(panels[0][1], points)
    _percentiles(panels[1][0], points, "first_token_s", "time to first token")
    _percentiles(panels[1][1], points, "token_s", "time per token")
    for panel in panels.flat:
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _title(report: Mapping[str, Any]) -> str:
    target, workload = report["target"], report["workload"]
    return f"{target['name']} over {target['api']}: {workload['name']}"


def _throughput_and_latency(panel: Any, points: Sequence[Mapping[str, Any]]) -> None:
    known = [point for point in points if point["request_s"]]
    speed, latency = [point["requests_per_s"] for point in known], [point["request_s"]["mean"] for point in known]
    panel.plot(speed, latency, "o-", color=_COLOURS[0])
    for point, x, y in zip(known, speed, latency, strict=True):
        panel.annotate(
            short_name(point["load"]), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8, color=_INK
        )
    _finish(panel, "throughput and latency", "requests/s", "mean time of a request, s")
    panel.set_xlim(left=0)


def _effective(panel: Any, points: Sequence[Mapping[str, Any]]) -> None:
    places, labels = _axis(points)
    panel.plot(places, [point["requests_per_s"] for point in points], "o-", color="#999999", label="all")
    for index, colour in enumerate(_COLOURS[: len(points[0]["effective"])]):
        rate = points[0]["effective"][index]["agreed_tokens_per_s"]
        values = [point["effective"][index]["requests_per_s"] for point in points]
        panel.plot(places, values, "s--", color=colour, label=f"at {rate:g} tokens/s", markersize=4)
    panel.set_xticks(places, labels)
    _finish(panel, "effective throughput", _unit(points), "requests/s")
    panel.legend(fontsize=8, frameon=False)


def _percentiles(panel: Any, points: Sequence[Mapping[str, Any]], name: str, title: str) -> None:
    known = [point for point in points if point[name]]
    places, labels = _axis(known)
    for percentile, style in _PERCENTILES:
        values = [1e3 * point[name][percentile] for point in known]
        panel.plot(places, values, f"o{style}", color=_COLOURS[0], label=percentile, markersize=4)
    panel.set_xticks(places, labels)
    _finish(panel, title, _unit(points), "ms")
    if known:
        panel.legend(fontsize=8, frameon=False)


def _axis(points: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
    """Loads grow in steps of any size, so they stand side by side."""
    return list(range(len(points))), [short_name(point["load"]) for point in points]


def _unit(points: Sequence[Mapping[str, Any]]) -> str:
    return "clients" if points[0]["load"]["clients"] else "requests/s that came"


def _finish(panel: Any, title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=10, color=_INK)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.set_ylim(0, _ROOM * panel.get_ylim()[1])
