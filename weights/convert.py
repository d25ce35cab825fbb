"""Converts a PyTorch checkpoint (.pt, .pth, .bin, .ckpt) to safetensors; needs PyTorch 1.13 or later.

    python3 convert.py IN OUT.safetensors [PREFIX...]

Reads what torch.save, torch.jit.save and open_clip write: a state dict, or one inside {"state_dict": ...},
{"model": ...} or {"cfg": ..., "state_dict": ...}, as PatchSAE saves its SAEs. "module." is cut from the names, and
every PREFIX that is given. An SAE's weights are turned to W_enc [D, n] and W_dec [n, D] where they are stored the
other way round or as encoder.weight, decoder.weight. Only tensors are taken from the file: other objects in it, such
as PatchSAE's configuration, are read as inert records, and nothing of theirs is run.
"""
import json
import pickle
import sys
import types

import torch

# What a file may name: what tensors consist of. Anything else becomes a Record.
TAKEN = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch.nn.parameter", "Parameter"),
    ("torch", "Size"), ("collections", "OrderedDict"), ("_codecs", "encode"),
    *(("torch", kind + "Storage") for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char",
                                               "Byte", "Bool")),
    *(("torch", kind) for kind in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"))}


class Record:
    """Stands for an object of a class that is not a tensor's."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return super().find_class(module, name) if (module, name) in TAKEN else Record


def load(path):
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()      # TorchScript: OpenAI's own CLIP files
    except RuntimeError:
        reader = types.ModuleType("reader")
        reader.__dict__.update(vars(pickle), Unpickler=Unpickler, load=lambda file, **more: Unpickler(file, **more).load())
        torch.serialization.pickle = reader                              # PyTorch 1.13 ignores pickle_module
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)


def tensors_of(loaded):
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, dict) and key in loaded and not torch.is_tensor(loaded[key]):
            return tensors_of(loaded[key])
    if not isinstance(loaded, dict):
        sys.exit(f"{sys.argv[1]}: holds a {type(loaded).__name__} (expected a state dict)")
    return {name: value for name, value in loaded.items()
            if torch.is_tensor(value) and value.is_floating_point()}      # no position_ids and their like


def rename(tensors, prefixes):
    for prefix in ("module.", *prefixes):
        tensors = {name[len(prefix):] if name.startswith(prefix) else name: t for name, t in tensors.items()}
    return tensors


def arrange_sae(tensors):
    """The names and shapes of an SAE: W_enc [D, n], b_enc [n], W_dec [n, D], b_dec [D]."""
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    if "decoder.weight" in tensors and "encoder.weight" in tensors:
        tensors = {names.get(name, name): t for name, t in tensors.items()}
    if not {"W_enc", "b_enc", "W_dec", "b_dec"} <= tensors.keys():
        return tensors
    D, n = len(tensors["b_dec"]), len(tensors["b_enc"])
    for name, shape in (("W_enc", (D, n)), ("W_dec", (n, D))):
        if tuple(tensors[name].shape) == shape[::-1] and D != n:
            tensors[name] = tensors[name].T
        if tuple(tensors[name].shape) != shape:
            sys.exit(f"{sys.argv[1]}: {name} is {list(tensors[name].shape)} (expected {list(shape)})")
    return tensors


def save(path, tensors):
    header, data, at = {}, [], 0
    for name, tensor in tensors.items():
        half = tensor.dtype == torch.float16
        values = (tensor if half else tensor.float()).detach().contiguous().numpy()
        header[name] = {"dtype": "F16" if half else "F32", "shape": list(values.shape),
                        "data_offsets": [at, at + values.nbytes]}
        data.append(values)
        at += values.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for values in data:
            out.write(values.tobytes())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    found = arrange_sae(rename(tensors_of(load(sys.argv[1])), sys.argv[3:]))
    if not found:
        sys.exit(f"{sys.argv[1]}: no floating-point tensors")
    save(sys.argv[2], found)
    print(f"{sys.argv[2]}: {len(found)} tensors")
