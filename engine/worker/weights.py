"""Filling a rank's decoder: from a Hugging Face folder of safetensors, or with random numbers.

Each parameter is put together from slices of the files, so a rank never holds more on the host than its own part and
one slice. Before the first is read, the files' tensors are checked against what the config says.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.documents import read_json
from engine.errors import InputError
from engine.specs.checks import file_name
from engine.worker.model import Decoder
from engine.worker.names import Piece, are_fused, first_layer, pieces, tensor_names

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")
DUMMY_STD = 0.02
MOST_LAYERS = 1000
COMPARED = 256  # rows of a matrix
SHOWN = 3  # names that an error message lists


class Checkpoint:
    """The tensors of a folder, by name. A context manager, for it keeps its files open."""

    def __init__(self, folder: str | Path) -> None:
        """Raises InputError for a folder without safetensors, and for files that can't be read."""
        self.folder = Path(folder).expanduser()
        self._files = ExitStack()
        self._holder: dict[str, safe_open] = {}
        with self._files:  # closes what is open if another can't be opened
            for path in _shards(self.folder):
                file = self._files.enter_context(_open(path))
                self._holder.update(dict.fromkeys(file.keys(), file))
            self._files = self._files.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def has_fused_experts(self) -> bool:
        """Whether each layer's experts are in one tensor."""
        return are_fused(self._holder)

    def read(self, piece: Piece) -> torch.Tensor:
        """The piece on the host, in the file's type."""
        tensor = self._slice(piece.tensor)
        part: torch.Tensor
        if piece.expert is not None:
            at = slice(piece.start, piece.stop)
            part = tensor[piece.expert, at] if piece.dim == 0 else tensor[piece.expert, :, at]
        else:
            part = tensor[piece.start : piece.stop] if piece.dim == 0 else tensor[:, piece.start : piece.stop]
        return part

    def _slice(self, name: str) -> Any:
        return self._holder[name].get_slice(name)  # type: ignore[no-untyped-call]

    def check(self, needed: dict[str, tuple[int, ...]], layers: tuple[str, ...], model: str) -> None:
        """Raise InputError unless all `needed` tensors are here in those shapes, and no others of these `layers`.

        A tensor of a layer that nothing takes means that the model computes something else than the config says.
        """
        if missing := [name for name in needed if name not in self._holder]:
            others = [name for name in self._holder if name not in needed] or list(self._holder)
            near = {match for name in missing[:SHOWN] for match in get_close_matches(name, others, 1, 0.5)}
            raise InputError(
                f"{self.folder} lacks {len(missing)} of the {len(needed)} tensors needed of {model}: {_some(missing)}. "
                f"It has {_some(sorted(near) or others)}: give all files of a checkpoint that has transformers' "
                "tensor names, and its own config.json"
            )
        for name, shape in needed.items():
            tensor = self._slice(name)
            if tuple(tensor.get_shape()) != shape:
                raise InputError(
                    f"{name} in {self.folder} is {tuple(tensor.get_shape())} but {model}'s config makes it {shape}: "
                    "give the config.json that belongs to these weights"
                )
            if tensor.get_dtype() not in FLOATS:
                raise InputError(
                    f"{name} in {self.folder} is of type {tensor.get_dtype()}: give unquantised weights, "
                    f"{', '.join(FLOATS)}"
                )
        of_layers = (name for name in self._holder if name.startswith(layers) and not name.endswith(".inv_freq"))
        if surplus := [name for name in of_layers if name not in needed]:
            raise InputError(
                f"{self.folder} has {len(surplus)} tensors that {model}'s config has no place for: {_some(surplus)}: "
                "give the config.json that belongs to these weights (is a bias switched off in it, a layer left out?)"
            )

    def check_tied(self, head: str, embedding: Piece, model: str) -> None:
        """Raise InputError if there is an LM head beside the embedding that is said to be it, and they differ.

        Looked at are the first and the last rows of the piece, for a copy of the whole may be there.
        """
        start, stop = embedding.start, embedding.stop
        if head not in self._holder or start == stop:
            return
        for first, last in ((start, min(start + COMPARED, stop)), (max(start, stop - COMPARED), stop)):
            if not torch.equal(*(self._slice(name)[first:last].float() for name in (head, embedding.tensor))):
                raise InputError(
                    f"{head} in {self.folder} differs from {embedding.tensor} although {model}'s config says "
                    '"tie_word_embeddings": true: give the config.json that belongs to these weights'
                )


