"""A few helpers that write SVG by hand, for light and dark pages."""

import html

_LIGHT = {
    "page": "fill:#ffffff;stroke:#d0d7de",
    "text": "fill:#1f2328",
    "muted": "fill:#59636e",
    "plain": "fill:#f6f8fa;stroke:#6e7781",
    "blue": "fill:#ddf4ff;stroke:#0969da",
    "green": "fill:#dafbe1;stroke:#1a7f37",
    "orange": "fill:#fff1e5;stroke:#bc4c00",
    "purple": "fill:#fbefff;stroke:#8250df",
    "hidden": "fill:#d0d7de;stroke:#8c959f",
    "line": "fill:none;stroke:#57606a",
    "head": "fill:#57606a;stroke:none",
}
_DARK = {
    "page": "fill:#0d1117;stroke:#30363d",
    "text": "fill:#e6edf3",
    "muted": "fill:#a3acb6",
    "plain": "fill:#1c2128;stroke:#8b949e",
    "blue": "fill:#12304f;stroke:#58a6ff",
    "green": "fill:#12361f;stroke:#3fb950",
    "orange": "fill:#40230f;stroke:#f0883e",
    "purple": "fill:#32204f;stroke:#a371f7",
    "hidden": "fill:#373e47;stroke:#6e7681",
    "line": "fill:none;stroke:#a3acb6",
    "head": "fill:#a3acb6;stroke:none",
}


def _rules(styles: dict[str, str]) -> str:
    return " ".join(f".{name}{{{style}}}" for name, style in styles.items())


class Picture:
    """An SVG in the making; coordinates are pixels from the top left corner.

    It has a background of its own, so that it is readable on any page, and follows the
    reader's colour scheme where the viewer supports that.
    """

    def __init__(self, width: int, height: int, title: str):
        """Start a picture of `width` x `height` with a title for screen readers."""
        self._size = (width, height)
        self._title = title
        self._parts: list[str] = []

    def box(self, x, y, width, height, style="plain", *, radius=6, dash="") -> None:
        """Draw a rectangle."""
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<rect class="{style}" x="{x}" y="{y}" width="{width}" height="{height}" '
            f'rx="{radius}"{dash}/>'
        )

    def text(self, x, y, words, *, size=13, style="text", anchor="middle", bold=False):
        """Write lines of text; `y` is the first line's base."""
        weight = ' font-weight="600"' if bold else ""
        for i, line in enumerate(words.split("\n")):
            self._parts.append(
                f'<text class="{style}" x="{x}" y="{y + i * size * 1.3:.1f}" '
                f'font-size="{size}" text-anchor="{anchor}"{weight}>'
                f"{html.escape(line)}</text>"
            )

    def label(self, x, y, width, height, title, detail="", style="plain") -> None:
        """Draw a box with a bold title, and smaller lines of detail under it."""
        self.box(x, y, width, height, style)
        lines = detail.count("\n") + 1 if detail else 0
        top = y + (height - 15 - lines * 15) / 2 + 12
        self.text(x + width / 2, round(top, 1), title, size=14, bold=True)
        if detail:
            self.text(x + width / 2, round(top + 17, 1), detail, size=11.5)

    def arrow(self, *points, dash="", both=False) -> None:
        """Draw a line through points (x, y) with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        start = ' marker-start="url(#back)"' if both else ""
        self._parts.append(
            f'<polyline class="line" points="{path}"{dash} stroke-width="1.5" '
            f'marker-end="url(#arrow)"{start}/>'
        )

    def circle(self, x, y, radius, style) -> None:
        """Draw a disc."""
        self._parts.append(f'<circle class="{style}" cx="{x}" cy="{y}" r="{radius}"/>')

    def render(self) -> str:
        """Return the SVG's text."""
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            f'font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f"<title>{html.escape(self._title)}</title>\n"
            f"<style>{_rules(_LIGHT)}\n"
            f"@media (prefers-color-scheme: dark) {{{_rules(_DARK)}}}</style>\n"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" '
            'markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="head" d="M0,0 L8,4 L0,8 z"/></marker>'
            '<marker id="back" viewBox="0 0 8 8" refX="1" refY="4" '
            'markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="head" d="M8,0 L0,4 L8,8 z"/></marker></defs>\n'
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" '
            f'height="{height - 1}" rx="8"/>\n'
        )
        return head + "\n".join(self._parts) + "\n</svg>\n"
