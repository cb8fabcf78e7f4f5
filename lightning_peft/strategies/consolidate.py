"""Make one ordinary checkpoint of a sharded one, on any machine and without other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.partial_state import optimizer_tree, read_checkpoint, read_flat

__all__ = ["consolidate_checkpoint"]


def consolidate_checkpoint(
    folder: str | Path, file: str | Path | None = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """Read a sharded checkpoint of ``FSDP2Strategy`` or ``ModelParallelStrategy`` whole, and write it as one file.

    The result is what a run on one device would have written: ``load_from_checkpoint``, ``Trainer.fit(ckpt_path=...)``
    on one device or many, and ``torch.load`` read it. It needs memory for all weights and optimizer states.

    Args:
        folder: The checkpoint, a folder with ``meta.pt``.
        file: Where to write; None only returns.
        weights_only: As in ``torch.load``, for what lies beside the tensors.

    Returns:
        The checkpoint: ``state_dict``, ``optimizer_states``, and all else that was saved.

    Raises:
        ConfigError: There is no sharded checkpoint at ``folder``, a file of it is missing, or ``file`` is a folder.

    Example:
        >>> from lightning_peft import consolidate_checkpoint
        >>> weights = consolidate_checkpoint("last.ckpt")["state_dict"]  # doctest: +SKIP
    """
    folder = Path(folder)
    if not (folder / _METADATA_FILENAME).is_file():
        kind = "a single file, and whole already" if folder.is_file() else f"no folder with {_METADATA_FILENAME}"
        raise ConfigError(f"No sharded checkpoint at {str(folder)!r}: it is {kind}.")
    if file is not None and Path(file).is_dir():
        raise ConfigError(f"{str(file)!r} is a folder; name the file to write.")
    metadata = FileSystemReader(folder).read_metadata()
    parts = {getattr(info, "relative_path", "") for info in (metadata.storage_data or {}).values()}
    if missing := sorted(part for part in parts if not (folder / part).is_file()):
        raise ConfigError(f"The sharded checkpoint {str(folder)!r} is not whole: {', '.join(missing)} missing.")
    flat: dict[str, Any] = {
        key: None if isinstance(entry, BytesStorageMetadata) else torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
    }
    read_flat(flat, folder, alone=True)
    checkpoint = read_checkpoint(folder / _METADATA_FILENAME, weights_only, mmap=False)
    paths = metadata.planner_data
    checkpoint["state_dict"] = {str(paths[key][1]): v for key, v in flat.items() if paths[key][0] == "state_dict"}
    names = sorted({paths[key][0] for key in flat} - {"state_dict"}, key=lambda name: int(name.rpartition("_")[2]))
    if names:
        checkpoint["optimizer_states"] = [
            _numbered(*optimizer_tree({key: v for key, v in flat.items() if paths[key][0] == name}, paths))
            for name in names
        ]
    if file is not None:
        torch.save(checkpoint, file)
    return checkpoint


def _numbered(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state by the place of each parameter in the groups, as torch's optimizers write it."""
    order = {name: number for number, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {order[name]: leaves for name, leaves in state.items()},
        "param_groups": [{**group, "params": [order[name] for name in group["params"]]} for group in groups],
    }
