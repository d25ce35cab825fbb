#!/usr/bin/python3
"""Trains weights/demo.safetensors, a small CLIP, on the pictures that tests/synth draws.

    make tests/synth
    OMP_NUM_THREADS=1 /usr/bin/python3 weights/train_demo.py             about 45 minutes on 2 cores
    OMP_NUM_THREADS=1 /usr/bin/python3 weights/train_demo.py --resume    goes on from a checkpoint

PyTorch 1.13 and numpy as Debian 12 has them (python3-torch, python3-numpy), float32, no GPU.

The run that made the file: seed 1 (the default), 166,400 pictures in 1,300 steps, 46 minutes on 2
cores of a busy machine (Zen 3). On unseen pictures `saeclip zeroshot` then named colour and shape
right on 1,976 of 2,000 with one object (98.8 %; synth's seed 7) and on 1,970 of 2,000 with one to
three (98.5 %, the main object; seed 8). A linear probe of the penultimate MLP's output on patches
with at least 16 pixels of an object: shape 92 %, colour 100 %, texture 91 %. Another machine or
library adds in another order, so a new run gives another file, and about these figures.

The image side is CLIP's vision transformer: 14 x 14 patches of 8 pixels and a class token, pre-norm
blocks with QuickGELU, 64-wide heads. The text side is a vector for each word: the prompt "red star"
is the sum of two, to unit length. Every picture is held against all 48 prompts: this is CLIP's loss
where captions are class prompts. What makes so few pictures enough:
  - linear heads on the patch tokens after the penultimate block say for the object under the patch
    its shape, colour and texture and the way to its centre: 196 answers a picture instead of one;
  - more such heads see what that block's MLP adds to the stream, and that only as a direction:
    logits are 8 times the cosine with a vector for each answer. So shape, colour and texture must
    each be a good part of it, and latents of this MLP can be held against all three. (A model made
    without them let colour pass the MLP by: 4 % of its output's variance on objects, shape 59 %.)
    All these heads are dropped afterwards;
  - positions begin as sines and cosines, so that attention can tell neighbours from the first step;
  - pictures of one object come first, and most of the time only 64 or 72 patches of a picture are
    seen, those on and around objects before others; the last stage sees all 196.
"""
import argparse
import json
import math
import multiprocessing
import os
import subprocess
import threading
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
SIDE, PATCH, GRID = 112, 8, 14
PATCHES, PIXELS = GRID * GRID, 3 * PATCH * PATCH
# As tests/synth numbers them; class = colour * 6 + shape.
SHAPES = ["cross", "disc", "ring", "square", "star", "triangle"]
COLOURS = ["blue", "cyan", "green", "orange", "purple", "red", "white", "yellow"]
TEXTURES = ["checked", "dotted", "plain", "striped"]
CLASS_NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
# A record of `synth stream`: facts, how much of each patch each object has, pixels.
FACTS, COVER = 3 + 6 * 3, 3 * PATCHES
RECORD = FACTS + COVER + SIDE * SIDE * 3
MEAN, STD = 0.5, 0.25
OUTPUTS = 64
# Pictures, patches seen of each, objects (0: one to three).
STAGES = [(64_000, 64, 1), (76_800, 72, 0), (25_600, 196, 0)]
TRAIN_SEED, TEST_SEED = 1001, 2002       # of worlds: no picture is in both


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.layer_norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        """x: [B, T, D]. The stream after this block, and what its MLP added to it."""
        B, T, D = x.shape
        qkv = self.qkv(self.layer_norm1(x)).view(B, T, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] * 0.125) @ qkv[1].transpose(2, 3)
        mixed = (torch.softmax(scores, -1) @ qkv[2]).transpose(1, 2).reshape(B, T, D)
        x = x + self.out_proj(mixed)
        # SiLU is quicker than QuickGELU(x) = SiLU(1.702 x) / 1.702; export() moves the factors.
        added = self.fc2(F.silu(self.fc1(self.layer_norm2(x))))
        return x + added, added


def waves(width):
    """Sines and cosines of row and column: [PATCHES, width]"""
    rates = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * rates
    wave = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], 2).reshape(PATCHES, width)


