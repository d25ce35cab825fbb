#!/usr/bin/env python3
"""An implementation in PyTorch that is checked against saeclip; `make verify` runs it (see README.md here).

    python3 tests/verify/example.py IN OUT [gelu|penalty]

Each stage starts from a file that saeclip wrote to the folder IN, so that an error in one stage does not hide
another, and writes its results to the folder OUT under saeclip's names. The last argument puts in one of two bugs.
The transformer and the SAE are those of tests/golden/reference.py, in float32.
"""
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "golden"))
from reference import decode, encode, geometric_median, load, normalise, save, vit  # noqa: E402

MODEL = os.path.join(HERE, "..", "..", "weights", "demo.safetensors")
BATCH, STEPS, LR, L1 = 8, 10, 1e-3, 1e-3                    # those of `saeclip train` in verify.sh


def tensors(path):
    """-> {name: float32 tensor} of the file's float tensors, metadata"""
    arrays, metadata = load(path)
    floats = {name: a for name, a in arrays.items() if a.dtype.kind == "f"}
    return {name: torch.from_numpy(np.array(a, np.float32)) for name, a in floats.items()}, metadata


# ---------------------------------------------------------------------------------- the vision transformer

def model_weights(path):
    """-> the weights under timm's names, as vit() takes them, and the metadata of a file with Hugging Face's names"""
    w, metadata = tensors(path)
    end = ".weight", ".bias"
    names = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding.weight": "pos_embed",
             "embeddings.patch_embedding.weight": "patch_embed.proj.weight"}
    names.update({"pre_layrnorm" + e: "norm_pre" + e for e in end})
    out = {timm: w["vision_model." + hf] for hf, timm in names.items()}
    block = 0
    while f"vision_model.encoder.layers.{block}.mlp.fc1.weight" in w:
        hf, timm = f"vision_model.encoder.layers.{block}.", f"blocks.{block}."
        for e in end:
            out[timm + "attn.qkv" + e] = torch.cat([w[f"{hf}self_attn.{part}_proj{e}"] for part in "qkv"])
            for a, b in (("layer_norm1", "norm1"), ("self_attn.out_proj", "attn.proj"), ("layer_norm2", "norm2"),
                         ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                out[timm + b + e] = w[hf + a + e]
        block += 1
    return out, metadata


def write_activations(images, out, bug):
    """images: U8 [N, H, W, 3]. Writes BLOCK-HOOK.safetensors with the activations [N, T, D] of each hook point."""
    w, metadata = model_weights(MODEL)
    mean, std = ([float(v) for v in metadata[name].split(",")] for name in ("image_mean", "image_std"))
    gelu = "erf" if bug == "gelu" else "quick"              # the bug: PyTorch's own GELU is the exact one
    x = normalise(images, mean, std, torch.float32)
    hooks, _ = vit(w, x, int(metadata["num_attention_heads"]), gelu, float(metadata["layer_norm_eps"]))
    for (block, hook), activations in hooks.items():
        save(f"{out}/{block}-{hook}.safetensors", {"activations": activations})


# ---------------------------------------------------------------------------------- training

def training_step(sae, adam, x, bug):
    """x: [tokens, D]. Changes the SAE's weights; their gradients stay in .grad. -> {column of the log: number}"""
    with torch.no_grad():
        sae["W_dec"] /= sae["W_dec"].norm(dim=1, keepdim=True)
    h, f = encode(sae, x)
    error = (decode(sae, f) - x) ** 2
    mse = (error / x.norm(dim=1, keepdim=True)).mean()
    axis = 0 if bug == "penalty" else 1                     # the bug: |f| summed over tokens, not over latents
    l1 = L1 * f.abs().sum(axis).mean()
    adam.zero_grad()
    (mse + l1).backward()
    with torch.no_grad():
        W, dW = sae["W_dec"], sae["W_dec"].grad
        dW -= (dW * W).sum(1, keepdim=True) * W             # the component that would change a row's length
    adam.step()
    return {"loss": (mse + l1).item(), "mse": mse.item(), "l1": l1.item(), "l0": (f > 0).sum(1).float().mean().item()}


def write_training(acts, start, out, bug):
    """acts: [N, T, D]. Writes step1.safetensors, Adam's first moments after one step, which are a tenth of the first
    gradients; trained.safetensors, the weights after all steps; and log.csv."""
    sae = {name: t.clone().requires_grad_(True) for name, t in start.items()}
    adam = torch.optim.Adam(sae.values(), lr=LR, betas=(0.9, 0.999), eps=1e-8)
    with open(f"{out}/log.csv", "w", encoding="ascii") as log:
        log.write("loss,mse,l1,l0\n")
        for step in range(STEPS):
            images = [(step * BATCH + i) % len(acts) for i in range(BATCH)]       # --order sequential
            row = training_step(sae, adam, acts[images].reshape(-1, acts.shape[2]), bug)
            log.write(",".join(f"{value:.9g}" for value in row.values()) + "\n")
            if step == 0:
                moments = {name + "_m": adam.state[t]["exp_avg"].clone() for name, t in sae.items()}
                moments["W_enc_m"] = moments["W_enc_m"].T.contiguous()            # [n, D], as in saeclip's checkpoint
                save(f"{out}/step1.safetensors", moments)
    save(f"{out}/trained.safetensors", sae)


def main(source, out, bug=None):
    os.makedirs(out, exist_ok=True)
    write_activations(load(f"{source}/images.safetensors")[0]["images"], out, bug)

    acts = tensors(f"{source}/5-mlp.safetensors")[0]["activations"]               # [N, T, D]
    start, _ = tensors(f"{source}/start.safetensors")
    b_dec, _ = geometric_median(acts[:BATCH].flatten(0, 1))
    save(f"{out}/start.safetensors", {"b_dec": b_dec.float()})

    write_training(acts, start, out, bug)

    sae, _ = tensors(f"{source}/trained.safetensors")
    _, f = encode(sae, acts.flatten(0, 1))
    save(f"{out}/codes.safetensors", {"f": f, "reconstruction": decode(sae, f),
                                      "image_means": f.reshape(len(acts), -1, f.shape[1]).mean(1)})


if __name__ == "__main__":
    main(*sys.argv[1:])
