"""Tensors as `torch.save` describes them: which entry of the archive, from where, at what distances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from streamsoup.checkpoints.gathering import Sizes, is_contiguous, row_major
from streamsoup.checkpoints.header import MAX_DIM
from streamsoup.checkpoints.pickled import Elsewhere, Made, Named
from streamsoup.dtypes import BY_NAME, DType
from streamsoup.errors import CheckpointError, UnsupportedDTypeError

TORCH_DTYPES = {f"torch.{dtype.torch_name}": dtype for dtype in BY_NAME.values() if dtype.torch_name}
_STORAGES = {
    f"torch.{name}Storage": BY_NAME[dtype]
    for name, dtype in {
        "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
        "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
    }.items()
}  # fmt: skip
_MAKERS = ("torch._utils._rebuild", "torch._tensor._rebuild")
_PLAIN_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
_KINDS = {"sparse": "sparse", "qtensor": "quantised", "nested": "nested", "meta": "without data (on device meta)"}
_MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A tensor in an archive.

    Attributes
    ----------
    dtype : DType
    shape, strides : tuple of int
    storage : str
        The entry's name below ``data/``.
    first : int
        Its first element, counted in the entry.
    """

    dtype: DType
    shape: Sizes
    strides: Sizes
    storage: str
    first: int

    @property
    def stored_bytes(self) -> int:
        """What the entry must hold for it."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (self.first + last + 1) * self.dtype.itemsize


def is_tensor(value: Any) -> bool:
    """Whether a pickle wants a tensor here, of whatever kind."""
    return isinstance(value, Made) and value.name.startswith(_MAKERS)


def read_tensor(value: Made, name: str, path: str) -> TorchTensor:
    """Understand a tensor of a pickle.

    Parameters
    ----------
    value : Made
    name : str
        Of the tensor, for messages.
    path : str

    Raises
    ------
    CheckpointError, UnsupportedDTypeError
    """
    return _Reader(name, path).tensor(value)


class _Reader:
    def __init__(self, name: str, path: str) -> None:
        self._name = name
        self._path = path

    def tensor(self, value: Any) -> TorchTensor:
        while True:
            if not isinstance(value, Made):
                self._damaged()
            kind, arguments = value.name.rpartition(".")[2], value.arguments
            if kind.startswith("_rebuild_parameter") and arguments:
                value = arguments[0]
            elif kind.startswith("_rebuild_from_type") and len(arguments) > 2:
                value = self._of_type(*arguments[:3])
            elif kind in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
                return self._plain(kind, *arguments)
            else:
                self._unsupported(next((words for part, words in _KINDS.items() if part in kind), f"made by {kind}"))

    def _of_type(self, maker: Any, kind: Any, arguments: Any) -> Made:
        if not isinstance(maker, Named) or not isinstance(kind, Named) or not isinstance(arguments, tuple):
            self._damaged()
        if kind.name not in _PLAIN_TYPES:
            self._unsupported(f"a {kind.name}")
        return Made(maker.name, arguments)

    def _plain(self, kind: str, *arguments: Any) -> TorchTensor:
        if len(arguments) < 4 or not isinstance(arguments[0], Elsewhere):
            self._damaged()
        shape, strides = self._sizes(arguments[2]), self._sizes(arguments[3])
        extra = arguments[6:] if kind == "_rebuild_tensor_v2" else arguments[7:]
        if extra and extra[0]:
            self._unsupported("a conjugate or negative view")
        asked = arguments[6] if kind == "_rebuild_tensor_v3" and len(arguments) > 6 else None
        dtype, storage = self._storage(arguments[0].place, asked)
        first = arguments[1]
        if type(first) is not int or not 0 <= first <= MAX_DIM or len(shape) != len(strides):
            self._damaged()
        if len(shape) > _MAX_RANK or math.prod(shape) * 16 >= 2**62:
            self._damaged()
        if is_contiguous(shape, strides) or 0 in shape:  # the stride of a dimension of size 1 can be anything
            strides = row_major(shape)
        return TorchTensor(dtype, shape, strides, storage, first)

    def _sizes(self, value: Any) -> Sizes:
        found = sizes_of(value)
        if found is None:
            self._damaged()
        return found

    def _storage(self, place: Any, asked: Any) -> tuple[DType, str]:
        if not isinstance(place, tuple) or len(place) < 5 or place[0] != "storage" or not isinstance(place[1], Named):
            self._damaged()
        name = asked.name if isinstance(asked, Named) else place[1].name
        dtype = TORCH_DTYPES.get(name) or _STORAGES.get(name)
        if dtype is None:
            self._unsupported(f"of {name.removesuffix('Storage')}")
        key = place[2]
        if type(key) is not str:
            self._damaged()
        return dtype, key

    def _unsupported(self, what: str) -> NoReturn:
        raise UnsupportedDTypeError(
            f"{self._name}: is {what} in {self._path}, which cannot be averaged. Save it as a plain tensor, or leave "
            "it out.",
            path=self._path,
        )

    def _damaged(self) -> NoReturn:
        raise CheckpointError(
            f"{self._name}: is described in no way that PyTorch does in {self._path}. Export or download it again.",
            path=self._path,
        )


def sizes_of(value: Any) -> Sizes | None:
    """Understand a size or strides: a tuple, or what makes a `torch.Size`; None if it is neither."""
    if isinstance(value, Made) and value.name == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or not all(type(n) is int and 0 <= n <= MAX_DIM for n in value):
        return None
    return tuple(value)
