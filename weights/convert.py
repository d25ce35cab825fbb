"""Converts a PyTorch checkpoint (.pt, .pth, .bin, .ckpt) to safetensors. Needs Python 3.8 or later and no packages.

    python3 convert.py IN OUT.safetensors [PREFIX...]

IN is a file that torch.save or torch.jit.save wrote. It holds a state dict, or one inside {"state_dict": ...},
{"model": ...} or {"cfg": ..., "state_dict": ...}, as PatchSAE saves its SAEs. "module." and each given PREFIX are
removed from the start of the tensors' names. IN may be safetensors too, whose names are to be changed.

The weights of an SAE become W_enc [D, n] and W_dec [n, D], transposed if they are stored the other way round or as
encoder.weight and decoder.weight of torch.nn.Linear. Its k and architecture are copied from cfg into the metadata.

A checkpoint is a pickle, which can name any Python function to be called. Here only the names in KNOWN have a
meaning; every other object becomes an inert Record, and TorchScript code is not run. The bytes of the numbers are
copied, so that a tensor keeps its type.
"""
import collections
import json
import math
import os
import pickle
import sys
import zipfile

MAGIC = 0x1950a86a20f9469cfc6c           # begins the format from before PyTorch 1.6, which is not a zip archive
SAE = {"W_enc", "b_enc", "W_dec", "b_dec"}
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}

# dtype: its name in safetensors; item: the memoryview format for items of its size
Kind = collections.namedtuple("Kind", "dtype item bytes")
KINDS = {"DoubleStorage": Kind("F64", "Q", 8), "FloatStorage": Kind("F32", "I", 4), "HalfStorage": Kind("F16", "H", 2),
         "BFloat16Storage": Kind("BF16", "H", 2), "LongStorage": Kind("I64", "Q", 8), "IntStorage": Kind("I32", "I", 4),
         "ShortStorage": Kind("I16", "H", 2), "CharStorage": Kind("I8", "B", 1), "ByteStorage": Kind("U8", "B", 1),
         "BoolStorage": Kind("BOOL", "B", 1)}

# count: of items
Storage = collections.namedtuple("Storage", "key kind count")
# offset and stride: in items of the storage; size: the shape
Tensor = collections.namedtuple("Tensor", "storage offset size stride")


class Unreadable(Exception):
    """Why a file cannot be converted."""


class Record(dict):
    """An object of a class that is not known: its items and its state, but not its behaviour."""
    what = "object"                                      # its class, for messages
    state = None
    __hash__ = object.__hash__

    def __init__(self, *arguments, **named):
        super().__init__()

    def __call__(self, *arguments, **named):
        return Record()

    def __setstate__(self, state):
        self.state = state

    def ignore(self, item):
        pass

    append = extend = add = ignore


def record_class(what):
    return type("Record", (Record,), {"what": what})


UNKNOWN_TENSOR = record_class("tensor of an unknown kind")


def dense_strides(size):
    """The strides of a tensor whose items are adjacent, the last dimension's first."""
    return tuple(math.prod(size[d + 1:]) for d in range(len(size)))


def rebuild_tensor(storage, offset, size, stride, requires_grad=False, *flags):
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple or any(flags):
        return UNKNOWN_TENSOR()
    if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Unreadable("a tensor's shape is invalid")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if 0 not in size and last >= storage.count:
        raise Unreadable("a tensor reaches past the end of its storage")
    return Tensor(storage, offset, size, stride)


def rebuild_parameter(tensor, *rest):
    return tensor


KNOWN = {("torch._utils", "_rebuild_tensor"): rebuild_tensor,
         ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
         ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
         ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
         ("torch", "Size"): tuple,
         ("collections", "OrderedDict"): collections.OrderedDict,
         **{("torch", name): kind for name, kind in KINDS.items()}}


class Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def find_class(self, module, name):
        return KNOWN.get((module, name)) or record_class(f"{module}.{name}")

    def persistent_load(self, identity):
        if identity[0] == "module":                      # in the old format: a class and its source text
            return identity[1]
        _, kind, key, _, count, *view = identity
        if not isinstance(kind, Kind) or any(view):
            return Record()
        self.storages[key] = Storage(key, kind, count)
        return self.storages[key]


def script_tensors(module, path=""):
    """The tensors of a TorchScript module and of the modules in it, as (name, tensor) pairs."""
    if not isinstance(module, Record) or not isinstance(module.state, dict):
        raise Unreadable(f"TorchScript module '{path}' cannot be read")
    for name, value in module.state.items():
        if isinstance(value, Record) and value.what.startswith("__torch__"):
            yield from script_tensors(value, f"{path}{name}.")
        elif isinstance(value, Tensor):
            yield path + name, value


