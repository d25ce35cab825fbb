"""Reference implementations in PyTorch for saeclip's golden files.

Written from interface.md alone (sections 3 to 6), in the plainest form, without a look at the C code: what the
two agree on is then likely right. Every function runs in the dtype it is given: float64 makes the golden files,
float32 tells how far an honest float32 program may be from them. Gradients come from autograd.
"""
import json
import struct

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------- safetensors, 25 lines

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}


def save(path, tensors, metadata=None):
    """tensors: {name: array, or (array, "BF16" or another kind of KINDS)}. Float arrays are F64, F32 or F16."""
    header, blobs, at = {"__metadata__": metadata} if metadata else {}, [], 0
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        array = array.detach().numpy() if torch.is_tensor(array) else np.asarray(array)
        kind = kind or next(k for k, t in KINDS.items() if np.dtype(t) == array.dtype)
        if kind == "BF16":  # the upper half of a float32; make_golden.py only has values that fit
            bits = np.ascontiguousarray(array, "<f4").view("<u4")
            assert not (bits & 0xFFFF).any(), name
            array_out = (bits >> 16).astype("<u2")
        else:
            array_out = array.astype(KINDS[kind])
            assert (array_out == array).all() or kind == "F32", name
        blob = array_out.tobytes()
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def load(path):
    """-> ({name: array; BF16 as float32}, metadata)"""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, t in header.items():
        array = np.frombuffer(data[slice(*t["data_offsets"])], KINDS[t["dtype"]])
        array = (array.astype("<u4") << 16).view("<f4") if t["dtype"] == "BF16" else array
        tensors[name] = array.reshape(t["shape"])
    return tensors, metadata


# ---------------------------------------------------------------------------------- the vision transformer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalise(images, mean, std, dtype):
    """images: U8 [N, H, W, 3] -> [N, 3, H, W]; (v / 255 - mean) / std"""
    x = torch.from_numpy(np.array(images)).to(dtype) / 255
    return ((x - torch.tensor(mean, dtype=dtype)) / torch.tensor(std, dtype=dtype)).permute(0, 3, 1, 2)


