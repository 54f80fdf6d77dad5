"""`make dashboards`: writes the dashboards as the JSON files that Grafana loads."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from openhelix.deploy.grafana.boards import asynchrony, fleet, realtime, success

FOLDER = Path(__file__).resolve().parent / "dashboards"
BOARDS = (realtime, success, asynchrony, fleet)


def rendered() -> dict[str, str]:
    """Return the JSON of every dashboard by file name."""
    found = {}
    for module in BOARDS:
        model = module.dashboard().build()
        for number, panel in enumerate(model.panels or (), 1):
            panel.id_val = number  # by which links and the viewer's URL name a panel
        name = module.__name__.rpartition(".")[2]
        found[f"{name}.json"] = JSONEncoder(sort_keys=True, indent=1).encode(model) + "\n"
    return found


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
