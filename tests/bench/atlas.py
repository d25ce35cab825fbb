#!/usr/bin/env python3
"""How long a browser takes to open an atlas: from the start of navigation to the load event, when
the list and the first latent are shown; the median of some rounds.

    tests/bench/atlas.py                    a made-up atlas of 12,288 latents
    tests/bench/atlas.py --latents 49152
    tests/bench/atlas.py --atlas out/atlas  one that saeclip wrote
"""
import argparse
import ast
import json
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
TIMER = ("<script>addEventListener('load', () => { const passed = performance.now();"
         " document.title = `${order.length} latents in ${passed} ms`; });</script>")


def page():
    """index.html after its numbers, from the table of its lines in saeclip.c."""
    source = (ROOT / "saeclip.c").read_text()
    table = source.split("const atlas_page[] = {\n")[1].split("\n};")[0]
    table = re.sub(r"/\*.*?\*/", "", table, flags=re.DOTALL)
    return "\n".join(ast.literal_eval(f"[{table}]"))


def make_atlas(folder, latents):
    """Random numbers of the same size and length as real ones, without images."""
    draw = random.Random(1)
    rows = []
    for latent in range(latents):
        frequency = 10 ** draw.uniform(-4, 0)
        mean = frequency * draw.uniform(0.1, 1)
        rows.append([latent, float(f"{frequency:.6g}"), float(f"{mean:.6g}"),
                     float(f"{draw.uniform(0, 2.77):.6g}"), draw.randrange(1000)])
    data = {"name": "made up", "images": 100000, "part": 64, "grid": 14,
            "classes": [f"class number {c}" for c in range(1000)], "latents": rows}
    image = [0, 0.5, 1, "name", "0123456789abcd" * 14]
    (folder / "data").mkdir()
    for part in range((latents + 63) // 64):
        (folder / f"data/{part}.js").write_text(f"parts[{part}] = {json.dumps([[image] * 16] * 64)};\n")
    (folder / "index.html").write_text(
        f"<!DOCTYPE html>\n<meta charset='utf-8'>\n<script>\nconst data = {json.dumps(data)};\n"
        f"</script>\n{page()}\n")


def opening(browser, folder, profile):
    """Milliseconds until the load event."""
    timed = folder / "timed.html"
    timed.write_text((folder / "index.html").read_text().replace("</body>", TIMER + "</body>"))
    shown = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                            f"--user-data-dir={profile}", timed.resolve().as_uri()],
                           capture_output=True, text=True, timeout=120).stdout
    timed.unlink()
    found = re.search(r"<title>(\d+) latents in ([\d.]+) ms</title>", shown)
    if not found:
        sys.exit(f"{browser} did not open the page: {shown[:200]}")
    return int(found[1]), float(found[2])


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parse.add_argument("--latents", type=int, default=12288)
    parse.add_argument("--atlas", type=pathlib.Path)
    parse.add_argument("--rounds", type=int, default=5)
    options = parse.parse_args()
    browser = next(filter(shutil.which, BROWSERS), None)
    if not browser:
        print("skipped: opening an atlas needs chromium, which is not installed")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.atlas or pathlib.Path(scratch) / "atlas"
        if not options.atlas:
            folder.mkdir()
            make_atlas(folder, options.latents)
        times = [opening(browser, folder, scratch + "/profile") for _ in range(options.rounds)]
    median = statistics.median(time for _, time in times) / 1000
    print(f"atlas: {times[0][0]} latents opened in {median:.2f} s"
          f" ({'under' if median < 2 else 'NOT UNDER'} 2 s)")


if __name__ == "__main__":
    main()
