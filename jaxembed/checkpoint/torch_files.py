"""`pytorch_model.bin` and its shards, read by torch where it is installed; nothing in them is executed.

`torch.load(weights_only=True)` builds tensors, numbers, texts and containers, and refuses a pickle that names anything
else. A file in torch's zip format is mapped anew for each tensor, so that only the pages of that tensor are in memory.
"""

import importlib.util
import os
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from jaxembed.checkpoint.buffers import Buffers
from jaxembed.checkpoint.safetensors import StoredTensor, file_inside, open_shards
from jaxembed.errors import InputError

if TYPE_CHECKING:
    import torch

TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX_FILE = "pytorch_model.bin.index.json"
OLDEST_TORCH = (2, 6)  # before it, weights_only=True could be tricked into executing code (CVE-2025-32434)

_SAFETENSORS_INSTEAD = (
    "`transformers.AutoModel.from_pretrained(…).save_pretrained(…)` writes safetensors, which need no torch to be read"
)
_DTYPES = {np.dtype(dtype).name: np.dtype(dtype) for dtype in [*"?bBhHiIqQefd", ml_dtypes.bfloat16]}
"""By torch's names, which are numpy's."""


@dataclass(frozen=True)
class TorchTensor(StoredTensor):
    """A tensor in a file of `torch.save`.

    Attributes:
        held: the tensor itself, from a file in the format before torch 1.6, which cannot be mapped; None: the file is
            mapped when the tensor is read.
    """

    held: "torch.Tensor | None" = field(default=None, repr=False, compare=False)

    def read(self, buffers: Buffers | None = None) -> np.ndarray:
        """Read-only, the bits as torch has them; a view of the mapped file where the tensor lies there in C order."""
        import torch

        tensor = self.held
        if tensor is None:
            tensor = _load(self.file).get(self.name)
            if tensor is None or (_dtype_name(tensor), tuple(tensor.shape)) != (self.dtype.name, self.shape):
                raise InputError(f"{self.file}: tensor {self.name!r} is another one now: the file has been replaced")
        tensor = tensor.contiguous()
        # numpy has no bfloat16 that torch knows of: the bits go over as whole numbers.
        array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().view(self.dtype)
        array.flags.writeable = False
        return array


def open_torch_tensors(directory: str | os.PathLike[str]) -> dict[str, TorchTensor]:
    """All tensors of `pytorch_model.bin`, or of the shards that `pytorch_model.bin.index.json` lists, by name.

    Buffers are among them, in their own dtype. No values are read.

    Raises:
        InputError: there is no such file, torch is not installed or too old, a file is damaged, holds anything but
            tensors or code in particular, lies outside the directory, or contradicts the index. Names file and key.
    """
    directory = Path(directory)
    if os.path.lexists(directory / TORCH_FILE):
        file = file_inside(directory, TORCH_FILE)
        _check_torch(file)
        return {tensor.name: tensor for tensor in _list(file)}
    if os.path.lexists(directory / TORCH_INDEX_FILE):
        file = file_inside(directory, TORCH_INDEX_FILE)
        _check_torch(file)
        return open_shards(file, _list)
    raise InputError(f"{directory}: no PyTorch weights: looked for {TORCH_FILE} and {TORCH_INDEX_FILE}")


def _check_torch(file: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{file}: torch reads such files, and is not installed: `pip install torch`, or convert the model where it "
            f"is: {_SAFETENSORS_INSTEAD}"
        )
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise InputError(f"{file}: torch {oldest} or newer expected, found {torch.__version__}")


def _list(file: Path) -> list[TorchTensor]:
    held = not _is_zip(file)
    return [
        TorchTensor(name, _DTYPES[_dtype_name(tensor)], tuple(tensor.shape), file, tensor if held else None)
        for name, tensor in _load(file).items()
    ]


def _load(file: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a file, mapped where that is possible, all of them of a kind that numpy can hold."""
    import torch

    try:
        mapped = _is_zip(file)
        if mapped:
            _check_stored(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and TorchScript: what is wrong is raised as well
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch raises whatever its parser stumbles over
        raise InputError(f"{file}: {_reason(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a dict of tensors, found {type(values).__name__}")
    tensors = {}
    for name, tensor in values.items():
        if not isinstance(name, str):
            raise InputError(f"{file}: expected the names of tensors as keys, found {name!r:.80}")
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{file}: {name!r}: expected a tensor, found {type(tensor).__name__}")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise InputError(f"{file}: tensor {name!r} is no plain dense one: {type(tensor).__name__}, {tensor.layout}")
        if tensor.device.type != "cpu":
            raise InputError(f"{file}: tensor {name!r} has no values: it was saved from the {tensor.device} device")
        if _dtype_name(tensor) not in _DTYPES:
            raise InputError(
                f"{file}: tensor {name!r}: dtype {_dtype_name(tensor)} cannot be read; weights are float32, float16 or "
                "bfloat16"
            )
        tensors[name] = tensor.detach().resolve_neg()
    return tensors


def _is_zip(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    if start == b"version ":
        raise InputError(f"{file}: a git-lfs pointer, not the weights: run `git lfs pull`, or download the file")
    return start.startswith(b"PK\x03\x04")


def _check_stored(file: Path) -> None:
    """A mapped file is taken as it lies; what an archiver has packed anew would be noise."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type and "/data/" in entry.filename]
    if packed:
        raise InputError(f"{file}: {packed[0]!r} in it is compressed, which torch.save never does; save it again")


def _reason(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return (
            f"refused, and nothing in it executed: the pickle names {found[1]!r}, where only tensors are expected. "
            f"If you trust the file: {_SAFETENSORS_INSTEAD}"
        )
    if "TorchScript" in text:
        return "a TorchScript program, not a dict of tensors"
    if "Unsupported operand" in text:
        return (
            "refused, and nothing in it executed: expected a pickle as torch.save writes it (protocol 2), found another"
        )
    text = text.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return f"damaged, or not written by torch.save: {text.splitlines()[0][:200]}"


def _dtype_name(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")
