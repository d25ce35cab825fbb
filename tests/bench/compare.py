#!/usr/bin/env python3
"""saeclip and other programs (peers) at the same work, in turn (A B A B ...): the ratios of their speeds, and what
they should be.

    tests/bench/compare.py [--rounds 3] [--threads N] [--peers DIR] [--python PYTHON] [--save FILE] [LINE ...]

Run it in the root of the repository after `make saeclip build/bench`. LINE: qkv out fc1 fc2 encoder vit-8 vit-1
step-topk step-relu step-half stats photos; without one, all. PYTHON has torch (and numpy for the products);
DIR/node_modules (or NODE_PATH) has onnxruntime-node. Programs that are missing are named and left out. A ratio is
taken within a round; printed is the median over rounds.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
PRODUCTS = ["qkv", "out", "fc1", "fc2", "encoder"]
VITS, STEPS = ["vit-8", "vit-1"], ["step-topk", "step-relu", "step-half"]
LINES = PRODUCTS + VITS + STEPS + ["stats", "photos"]

# A line of bench: what it is compared with ("share": with the machine's peak), and two goals, reach and aim.
TARGETS = {
    **{line: ("share", 0.88, 0.94) for line in PRODUCTS},
    "vit-8": ("onnx", 1.1, 1.2), "vit-1": ("onnx", 1.05, 1.15),
    "step-topk": ("torch", 8, 10), "step-relu": ("torch", 5, 7), "step-half": ("torch", 1.8, 2.2),
}
MEMORY, STATS, SPEEDUP = (1.3e9, 1.1e9), (1.6, 1.42), (1.85, 1.95)


def run(command, environment, missing, what):
    """The output of a program; None if it fails, which is reported once."""
    if what in missing:
        return None
    try:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    except OSError as error:
        done, reason = None, str(error)
    if done and done.returncode == 0:
        return done.stdout
    if done:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    print(f"left out: {what}: {reason}", flush=True)
    missing.add(what)
    return None


def environment_for(threads, peers):
    flags = pathlib.Path("/proc/cpuinfo")
    flags = flags.read_text().split() if flags.exists() else []
    core = "SKYLAKEX" if "avx512f" in flags else "Haswell" if "avx2" in flags else ""
    found = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    if core:
        found["OPENBLAS_CORETYPE"] = core
    if peers:
        found["NODE_PATH"] = str(pathlib.Path(peers).resolve() / "node_modules")
    return found


class Bench:
    def __init__(self, o, folder):
        self.o, self.folder, self.missing = o, folder, set()
        self.environment = environment_for(o.threads, o.peers)
        self.rounds = []                                    # per round: a dict (who, line) -> figures

    def saeclip(self, row, *lines):
        output = run([self.o.bench, "--json", "--threads", str(self.o.threads), *lines], {}, set(), self.o.bench)
        if output is None:
            sys.exit(f"{self.o.bench} does not work (expected: make build/bench)")
        for found in json.loads(output):
            row[("saeclip" if found["threads"] == self.o.threads else "single", found["name"])] = found

    def peer(self, row, who, line, command):
        output = run(command, self.environment, self.missing, who)
        if output is not None:
            row[(who, line)] = json.loads(output.strip().splitlines()[-1])

    def onnx(self, row, line):
        model = os.path.join(self.folder, "vit.onnx")
        if not os.path.exists(model):
            run([self.o.python, str(HERE / "peer_torch.py"), "export", model], self.environment, self.missing,
                "the ONNX model (torch writes it)")
        if os.path.exists(model):
            self.peer(row, "onnx", line, ["node", str(HERE / "peer_onnx.js"), model, line, str(self.o.threads)])

    def photos(self, row):
        """Decoding by pack: 64 JPEG images of 500 x 375."""
        source = pathlib.Path(self.folder) / "photos"
        if not shutil.which("cjpeg") or not shutil.which("djpeg"):
            if "photos" not in self.missing:
                print("left out: photos: cjpeg or djpeg is not installed", flush=True)
            self.missing.add("photos")
            return
        if not source.exists():
            source.mkdir()
            for i in range(64):
                pixels = bytes((x * y // 99 + 2 * x * (c + i) + 3 * y + (x * 7919 + y * 104729) % 23) % 256
                               for y in range(375) for x in range(500) for c in range(3))
                subprocess.run(["cjpeg", "-quality", "90", "-outfile", str(source / f"{i}.jpg")], check=True,
                               input=b"P6 500 375 255\n" + pixels)
        packed = os.path.join(self.folder, "packed.safetensors")
        start = time.perf_counter()
        subprocess.run([self.o.saeclip, "pack", "--quiet", "--threads", str(self.o.threads), str(source), "-o", packed],
                       check=True)
        row[("saeclip", "photos")] = {"seconds": (time.perf_counter() - start) / 64}

    def one_round(self):
        row, lines = {}, self.o.lines
        torch = [self.o.python, str(HERE / "peer_torch.py")]
        for line in lines:
            if line == "stats":
                self.saeclip(row, "vit-8", "stats", "eval")
            elif line == "photos":
                self.photos(row)
            else:
                self.saeclip(row, line)
            if line in PRODUCTS:
                self.peer(row, "blas", line, [self.o.python, str(HERE / "peer_blas.py"), line])
            if line in VITS:
                self.onnx(row, line)
            if line in VITS + STEPS:
                self.peer(row, "torch", line, torch + [line])
            print(f"round {len(self.rounds) + 1}: {line}", flush=True)
        self.rounds.append(row)

    def each(self, figure):
        """A figure from each round that has it."""
        found = []
        for row in self.rounds:
            try:
                found.append(figure(row))
            except KeyError:
                pass
        return found

    def ratio(self, line, who):
        return self.each(lambda row: row[(who, line)]["seconds"] / row[("saeclip", line)]["seconds"])

    def seconds(self, line, who):
        found = self.each(lambda row: row[(who, line)]["seconds"])
        return f"{1e3 * statistics.median(found):.4g} ms" if found else "-"

    def line(self, what, ours, peer, values, target=None, unit="{:.3g}"):
        if not values:
            return
        middle = statistics.median(values)
        rounds = " ".join(unit.format(v) for v in values)
        verdict, wanted = "", ""
        if target:
            reach, aim = target
            less = reach > aim                              # less is better
            right = [middle <= t if less else middle >= t for t in target]
            verdict = "aim" if right[1] else "reach" if right[0] else "SHORT"
            wanted = ("at most " if less else "") + f"{unit.format(reach)}, {unit.format(aim)}"
        print(f"{what:34} {ours:>11} {peer:>22} {unit.format(middle):>9} {wanted:>22} {verdict:6} [{rounds}]")

    def report(self):
        threads, figure = self.o.threads, lambda who, line, key: self.each(lambda row: row[(who, line)][key])
        print(f"\nsaeclip with {threads} threads and its peers, medians of {len(self.rounds)} rounds [each round]")
        print(f"{'work':34} {'saeclip':>11} {'peer, peak, one thread':>22} {'ratio':>9} {'reach, aim':>22}")
        for line in [l for l in self.o.lines if l in TARGETS]:
            who, *target = TARGETS[line]
            ours = self.seconds(line, "saeclip")
            if who == "share":
                blas = figure("blas", line, "gflops")
                peak = self.each(lambda row: row[("saeclip", line)]["gflops"] / row[("saeclip", line)]["share"])
                self.line(f"{line}, of the FMA peak", ours, f"{statistics.median(peak):.4g} GFLOP/s",
                          figure("saeclip", line, "share"), target, "{:.1%}")
                if blas:
                    self.line(f"{line}, against OpenBLAS", ours, f"{statistics.median(blas):.4g} GFLOP/s",
                              self.ratio(line, "blas"))
                continue
            for peer, name in (("onnx", "ONNX Runtime"), ("torch", "PyTorch")):
                self.line(f"{line}, against {name}", ours, self.seconds(line, peer), self.ratio(line, peer),
                          target if peer == who else None)
        for line in [l for l in STEPS if l in self.o.lines]:
            torch = figure("torch", line, "peak_memory")
            self.line(f"{line}, peak memory, MB", "", f"{statistics.median(torch) / 1e6:.0f} MB" if torch else "-",
                      [v / 1e6 for v in figure("saeclip", line, "peak_memory")], [v / 1e6 for v in MEMORY], "{:.0f}")
        for line in ("stats", "eval"):
            self.line(f"{line}, of ViT-B/16 alone", self.seconds(line, "saeclip"), "",
                      figure("saeclip", line, "of_vit"), STATS)
        for line in [l for l in LINES[:-1] + ["eval"] if threads > 1]:
            self.line(f"{line}, {threads} threads over one", self.seconds(line, "saeclip"), self.seconds(line, "single"),
                      figure("saeclip", line, "speedup"), SPEEDUP if threads == 2 else None)
        self.line("photos decoded by djpeg, per second", self.seconds("photos", "saeclip"), "",
                  [1 / v for v in figure("saeclip", "photos", "seconds")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", help="folder with node_modules (default: NODE_PATH as it is)")
    parser.add_argument("--python", default="/usr/bin/python3", help="one that has torch and numpy")
    parser.add_argument("--saeclip", default="./saeclip")
    parser.add_argument("--bench", default="build/bench")
    parser.add_argument("--save", help="write everything that was measured, as JSON")
    o = parser.parse_args()
    o.lines = o.lines or LINES
    for line in o.lines:
        if line not in LINES:
            parser.error(f"invalid line '{line}' (expected one of {' '.join(LINES)})")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, folder)
        for _ in range(o.rounds):
            bench.one_round()
    bench.report()
    if o.save:
        rounds = [[{"who": who, "line": line, **found} for (who, line), found in row.items()] for row in bench.rounds]
        pathlib.Path(o.save).write_text(json.dumps(rounds, indent=1))


main()
