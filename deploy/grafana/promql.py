"""The questions that panels put to Prometheus.

Rates are over Grafana's `$__rate_interval`, sums over what the time picker says (`$__range`);
`$instance` is the dashboard's choice of targets.

A run lasts seconds to minutes, and `rate` divides by the whole window even if the run began or
ended within it: a loop of 30 Hz would show 19. So rates are divided by those of a counter of
seconds that the same process serves: its loop's, or its endpoint's.
"""

from __future__ import annotations

from openhelix.runtime.observe.metrics import sections

HERE = '{instance=~"$instance"}'
LOOP_S, UP_S = "openhelix_loop_running_seconds_total", "openhelix_up_seconds_total"
OF_THE_LOOP = {e.name for s in sections() if s.served_by == "control" for e in s.entries}
Query = tuple[str, str]  # expression, legend
Column = tuple[str, str, str]  # title, expression, unit


def rate(name: str, by: str = "", more: str = "", here: bool = True) -> str:
    """Return a counter's increase a second of running, in total for each value of `by`."""
    seconds = LOOP_S if f"openhelix_{name}" in OF_THE_LOOP else UP_S
    found = per_second(f"openhelix_{name}{_chosen(more, here)}", seconds)
    return f"sum by ({by}) ({found})" if by else found


def per_second(counter: str, seconds: str = UP_S) -> str:
    """Return a counter's increase for every second that another one counts in its process."""
    while_running = f"(rate({seconds}[$__rate_interval]) > 0)"
    return f"rate({counter}[$__rate_interval]) / on (instance) group_left () {while_running}"


def events(name: str, by: str = "", more: str = "", here: bool = True) -> str:
    """Return how often something was counted within the time shown."""
    inner = f"increase(openhelix_{name}{_chosen(more, here)}[$__range])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def buckets(name: str, here: bool = True) -> str:
    """Return the increase of a distribution's buckets, for a heat map."""
    return f"sum by (le) (increase(openhelix_{name}_bucket{_chosen('', here)}[$__rate_interval]))"


def quantile(name: str, q: float) -> str:
    """Return a quantile of a distribution, a series a target."""
    grown = f"rate(openhelix_{name}_bucket{HERE}[$__rate_interval])"
    return f"histogram_quantile({q}, sum by (instance, le) ({grown}))"


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


CHAIN = 5  # instructions of a sequence, after CALVIN


def longer(name: str, here: bool = True) -> str:
    """Return the share of chains with at least so many successes in a row, by label `tasks`."""
    few = events(f"{name}_bucket", "le", 'le!~"5.0|[+]Inf"', here)
    share = f"1 - {few} / on () group_left () ({events(f'{name}_count', here=here)} > 0)"
    for tasks in range(1, CHAIN + 1):  # a bucket counts what is at most `le`
        share = f'label_replace({share}, "tasks", "{tasks}", "le", "{tasks - 1}[.]0")'
    return f"sum by (tasks) ({share})"


def _chosen(more: str, here: bool) -> str:
    parts = [*(['instance=~"$instance"'] if here else []), *([more] if more else [])]
    return "{" + ",".join(parts) + "}" if parts else ""
