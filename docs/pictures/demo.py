"""Make the pictures of the demo that README.md and docs/ show.

    python docs/pictures/demo.py --workdir=runs/demo

Needs Chromium, and the folder in which `launch/demo.sh` has run. Writes beside
this file: masks.png, features.png, and report.png, the top of the page.
"""

import argparse
import pathlib
import subprocess
import tempfile

from PIL import Image

from vjepa_jax import probe
from vjepa_jax.evals import frozen
from vjepa_jax.report import __main__ as report

FOLDER = pathlib.Path(__file__).parent
CHROMIUM = "chromium"
WIDTH, HEIGHT = 1280, 1345  # of the screenshot: to the end of the first table
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--virtual-time-budget=5000"),
    "--force-prefers-reduced-motion",  # clips stay at their first frame
)


def take_screenshot(page: pathlib.Path, image: pathlib.Path) -> None:
    """Write the top of a page, as a light browser window shows it, as a small PNG."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *(CHROMIUM, *_FLAGS, f"--user-data-dir={profile}"),
            *(f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image}"),
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True)
    pixels = Image.open(image).convert("RGB")
    pixels.quantize(256, dither=Image.Dither.NONE).save(image, optimize=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    options = parser.parse_args()
    probe.draw_pictures(frozen.load(options.workdir), 0, FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder) / "report.html"
        report.write_report(options.workdir, output=str(page))
        take_screenshot(page, FOLDER / "report.png")


if __name__ == "__main__":
    main()
