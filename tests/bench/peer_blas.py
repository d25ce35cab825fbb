"""The matrix product of numpy, with the BLAS that it was built with, at the shapes of build/bench.

    OPENBLAS_NUM_THREADS=2 /usr/bin/python3 peer_blas.py qkv|out|fc1|fc2|encoder

Prints one line of JSON: seconds and GFLOP/s (median of three runs after one that is not counted)."""
import json
import statistics
import sys
import time

import numpy

SHAPES = {"qkv": (1576, 768, 2304), "out": (1576, 768, 768), "fc1": (1576, 768, 3072), "fc2": (1576, 3072, 768),
          "encoder": (2364, 768, 49152)}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in SHAPES:
        sys.exit(__doc__)
    M, K, N = SHAPES[sys.argv[1]]
    random = numpy.random.default_rng(1)
    a, b = (random.random(shape, dtype=numpy.float32) for shape in ((M, K), (K, N)))
    c = numpy.empty((M, N), dtype=numpy.float32)
    start = time.perf_counter()
    numpy.matmul(a, b, out=c)
    repeat, runs = int(0.3 / (time.perf_counter() - start)) + 1, []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeat):
            numpy.matmul(a, b, out=c)
        runs.append((time.perf_counter() - start) / repeat)
    seconds = statistics.median(runs)
    print(json.dumps({"name": sys.argv[1], "seconds": seconds, "gflops": 2e-9 * M * N * K / seconds}))


main()
