#!/usr/bin/python3
"""Writes golden/images.bin: pictures from a formula, resized and cropped by Pillow as torchvision
does it (Resize(S, BICUBIC), CenterCrop(S)), and its normalisation in float32.

A record is six little-endian uint32 (width, height, size, square, crop_hf, 1 if only a digest
follows) and the pixels [S, S, 3], or their digest. The last one has width 0 and the digest of the normalised values [3, 256], F32 little-endian. Needs Pillow and numpy."""
import os
import struct
import sys

import numpy as np
from PIL import Image

MASK = (1 << 64) - 1


def digest(data):
    """FNV-1a"""
    state = 0xCBF29CE484222325
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 & MASK
    return state


def source(width, height):
    """Tiles of noise and of gradients; the test has the same formula."""
    y, x, c = np.meshgrid(np.arange(height, dtype=np.uint64), np.arange(width, dtype=np.uint64),
                          np.arange(3, dtype=np.uint64), indexing="ij")
    h = (x * 374761393 + y * 668265263 + c * 2246822519) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 1274126177) & 0xFFFFFFFF
    noise = (h >> 16) & 255
    gradient = (x * 5 + y * 3 + c * 85) & 255
    return np.where(((x >> 4) + (y >> 4)) & 1 == 1, noise, gradient).astype(np.uint8)


def half(n, crop_hf):
    return n // 2 if crop_hf else int(round(n / 2.0))


def preprocess(image, size, square, crop_hf):
    if square:
        side = min(image.size)
        left, top = (half(n - side, crop_hf) for n in image.size)
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((square, square), Image.BICUBIC)
    width, height = image.size
    short, long = sorted(image.size)
    new = (size, int(size * long / short))
    new = new if width <= height else new[::-1]
    image = image.resize(new, Image.BICUBIC)
    left, top = (half(n - size, crop_hf) for n in new)
    return np.asarray(image.crop((left, top, left + size, top + size)))


CASES = [(w, h, s, 0, 0) for s in (32,) for w, h in
         [(68, 500), (1, 1), (3, 1000), (1000, 3), (32, 32), (33, 32), (32, 35), (37, 53), (640, 1),
          (2, 2), (500, 375), (31, 77), (35, 32)]]
CASES += [(w, h, s, 0, 1) for w, h, s in [(35, 32, 32), (32, 35, 32), (101, 67, 21)]]
CASES += [(w, h, s, q, f) for w, h, s, q, f in
          [(500, 375, 64, 0, 0), (90, 61, 24, 40, 0), (61, 90, 40, 40, 0), (61, 90, 24, 40, 1),
           (40, 40, 40, 40, 0), (60, 45, 64, 256, 0)]]
DIGESTS = [(500, 375, 224, 0, 0), (375, 500, 224, 0, 0), (224, 224, 224, 0, 0), (225, 224, 224, 0, 0),
           (1024, 768, 224, 256, 0), (64, 64, 224, 0, 0), (68, 500, 224, 0, 1), (2000, 1500, 336, 0, 0)]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)   # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def main(path):
    with open(path, "wb") as out:
        for case in CASES + DIGESTS:
            width, height, size, square, crop_hf = case
            pixels = preprocess(Image.fromarray(source(width, height)), size, square, crop_hf).tobytes()
            out.write(struct.pack("<6I", *case, case in DIGESTS))
            out.write(struct.pack("<Q", digest(pixels)) if case in DIGESTS else pixels)
        value = np.arange(256, dtype=np.float32) / np.float32(255)
        normal = (value[None, :] - MEAN[:, None]) / STD[:, None]
        assert normal.dtype == np.float32
        out.write(struct.pack("<6IQ", 0, 0, 0, 0, 0, 1, digest(normal.astype("<f4").tobytes())))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "golden", "images.bin"))