def vit(w, x, heads, gelu, eps, replace=None):
    """A vision transformer with pre-norm blocks. w: weights under timm's names, with qkv joined; x: [N, 3, H, W].
    replace: {(block, hook): function of [N, T, D]}, whose results go on in the place of what they were given.
    -> {(block from 1, hook): [N, T, D]}, and the head's output [N, P] (None without a head)"""
    replace = replace or {}

    def place(x, *hook):
        return replace[hook](x) if hook in replace else x

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    patch = w["patch_embed.proj.weight"]                                             # [D, 3, p, p]
    x = F.conv2d(x, patch, w.get("patch_embed.proj.bias"), stride=patch.shape[-1])   # [N, D, rows, columns]
    x = x.flatten(2).transpose(1, 2)                                                 # [N, patches, D]
    N, _, D = x.shape
    x = torch.cat([w["cls_token"].reshape(1, 1, D).expand(N, 1, D), x], 1)
    x = x + w["pos_embed"].reshape(1, -1, D)
    if "norm_pre.weight" in w:
        x = norm(x, "norm_pre")
    hooks, block = {}, 0
    while f"blocks.{block}.norm1.weight" in w:
        name = f"blocks.{block}."
        q, k, v = linear(norm(x, name + "norm1"), name + "attn.qkv").reshape(N, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        p = torch.softmax(q @ k.transpose(-1, -2) / (D // heads) ** 0.5, -1)         # [N, heads, T, T]
        attn = linear((p @ v).transpose(1, 2).reshape(N, -1, D), name + "attn.proj")
        x = x + place(attn, block + 1, "attn")
        hidden = linear(norm(x, name + "norm2"), name + "mlp.fc1")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if gelu == "quick" else F.gelu(hidden)
        mlp = linear(hidden, name + "mlp.fc2")
        block += 1
        x = place(x + place(mlp, block, "mlp"), block, "resid")
        hooks[block, "attn"], hooks[block, "mlp"], hooks[block, "resid"] = attn, mlp, x
    head = linear(norm(x[:, 0], "norm"), "head") if "head.weight" in w else None
    return hooks, head


# ---------------------------------------------------------------------------------- the sparse autoencoder

def encode(sae, x, k=None):
    """sae: {W_enc [D, n], b_enc [n], W_dec [n, D], b_dec [D]}, x: [tokens, D] -> h and f, both [tokens, n]"""
    h = (x - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]
    if k is None:
        return h, torch.relu(h)
    order = torch.argsort(h.detach(), dim=1, descending=True, stable=True)[:, :k]  # stable: ties to the lower index
    return h, torch.relu(h) * torch.zeros_like(h).scatter_(1, order, 1.0)


def decode(sae, f):
    return f @ sae["W_dec"] + sae["b_dec"]


def ghost_loss(sae, x, h, reconstruction, dead):
    """PatchSAE's ghost gradients over the latents of the mask dead [n]; .detach() where the definition says constant"""
    r = (x - reconstruction).detach()
    g = torch.exp(h[:, dead]) @ sae["W_dec"][dead]
    g = g * (r.norm(dim=1) / (1e-6 + 2 * g.norm(dim=1))).detach()[:, None]
    norm = r.norm(dim=1, keepdim=True)
    m = torch.where(norm > 0, (g - r) ** 2 / norm, torch.zeros_like(r))
    return (m * ((r ** 2 / x.norm(dim=1, keepdim=True)) / (m + 1e-6)).detach()).mean()


def train(acts, init, steps, batch, lr, l1=0.0, warmup=0, k=None, ghost=False, dead_window=64, disturb=None):
    """acts: [N, T, D] in sequential order; init: an SAE of the same dtype. -> the trained SAE, the log [steps] of dicts.
    disturb: a function that is called on the weights after each step (used to see how chaotic a run is)."""
    N, T, D = acts.shape
    sae = {name: t.clone().requires_grad_(True) for name, t in init.items()}
    adam = torch.optim.Adam(sae.values(), betas=(0.9, 0.999), eps=1e-8)
    since_fired = torch.zeros(sae["b_enc"].numel(), dtype=torch.int64)
    log = []
    for step in range(steps):
        images = [(step * batch + i) % N for i in range(batch)]           # always full, across an epoch's end
        x = acts[images].reshape(-1, D)
        with torch.no_grad():
            sae["W_dec"] /= sae["W_dec"].norm(dim=1, keepdim=True)
        dead = since_fired > dead_window
        h, f = encode(sae, x, k)
        reconstruction = decode(sae, f)
        error = (reconstruction - x) ** 2
        parts = {"mse": (error / x.norm(dim=1, keepdim=True)).mean(),
                 "l1": l1 * f.abs().sum(1).mean() if k is None else torch.zeros((), dtype=x.dtype),
                 "ghost": ghost_loss(sae, x, h, reconstruction, dead) if ghost and dead.any()
                 else torch.zeros((), dtype=x.dtype)}
        loss = sum(parts.values())
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W, dW = sae["W_dec"], sae["W_dec"].grad
            dW -= (dW * W).sum(1, keepdim=True) * W
            fired = (f > 0).any(0)
            since_fired = torch.where(fired, torch.zeros_like(since_fired), since_fired + 1)
            rate = lr * min(1.0, (step + 1) / warmup) if warmup else lr
            log.append({"step": step + 1, "images": (step + 1) * batch, "tokens": (step + 1) * batch * T, "lr": rate,
                        "loss": loss.item(), **{name: t.item() for name, t in parts.items()},
                        "l0": (f > 0).sum(1).to(x.dtype).mean().item(),
                        "explained_variance": 1 - (error.sum() / ((x - x.mean(0)) ** 2).sum()).item(),
                        "explained_variance_uncentred": 1 - (error.sum() / (x ** 2).sum()).item(),
                        "dead": int(dead.sum()), "seconds": 0,
                        "revived": int((dead & fired).sum())})            # revived: for make_golden.py's own check
            for group in adam.param_groups:
                group["lr"] = rate
        adam.step()
        if disturb:
            disturb(sae)
    return {name: t.detach() for name, t in sae.items()}, log


def geometric_median(points):
    """Weiszfeld over points [M, ...], float64: at most 100 iterations or until the estimate repeats"""
    flat = points.reshape(len(points), -1).double()
    at, iterations = flat.mean(0), 0
    for iterations in range(1, 101):
        weight = 1 / (flat - at).norm(dim=1).clamp_min(1e-6)
        before, at = at, (weight[:, None] * flat).sum(0) / weight.sum()
        if torch.equal(before, at):
            break
    return at.reshape(points.shape[1:]), iterations


# ---------------------------------------------------------------------------------- statistics, eval

def statistics(f, labels, K, P, classes, threshold):
    """f: float64 array [N, T, n], token 0 is CLS; labels: [N] or None -> {name of section 5: array}"""
    N, T, n = f.shape
    a = f.sum(1) / T                                                      # [N, n]
    image_count = (a > 0).sum(0)
    s = {"image_count": image_count.astype(np.int64),
         "sae_sparsity": image_count / N,
         "sae_mean_acts": a.sum(0) / np.maximum(image_count, 1),
         "token_count": (f > 0).sum((0, 1)).astype(np.int64),
         "activation_sum": f.sum((0, 1)),
         "max_activating_image_values": np.zeros((n, K)),
         "max_activating_image_indices": np.full((n, K), -1, np.int64),
         "max_activating_image_label_indices": np.full((n, K), -1, np.int64),
         "top_entropy": np.full(n, -1.0),
         "max_activating_patch_values": np.zeros((n, P)),
         "max_activating_patch_indices": np.full((n, P, 2), -1, np.int64)}
    for j in range(n):
        top = [i for i in sorted(range(N), key=lambda i: (-a[i, j], i))[:K] if a[i, j] > 0]
        s["max_activating_image_values"][j, :len(top)] = a[top, j]
        s["max_activating_image_indices"][j, :len(top)] = top
        patches = [(i, t) for i in range(N) for t in range(1, T) if f[i, t, j] > 0]
        for at, (i, t) in enumerate(sorted(patches, key=lambda it: (-f[it[0], it[1], j], it))[:P]):
            s["max_activating_patch_values"][j, at] = f[i, t, j]
            s["max_activating_patch_indices"][j, at] = i, t
        if labels is None:
            continue
        s["max_activating_image_label_indices"][j, :len(top)] = labels[top]
        if len(top) >= min(10, K):
            share = np.array([sum(a[i, j] for i in top if labels[i] == c) for c in range(classes)])
            share = share[share > 0] / share.sum()
            s["top_entropy"][j] = 0.0 - (share * np.log(share)).sum()
    if labels is not None:
        s["class_counts"] = np.array([(a[labels == c] > 0).sum(0) for c in range(classes)], np.int64)
        s["class_counts_threshold"] = np.array([(f[labels == c] > threshold).sum((0, 1)) for c in range(classes)], np.int64)
    return s


def evaluate(x, f, reconstruction, s, N):
    """x, reconstruction: float64 [tokens, D], f: [tokens, n], s: statistics with K = 16 of the N images
    -> {figure of section 6: number}"""
    error, count, entropy = (reconstruction - x) ** 2, s["image_count"], s["top_entropy"]
    defined = entropy >= 0
    return {"mse": (error / np.sqrt((x ** 2).sum(1, keepdims=True))).mean(),
            "mse_raw": error.mean(),
            "explained_variance": 1 - error.sum() / ((x - x.mean(0)) ** 2).sum(),
            "explained_variance_uncentred": 1 - error.sum() / (x ** 2).sum(),
            "l0": (f > 0).sum(1).mean(),
            "l0_fraction": (f > 0).mean(),
            "l1": np.abs(f).sum(1).mean(),
            "mean_activation": f[f > 0].mean(),
            "mean_sae_mean_acts": s["sae_mean_acts"][count > 0].mean(),
            "entropy_mean": entropy[defined].mean() if defined.any() else -1.0,
            "entropy_sum": entropy[defined].sum(),
            "entropy_latents": int(defined.sum()),
            "dead": int((count == 0).sum()),
            "every_image": int((count == N).sum()),
            "one_image": int((count == 1).sum()),
            "two_images": int((count == 2).sum())}
