"""The questions that panels put to Prometheus.

Rates are over Grafana's `$__rate_interval`, sums over what the time picker says (`$__range`);
`$instance` is the dashboard's choice of targets.
"""

from __future__ import annotations

HERE = '{instance=~"$instance"}'
Query = tuple[str, str]  # expression, legend
Column = tuple[str, str, str]  # title, expression, unit


def rate(name: str, by: str = "", more: str = "", here: bool = True) -> str:
    """Return a counter's increase a second, in total for each value of the labels `by`."""
    inner = f"rate(openhelix_{name}{_chosen(more, here)}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else inner


def events(name: str, by: str = "", more: str = "", here: bool = True) -> str:
    """Return how often something was counted within the time shown."""
    inner = f"increase(openhelix_{name}{_chosen(more, here)}[$__range])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def buckets(name: str, here: bool = True) -> str:
    """Return the increase of a distribution's buckets, for a heat map."""
    return f"sum by (le) (increase(openhelix_{name}_bucket{_chosen('', here)}[$__rate_interval]))"


def quantile(name: str, q: float) -> str:
    """Return a quantile of a distribution, a series a target."""
    return f"histogram_quantile({q}, {rate(f'{name}_bucket', 'instance, le')})"


def quantiles(name: str) -> list[Query]:
    """Return the median and the 99th percentile, named."""
    return [(quantile(name, q), f"p{q * 100:.0f} {{{{instance}}}}") for q in (0.5, 0.99)]


def mean(name: str, by: str = "", here: bool = True) -> str:
    """Return the mean of a distribution within the time shown."""
    count = events(f"{name}_count", by, here=here)
    return f"{events(f'{name}_sum', by, here=here)} / ({count} > 0)"


def success(name: str, by: str = "", here: bool = True) -> list[Column]:
    """Return the columns of a success rate: its value, its interval, the number of trials.

    The interval is Wilson's at 95 %; deploy/prometheus/rules/recording.yml writes it out.
    """
    good = events(name, by, 'outcome="success"', here)
    judged = events(name, by, 'outcome!="unjudged"', here)
    n = f"({judged} > 0)"
    root = f"1.96 * sqrt({good} * (1 - {good} / {n}) + 0.9604)"
    return [
        ("success", f"{good} / {n}", "percentunit"),
        (
            "95 % from",
            f"clamp_min({good} + 1.9208 - {root}, 0) / ({n} + 3.8416)",
            "percentunit",
        ),
        ("to", f"({good} + 1.9208 + {root}) / ({n} + 3.8416)", "percentunit"),
        ("attempts", f"round({n})", "none"),
    ]


def longer(name: str, here: bool = True) -> str:
    """Return the share of chains with more than `le` successes in a row."""
    few = events(f"{name}_bucket", "le", 'le!~"5.0|[+]Inf"', here)
    return f"1 - {few} / on () group_left () ({events(f'{name}_count', here=here)} > 0)"


def _chosen(more: str, here: bool) -> str:
    parts = [*(['instance=~"$instance"'] if here else []), *([more] if more else [])]
    return "{" + ",".join(parts) + "}" if parts else ""
