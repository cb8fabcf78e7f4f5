"""Low-bit adapters: adapters whose weights are trained in 1 to 8 bits.

Jie et al. 2023, arXiv:2307.16867. A weight matrix is standardised, each element is set to the nearest level of a
codebook for the standard normal distribution, and mean and standard deviation are put back; the gradient passes
through the rounding as if it were not there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.utils import parametrize
from typing_extensions import override

from lightning_peft.core.bits import pack, packed_bytes, unpack
from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_modules
from lightning_peft.core.plan import Claim
from lightning_peft.core.scope import Scope, resolve_scope
from lightning_peft.errors import BaseMismatch, ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built
from lightning_peft.methods.engine import Engine

__all__ = [
    "LowBitAdapters",
    "LowBitWeight",
    "bake",
    "export_codes",
    "load_codes",
    "low_bit_weights",
    "normal_codebook",
    "stored_bytes",
]

Centre = Literal["median", "mean"]
_EPSILON = 1e-5
_SPREAD = 1e-3  # standard deviation that a matrix of equal elements starts with, cut off at two of them
_ITERATIONS = 500


def normal_codebook(bits: int, centre: Centre = "median") -> torch.Tensor:
    """Return the ``2**bits`` levels that cluster the standard normal distribution best, in ascending order.

    Args:
        bits: From 1 to 8.
        centre: Of a cluster: its ``"median"`` makes the mean distance to the levels least, its ``"mean"`` the mean
            squared distance. One bit: 0.6745 or 0.7979 on either side.
    """
    num_levels = 2**bits
    levels = torch.special.ndtri((torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels)
    ends = torch.tensor([-math.inf]).double(), torch.tensor([math.inf]).double()
    for _ in range(_ITERATIONS):
        borders = torch.cat([ends[0], (levels[1:] + levels[:-1]) / 2, ends[1]])
        shares = torch.special.ndtr(borders)
        if centre == "median":
            levels = torch.special.ndtri((shares[1:] + shares[:-1]) / 2)
        else:
            density = torch.exp(-(borders**2) / 2) / math.sqrt(2 * math.pi)
            levels = (density[:-1] - density[1:]) / (shares[1:] - shares[:-1])
    return levels.float()


class LowBitWeight(nn.Module):
    """Parametrisation of a weight by the nearest levels of a codebook, to its own mean and standard deviation."""

    levels: torch.Tensor
    borders: torch.Tensor

    def __init__(self, bits: int, centre: Centre) -> None:
        super().__init__()
        self.bits = bits
        levels = normal_codebook(bits, centre)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("borders", (levels[1:] + levels[:-1]) / 2, persistent=False)

    def standardise(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the standardised weight, its mean and its standard deviation."""
        mean, std = weight.mean(), weight.std()
        return (weight - mean) / (std + _EPSILON), mean, std

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the index of each element's level."""
        return torch.bucketize(self.standardise(weight.float())[0].detach(), self.borders)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the quantised weight; its gradient takes the rounding for the identity."""
        standard, mean, std = self.standardise(weight)
        rounded = self.levels.to(weight.dtype)[torch.bucketize(standard.detach(), self.borders)]
        return (rounded + (standard - standard.detach())) * std + mean


def low_bit_weights(root: nn.Module) -> Iterator[tuple[str, nn.Module, LowBitWeight]]:
    """Yield ``(clean name of the weight, its module, its parametrisation)`` of every low-bit weight below ``root``."""
    for path, module in named_modules(root):
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for name, chain in chains.items():
            if isinstance(chain[0], LowBitWeight):
                yield f"{path}.{name}" if path else name, module, chain[0]


def stored_bytes(root: nn.Module) -> int:
    """Return the bytes that :func:`export_codes` takes: codes, two numbers per matrix, and the levels."""
    sizes = [(_latent(module, name).numel(), how.bits) for name, module, how in low_bit_weights(root)]
    return sum(packed_bytes(size, bits) + 8 for size, bits in sizes) + max(
        (4 * 2**bits for _, bits in sizes), default=0
    )


def _latent(module: nn.Module, name: str) -> torch.Tensor:
    """The floating-point weight that the optimizer steps."""
    chain: Any = module.parametrizations
    return chain[name.rpartition(".")[2]].original


@torch.no_grad()
def export_codes(root: nn.Module) -> dict[str, torch.Tensor]:
    """Return all low-bit weights as ``NAME.codes`` (packed), ``NAME.moments`` (mean, deviation) and ``levels``."""
    found: dict[str, torch.Tensor] = {}
    for name, module, how in low_bit_weights(root):
        latent = _latent(module, name).float()
        _, mean, std = how.standardise(latent)
        found[f"{name}.codes"] = pack(how.codes(latent), how.bits)
        found[f"{name}.moments"] = torch.stack([mean, std])
        found["levels"] = how.levels.clone()
    return found


@torch.no_grad()
def load_codes(root: nn.Module, codes: Mapping[str, torch.Tensor]) -> None:
    """Put exported codes into the plain weights of ``root`` (:func:`bake` first if it has low-bit weights of its own).

    Args:
        root: A model with the same adapters, in floating point.
        codes: From :func:`export_codes`.

    Raises:
        BaseMismatch: If a weight is not there, or of another size than the codes.
    """
    modules = dict(named_modules(root))
    for name in [key.removesuffix(".codes") for key in codes if key.endswith(".codes")]:
        path, _, leaf = name.rpartition(".")
        weight = modules[path]._parameters.get(leaf) if path in modules else None
        if weight is None:
            raise BaseMismatch(f"The codes of {name!r} have no place in this model: it has no such plain weight.")
        packed = codes[f"{name}.codes"]
        bits, rest = divmod(packed.numel(), -(-weight.numel() // 8))
        if rest or not 1 <= bits <= 8:
            raise BaseMismatch(f"The codes of {name!r} are {packed.numel()} bytes, for {weight.numel()} elements.")
        mean, std = codes[f"{name}.moments"]
        index = unpack(packed, bits, weight.numel()).long()
        weight.copy_((codes["levels"][index] * std + mean).reshape(weight.shape))


def bake(root: nn.Module) -> list[str]:
    """Turn low-bit weights into plain ones of the same values, for ``save_pretrained``; return their names."""
    found = [(name, module) for name, module, _ in low_bit_weights(root)]
    for name, module in found:
        parametrize.remove_parametrizations(module, name.rpartition(".")[2], leave_parametrized=True)
    return [name for name, _ in found]


class LowBitAdapters(MethodCallback):
    """Train adapters in 1 to 8 bits per weight: what is stored and shipped shrinks up to 32 times.

    Memory and time of training are those of the adapters in floating point, which the optimizer steps; each use of a
    weight rounds it anew. What shrinks is the result: :func:`export_codes` holds ``bits`` bits per weight and two
    numbers per matrix. At one bit the paper gives the saved size to wider adapters, and wins.

    Use it where adapters are stored or sent in numbers (one per user or task), with adapters that are in the model
    already, or that ``Adapter`` or ``QLoRA`` puts there (name it after them). What other methods of the run choose from
    it only rounds.

    Args:
        bits: Per weight, from 1 to 8.
        codebook: ``"median"``: levels of least distance, as the authors' code has them; ``"mean"``: of least squared
            distance.
        scope: Which adapters: the role, or paths and patterns of their parameters. Matrices are rounded, vectors not.
        always: What trains beside them. A new classification head must: ``["head"]``.
        seed: Of the noise that matrices of equal elements (LoRA's zeros) start with; without it they would stay equal.

    Raises:
        ConfigError: If an argument is out of range. From the fit, if an adapter keeps its matrices in no module.
        ScopeError: From the fit, if the model has no adapter matrix in scope.

    Example:
        >>> from lightning_peft import LowBitAdapters
        >>> LowBitAdapters(bits=2).codebook
        'median'

    Paper:
        S. Jie, H. Wang, Z.-H. Deng: Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
        Redundancy, ICCV 2023, arXiv:2307.16867; constants as in the authors' code.

    Differs from the paper:
        Works on any adapter of peft, where the paper has AdaptFormer and LoRA of its own. An element exactly between
        two levels goes to the lower one; the authors' code puts it in the middle.
    """

    def __init__(
        self,
        bits: int = 1,
        codebook: Centre = "median",
        scope: str | list[str] = "adapters",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        if not is_whole(bits, 1) or bits > 8:
            raise ConfigError(f"bits={bits!r}: a whole number from 1 to 8.")
        if codebook not in ("median", "mean"):
            raise ConfigError(f"codebook={codebook!r} is unknown. {suggest(str(codebook), ('median', 'mean'))}")
        self.bits = int(bits)
        self.codebook: Centre = codebook
        self._others: list[MethodCallback] = []

    def select(self, draw: Draw) -> list[str]:
        """All adapters in scope."""
        return list(self.units)

    @override
    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        """Claim the adapters that no other method of the run chooses from; nothing if there are none."""
        if self.resolve(structure).names:
            return super().bind(structure, user_flags)
        self._structure = structure
        self._units, self._always_units = {}, {}
        return Claim(self.label, frozenset())

    @override
    def resolve(self, structure: Structure) -> Scope:
        """The scope without what the other methods of the run choose from."""
        scope = super().resolve(structure)
        taken = frozenset(name for method in self._others for name in method.resolve(structure).names)
        return Scope(tuple(name for name in scope.names if name not in taken), scope.explicit - taken)

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, and the bytes of the adapters' matrices as trained and as stored."""
        if self._draw_index < 0:
            return super().describe()
        root = self._structure.modules[""]
        latent = [_latent(module, name) for name, module, _ in low_bit_weights(root)]
        return {
            **super().describe(),
            "trained_bytes": sum(tensor.nbytes for tensor in latent),
            "stored_bytes": stored_bytes(root),
        }

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._others = [method for method in Engine.of(trainer).methods if method is not self]
        when_built(pl_module, lambda: self.convert(pl_module))

    def convert(self, root: nn.Module) -> list[str]:
        """Round the adapters' matrices below ``root`` from now on; done once, a second call does nothing.

        Returns:
            Names of the weights converted now.
        """
        if any(True for _ in low_bit_weights(root)):
            return []
        structure = find_structure(root)
        names = resolve_scope(self.scope, structure).names
        done = []
        for name in names:
            parameter = structure.parameters[name]
            path, _, leaf = name.rpartition(".")
            if parameter.ndim < 2 or parameter.numel() < 2:
                continue
            module = structure.modules[path]
            if isinstance(module, (nn.ParameterDict, nn.ParameterList)) and not _is_native(structure, path):
                raise ConfigError(
                    f"{self.label}: {name} lies in a {type(module).__name__}, where a weight cannot be rounded as "
                    "it is used. Leave it out of scope with '!' and its path."
                )
            self._spread(name, parameter)
            parametrize.register_parametrization(module, leaf, LowBitWeight(self.bits, self.codebook))
            done.append(name)
        if not done:
            raise ScopeError(
                f"{self.label}: the {len(names)} parameters in scope are vectors; only matrices are rounded."
            )
        return done

    @torch.no_grad()
    def _spread(self, name: str, parameter: nn.Parameter) -> None:
        """Give a matrix of equal elements a spread: by its standard deviation of 0 all gradients would be 0."""
        if parameter.is_meta or bool((parameter != parameter.flatten()[0]).any()):
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        noise = torch.empty(parameter.shape)
        nn.init.trunc_normal_(noise, std=_SPREAD, a=-2 * _SPREAD, b=2 * _SPREAD, generator=generator)
        parameter.add_(noise.to(parameter))


def _is_native(structure: Structure, path: str) -> bool:
    """Whether a ``ParameterDict`` is one of this package's own adapters, which read it anew in each forward pass."""
    from lightning_peft.adapters.native.tuner import NativeLayer

    return isinstance(structure.modules[path.rpartition(".")[0]], NativeLayer)