class Model(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.cat([torch.zeros(1, width), waves(width)]))
        self.patches = nn.Linear(PIXELS, width, bias=False)
        self.pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.post = nn.LayerNorm(width)
        self.projection = nn.Linear(width, OUTPUTS, bias=False)
        self.colour_words = nn.Parameter(torch.randn(len(COLOURS), OUTPUTS))
        self.shape_words = nn.Parameter(torch.randn(len(SHAPES), OUTPUTS))
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.sizes = [len(SHAPES) + 1, len(COLOURS) + 1, len(TEXTURES) + 1, 2]
        self.answer_norm = nn.LayerNorm(width)           # these three are not kept
        self.answer = nn.Linear(width, sum(self.sizes))
        self.even = nn.Linear(width, sum(self.sizes[:3]), bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("weight") and p.dim() == 2:
                into_stream = 0.5 if "fc2" in name or "out_proj" in name else 1
                nn.init.trunc_normal_(p, std=into_stream * p.shape[1] ** -0.5)

    def text(self):
        words = self.colour_words[:, None] + self.shape_words[None]
        return F.normalize(words.reshape(len(CLASS_NAMES), OUTPUTS), dim=-1)

    def forward(self, pixels, place):
        """pixels: [B, T, PIXELS]; place: [B, T], patches' numbers. Logits of the prompts; answers
        from the stream after the penultimate block; answers from what its MLP added."""
        x = self.patches(pixels) + self.positions[1:][place]
        first = (self.class_embedding + self.positions[0]).expand(len(x), 1, -1)
        x = self.pre(torch.cat([first, x], 1))
        for block in self.blocks[:-1]:
            x, added = block(x)
        answers = self.answer(self.answer_norm(x[:, 1:])).split(self.sizes, -1)
        cosines = F.normalize(added[:, 1:], dim=-1) @ F.normalize(self.even.weight, dim=-1).t()
        x, _ = self.blocks[-1](x)
        image = F.normalize(self.projection(self.post(x[:, 0])), dim=-1)
        logits = image @ self.text().t() * self.scale.exp().clamp(max=50)
        return logits, answers, (8 * cosines).split(self.sizes[:3], -1)


class World:
    """Pictures from tests/synth, drawn by a process of its own."""

    def __init__(self, synth, seed, objects, first):
        words = [synth, "stream", "--seed", seed, "--objects", objects, "--first", first]
        self.process = subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE)

    def read(self, count):               # [count, RECORD]
        data = self.process.stdout.read(count * RECORD)
        return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(count, RECORD).copy())

    def close(self):
        self.process.kill()
        self.process.wait()


def choose(records, tokens):
    """Patches to see, and what is under them: pixels [B, T, PIXELS], place [B, T], facts of the
    object there [B, T, 6], whether there is one [B, T]."""
    B = len(records)
    facts = records[:, 3:FACTS].reshape(B, 3, 6).long()
    most, owner = records[:, FACTS:FACTS + COVER].reshape(B, 3, PATCHES).max(1)
    place = torch.arange(PATCHES).expand(B, -1)
    if tokens < PATCHES:
        on = (most > 0).float()
        near = F.max_pool2d(on.view(B, 1, GRID, GRID), 3, 1, 1).view(B, PATCHES)
        place = torch.topk(torch.rand(B, PATCHES) + near + on, tokens, sorted=False)[1]
    pixels = records[:, FACTS + COVER:].reshape(B, GRID, PATCH, GRID, PATCH, 3)
    pixels = pixels.permute(0, 1, 3, 5, 2, 4).reshape(B, PATCHES, PIXELS)
    pixels = pixels.gather(1, place[..., None].expand(-1, -1, PIXELS))
    under = facts.gather(1, owner.gather(1, place)[..., None].expand(-1, -1, 6))
    pixels = pixels.float().mul_(1 / 255 / STD).sub_(MEAN / STD)
    return pixels, place, under, most.gather(1, place) >= 6


def losses(model, records, tokens):
    """The loss and figures to print."""
    pixels, place, under, there = choose(records, tokens)
    label = records[:, 0].long()
    logits, answers, even = model(pixels, place)
    total = F.cross_entropy(logits, label)
    best = logits.argmax(1)
    figures = {"clip": total.item(), "right": (best == label).float().mean().item(),
               "shape": (best % 6 == label % 6).float().mean().item()}
    names, weights = ("patch shape", "patch colour", "patch texture"), (2, 0.5, 0.5)
    for f in range(3):
        nothing = torch.full_like(under[..., f], model.sizes[f] - 1)
        target = torch.where(there, under[..., f], nothing)
        total = total + weights[f] * F.cross_entropy(answers[f].flatten(0, 1), target.flatten())
        total = total + 0.5 * F.cross_entropy(even[f].flatten(0, 1), target.flatten())
        hit = even[f].argmax(-1)[there] == target[there]
        figures[names[f]] = hit.float().mean().item()
    row = torch.div(place, GRID, rounding_mode="floor")
    centre = torch.stack([place % GRID, row], -1) * PATCH + PATCH // 2
    miss = ((answers[3] - (under[..., 3:5] - centre) / 16) ** 2).sum(-1)
    return total + 0.5 * (miss * there).sum() / there.sum(), figures


