"""Notice when selections are too many for ``torch.compile``.

Compiled code is specialised on which parameters require a gradient. Whole blocks that freeze and thaw need two variants
each, and blocks of one class share them if they are compiled one by one. A method that trains parts of blocks needs a
variant for each pattern of parts, and a model that is compiled as a whole one for each draw. PyTorch keeps so many
variants as ``torch._dynamo.config.recompile_limit`` says (8), and runs what comes after uncompiled.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

__all__ = ["CompiledSelections", "compiled_modules"]


def compiled_modules(root: nn.Module) -> list[nn.Module]:
    """Return the modules of ``root`` that are compiled, each as it was before: no wrappers."""
    found = []
    for module in root.modules():
        if type(module).__name__ == "OptimizedModule" and isinstance(getattr(module, "_orig_mod", None), nn.Module):
            found.append(module._orig_mod)
        elif getattr(module, "_compiled_call_impl", None) is not None or getattr(module, "_compiler_ctx", None):
            found.append(module)
    return list(dict.fromkeys(found))


class CompiledSelections:
    """Count the selections that the compiled parts of a model have been compiled for."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = compiled_modules(root)
        self._seen: dict[type[nn.Module], set[tuple[bool, ...]]] = {}
        self._warned: set[type[nn.Module]] = set()

    def note(self) -> None:
        """Note what requires a gradient now; warn once per class of modules if that is one selection too many."""
        for module in self._modules:
            kind = type(module)
            seen = self._seen.setdefault(kind, set())
            seen.add(tuple(parameter.requires_grad for parameter in module.parameters()))
            limit = _recompile_limit()
            if len(seen) <= limit or kind in self._warned:
                continue
            self._warned.add(kind)
            alone = sum(type(other) is kind for other in self._modules) == 1
            remedy = "compile it block by block" if alone else "let whole blocks train (such as granularity='layer')"
            rank_zero_warn(
                f"torch.compile: {kind.__name__} has had {len(seen)} different sets of trainable parameters, each "
                f"compiled anew, and what comes after {limit} runs uncompiled. To keep it fast, {remedy}, draw more "
                "rarely, or raise torch._dynamo.config.recompile_limit."
            )


def _recompile_limit() -> int:
    import torch._dynamo.config as config

    return int(config.recompile_limit)
