"""Where a direction comes from: the heads and MLPs that write it, and the tokens it promotes."""

from html import escape


class Table:
    """Shows `_rows`, lists of text, in a terminal and in Jupyter."""

    def _rows(self) -> list[list[str]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._rows(), strict=True)]
        lines = (map(str.ljust, row, widths) for row in self._rows())
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows())
        return f'<table style="text-align: left"><tr>{"</tr><tr>".join(rows)}</tr></table>'
