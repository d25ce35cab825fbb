#!/usr/bin/env python3
"""Writes the golden files beside itself: python3 make_golden.py   (PyTorch 1.13 or later; a minute)

Inputs are float32 values, so a C program reads exactly what PyTorch read; results are computed in float64 and stored
as float32, or as CSV with 17 digits. The reports on standard output say how far PyTorch's own float32 lies from
float64 (the tolerance to ask of another program) and how much each likely mistake would change the result.
"""
import csv
import json
import os

import numpy as np
import torch

from reference import (CLIP_MEAN, CLIP_STD, decode, encode, evaluate, geometric_median, load, normalise, save,
                       statistics, train, vit)

HERE = os.path.dirname(os.path.abspath(__file__))


def put(name, tensors, metadata=None):
    path = os.path.join(HERE, name)
    save(path, tensors, metadata)
    print(f"    wrote {name}, {os.path.getsize(path)} bytes")


def put_csv(name, rows, columns):
    with open(os.path.join(HERE, name), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([v if isinstance(v, (str, int)) else f"{v:.17g}" for v in (row[c] for c in columns)] for row in rows)
    print(f"    wrote {name}, {os.path.getsize(os.path.join(HERE, name))} bytes")


def to(tensors, dtype):
    return {name: torch.from_numpy(np.array(t, np.float32)).to(dtype) for name, t in tensors.items()}


def off(a, b):
    """largest error over largest value"""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


# ---------------------------------------------------------------------------------- models

def grid(rng, shape, std):
    """Normal numbers that F16 and BF16 hold exactly (std a power of two): the same weights in every file type"""
    return np.float32(np.round(rng.standard_normal(shape) * 32).clip(-255, 255) / 32 * std)


def near_one(rng, D):
    return np.float32(1 + np.round(rng.standard_normal(D) * 8).clip(-31, 31) / 64)


def tiny_vit(rng, width, hidden, blocks, patch, tokens, std, any_float):
    """Weights under timm's names, without the head. any_float: vectors hold any float32, not only those of the grid."""
    vector = (lambda shape, s: np.float32(rng.standard_normal(shape) * s)) if any_float else (lambda shape, s: grid(rng, shape, s))
    scale = (lambda D: np.float32(1 + rng.standard_normal(D) / 8)) if any_float else (lambda D: near_one(rng, D))
    w = {"cls_token": vector((1, 1, width), 2**-4), "pos_embed": vector((1, tokens, width), 2**-4),
         "patch_embed.proj.weight": grid(rng, (width, 3, patch, patch), 2**-8)}
    for b in range(blocks):
        name = f"blocks.{b}."
        for part, shape in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
                            ("mlp.fc1", (hidden, width)), ("mlp.fc2", (width, hidden))):
            w[name + part + ".weight"] = grid(rng, shape, std if part != "mlp.fc2" else 2**-4)
            w[name + part + ".bias"] = vector(shape[0], 2**-3)
        for part in ("norm1", "norm2"):
            w[name + part + ".weight"], w[name + part + ".bias"] = scale(width), vector(width, 2**-3)
    w["norm.weight"], w["norm.bias"] = scale(width), vector(width, 2**-3)
    return w


