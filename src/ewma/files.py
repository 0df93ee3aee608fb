"""Files and state dicts: written whole or not at all, read with an error that says what is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The version of state dicts and files. Raise it when a reader of the old one would misread the new one."""


def write(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, Any], told: dict[str, str]
) -> None:
    """Write tensors and metadata as safetensors, atomically: `path` holds the old file or the whole new one.

    `metadata` is for `read`; `told` stands beside it in plain text, for people and other tools. Tensors may share
    memory (tied weights): each name gets its own copy, since other tools expect every name.
    """
    import torch
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise IsADirectoryError(
            f"{path}: expected the name of a file; this is a folder. Pass {path / 'ema.safetensors'}"
        )
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise TypeError(_unfit(name, tensor.layout))
        memory = tensor.untyped_storage().data_ptr()
        tied = tensor.numel() > 0 and memory in seen
        seen.add(memory)
        separate[name] = tensor.detach().clone().contiguous() if tied else tensor.detach().contiguous()
    with _replacing(path) as temporary:
        # "format": "pt" is what transformers asks of a file before it loads one.
        ours = json.dumps({"format": FORMAT, **metadata})
        try:
            save_file(separate, temporary, {"format": "pt", **told, "ewma": ours})
        except KeyError as error:  # a dtype that it has no name for
            name = next(name for name, tensor in separate.items() if tensor.dtype == error.args[0])
            raise TypeError(_unfit(name, error.args[0])) from error


def _unfit(name: str, kind: object) -> str:
    return (
        f"{name}: a safetensors file cannot hold {kind}. Register a constant with persistent=False; or save the state "
        f"instead of the file: torch.save(ema.state_dict(), path)."
    )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a file that `write` wrote."""
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)}: expected a file written by ModelEMA.save; this is a folder")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("ewma", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)}: expected a safetensors file written by ModelEMA.save; it is truncated or of another "
            f"format ({error}). A torch.save file is loaded with load_state_dict(torch.load(path))."
        ) from error
    if metadata is None:
        raise ValueError(
            f"{os.fspath(path)}: expected a file written by ModelEMA.save; this safetensors file holds plain weights, "
            f"with no profile, time or count. Load it into the model: model.load_state_dict(load_file(path))."
        )
    check_format(os.fspath(path), metadata)
    return tensors, metadata


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text atomically: `path` holds the old file or the whole new one."""
    with _replacing(Path(path)) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def check_format(what: str, state: Any, kind: str | None = None, needs: Iterable[str] = ()) -> None:
    """Refuse a state that a newer version wrote, that is of another class, or that lacks a part."""
    if not isinstance(state, Mapping) or "format" not in state:
        parts = state if isinstance(state, Mapping) else {}
        meant = [name for name, part in parts.items() if isinstance(part, Mapping) and part.get("kind") == kind]
        raise ValueError(
            f"{what}: expected what {kind or 'ewma'}.state_dict() gives; got "
            f"{sorted(map(str, parts))[:5] if parts else type(state).__name__}"
            f"{f'. Its part {meant[0]!r} was probably meant: state[{meant[0]!r}]' if meant else ''}"
        )
    if state["format"] > FORMAT:
        raise ValueError(
            f"{what}: it was written in format {state['format']}, and this version of ewma reads up to {FORMAT}. "
            f"Upgrade with pip install --upgrade ewma."
        )
    if kind is not None and state.get("kind") != kind:
        raise ValueError(f"{what}: expected the state of {kind}; got that of {state.get('kind')}")
    if lacking := [part for part in needs if part not in state]:
        raise ValueError(
            f"{what}: the state is not whole, it lacks {', '.join(map(repr, lacking))}. Nothing was loaded. Pass all "
            f"of what {kind}.state_dict() gave."
        )


def settle(temporary: str) -> None:
    """Make a written temporary file ready for its place: on the disk, and with the permissions of any new file."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~_umask())


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary file beside `path`, which takes its place once it is written; and is gone where that fails."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
