"""Panels of the dashboards: the few kinds that are used, with one look.

Every panel says what it shows in its description, and what it means that it shows nothing; units
are Grafana's names of base units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    barchart,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
    trend,
)
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from openhelix.deploy.grafana.promql import Column, Query

SOURCE = d.DataSourceRef(type_val="prometheus", uid="openhelix-prometheus")
TAG = "openhelix"
STEPS = ("interval", "latency", "le")  # labels that are numbers
NOTHING = "nothing in this time range"
SCHEME = "Cividis"  # the same order of brightness for every eye


def query(expr: str, legend: str, letter: str = "A") -> prometheus.Dataquery:
    """Return a query over the dashboard's time range."""
    return prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(letter).range()


def snapshot(expr: str, letter: str) -> prometheus.Dataquery:
    """Return a query for now, one row a series."""
    found = prometheus.Dataquery().expr(expr).ref_id(letter).instant()
    return found.format(PromQueryFormat.TABLE)


def lines(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    height: int = 7,
    log: bool = False,
    stack: bool = False,
    top: float | None = None,
    band: tuple[str, str] | None = None,
    empty: str = NOTHING,
) -> timeseries.Panel:
    """Return curves over time.

    Args:
        title: of the panel.
        about: what it shows.
        unit: of the values.
        queries: the curves.
        width: in cells of the grid, 24 wide.
        height: in cells.
        log: a logarithmic axis.
        stack: one curve upon the other.
        top: of the axis.
        band: legends of two curves that are drawn as the bounds of a band.
        empty: shown where there is no data.
    """
    panel = (
        timeseries.Panel()
        .no_value(empty)
        .title(title)
        .description(about)
        .unit(unit)
        .datasource(SOURCE)
    )
    panel.span(width).height(height).line_width(1).fill_opacity(30 if stack else 5)
    panel.show_points(c.VisibilityMode.NEVER)
    panel.tooltip(common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI))
    legend = common.VizLegendOptions().display_mode(c.LegendDisplayMode.LIST)
    panel.legend(legend.placement(c.LegendPlacement.BOTTOM).show_legend(True))
    if not log:
        panel.min(0)
    else:
        scale = common.ScaleDistributionConfig().type(c.ScaleDistribution.LOG)
        panel.scale_distribution(scale.log(10))
    if stack:
        panel.stacking(common.StackingConfig().mode(c.StackingMode.NORMAL))
    if top is not None:
        panel.max(top)
    for number, (expr, legend_format) in enumerate(queries):
        panel.with_target(query(expr, legend_format, chr(ord("A") + number)))
    return panel if band is None else _with_band(panel, *band)


def _with_band(panel: Any, low: str, high: str) -> Any:
    """Fill between two curves and draw neither."""
    unseen = d.DynamicConfigValue("custom.lineWidth", 0)
    panel.override_by_name(low, [unseen, d.DynamicConfigValue("custom.fillOpacity", 0)])
    below = d.DynamicConfigValue("custom.fillBelowTo", low)
    grey = d.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "text"})
    return panel.override_by_name(
        high, [unseen, below, grey, d.DynamicConfigValue("custom.fillOpacity", 15)]
    )


def heat(
    title: str, about: str, unit: str, expr: str, width: int = 12, empty: str = NOTHING
) -> heatmap.Panel:
    """Return a histogram over time; `expr` gives the increase of each bucket, by `le`."""
    panel = heatmap.Panel().no_value(empty).title(title).description(about).datasource(SOURCE)
    panel.span(width).height(8).calculate(False).cell_gap(1).show_legend()
    panel.y_axis(_y_axis(unit))
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme(SCHEME)
    panel.color(color.exponent(0.5).steps(64).fill("dark-orange"))
    buckets = query(expr, "{{le}}").format(PromQueryFormat.HEATMAP)
    return panel.with_target(buckets)


def _y_axis(unit: str) -> heatmap.YAxisConfig:
    return heatmap.YAxisConfig().unit(unit).axis_placement(c.AxisPlacement.LEFT)


def figure(
    title: str,
    about: str,
    unit: str,
    *queries: Query,
    width: int = 4,
    bad: Sequence[tuple[float, str]] = (),
) -> stat.Panel:
    """Return the newest values as numbers; `bad` says from where on which colour."""
    panel = (
        stat.Panel().no_value("none").title(title).description(about).unit(unit).datasource(SOURCE)
    )
    panel.span(width).height(4).graph_mode(c.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    steps = [d.Threshold(None, "green"), *(d.Threshold(at, color) for at, color in bad)]
    levels = dashboard.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE).steps(steps)
    panel.thresholds(levels)
    for number, (expr, legend) in enumerate(queries):
        panel.with_target(query(expr, legend, chr(ord("A") + number)))
    return panel


def states(
    title: str, about: str, asked: Query, names: Sequence[tuple[str, str]]
) -> statetimeline.Panel:
    """Return which state held when; the query's value is the place of its name and colour."""
    panel = statetimeline.Panel().title(title).description(about).datasource(SOURCE)
    panel.span(12).height(4).row_height(0.8).fill_opacity(80)
    shown = {
        str(value): d.ValueMappingResult(text=name, color=color)
        for value, (name, color) in enumerate(names)
    }
    return panel.mappings([d.ValueMap(options=shown)]).with_target(query(*asked))


