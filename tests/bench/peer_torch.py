"""The same work in PyTorch, implemented in the usual way: one line of build/bench per run.

    OMP_NUM_THREADS=2 /usr/bin/python3 peer_torch.py vit-8|vit-1|step-topk|step-relu|step-half
    /usr/bin/python3 peer_torch.py export vit.onnx        writes the ViT for peer_onnx.js

Prints one line of JSON: seconds per image or step (median of three runs after one that is not counted), peak
memory. Weights are random. compare.py runs this with the right environment."""
import json
import resource
import statistics
import sys
import time

import torch
from torch import nn

WIDTH, HEADS, HIDDEN, BLOCKS, PATCH, SIDE = 768, 12, 3072, 12, 16, 224
TOKENS = 1 + (SIDE // PATCH) ** 2
LATENTS, STEP_TOKENS, K, L1 = 49152, 12 * TOKENS, 32, 8e-5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):                                   # x: [B, T, D]
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (D // HEADS) ** -0.5) @ k.transpose(-2, -1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))
        h = self.fc1(self.norm2(x))
        return x + self.fc2(h * torch.sigmoid(1.702 * h))


class ViT(nn.Module):
    """CLIP ViT-B/16's vision transformer up to the last block's output."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])

    def forward(self, pixels):                              # [B, 3, S, S]
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.blocks(x)


class Sae(nn.Module):
    def __init__(self, k, shift):
        super().__init__()
        bound = (6 / LATENTS) ** 0.5
        self.k = k
        self.W_enc = nn.Parameter(torch.empty(WIDTH, LATENTS).uniform_(-bound, bound))
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.rand(LATENTS, WIDTH) * 2 - 1, dim=1))
        self.b_enc = nn.Parameter(torch.full((LATENTS,), -shift * (2 * WIDTH / LATENTS) ** 0.5))
        self.b_dec = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):                                   # x: [T, D]
        h = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)
        if self.k:
            value, index = h.topk(self.k, dim=1, sorted=False)
            f = torch.zeros_like(h).scatter(1, index, value.relu())
        else:
            f = h.relu()
        return f, torch.addmm(self.b_dec, f, self.W_dec)


class Step:
    """A training step by autograd: unit rows of W_dec, loss, gradient less its part along the rows, Adam."""

    def __init__(self, k, shift):
        self.sae = Sae(k, shift)
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=0.0, foreach=True)
        self.x = torch.rand(STEP_TOKENS, WIDTH).mul_(2).sub_(1).mul_(3 ** 0.5)
        self.active = 0.0

    def __call__(self):
        sae, x = self.sae, self.x
        with torch.no_grad():
            sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
        f, output = sae(x)
        loss = ((output - x).pow(2) / x.norm(dim=1, keepdim=True)).mean()
        if not sae.k:
            loss = loss + L1 * f.sum(1).mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            along = (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True)
            sae.W_dec.grad.addcmul_(along, sae.W_dec, value=-1)
        self.adam.step()
        return f                                            # alive as long as a caller looks at it


def timed(work, runs, least):
    """Median seconds of a call after a first one; short ones are repeated."""
    start = time.perf_counter()
    work()
    repeat = int(least / (time.perf_counter() - start)) + 1
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(repeat):
            work()
        seconds.append((time.perf_counter() - start) / repeat)
    return statistics.median(seconds)


def main():
    torch.manual_seed(1)
    line = sys.argv[1] if len(sys.argv) > 1 else ""
    steps = {"step-topk": (K, 0.0), "step-relu": (0, 2.505), "step-half": (0, 0.0)}
    images = {"vit-8": 8, "vit-1": 1}
    if line == "export":
        with torch.no_grad():
            torch.onnx.export(ViT().eval(), torch.zeros(1, 3, SIDE, SIDE), sys.argv[2], opset_version=14,
                              input_names=["pixels"], output_names=["output"],
                              dynamic_axes={"pixels": {0: "images"}, "output": {0: "images"}})
        return
    more = {}
    if line in images:
        vit, pixels = ViT().eval(), torch.rand(images[line], 3, SIDE, SIDE)
        with torch.inference_mode():
            seconds = timed(lambda: vit(pixels), 3, 0.5) / images[line]
    elif line in steps:
        step = Step(*steps[line])
        seconds = timed(lambda: step() is None, 3, 0.5)
        more["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        more["active"] = float((step() > 0).sum()) / STEP_TOKENS
    else:
        sys.exit(__doc__)
    print(json.dumps({"name": line, "threads": torch.get_num_threads(), "seconds": seconds, **more}))


main()
