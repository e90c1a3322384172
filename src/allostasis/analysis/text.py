"""How the report writes numbers and other people's text."""

from __future__ import annotations

import re

from markupsafe import Markup

from allostasis.analysis.intervals import Interval


def number(value: float | None) -> str:
    """A number with four significant digits; whole from 1,000 on; None is "not reached".

    Example:
        >>> number(9750.4), number(-0.30512), number(1.0), number(0.0000123), number(None)
        ('9750', '-0.3051', '1', '1.23e-05', 'not reached')
    """
    if value is None:
        return "not reached"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"


def bracket(interval: Interval) -> str:
    """An interval as [low, high]."""
    return f"[{number(interval.low)}, {number(interval.high)}]"


def leveled(interval: Interval) -> str:
    """An interval with its level, as `95 % interval [low, high]`."""
    return f"{100 * interval.level:g} % interval {bracket(interval)}"


def counted(n: int, units: str) -> str:
    """How many of something, given its plural.

    Example:
        >>> counted(1, "seeds"), counted(0, "clusters")
        ('1 seed', '0 clusters')
    """
    return f"{n} {units.removesuffix('s') if n == 1 else units}"


def cell(text: str) -> Markup:
    r"""Text made safe for a cell of a Markdown table: one line, no tags, no column breaks.

    Example:
        >>> print(cell("rho < 0 | <script>"))
        rho < 0 \| &lt;script>
    """
    line = " ".join(text.split())
    return Markup(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line).replace("|", "\\|"))
