#!/usr/bin/env python3
"""ViT-B/16's exact shapes with random weights: is saeclip as near to float64 as PyTorch's own float32 is?

    python3 vit_b16.py make DIR              writes DIR/vit_b16.safetensors (CLIP under Hugging Face's names, F32,
                                             345 MB), DIR/pictures.safetensors (two of 224 x 224) and
                                             DIR/expected.safetensors (every hook in float64, PyTorch's float32 errors)
    saeclip extract -m DIR/vit_b16.safetensors --layer 11 --hook mlp DIR/pictures.safetensors -o DIR/out.safetensors
    python3 vit_b16.py compare DIR/expected.safetensors DIR/out.safetensors ...

The rule: the largest error over the largest value is at most 2e-5 and at most 3 times PyTorch's own. Status 1 if not.
"""
import os
import sys

import numpy as np
import torch

from make_golden import huggingface, off, to
from reference import CLIP_MEAN, CLIP_STD, load, normalise, save, vit

BLOCKS, D, HEADS, PATCH, TOKENS, P = 12, 768, 12, 16, 197, 512


def weights():
    """timm's names; standard deviations like CLIP's own, LayerNorm's weights near 1"""
    rng = np.random.default_rng(16)
    normal = lambda std, *shape: np.float32(std) * rng.standard_normal(shape, np.float32)
    w = {"cls_token": normal(0.04, 1, 1, D), "pos_embed": normal(0.04, 1, TOKENS, D), "head.weight": normal(0.04, P, D),
         "patch_embed.proj.weight": normal(0.02, D, 3, PATCH, PATCH)}
    norms = ["norm_pre", "norm"] + [f"blocks.{b}.norm{i}" for b in range(BLOCKS) for i in (1, 2)]
    for name in norms:
        w[name + ".weight"], w[name + ".bias"] = 1 + normal(0.1, D), normal(0.05, D)
    for b in range(BLOCKS):
        for part, out, into in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D), ("mlp.fc2", D, 4 * D)):
            w[f"blocks.{b}.{part}.weight"], w[f"blocks.{b}.{part}.bias"] = normal(0.04, out, into), normal(0.05, out)
    return w


def make(folder):
    os.makedirs(folder, exist_ok=True)
    w, rng = weights(), np.random.default_rng(17)
    y, x, c = np.mgrid[0:224, 0:224, 0:3]
    images = np.stack([128 + 80 * np.sin(x / a + y / b + c) + 30 * rng.standard_normal(x.shape)
                       for a, b in ((9, 31), (50, -7))]).clip(0, 255).astype(np.uint8)
    save(f"{folder}/vit_b16.safetensors", huggingface(w, BLOCKS), {"format": "pt"})
    save(f"{folder}/pictures.safetensors", {"images": images})
    run = lambda dtype: vit(to(w, dtype), normalise(images, CLIP_MEAN, CLIP_STD, dtype), HEADS, "quick", 1e-5)
    with torch.no_grad():
        (right, head), (single, single_head) = run(torch.float64), run(torch.float32)
    out = {f"layer{b}.{hook}": t for (b, hook), t in right.items()}
    errors = {f"float32_error.layer{b}.{hook}": np.float64(off(single[b, hook], t)) for (b, hook), t in right.items()}
    save(f"{folder}/expected.safetensors", {**out, "head": head, **errors, "float32_error.head": np.float64(off(single_head, head))})
    for b in range(1, BLOCKS + 1):
        print(f"block {b:2}:", "  ".join(f"{hook} largest {right[b, hook].abs().max():7.3f}, PyTorch's float32 error "
                                         f"{errors[f'float32_error.layer{b}.{hook}']:.2e}" for hook in ("attn", "mlp", "resid")))
    print(f"head: largest {head.abs().max():.3f}, PyTorch's float32 error {off(single_head, head):.2e}")


def compare(expected, files):
    """files: of saeclip extract, whose metadata say which layer and hook they are"""
    expected, bad = load(expected)[0], 0
    print(f"{'layer':>5} {'hook':6} {'error':>9} {'PyTorch':>9} {'ratio':>6}")
    for file in files:
        tensors, metadata = load(file)
        assert tensors["activations"].shape == expected[f"layer{metadata['layer']}.{metadata['hook']}"].shape, file
        name = f"layer{metadata['layer']}.{metadata['hook']}"
        error, own = off(tensors["activations"], expected[name]), float(expected["float32_error." + name])
        fits = error <= 2e-5 and error <= 3 * own
        bad += not fits
        print(f"{metadata['layer']:>5} {metadata['hook']:6} {error:9.2e} {own:9.2e} {error / own:6.2f} {'' if fits else ' TOO FAR'}")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) >= 3 and sys.argv[1] == "make":
        make(sys.argv[2])
    elif len(sys.argv) >= 4 and sys.argv[1] == "compare":
        sys.exit(compare(sys.argv[2], sys.argv[3:]))
    else:
        sys.exit(__doc__)
