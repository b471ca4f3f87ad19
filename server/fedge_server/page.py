"""Pages that need no network: pictures as SVG inside, one style, templates of this and other packages."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, PrefixLoader, StrictUndefined

from fedge.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Paint = Callable[["Axes"], None]
"""Draws into a picture's axes."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled picture and the sentence that says what to see in it."""

    title: str
    caption: str
    svg: str


def draw(title: str, caption: str, paint: Paint, *, height: float = 3.2) -> Plot:
    """A picture as SVG text that is the same for the same data; `height` in inches, 7.2 wide."""
    # The object interface, not pyplot: no global state and no display is needed.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "fedge", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Plot(title, caption, text[text.index("<svg") :])


def write_page(path: Path, package: str, template: str, **values: Any) -> None:
    """Render a package's template and put the page in place whole.

    Args:
        path: of the page.
        package: whose template; it may include those of `fedge_server` by "fedge_server/NAME".
        template: its file name.
        values: what the template shows.
    """
    packages = {name: PackageLoader(name, ".") for name in {package, "fedge_server"}}
    environment = Environment(
        loader=PrefixLoader(packages), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    write_atomically(path, environment.get_template(f"{package}/{template}").render(**values).encode())


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{prefix}{key}"
        found |= flat(value, f"{inner}.") if isinstance(value, Mapping) else {inner: value}
    return found