def load(decoder: Decoder, folder: str | Path) -> None:
    """Fill the decoder's parameters, in their own type, from the safetensors of a Hugging Face folder.

    Raises InputError, before any parameter is touched, if the folder does not hold the model of the decoder's spec.
    """
    spec, rank = decoder.spec, decoder.rank
    first, layer = first_layer(spec, rank), tensor_names(spec)["layers"]
    numbers = {*range(first, first + len(decoder.layers)), *range(spec.num_layers, MOST_LAYERS)}  # and none beyond
    prefixes = tuple(layer.format(number) for number in numbers)
    with Checkpoint(folder) as checkpoint:
        fused = checkpoint.has_fused_experts
        parts = {name: pieces(spec, rank, name, fused) for name, _ in decoder.named_parameters()}
        needed = {part.tensor: part.shape for each in parts.values() for part in each}
        checkpoint.check(needed, prefixes, spec.name)
        if spec.tie_word_embeddings and (table := parts.get("embedding.weight") or parts.get("lm_head.weight")):
            checkpoint.check_tied(f"{tensor_names(spec)['lm_head']}.weight", table[0], spec.name)
        for name, parameter in decoder.named_parameters():
            row, rows = 0, parameter.flatten(0, -2) if parameter.dim() == 3 else parameter
            for piece in parts[name]:
                tensor = checkpoint.read(piece)
                rows[row : row + len(tensor)].copy_(tensor)
                row += len(tensor)
            rows[row:].zero_()  # past the end of the vocabulary


def dummy(decoder: Decoder, seed: int) -> None:
    """Fill the decoder with random numbers, made where they are: normal around 0, or around 1 for norms' weights.

    A layer gets the same numbers on whatever stage it is. Matrices differ between tensor-parallel ranks; vectors and
    routers do not, for norms and what is chosen have to be the same.
    """
    for name, parameter in decoder.named_parameters():
        whole_name = pieces(decoder.spec, decoder.rank, name)[0].tensor  # with the layer's number in the model
        part = decoder.rank.tp_rank if parameter.dim() > 1 and not name.endswith("router.weight") else 0
        generator = torch.Generator(parameter.device)
        generator.manual_seed(zlib.crc32(f"{seed} {part} {whole_name}".encode()))
        parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, DUMMY_STD, generator=generator)


def _shards(folder: Path) -> list[Path]:
    """The files that the index lists, or else model.safetensors, or else all there are."""
    index = folder / INDEX
    if not index.is_file():
        paths = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob("*.safetensors"))
        if not paths:
            raise InputError(
                f"no safetensors in {folder}: give a Hugging Face folder with {WHOLE} or {INDEX} (transformers' "
                "save_pretrained writes them)"
            )
        return paths
    try:
        names = sorted(set(read_json(index, "get it again")["weight_map"].values()))
        paths = [folder / file_name("the shard", name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"can't read {index} ({type(error).__name__}: {error}): it is damaged, or lists no shards: get it again"
        ) from None
    if absent := [path.name for path in paths if not path.is_file()]:
        raise InputError(
            f"{folder} lacks {len(absent)} of the {len(paths)} files that its {INDEX} lists: {_some(absent)}: get them"
        )
    return paths


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"can't read {path} ({error}): it is cut short or damaged: get it again") from None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