def huggingface(w, blocks):
    """The same CLIP under Hugging Face's names"""
    D, v, out = w["cls_token"].size, "vision_model.", {}
    out[v + "embeddings.class_embedding"] = w["cls_token"].reshape(D)
    out[v + "embeddings.patch_embedding.weight"] = w["patch_embed.proj.weight"]
    out[v + "embeddings.position_embedding.weight"] = w["pos_embed"][0]
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        for end in (".weight", ".bias"):
            out[v + theirs + end] = w[ours + end]
    for b in range(blocks):
        ours, theirs = f"blocks.{b}.", f"{v}encoder.layers.{b}."
        for end in (".weight", ".bias"):
            for name, part in zip("qkv", np.split(w[ours + "attn.qkv" + end], 3)):
                out[f"{theirs}self_attn.{name}_proj{end}"] = part
            for a, h in (("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                         ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                out[theirs + h + end] = w[ours + a + end]
    out["visual_projection.weight"] = w["head.weight"]
    return out


def openai(w, blocks):
    """The same CLIP under OpenAI's and OpenCLIP's names: the projection is [D, P]"""
    D, v, out = w["cls_token"].size, "visual.", {}
    out[v + "class_embedding"] = w["cls_token"].reshape(D)
    out[v + "positional_embedding"] = w["pos_embed"][0]
    out[v + "proj"] = np.ascontiguousarray(w["head.weight"].T)
    out[v + "conv1.weight"] = w["patch_embed.proj.weight"]
    for end in ("weight", "bias"):
        out[v + "ln_pre." + end], out[v + "ln_post." + end] = w["norm_pre." + end], w["norm." + end]
    for b in range(blocks):
        ours, theirs = f"blocks.{b}.", f"{v}transformer.resblocks.{b}."
        for end in ("weight", "bias"):
            out[theirs + "attn.in_proj_" + end] = w[ours + "attn.qkv." + end]
            for a, h in (("attn.proj", "attn.out_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                out[f"{theirs}{h}.{end}"] = w[f"{ours}{a}.{end}"]
    return out


def text_tower(rng, prefix, D):
    """Some of the text tower's tensors, which a reader of the vision tower must pass over"""
    if prefix == "text_model.":
        return {"logit_scale": np.float32(4.5), "text_projection.weight": grid(rng, (20, 8), 1.0),
                "text_model.embeddings.token_embedding.weight": grid(rng, (11, 8), 1.0),
                "text_model.encoder.layers.0.self_attn.q_proj.weight": grid(rng, (8, 8), 1.0),
                "text_model.encoder.layers.0.layer_norm1.weight": grid(rng, 8, 1.0)}
    return {"logit_scale": np.float32(4.5), "text_projection": grid(rng, (8, 20), 1.0), "positional_embedding": grid(rng, (7, 8), 1.0),
            "token_embedding.weight": grid(rng, (11, 8), 1.0), "ln_final.weight": grid(rng, 8, 1.0),
            "transformer.resblocks.0.attn.in_proj_weight": grid(rng, (24, 8), 1.0), "transformer.resblocks.0.ln_1.weight": grid(rng, 8, 1.0)}


def pictures(rng):
    """Three pictures [3, 40, 40, 3] of waves and noise"""
    y, x, c = np.mgrid[0:40, 0:40, 0:3]
    waves = [np.sin(x / 3 + c), np.cos(y / 5 - x / 7 + 2 * c), np.sin((x - 20) * (y - 20) / 60 + c)]
    return np.stack([128 + 90 * w + 25 * rng.standard_normal(w.shape) for w in waves]).clip(0, 255).astype(np.uint8)


def cosines(embedding, text):
    normal = torch.nn.functional.normalize
    return normal(embedding, dim=1) @ normal(text, dim=1).T


def ranks(scores, labels):
    """0-based rank of each picture's own class"""
    return np.array([(s > s[c]).sum() for s, c in zip(np.asarray(scores), labels)])


def expected(w, images, mean, std, heads, gelu, eps):
    """float64 results as {name: array}; prints float32's distance, and what each likely mistake would change"""
    def run(dtype, mean=mean, std=std, heads=heads, gelu=gelu, eps=eps):
        hooks, head = vit(to(w, dtype), normalise(images, mean, std, dtype), heads, gelu, eps)
        return {**{f"layer{b}.{hook}": t.numpy() for (b, hook), t in hooks.items()}, "head": head.numpy()}
    right, single = run(torch.float64), run(torch.float32)
    worst = lambda other: max(off(other[name], right[name]) for name in right)
    print(f"    float32 against float64: {worst(single):.2g};  wrong eps {worst(run(torch.float64, eps=1.1e-5 - eps)):.2g}, wrong GELU"
          f" {worst(run(torch.float64, gelu='erf' if gelu == 'quick' else 'quick')):.2g}, one head {worst(run(torch.float64, heads=1)):.2g}")
    return right


def models():
    print("models")
    rng = np.random.default_rng(1)
    images = pictures(rng)
    clip = tiny_vit(rng, width=32, hidden=100, blocks=3, patch=10, tokens=17, std=2**-2, any_float=False)
    clip["norm_pre.weight"], clip["norm_pre.bias"] = near_one(rng, 32), grid(rng, 32, 2**-3)
    clip["head.weight"] = grid(rng, (20, 32), 2**-2)
    text = np.float32(rng.standard_normal((10, 20)) * rng.uniform(0.5, 3, (10, 1)))
    names = ["tench, Tinca tinca", "caf\u00e9", 'a "quoted" name', "back\\slash", "tab\there", "\u732b", "plain", "", "\U0001f600", "last"]
    right = expected(clip, images, CLIP_MEAN, CLIP_STD, 2, "quick", 1e-5)
    right["cosine"] = cosines(torch.tensor(right["head"]), torch.tensor(text).double()).numpy()
    order = (-right["cosine"]).argsort(1)
    labels = np.array([order[0, 0], order[1, 2], order[2, 7]])              # right at top 1, at top 5, not at all
    put("images.safetensors", {"images": images, "labels": labels},
        {"class_names": json.dumps(names), "file_names": json.dumps(["waves/one.ppm", "waves/two.ppm", "caf\u00e9/three.ppm"])})
    heads = {"num_attention_heads": "2"}
    hf = {name: (t, "BF16") for name, t in {**text_tower(rng, "text_model.", 32), **huggingface(clip, 3)}.items()}
    put("clip_hf.safetensors", {**hf, "vision_model.embeddings.position_ids": np.arange(17)[None], "text_embeds": text},
        {**heads, "class_names": json.dumps(names), "format": "pt"})
    put("clip_openai.safetensors", {name: (t, "F16") for name, t in {**text_tower(rng, "", 32), **openai(clip, 3)}.items()}, heads)
    put("clip_timm.safetensors", clip, {**heads, "hidden_act": "quick_gelu", "layer_norm_eps": "1e-05"})
    put("clip_expected.safetensors", {name: np.float32(t) for name, t in right.items()})
    r = ranks(right["cosine"], labels)
    print(f"    zeroshot: images 3, top1 {(r < 1).sum()}, top5 {(r < 5).sum()}")

    plain = tiny_vit(rng, width=128, hidden=260, blocks=1, patch=8, tokens=26, std=2**-3, any_float=True)
    plain["patch_embed.proj.bias"] = np.float32(rng.standard_normal(128) / 16)
    plain["head.weight"], plain["head.bias"] = grid(rng, (10, 128), 2**-3), np.float32(rng.standard_normal(10))
    right = expected(plain, images, (0.5,) * 3, (0.5,) * 3, 2, "erf", 1e-6)
    put("vit_timm.safetensors", {name: (t, "F16" if t.ndim > 1 and name.endswith("weight") else "F32") for name, t in plain.items()},
        {"image_mean": "0.5,0.5,0.5", "image_std": "0.5,0.5,0.5"})
    put("vit_expected.safetensors", {name: np.float32(t) for name, t in right.items()})
    r = ranks(right["head"], labels)
    print(f"    zeroshot: images 3, top1 {(r < 1).sum()}, top5 {(r < 5).sum()}; smallest gap between logits "
          f"{min(np.diff(np.sort(s)).min() for s in right['head']):.2g}")


LOOP = [("attn", None), ("mlp", None), ("resid", None), ("mlp", 6)]       # hook, TopK's k


def loop():
    """The SAE in the loop: what zeroshot compares when at layer 2 of the golden CLIP x' stands in the place of x"""
    print("SAE in the loop")
    rng = np.random.default_rng(4)
    clip = {name: np.array(t) for name, t in load(os.path.join(HERE, "clip_timm.safetensors"))[0].items()}
    images = load(os.path.join(HERE, "images.safetensors"))[0]
    text = torch.tensor(np.array(load(os.path.join(HERE, "clip_hf.safetensors"))[0]["text_embeds"])).double()
    W_dec = rng.standard_normal((48, 32)) / 32 ** 0.5
    sae = {name: np.float32(t) for name, t in {"W_enc": W_dec.T * rng.uniform(0.4, 1, 48), "b_enc": rng.standard_normal(48) / 4,
                                               "W_dec": W_dec, "b_dec": rng.standard_normal(32) / 2}.items()}
    put("loop_sae.safetensors", sae, {"layer": "2", "hook": "mlp"})
    right = {}
    for hook, k in LOOP:
        margins = []

        def cosine(dtype, change=True):
            def reconstruct(x):
                flat, s = x.reshape(-1, 32), to(sae, dtype)
                h, f = encode(s, flat, k)
                margins.append(h.sort(1).values.diff(dim=1)[:, -6].min().item() if k else 1)
                return decode(s, f).reshape(x.shape)
            head = vit(to(clip, dtype), normalise(images["images"], CLIP_MEAN, CLIP_STD, dtype), 2, "quick", 1e-5,
                       {(2, hook): reconstruct} if change else None)[1]
            return cosines(head, text.to(dtype)).numpy()
        name = f"{hook}_{k or 'relu'}"
        right[name] = cosine(torch.float64)
        r = ranks(right[name], images["labels"])
        print(f"    {name}: float32 against float64 {off(cosine(torch.float32), right[name]):.2g}, without the SAE "
              f"{off(cosine(torch.float64, False), right[name]):.2g}, TopK's margin {min(margins):.2g}; "
              f"top1 {(r < 1).sum()}, top5 {(r < 5).sum()}")
    put("loop_expected.safetensors", {name: np.float32(t) for name, t in right.items()})


# ---------------------------------------------------------------------------------- training

LOG = ["step", "images", "tokens", "lr", "loss", "mse", "l1", "ghost", "l0", "explained_variance", "explained_variance_uncentred", "dead", "seconds"]
CASES = {  # name: latents and options; powers of two, so that --lr and --l1 are the same number in float and double
    "relu": dict(n=90, lr=2**-8, l1=2**-8, warmup=10),
    "relu_ghost": dict(n=300, lr=2**-10, l1=2**-8, warmup=5, ghost=True, dead_window=3),
    "topk": dict(n=300, lr=2**-8, k=6, warmup=0),
    "topk_ghost": dict(n=90, lr=2**-10, k=5, warmup=5, ghost=True, dead_window=3),
}
ACTS = {"model": "synthetic", "layer": "2", "hook": "mlp", "tokens": "all"}


def training_activations(rng, N=12, T=26, D=20):
    """Sparse sums of 40 directions, each image with its own favourites, around a mean; the fourth image is far out.
    The scale 1/32 is what keeps the ghost gradients from chaos: their factor 1 / (m + 1e-6) makes the gradient nearly
    1 / (g - r) down to |g - r| = 1e-3 sqrt(||r||), so at scale 1 float32's rounding grows a thousandfold in some steps."""
    directions = rng.standard_normal((40, D)) / D ** 0.5
    favourites = rng.random((N, 1, 40)) * 0.3
    codes = (rng.random((N, T, 40)) < favourites) * rng.exponential(1.0, (N, T, 40))
    x = codes @ directions + 0.5 * rng.standard_normal(D) + 0.1 * rng.standard_normal((N, T, D))
    x[3] *= 3
    return np.float32(x / 32)


def initial_sae(rng, n, D=20):
    """Rows of W_dec are not of unit norm; a third of the latents hardly fires, so that some are dead and some revive"""
    W_dec = rng.standard_normal((n, D)) * rng.uniform(0.1, 0.4, (n, 1))
    W_enc = rng.uniform(-0.5, 0.5, (D, n))
    b_enc = 0.1 / 32 * rng.standard_normal(n)
    quiet = np.arange(n) % 3 == 1
    W_enc[:, quiet] *= 0.1
    b_enc[quiet] = -rng.uniform(4, 14, quiet.sum()) / 1024                # 4 to 14 steps of the ghosts' learning rate
    return {name: np.float32(t) for name, t in
            {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": 0.1 / 32 * rng.standard_normal(D)}.items()}


def training():
    print("training")
    acts = training_activations(np.random.default_rng(2))
    put("acts.safetensors", {"activations": acts}, ACTS)
    init = {}
    for n, seed in ((90, 26), (300, 21)):  # seeds for which no h comes within float32's rounding of a decision
        init[n] = initial_sae(np.random.default_rng(seed), n)
        put(f"init_{n}.safetensors", init[n], {"d_in": "20", "d_sae": str(n), "layer": "2", "hook": "mlp",
                                               **({"architecture": "standard"} if n == 90 else {})})
    for name, options in CASES.items():
        options = dict(options, steps=30, batch=11)
        n = options.pop("n")
        run = lambda dtype, disturb=None: train(torch.from_numpy(acts).to(dtype), to(init[n], dtype), disturb=disturb, **options)
        right, log = run(torch.float64)
        put(f"train_{name}.safetensors", {key: np.float32(t) for key, t in right.items()})
        put_csv(f"train_{name}.csv", log, LOG)
        report_training(right, log, run)
    put_csv("b_dec.csv", *initial_b_dec(acts))


def report_training(right, log, run):
    """How far float32 is off, and float64 whose weights are shaken by float32's rounding after each step"""
    distances = lambda other: " ".join(f"{key} {off(other[key], right[key]):.1g}" for key in right)
    def columns(other):
        return " ".join(f"{c} {max(abs(a[c] - b[c]) / max(1e-9, abs(b[c])) for a, b in zip(other, log)):.1g}" for c in LOG[4:10])
    print("      dead", [r["dead"] for r in log], "revived", sum(r["revived"] for r in log))
    print("      loss", log[0]["loss"], "->", log[-1]["loss"], " l0", log[0]["l0"], "->", log[-1]["l0"], " ev", log[-1]["explained_variance"])
    single, single_log = run(torch.float32)
    print("      float32:", distances(single), "| log:", columns(single_log))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        def shake(sae):
            with torch.no_grad():
                for t in sae.values():
                    t *= 1 + 2**-23 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        shaken, shaken_log = run(torch.float64, shake)
        print("      shaken: ", distances(shaken), "| log:", columns(shaken_log))


def initial_b_dec(acts):
    """A row a dimension: each start over the first 11 images (one step's) and over the first 5"""
    columns, rows = ["dimension"], [{"dimension": d} for d in range(acts.shape[2])]
    for M in (11, 5):
        x = torch.from_numpy(acts[:M]).double()
        tokens, steps = geometric_median(x.reshape(-1, x.shape[2]))
        images, image_steps = geometric_median(x)
        images = images.mean(0)
        print(f"    geometric medians of {M} images: {steps} and {image_steps} iterations; from the mean by "
              f"{off(tokens, x.mean((0, 1))):.2g} and {off(images, x.mean((0, 1))):.2g} (100 is the limit)")
        for kind, value in (("mean", x.mean((0, 1))), ("geomedian", tokens), ("geomedian-images", images)):
            columns.append(f"{kind}_{M}")
            for d, row in enumerate(rows):
                row[columns[-1]] = value[d].item()
    return rows, columns


# ---------------------------------------------------------------------------------- statistics

def exact_case(rng, N=60, T=5, D=16, n=40, C=7):
    """Numbers on a coarse grid, so that h is exact in float32 too, ties are many and nothing hangs on rounding"""
    labels = rng.integers(0, C - 1, N)
    labels[labels == 3] = C - 1                                           # no image of class 3, some of the last
    middle = rng.integers(-6, 7, (C, D))
    x = np.float32(middle[labels][:, None] + rng.integers(-5, 6, (N, T, D))) / 4
    for a, b in ((7, 23), (8, 9), (0, 59), (12, 30), (12, 31)):           # equal images, hence equal activations
        x[b] = x[a]
    W_enc = np.float32(rng.integers(-4, 5, (D, n)) * (rng.random((D, n)) < 0.4)) / 8
    b_dec = np.float32(rng.integers(-3, 4, D)) / 4
    h = np.sort(((x - b_dec) @ W_enc).reshape(-1, n), axis=0)             # exact
    # Each latent is silent up to a quantile of its own: the largest h is exactly 0 where it is 1, all fire at -1
    quantile = np.concatenate([[1, 1, -1, -1], 1 - np.geomspace(0.003, 0.97, n - 4)])
    at = np.round(quantile * (N * T - 1)).astype(int)
    b_enc = np.where(quantile < 0, 1 - h[0], -h[at.clip(0), np.arange(n)]).astype(np.float32)
    f = np.maximum((x - b_dec) @ W_enc + b_enc, 0).reshape(-1, n)
    W_dec = np.float32(np.linalg.lstsq(f.astype(float), (x - b_dec).reshape(-1, D).astype(float), rcond=None)[0])
    return x, labels, {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def small_case(rng, N=6, T=5, D=16, n=40):
    """Fewer than ten images, no labels, TopK, any float32"""
    x = np.float32(rng.standard_normal((N, T, D)) + rng.standard_normal((N, 1, D)))
    W_enc = np.float32(rng.standard_normal((D, n)) / 4)
    return x, None, {"W_enc": W_enc, "b_enc": np.float32(rng.standard_normal(n) / 2 - 2.5),
                     "W_dec": np.float32(W_enc.T * 0.5), "b_dec": np.float32(rng.standard_normal(D) / 8)}


def measuring():
    print("statistics")
    rng, figures = np.random.default_rng(3), []
    for name, make, k in (("exact", exact_case, None), ("small", small_case, 4)):
        x, labels, sae = make(rng)
        N, T, D = x.shape
        n = sae["b_enc"].size
        put(f"stats_{name}_acts.safetensors", {"activations": x, **({"labels": labels} if labels is not None else {})}, ACTS)
        put(f"stats_{name}_sae.safetensors", sae, {"architecture": "topk", "k": str(k), "d_in": str(D), "d_sae": str(n), "layer": "2", "hook": "mlp"}
            if k else {"architecture": "standard", "layer": "2", "hook": "mlp"})
        results = {}
        for dtype in (torch.float64, torch.float32):
            h, f = encode(to(sae, dtype), torch.from_numpy(x).to(dtype).reshape(-1, D), k)
            reconstruction = decode(to(sae, dtype), f).double().numpy()
            f = f.double().numpy()
            results[dtype] = h.double().numpy(), f, reconstruction, statistics(f.reshape(N, T, n), labels, 16, 64, 7, 0.2)
        h, f, reconstruction, s = results[torch.float64]
        # what is discrete must not hang on rounding
        for key, value in results[torch.float32][3].items():
            same = (value == s[key]).all() if value.dtype == np.int64 else np.allclose(value, s[key], rtol=1e-6, atol=1e-6)
            assert same, (name, key)
        if k is None:
            assert (results[torch.float32][0] == h).all()
        else:
            ordered = -np.sort(-h, axis=1)
            print(f"      TopK's margins: {(ordered[:, k - 1] - ordered[:, k]).min():.2g} to the next, {np.abs(ordered[:, :k]).min():.2g} to 0")
        put(f"stats_{name}_codes.safetensors", {**({"h": np.float32(h)} if k else {}), "f": np.float32(f), "reconstruction": np.float32(reconstruction),
                                                "image_means": np.float32(f.reshape(N, T, n).sum(1) / T)})
        put(f"stats_{name}.safetensors", {key: t if key == "activation_sum" else np.float32(t) if t.dtype == np.float64 else t
                                          for key, t in s.items()})
        figures.append({"case": name, **evaluate(x.reshape(-1, D).astype(float), f, reconstruction, s, N)})
        print("     ", figures[-1])
        if k is None:
            top4 = statistics(f.reshape(N, T, n), labels, 4, 3, 7, 0.2)
            put("stats_exact_top4.safetensors", {key: np.float32(t) if t.dtype == np.float64 else t
                                                 for key, t in top4.items() if key.startswith(("max", "top"))})
            values = s["max_activating_image_values"]
            print(f"      images that tie with the next in the top 16: {((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > 0)).sum()}, "
                  f"latents by active images: {np.bincount(s['image_count'])[:12]}, entropy defined for {(s['top_entropy'] >= 0).sum()}")
    put_csv("eval.csv", figures, list(figures[0]))


if __name__ == "__main__":
    models()
    loop()
    training()
    measuring()