def test(model, synth, objects, count=512):
    """Shares of unseen pictures of which class, and shape, are named right, seeing all patches."""
    world, right, shape = World(synth, TEST_SEED, objects, 0), 0, 0
    with torch.no_grad():
        for _ in range(count // 64):
            records = world.read(64)
            pixels, place, _, _ = choose(records, PATCHES)
            best, label = model(pixels, place)[0].argmax(1), records[:, 0].long()
            right += (best == label).sum().item()
            shape += (best % 6 == label % 6).sum().item()
    world.close()
    return right / count, shape / count


def write_safetensors(path, tensors, metadata):
    header, at = {"__metadata__": metadata}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(values.shape),
                        "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path + ".tmp", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(values.tobytes())
    os.replace(path + ".tmp", path)


def export(model, path):
    """Under Hugging Face's names, in half precision."""
    w = {name: p.detach() for name, p in model.named_parameters()}
    width, begin = len(w["class_embedding"]), "vision_model."
    out = {begin + "embeddings.class_embedding": w["class_embedding"],
           begin + "embeddings.patch_embedding.weight":
               w["patches.weight"].view(width, 3, PATCH, PATCH),
           begin + "embeddings.position_embedding.weight": w["positions"],
           "visual_projection.weight": w["projection.weight"], "text_embeds": model.text().detach()}
    for part in ("weight", "bias"):
        out[begin + "pre_layrnorm." + part] = w["pre." + part]
        out[begin + "post_layernorm." + part] = w["post." + part]
    for b in range(len(model.blocks)):
        for part in ("weight", "bias"):
            block, names = f"blocks.{b}.", begin + f"encoder.layers.{b}."
            for norm in ("layer_norm1.", "layer_norm2."):
                out[names + norm + part] = w[block + norm + part]
            for i, qkv in enumerate(w[block + "qkv." + part].split(width)):
                out[names + f"self_attn.{'qkv'[i]}_proj." + part] = qkv
            out[names + "self_attn.out_proj." + part] = w[block + "out_proj." + part]
            out[names + "mlp.fc1." + part] = w[block + "fc1." + part] / 1.702
            factor = 1.702 if part == "weight" else 1
            out[names + "mlp.fc2." + part] = w[block + "fc2." + part] * factor
    metadata = {"model": "saeclip's demo model", "hidden_act": "quick_gelu",
                "layer_norm_eps": "1e-05", "num_attention_heads": str(width // 64),
                "image_mean": ",".join([str(MEAN)] * 3), "image_std": ",".join([str(STD)] * 3),
                "class_names": json.dumps(CLASS_NAMES)}
    write_safetensors(path, {n: t.numpy().astype("<f2") for n, t in sorted(out.items())}, metadata)


class Flat:
    """A model's parameters in one vector, and AdamW on it (Loshchilov and Hutter, 2019)."""

    def __init__(self, model):
        count = sum(p.numel() for p in model.parameters())
        self.values, self.grad = torch.empty(count), torch.zeros(count)
        self.mean, self.square = torch.zeros(count), torch.zeros(count)
        self.decay, at = torch.zeros(count), 0
        for name, p in model.named_parameters():
            here = slice(at, at + p.numel())
            self.values[here] = p.data.flatten()
            self.decay[here] = 0.02 if name.endswith("weight") and p.dim() == 2 else 0
            p.data, p.grad = self.values[here].view_as(p), self.grad[here].view_as(p)
            at += p.numel()

    def step(self, rate, number):        # number: from 1
        self.grad.mul_(min(1, 1 / (self.grad.norm().item() + 1e-9)))
        self.mean.mul_(0.9).add_(self.grad, alpha=0.1)
        self.square.mul_(0.98).addcmul_(self.grad, self.grad, value=0.02)
        self.values.addcmul_(self.values, self.decay, value=-rate)
        size = (self.square / (1 - 0.98 ** number)).sqrt_().add_(1e-8)
        self.values.addcdiv_(self.mean / (1 - 0.9 ** number), size, value=-rate)


def stage_at(pictures, scale):
    for number, (count, tokens, objects) in enumerate(STAGES):
        pictures -= int(count * scale)
        if pictures < 0:
            return number, tokens, objects
    return None


def train(rank, o, shared, barrier):
    """One of two processes, each with half of every batch; both take the same steps."""
    torch.set_num_threads(1)
    torch.manual_seed(o.seed)
    model = Model(o.width, o.blocks)
    flat, first, spent = Flat(model), 0, 0
    state_path = os.path.join(o.work, "state.pt")
    if o.resume and os.path.exists(state_path):
        state = torch.load(state_path)
        first, spent = state["step"], state["seconds"]
        for name in ("values", "mean", "square"):
            getattr(flat, name).copy_(state[name])
    steps = sum(int(stage[0] * o.scale) for stage in STAGES) // o.batch
    share, world, now, figures = o.batch // 2, None, None, {}
    begin = saved = time.time() - spent
    torch.manual_seed(o.seed + 1000 * (rank + 1) + first)
    for step in range(first, steps):
        stage, tokens, objects = stage_at(step * o.batch, o.scale)
        if stage != now:
            if world:
                world.close()
            world = World(o.synth, TRAIN_SEED, objects, (rank << 32) + step * share)
            now = stage
        flat.grad.zero_()
        loss, seen = losses(model, world.read(share), tokens)
        loss.backward()
        shared[step % 2, rank].copy_(flat.grad)
        barrier.wait()
        torch.mean(shared[step % 2], 0, out=flat.grad)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        flat.step(o.rate * min(1, (step + 1) / 100) * max(cosine, 0.01), step + 1)
        for name, value in seen.items():
            figures[name] = figures.get(name, 0) + value / o.every
        if rank > 0:
            continue
        passed, last = time.time() - begin, step + 1 == steps
        if (step + 1) % o.every == 0:
            text = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{step + 1}/{steps}, {(step + 1) * o.batch} pictures, {passed:.0f} s, "
                  f"stage {stage + 1}: {text}", flush=True)
            figures = {}
        if (step + 1) % o.test_every == 0 or last:
            one, some = test(model, o.synth, 1), test(model, o.synth, 0)
            print("unseen: one object %.3f (shape %.3f), one to three %.3f (%.3f)" % (one + some),
                  flush=True)
        if time.time() - saved > 180 or last:
            torch.save({"step": step + 1, "seconds": passed, "values": flat.values,
                        "mean": flat.mean, "square": flat.square}, state_path + ".tmp")
            os.replace(state_path + ".tmp", state_path)
            export(model, os.path.join(o.work, "demo.safetensors"))
            saved = time.time()
    if world:
        world.close()
    if rank == 0:
        export(model, o.output)


def second(rank, o, shared, barrier, parent):
    """The other process; ends with the first, however that ends."""
    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    train(rank, o, shared, barrier)


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--width", type=int, default=128)
    a.add_argument("--blocks", type=int, default=6)
    a.add_argument("--batch", type=int, default=128)
    a.add_argument("--rate", type=float, default=1.5e-3)
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--scale", type=float, default=1, help="so many times the stages' pictures")
    a.add_argument("--every", type=int, default=50, help="steps from line to line of figures")
    a.add_argument("--test-every", type=int, default=250)
    a.add_argument("--synth", default=os.path.join(HERE, "../tests/synth"))
    a.add_argument("--work", default=os.path.join(HERE, "../build"), help="the checkpoint's folder")
    a.add_argument("--pid", help="file to write the process number to")
    a.add_argument("--resume", action="store_true")
    a.add_argument("-o", "--output", default=os.path.join(HERE, "demo.safetensors"))
    o = a.parse_args()
    if o.pid:
        with open(o.pid, "w") as file:
            file.write(f"{os.getpid()}\n")
    os.makedirs(o.work, exist_ok=True)
    count = sum(p.numel() for p in Model(o.width, o.blocks).parameters())
    shared = torch.zeros(2, 2, count).share_memory_()
    barrier = multiprocessing.Barrier(2)
    multiprocessing.Process(target=second, args=(1, o, shared, barrier, os.getpid()),
                            daemon=True).start()
    train(0, o, shared, barrier)


if __name__ == "__main__":
    main()