class Archive:
    """The format since PyTorch 1.6, and TorchScript: a zip archive with a file for each storage."""
    metadata = {}

    def __init__(self, path):
        self.zip = zipfile.ZipFile(path)
        files = self.zip.namelist()
        pickles = [name for name in files if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise Unreadable("a zip archive without data.pkl (expected a file that torch.save wrote)")
        self.folder = pickles[0][:-len("data.pkl")]
        order = self.folder + "byteorder"
        self.is_little_endian = order not in files or self.zip.read(order) == b"little"
        with self.zip.open(pickles[0]) as file:
            self.root = Unpickler(file).load()
        if self.folder + "constants.pkl" in files:
            self.root = dict(script_tensors(self.root))

    def read(self, storage):
        return self.zip.read(f"{self.folder}data/{storage.key}")


class OldFile:
    """The format before PyTorch 1.6: four pickles, the keys of the storages, then the count and bytes of each."""
    metadata = {}

    def __init__(self, path):
        self.file = open(path, "rb")
        try:
            magic = Unpickler(self.file).load()
        except Exception:
            magic = None
        if magic != MAGIC:
            raise Unreadable("incomplete or not a PyTorch checkpoint (expected a file written by torch.save)")
        Unpickler(self.file).load()                      # the version of the protocol
        self.is_little_endian = Unpickler(self.file).load().get("little_endian")
        reader = Unpickler(self.file)
        self.root = reader.load()
        self.places = {}
        for key in Unpickler(self.file).load():
            count = int.from_bytes(self.file.read(8), "little")
            size = count * reader.storages[key].kind.bytes
            self.places[key] = self.file.tell(), size
            self.file.seek(size, os.SEEK_CUR)

    def read(self, storage):
        place, size = self.places[storage.key]
        self.file.seek(place)
        return self.file.read(size)


class SafeFile(OldFile):
    """safetensors: the header's length, the header, then the numbers."""
    is_little_endian = True

    def __init__(self, path):
        kinds = {kind.dtype: kind for kind in KINDS.values()}
        self.file = open(path, "rb")
        start = 8 + int.from_bytes(self.file.read(8), "little")
        header = json.loads(self.file.read(start - 8))
        self.metadata = header.pop("__metadata__", {})
        self.root, self.places = {}, {}
        for name, entry in header.items():
            if entry["dtype"] not in kinds:
                raise Unreadable(f"'{name}' has the type {entry['dtype']} (expected one of {', '.join(kinds)})")
            size, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
            storage = Storage(name, kinds[entry["dtype"]], math.prod(size))
            self.root[name] = Tensor(storage, 0, size, dense_strides(size))
            self.places[name] = start + first, end - first


def tensors_of(root):
    """The tensors of the innermost state dict, the names of other values in it, and the configuration beside it."""
    config, tensors, others = {}, {}, []
    while type(root) in (dict, collections.OrderedDict):
        inner = [key for key in ("state_dict", "model_state_dict", "model") if isinstance(root.get(key), dict)]
        if not inner:
            break
        config = root.get("cfg", config)
        root = root[inner[0]]
    else:
        what = root.what if isinstance(root, Record) else type(root).__name__
        raise Unreadable(f"holds a {what} (expected a state dict: torch.save(model.state_dict(), ...))")
    for name, value in root.items():
        if isinstance(value, Tensor):
            tensors[str(name)] = value
        elif value is None or type(value) in (bool, int, float, str):
            others.append(str(name))
        else:
            what = value.what if isinstance(value, Record) else type(value).__name__
            raise Unreadable(f"'{name}' is a {what} (expected a dense tensor of real numbers)")
    return tensors, others, config


def renamed(tensors, names):
    """names: the new name of each tensor that gets one."""
    result = {names.get(name, name): tensor for name, tensor in tensors.items()}
    if len(result) < len(tensors):
        raise Unreadable(f"two tensors would have the same name without '{next(iter(names))}' cut or replaced")
    return result


def cut_prefix(tensors, prefix):
    return renamed(tensors, {name: name[len(prefix):] for name in tensors if name.startswith(prefix)})


def transposed(tensor):
    return tensor._replace(size=tensor.size[::-1], stride=tensor.stride[::-1])


def arrange_sae(tensors):
    """Gives an SAE's tensors their names and shapes: W_enc [D, n], b_enc [n], W_dec [n, D], b_dec [D]."""
    if {"encoder.weight", "decoder.weight"} <= tensors.keys():
        for name in ("encoder.weight", "decoder.weight"):            # [out, in], as torch.nn.Linear has them
            tensors[name] = transposed(tensors[name])
        tensors = renamed(tensors, {name: LINEAR[name] for name in LINEAR if name in tensors})
    if not SAE <= tensors.keys():
        return tensors
    D, n = math.prod(tensors["b_dec"].size), math.prod(tensors["b_enc"].size)
    for name, shape in (("W_enc", (D, n)), ("W_dec", (n, D))):
        if tensors[name].size != shape and tensors[name].size == shape[::-1]:
            tensors[name] = transposed(tensors[name])
        if tensors[name].size != shape:
            raise Unreadable(f"{name} is {list(tensors[name].size)} (expected {list(shape)})")
    return tensors


def sae_metadata(config):
    """What the configuration of an SAE says about its computation that its tensors do not show."""
    config = config.state if isinstance(config, Record) else config
    if not config or not isinstance(config, dict):
        return {}
    activation = config.get("activation_fn_str") or "relu"
    options = config.get("activation_fn_kwargs") or {}
    k = config.get("k") or options.get("k")
    for key, value, expected in (("apply_b_dec_to_input", config.get("apply_b_dec_to_input", True), (True,)),
                                 ("normalize_activations", config.get("normalize_activations") or "none", ("none",)),
                                 ("activation_fn_str", activation, ("relu", "topk"))):
        if value not in expected:
            raise Unreadable(f"cfg has {key} = {value} (expected {' or '.join(map(str, expected))})")
    usual = "topk" if k or activation == "topk" else "standard"
    metadata = {"architecture": str(config.get("architecture", usual))}
    return {**metadata, "k": str(k)} if k else metadata


def gather(items, at, size, stride):
    """The bytes of a tensor's items in order. items: a memoryview of the storage; at: the first item."""
    if 0 in size:
        return b""
    if all(n == 1 or step == usual for n, step, usual in zip(size, stride, dense_strides(size))):
        return items[at:at + math.prod(size)].tobytes()
    if len(size) == 1 and stride[0] > 0:
        return items[at:at + (size[0] - 1) * stride[0] + 1:stride[0]].tobytes()
    return b"".join(gather(items, at + i * stride[0], size[1:], stride[1:]) for i in range(size[0]))


def save(path, tensors, metadata, read):
    """Writes safetensors: the header's length, the header, then the tensors in its order. read(storage): its bytes"""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        end = at + math.prod(tensor.size) * tensor.storage.kind.bytes
        header[name] = {"dtype": tensor.storage.kind.dtype, "shape": tensor.size, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    last, data = None, b""                               # tensors with one storage mostly follow each other
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            storage = tensor.storage
            if storage != last:
                last, data = storage, read(storage)
            expected = storage.count * storage.kind.bytes
            if len(data) != expected:
                raise Unreadable(f"storage {storage.key} has {len(data)} bytes (expected {expected})")
            items = memoryview(data).cast(storage.kind.item) if data else memoryview(b"")
            out.write(gather(items, tensor.offset, tensor.size, tensor.stride))


def open_file(path):
    if zipfile.is_zipfile(path):
        return Archive(path)
    with open(path, "rb") as file:
        is_safe = file.read(9)[8:] == b"{"
    return SafeFile(path) if is_safe else OldFile(path)


def convert(source, target, prefixes):
    reader = open_file(source)
    if not reader.is_little_endian:
        raise Unreadable("written on a big-endian machine (expected little-endian numbers)")
    tensors, others, config = tensors_of(reader.root)
    if not tensors:
        raise Unreadable("holds no tensors")
    first = next(iter(tensors))
    for prefix in ("module.", *prefixes):
        before, tensors = tensors, cut_prefix(tensors, prefix)
        if prefix != "module." and tensors.keys() == before.keys():
            raise Unreadable(f"no tensor's name begins with '{prefix}' (the first is '{first}')")
    tensors = arrange_sae(tensors)
    metadata = {**reader.metadata, **(sae_metadata(config) if SAE <= tensors.keys() else {})}
    try:
        save(target + ".tmp", tensors, metadata, reader.read)
        os.replace(target + ".tmp", target)
    finally:
        if os.path.exists(target + ".tmp"):
            os.remove(target + ".tmp")
    print(f"{target}: {len(tensors)} tensors" + (f"; left out: {', '.join(others)}" if others else ""))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        convert(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (Unreadable, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
    except Exception as error:
        sys.exit(f"{sys.argv[1]}: damaged, or not a checkpoint ({type(error).__name__}: {error})")
