#!/usr/bin/env python3
"""The real check: ViT-Ti/16 on imagenet-700 in PyTorch and Pillow: 577 of 700 at top 1, 675 at top 5.

    python3 vit_tiny_reference.py SHARED_DATA OUT

Also writes OUT/vit_tiny_expected.safetensors, float64 results for the list's first 20 pictures ("vit_b16.py compare"
reads it), and OUT/vit_tiny_pictures.safetensors, their pixels as a packed set.
"""
import os
import sys

import numpy as np
import torch
from PIL import Image

from make_golden import off, to
from reference import load, normalise, save, vit


def preprocess(path, S=224):
    """The shorter side to S with Pillow's bicubic filter, the long side floor(S long / short), centre crop (torchvision's)"""
    image = Image.open(path).convert("RGB")
    w, h = image.size
    w, h = (S, S * h // w) if w <= h else (S * w // h, S)
    left, top = round((w - S) / 2), round((h - S) / 2)                    # Python rounds halves to even
    return np.asarray(image.resize((w, h), Image.BICUBIC).crop((left, top, left + S, top + S)))


def main(data, out):
    lines = [line.rstrip("\n").split("\t") for line in open(f"{data}/imagenet-700.txt") if not line.startswith("#")]
    labels = np.array([int(label) for _, label in lines])
    images = np.stack([preprocess(f"{data}/{path}") for path, _ in lines])
    w, metadata = load(f"{data}/vit_tiny_patch16_224.safetensors")
    half = (0.5, 0.5, 0.5)
    run = lambda some, dtype: vit(to(w, dtype), normalise(some, half, half, dtype), 3, "erf", 1e-6)
    with torch.no_grad():
        logits = torch.cat([run(images[i:i + 50], torch.float32)[1] for i in range(0, len(images), 50)]).numpy()
        hooks, head = run(images[:20], torch.float64)
        single, _ = run(images[:20], torch.float32)
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(1)
    print(f"images {len(images)}, top1 {(rank < 1).sum()}, top5 {(rank < 5).sum()}")
    ordered = -np.sort(-logits, 1)
    print(f"smallest margins: {np.sort(ordered[:, 0] - ordered[:, 1])[:3]} at top 1, {np.sort(ordered[:, 4] - ordered[:, 5])[:3]} at top 5")
    os.makedirs(out, exist_ok=True)
    kept = {f"layer{b}.{hook}": hooks[b, hook] for b in (11, 12) for hook in ("attn", "mlp", "resid")}
    errors = {f"float32_error.layer{b}.{hook}": np.float64(off(single[b, hook], hooks[b, hook]))
              for b in (11, 12) for hook in ("attn", "mlp", "resid")}
    print({name: f"{float(e):.2g}" for name, e in errors.items()}, "logits", f"{off(logits[:20], head):.2g}")
    save(f"{out}/vit_tiny_pictures.safetensors", {"images": images[:20]})
    save(f"{out}/vit_tiny_expected.safetensors", {"logits": head, **kept, **errors, "all_logits": logits, "all_labels": labels})


if __name__ == "__main__":
    main(*sys.argv[1:])
