"""Makes the checkpoints that test_convert.c converts, from the golden files: python3 test_convert.py GOLDEN OUT

Needs PyTorch 1.13 or later. Each checkpoint NAME.pt in the folder OUT is described where it is made. EVIL, a path in
OUT, must not exist after a conversion: hostile checkpoints would create it if their code ran.
"""
import collections
import json
import os
import sys
import zipfile

import torch

GOLDEN, OUT = sys.argv[1:]
EVIL = os.path.join(OUT, "evil")
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def golden(name):
    """The tensors of a golden file."""
    with open(os.path.join(GOLDEN, name + ".safetensors"), "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    return {key: torch.frombuffer(data[slice(*t["data_offsets"])], dtype=TYPES[t["dtype"]]).reshape(t["shape"]).clone()
            for key, t in header.items()}


def save(name, value, **options):
    torch.save(value, os.path.join(OUT, name + ".pt"), **options)


def module(tensors):
    """A module whose state dict consists of these tensors."""
    tree = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = tree
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return tree


class Config:
    """A configuration of a class that the converter does not know."""

    def __init__(self, **fields):
        self.__dict__.update(fields, device=torch.device("cpu"), dtype=torch.float32, names={"a", "b"})
        self.betas = [0.9, 0.99]


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {EVIL}",)


class Rebuilt:
    """A tensor of n numbers in a storage of 11. flags: as PyTorch 2 writes them for negated tensors"""

    def __init__(self, n, *flags):
        self.n, self.flags = n, flags

    def __reduce__(self):
        storage = torch.arange(11.).storage()
        arguments = (storage, 0, (self.n,), (1,), False, collections.OrderedDict(), *self.flags)
        return torch._utils._rebuild_tensor_v2, arguments


hf, openai, timm, sae = (golden(name) for name in ("clip_hf", "clip_openai", "clip_timm", "stats_small_sae"))

# BF16, with a scalar and int64 position ids.
save("state", hf)
save("old_state", hf, _use_new_zipfile_serialization=False)
torch.jit.save(torch.jit.script(module(openai)), os.path.join(OUT, "script.pt"))
# As open_clip's training writes it.
training = {"epoch": 3, "name": "run", "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}
save("training", {**training, "state_dict": {"module." + name: t for name, t in openai.items()}})
save("parameters", {"model": dict(module(timm).named_parameters())})
save("prefixed", {"module.visual.trunk." + name: t for name, t in timm.items()})

# One storage for all tensors, and every other layout of numbers in memory.
flat, views, at = torch.cat([t.flatten() for t in timm.values()]), {}, 0
for name, t in timm.items():
    views[name] = flat[at:at + t.numel()].reshape(t.shape)
    at += t.numel()
save("shared", views)
save("old_shared", views, _use_new_zipfile_serialization=False)
mixed = {}
for i, (name, t) in enumerate(timm.items()):
    order = list(range(t.dim()))[::-1] if i % 2 else [*range(1, t.dim()), 0]
    mixed[name] = t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])
    if t.dim() == 1 and i % 3 == 0:
        mixed[name] = torch.stack([t + 1, t, t - 1], 1)[:, 1]
save("strided", mixed)
save("expanded", {"rows": torch.arange(3.).expand(4, 3), "columns": torch.arange(3.)[:, None].expand(3, 4),
                  "value": torch.tensor(7.).expand(5), "none": torch.zeros(0, 3).t()})
save("expanded_plain", {"rows": torch.arange(3.).repeat(4, 1), "columns": torch.arange(3.)[:, None].repeat(1, 4),
                        "value": torch.full((5,), 7.), "none": torch.zeros(3, 0)})

# SAEs: PatchSAE's form with the weights transposed, torch.nn.Linear's names, and those with as many latents as inputs.
turned = {name: t.t() if t.dim() == 2 else t for name, t in sae.items()}
topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "d_in": 16}
names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
save("sae", {"cfg": Config(**topk), "state_dict": turned})
save("sae_linear", {"cfg": topk, "state_dict": {names[name]: t for name, t in turned.items()}})
square = {"W_enc": sae["W_enc"][:, :16], "b_enc": sae["b_enc"][:16], "W_dec": sae["W_dec"][:16], "b_dec": sae["b_dec"]}
save("square", {name: t.clone() for name, t in square.items()})
save("square_linear", {names[name]: t.t() for name, t in square.items() if t.dim() == 2}
     | {names[name]: t for name, t in square.items() if t.dim() == 1})
save("k_alone", {"cfg": {"k": 4}, "state_dict": sae})
save("evil_beside", {"cfg": Evil(), "state_dict": sae})

# safetensors, made by the converter itself: a second time, with names and layouts that it changes.
save("names", {"trunk." + name: t for name, t in hf.items()})

# What is refused.
save("evil", Evil())
save("evil_old", Evil(), _use_new_zipfile_serialization=False)
save("evil_value", {**sae, "b_enc": Evil()})
save("sparse", {"a": torch.eye(3).to_sparse()})
save("complex", {"a": torch.zeros(3, dtype=torch.complex64)})
save("negative", {"a": Rebuilt(11, {"neg": True})})
save("module", torch.nn.Linear(2, 3))
save("list", [torch.zeros(3)])
save("empty", {"state_dict": {}})
save("same_name", {"module.a": torch.zeros(3), "a": torch.ones(3)})
save("sae_shape", {**sae, "W_enc": torch.zeros(16, 39)})
save("sae_normalized", {"cfg": Config(normalize_activations="layer_norm"), "state_dict": sae})
save("sae_tanh", {"cfg": {"activation_fn_str": "tanh-relu"}, "state_dict": sae})
save("sae_unshifted", {"cfg": {"apply_b_dec_to_input": False}, "state_dict": sae})
for name in ("state", "old_state"):
    with open(os.path.join(OUT, name + ".pt"), "rb") as file:
        whole = file.read()
    with open(os.path.join(OUT, name + "_cut.pt"), "wb") as file:
        file.write(whole[:-100])
save("big_endian", {"a": torch.ones(3)})
with zipfile.ZipFile(os.path.join(OUT, "big_endian.pt"), "a") as file:
    file.writestr(file.namelist()[0].split("/")[0] + "/byteorder", "big")
with open(os.path.join(OUT, "text.pt"), "w") as file:
    file.write("<!DOCTYPE html>")
save("beyond", {"a": Rebuilt(12)})
save("beyond_old", {"a": Rebuilt(12)}, _use_new_zipfile_serialization=False)