def _joined(panel: Any, by: Sequence[str], columns: Sequence[Column]) -> Any:
    """Add snapshots and join them into one table by their common labels.

    Args:
        panel: gets the queries.
        by: labels, in the order of the columns and of sorting.
        columns: title, expression and unit of each.
    """
    for number, (_, expr, _) in enumerate(columns):
        panel.with_target(snapshot(expr, chr(ord("A") + number)))
    values = [f"Value #{chr(ord('A') + n)}" for n in range(len(columns))]
    rename = {v: title for v, (title, _, _) in zip(values, columns, strict=True)}
    if len(columns) == 1:  # Grafana numbers the values of several queries only
        rename = {"Value": columns[0][0]}
    order = {name: n for n, name in enumerate((*by, *rename))}
    numbers = [{"targetField": name, "destinationType": "number"} for name in by if name in STEPS]
    steps: list[tuple[str, dict[str, Any]]] = [
        ("merge", {}),
        ("convertFieldType", {"conversions": numbers}),
        ("sortBy", {"sort": [{"field": by[-1]}]}),
        ("organize", _organize(order, rename)),
    ]
    for name, options in steps:
        panel.with_transformation(d.DataTransformerConfig(id_val=name, options=options))
    for title, _, unit in columns:
        panel.override_by_name(title, [d.DynamicConfigValue("unit", unit)])
    return panel


def _organize(order: dict[str, int], rename: dict[str, str]) -> dict[str, Any]:
    return {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": rename}


def rows(
    title: str,
    about: str,
    by: Sequence[str],
    *columns: Column,
    width: int = 12,
    height: int = 10,
    empty: str = NOTHING,
) -> table.Panel:
    """Return a table: one row for each value of the labels `by`."""
    panel = table.Panel().no_value(empty).title(title).description(about).datasource(SOURCE)
    panel.span(width).height(height)
    found: table.Panel = _joined(panel, by, columns)
    return found


def bars(
    title: str, about: str, by: str, column: Column, width: int = 12, empty: str = NOTHING
) -> barchart.Panel:
    """Return a bar for each value of one label, in its order."""
    panel = barchart.Panel().no_value(empty).title(title).description(about).datasource(SOURCE)
    panel.span(width).height(9).x_field(by).show_value(c.VisibilityMode.ALWAYS)
    panel.min(0).unit(column[2]).group_width(0.7).bar_width(0.9).fill_opacity(70)
    panel.legend(common.VizLegendOptions().show_legend(False))
    found: barchart.Panel = _joined(panel, [by], [column])
    return found


def curve(
    title: str,
    about: str,
    by: str,
    *columns: Column,
    width: int = 12,
    empty: str = NOTHING,
) -> trend.Panel:
    """Return a curve over one label's values, which are numbers; two more columns are its band."""
    panel = trend.Panel().no_value(empty).title(title).description(about).datasource(SOURCE)
    panel.span(width).height(9).x_field(by).min(0).unit(columns[0][2])
    panel.line_width(2).point_size(7).show_points(c.VisibilityMode.ALWAYS)
    legend = common.VizLegendOptions().display_mode(c.LegendDisplayMode.LIST)
    panel.legend(legend.placement(c.LegendPlacement.BOTTOM).show_legend(True))
    found: trend.Panel = _joined(panel, [by], columns)
    if len(columns) == 3:
        found.max(1)
        _with_band(found, columns[1][0], columns[2][0])
        for title, _, _ in columns[1:]:
            found.override_by_name(title, [d.DynamicConfigValue("custom.showPoints", "never")])
    return found


def board(
    uid: str,
    title: str,
    about: str,
    targets: tuple[str, str],
    panels: Mapping[str, Sequence[Any]],
    since: str = "now-15m",
) -> dashboard.Dashboard:
    """Return a dashboard.

    Args:
        uid: its address in Grafana.
        title: its name.
        about: one sentence.
        targets: label of the variable `instance`, and a metric that all its choices have.
        panels: by the heading of their row.
        since: start of the time shown at first.
    """
    label, metric = targets
    listed = dashboard.QueryVariable("instance").label(label).datasource(SOURCE)
    listed.query({"query": f"label_values({metric}, instance)", "refId": "instance"})
    listed.refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED).include_all(True).all_value(".*")
    listed.multi(True).current(d.VariableOption(text="All", value="$__all"))
    others = dashboard.DashboardLink("Other dashboards").tags([TAG]).as_dropdown(True)
    others.type(d.DashboardLinkType.DASHBOARDS).keep_time(True)
    found = dashboard.Dashboard(title).uid(uid).description(about).tags([TAG]).editable()
    found.with_variable(listed).link(others)
    found.time(since, "now").refresh("5s").timezone("browser")
    for heading, row in panels.items():
        found.with_row(dashboard.Row(heading))
        for panel in row:
            found.with_panel(panel)
    return found
