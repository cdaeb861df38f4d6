"""Write the tables of docs/claims_file.md from the schema of claims files: `python docs/claims_table.py`."""

import json
import re
from pathlib import Path
from typing import Any

from albert_ablate.judge.claims import claims_schema

PAGE = Path(__file__).parent / "claims_file.md"
HEADINGS = {  # definition of the schema -> where it stands in a file
    "": "The file",
    "Family": "`family`",
    "Regime": "Each of `regimes`",
    "ClaimText": "Each of `claims`",
    "Part": "Each of `parts` and `secondary`",
    "ScreenForm": "`screen`",
    "Form": "`full`",
}


def table(definition: dict[str, Any]) -> list[str]:
    """A row for each key: what it may be, its default, what it is for."""
    out = ["| key | is | if left out | what for |", "| --- | --- | --- | --- |"]
    for key, field in definition["properties"].items():
        limits, _, purpose = field["description"].partition("; ")
        default = "needed" if key in definition.get("required", ()) else ""
        value = field.get("default")
        if not default and value not in (None, "", []):
            default = f"`{value:.4g}`" if isinstance(value, float) else f"`{json.dumps(value)}`".replace('"', "")
        out.append(f"| `{key}` | {limits} | {default} | {purpose} |")
    return out


def tables() -> str:
    schema = claims_schema()
    parts = []
    for name, heading in HEADINGS.items():
        parts += [f"### {heading}", "", *table(schema["$defs"][name] if name else schema), ""]
    return "\n".join(parts)


def page() -> str:
    """The page with its tables made anew."""
    body = PAGE.read_text()
    return re.sub(
        r"(?<=<!-- tables -->\n).*(?=<!-- end of tables -->)", lambda m: f"\n{tables()}\n", body, flags=re.DOTALL
    )


if __name__ == "__main__":
    PAGE.write_text(page())
