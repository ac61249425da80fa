"""Take the screenshots of the documentation: report, MLflow charts and comparison of a finished run; actors of a
running job on Ray's dashboard.

    python jobs/screenshots.py results/demo-1234abcd
    python jobs/screenshots.py --ray http://127.0.0.1:8265

The MLflow store must be next to the folder of the finished run, as after `all-folds` or `sync`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent))

from cvrunner.records.run_directory import RunDirectory
from jobs.browser import (
    browser,
    chromium_path,
    links_at,
    mlflow_page,
    open_actor,
    open_actors,
    open_charts,
    open_comparison,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser

OUTPUT = Path(__file__).parent.parent / "docs" / "images"
DESK = {"width": 1440, "height": 900}
DASHBOARD = {"width": 1280, "height": 720}
ONE_ACTOR = {"width": 1280, "height": 1580}
REPORT = {"width": 1000, "height": 1200}
LARGEST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--ray", metavar="ADDRESS", help="address of Ray's dashboard while a run is training")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    executable = chromium_path()
    if executable is None:
        sys.exit("`chromium` is not on the PATH (Debian: apt-get install chromium)")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with browser(executable) as chromium:
        if arguments.run:
            directory = RunDirectory(arguments.run.absolute())
            picture_of_report(chromium, directory, arguments.output / "report.png")
            pictures_of_mlflow(chromium, directory, arguments.output)
        if arguments.ray:
            pictures_of_ray(chromium, arguments.ray, arguments.output)
    for file in sorted(arguments.output.glob("*.png")):
        size = file.stat().st_size
        print(f"{file}  {size / 1000:.0f} kB" + ("  TOO LARGE for the repository" if size > LARGEST_BYTES else ""))


def picture_of_report(chromium: Browser, directory: RunDirectory, file: Path) -> None:
    """Photograph the top of the report: the sentence, scores, differences."""
    page = chromium.new_page(viewport=REPORT)  # type: ignore[arg-type]
    page.goto(directory.report.as_uri())
    following = page.locator("h2").nth(2).bounding_box()
    height = following["y"] - 20 if following else REPORT["height"]
    page.set_viewport_size({"width": REPORT["width"], "height": round(height)})
    page.screenshot(path=file)
    page.close()


def pictures_of_mlflow(chromium: Browser, directory: RunDirectory, folder: Path) -> None:
    """Photograph the saved view with its charts, and the parent runs side by side."""
    with mlflow_page(f"sqlite:///{directory.path.parent}/mlflow.db") as address:
        links = links_at(directory.read_run(), address)
        page = chromium.new_page(viewport=DESK)  # type: ignore[arg-type]
        open_charts(page, links)
        page.screenshot(path=folder / "mlflow-charts.png", animations="disabled")
        open_comparison(page, links)
        page.screenshot(path=folder / "mlflow-compare.png", animations="disabled")
        page.close()


def pictures_of_ray(chromium: Browser, address: str, folder: Path) -> None:
    """Photograph the Actors page, and one actor with its log and its tasks."""
    page = chromium.new_page(viewport=DASHBOARD)  # type: ignore[arg-type]
    open_actors(page, address)
    page.screenshot(path=folder / "ray-actors.png", animations="disabled")
    page.set_viewport_size(ONE_ACTOR)  # type: ignore[arg-type]
    open_actor(page)
    page.screenshot(path=folder / "ray-actor.png", animations="disabled")
    page.close()


if __name__ == "__main__":
    main()
