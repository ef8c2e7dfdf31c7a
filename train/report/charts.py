"""Line and bar charts as geometry: the template draws them as SVG, beside a table of the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

WIDTH, HEIGHT = 560, 260  # units of the SVG's own coordinates
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 40
_MOST_POINTS = 400  # of a line: more are not told apart
_MOST_MARKS = 40  # points of a line that has a mark at each
_MOST_ROWS = 24  # of the table beside a line chart

Point = tuple[float, float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """`path` is an SVG path; `marks` are (x, y, text) of single points, none where there are too many."""

    name: str
    path: str
    marks: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Bar:
    series: int
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """Positions are in units of the SVG; `lines` or `bars` are empty. `names` are the series' in the order of their colours."""

    title: str
    description: str
    x_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    names: list[str]
    lines: list[Line]
    bars: list[Bar]
    table: Table

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM


def line_chart(title: str, x_title: str, series: Mapping[str, Sequence[Point]], *, from_zero: bool = False) -> Chart | None:
    """A line for each series of (x, y); None when no series has a point. Numbers that are not finite are left out."""
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_scale = _Scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_scale = _Scale(min([*ys, 0.0] if from_zero else ys), max(ys), HEIGHT - _BOTTOM, _TOP, rounded=True)
    lines = []
    for name, points in kept.items():
        drawn = [(x_scale(x), y_scale(y)) for x, y in thin(points, _MOST_POINTS)]
        marks = [(x_scale(x), y_scale(y), f"{name}, {x_title} {number(x)}: {number(y)}") for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
        lines.append(Line(name, path, marks if len(points) <= _MOST_MARKS else []))
    columns = [dict(points) for points in kept.values()]
    shown = thin(sorted(set(xs)), _MOST_ROWS)
    rows = [[number(x), *(number(column.get(x)) for column in columns)] for x in shown]
    return Chart(
        title=title,
        description=f"{len(kept)} lines over {x_title}. " + "; ".join(_course(name, points) for name, points in kept.items()),
        x_title=x_title,
        x_ticks=x_scale.ticks(whole=True),
        y_ticks=y_scale.ticks(),
        names=list(kept),
        lines=lines,
        bars=[],
        table=Table([x_title, *kept], rows),
    )


def bar_chart(
    title: str, x_title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], more: Mapping[str, list[str]]
) -> Chart | None:
    """A bar for each series in each group; None when there is no number. `more` are further columns of the table."""
    values = [value for heights in series.values() for value in heights if value is not None]
    if not values:
        return None
    y_scale = _Scale(0.0, max(values), HEIGHT - _BOTTOM, _TOP, rounded=True)
    slot = (WIDTH - _LEFT - _RIGHT) / len(groups)
    width = 0.76 * slot / len(series)
    bars = [
        Bar(
            series=i,
            x=_LEFT + slot * (g + 0.12) + width * i,
            y=y_scale(value),
            width=width,
            height=y_scale(0.0) - y_scale(value),
            text=f"{name}, {x_title} {groups[g]}: {number(value)}",
        )
        for i, (name, heights) in enumerate(series.items())
        for g, value in enumerate(heights)
        if value is not None
    ]
    columns = [*more.values(), *(list(map(number, heights)) for heights in series.values())]
    rows = [[group, *(column[g] for column in columns)] for g, group in enumerate(groups)]
    return Chart(
        title=title,
        description=f"{len(series)} bars for each {x_title}, {len(groups)} in all. The table below has their heights.",
        x_title=x_title,
        x_ticks=[Tick(_LEFT + slot * (g + 0.5), group) for g, group in enumerate(groups)],
        y_ticks=y_scale.ticks(),
        names=list(series),
        lines=[],
        bars=bars,
        table=Table([x_title, *more, *series], rows),
    )


def number(value: float | None) -> str:
    """A number as it is read: 12,345 · 0.431 · 2.5e-05; nothing for None."""
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"


def thin(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _course(name: str, points: Sequence[Point]) -> str:
    return f"{name} goes from {number(points[0][1])} to {number(points[-1][1])}"


class _Scale:
    """Maps low … high to start … stop. When `rounded`, low and high move out to the next ticks."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, rounded: bool = False) -> None:
        if high == low:
            low, high = (low - 1, high + 1) if low else (0.0, 1.0)
        self._step = _tick_step(high - low)
        if rounded:
            low = math.floor(low / self._step + 1e-9) * self._step
            high = math.ceil(high / self._step - 1e-9) * self._step
        self._low, self._high, self._start, self._stop = low, high, start, stop

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._stop - self._start)

    def ticks(self, *, whole: bool = False) -> list[Tick]:
        step = max(1, round(self._step)) if whole else self._step
        first, last = math.ceil(self._low / step - 1e-9), math.floor(self._high / step + 1e-9)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        shown = (lambda value: f"{value:.0e}") if digits > 4 else (lambda value: f"{value:,.{digits}f}")
        return [Tick(self(i * step), "0" if i == 0 else shown(i * step)) for i in range(first, last + 1)]


def _tick_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that four to nine of it make the span."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return max(step for step in (power, 2 * power, 5 * power) if 4 * step <= span * (1 + 1e-9))
