"""AdaMSS: updates inside clusters of each weight's singular subspace, of which the less useful ones stop training.

The rows of the leading left singular vectors are clustered; each cluster, a *subspace*, has a low-rank update of its
own. From one step to another the number of subspaces that train falls from all ``N`` to a target ``T``, as
``T + (N - T) (1 - progress)^exponent``; those stay whose weights and gradients say most. J. Zheng et al., NeurIPS 2025.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.core.names import clean_name
from lightning_peft.errors import ConfigError

__all__ = ["AdaMSS", "AdaMSSDriver", "num_kept"]


def num_kept(step: int, total: int, target: int, start: int, end: int, exponent: float) -> int:
    """Return how many of ``total`` subspaces train after the allocation of ``step``; ``start <= step <= end``."""
    left = 1 - (step - start) / (end - start)
    return int(target + (total - target) * left**exponent)


class AdaMSSDriver(Driver):
    """Measure each subspace after every optimizer step, and drop the least important ones at every interval.

    Importance is ``peft``'s: running means of ``|w g|`` times those of its variation, averaged over each factor. What
    is dropped keeps its values and trains no more; freezing it is left to the plan of the run.
    """

    sees_whole_parameters = True
    allocates = True
    _units: Mapping[str, tuple[str, ...]] = {}
    _FIELDS = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")

    @property
    def _config(self) -> Any:
        return self.handle.peft_config[self.adapter_name]

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.adamss import AdamssLayer

        return {
            clean_name(path): module
            for path, module in self.handle.get_base_model().named_modules()
            if isinstance(module, AdamssLayer) and self.adapter_name in module.exp_avg_ipt_A
        }

    @override
    def cut(self, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per subspace of each layer; anything else that the adapter trains is one more."""
        units: dict[str, list[str]] = {}
        for name in names:
            layer, _, rest = name.partition(".adamss_")
            unit = f"{layer}/{rest.rpartition('.')[2]}" if rest else self.adapter_name
            units.setdefault(unit, []).append(name)
        cut = {unit: tuple(members) for unit, members in units.items()}
        self._units = cut
        return cut

    @override
    def stepped(self, step: int) -> None:
        """Measure, and allocate where it is time."""
        config = self._config
        if not config.init_warmup <= step <= config.final_warmup:
            return
        layers = self._layers()
        for layer in layers.values():
            layer.update_importance(self.adapter_name, config.asa_importance_beta, config.asa_uncertainty_beta)
        if step % config.mask_interval:
            return
        scores = self._scores(layers)
        total = sum(layer.num_subspaces[self.adapter_name] for layer in layers.values())
        kept = num_kept(
            step,
            total,
            config.asa_target_subspaces,
            config.init_warmup,
            config.final_warmup,
            config.asa_schedule_exponent,
        )
        ranked = sorted(scores, key=lambda unit: -scores[unit])  # stable: of equals, those nearer to the input stay
        self.dropped |= frozenset(ranked[kept:])
        self.allocations += 1
        for layer in layers.values():
            layer.reset_importance(self.adapter_name)

    def _scores(self, layers: Mapping[str, Any]) -> dict[str, float]:
        """Importance of each subspace that trains and has had a gradient."""
        names, values = [], []
        for unit in self._units:
            path, _, index = unit.rpartition("/")
            layer = next((layer for name, layer in layers.items() if path == name or path.endswith(f".{name}")), None)
            if layer is None or unit in self.dropped:
                continue
            parts: list[Tensor | None] = [
                getattr(layer, field)[self.adapter_name][int(index)] for field in self._FIELDS
            ]
            importance_a, importance_b, variation_a, variation_b = parts
            if importance_a is not None and importance_b is not None:
                assert variation_a is not None
                assert variation_b is not None
                names.append(unit)
                values.append((importance_a * variation_a).mean() + (importance_b * variation_b).mean())
        return dict(zip(names, torch.stack(values).tolist(), strict=True)) if names else {}

    @override
    def state_dict(self) -> dict[str, Any]:
        moments = {
            f"{path}/{field}": [None if t is None else t.detach().clone() for t in getattr(layer, field)[name]]
            for name in [self.adapter_name]
            for path, layer in self._layers().items()
            for field in self._FIELDS
        }
        return {"moments": moments, "dropped": sorted(self.dropped), "allocations": self.allocations}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dropped, self.allocations = frozenset(state["dropped"]), state["allocations"]
        for path, layer in self._layers().items():
            for field in self._FIELDS:
                factors = (layer.adamss_A if field.endswith("A") else layer.adamss_B)[self.adapter_name]
                saved = state["moments"][f"{path}/{field}"]
                getattr(layer, field)[self.adapter_name] = [
                    None if tensor is None else tensor.to(factor.device, copy=True)
                    for tensor, factor in zip(saved, factors, strict=True)
                ]


class AdaMSS(Adapter):
    """Train small updates inside clusters of each weight's leading singular subspace; drop the least useful clusters.

    ``subspace_rank * (rank + rows of the cluster)`` parameters per cluster. Clusters that are dropped keep what they
    have learnt, and have no gradient any more. Each layer is decomposed and clustered at the start; merged into the
    base it costs nothing in use. Needs scikit-learn.

    Use it to train fewer parameters than LoRA at rank 1, where most of the model needs no change.

    Args:
        rank: Singular vectors that are clustered; at most the smaller side of the layer.
        num_subspaces: Clusters per layer.
        subspace_rank: Rank of the update in each.
        target_subspaces: Clusters of the whole model that train at the end, 1 or more; None drops none.
        start_step: Optimizer step of the first measurement.
        end_step: Optimizer step at which the target is reached.
        period_steps: Optimizer steps between two allocations; they fall on its multiples.
        exponent: How early the number falls; above 0.
        layers: Which layers get one, as a scope; linear layers only.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the decomposition.

    Raises:
        ConfigError: If the schedule holds no allocation, or an argument is out of its range. From the fit, if
            scikit-learn is missing.
        UnsupportedStrategy: From the fit, if clusters are dropped and the strategy shards parameters.

    Example:
        >>> from lightning_peft import AdaMSS
        >>> AdaMSS(target_subspaces=20).config["asa_target_subspaces"]
        20

    Paper:
        J. Zheng et al.: AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025,
        OpenReview:8ZdWmpYxT0.

    Differs from the paper:
        As ``peft``, but that exactly the planned number of clusters is kept: ``peft`` keeps one less.
    """

    def __init__(
        self,
        rank: int = 100,
        num_subspaces: int = 5,
        subspace_rank: int = 1,
        target_subspaces: int | None = None,
        start_step: int = 50,
        end_step: int = 1000,
        period_steps: int = 100,
        exponent: float = 3.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.num_subspaces, self.subspace_rank = rank, num_subspaces, subspace_rank
        self.target_subspaces, self.start_step, self.end_step = target_subspaces, start_step, end_step
        self.period_steps, self.exponent = period_steps, exponent
        if target_subspaces is not None and period_steps > 0 and end_step // period_steps * period_steps < start_step:
            raise ConfigError(
                f"AdaMSS: no multiple of period_steps={period_steps} lies between start_step={start_step} and "
                f"end_step={end_step}: no cluster would ever be dropped."
            )
        allocation = {
            "use_asa": True,
            "asa_target_subspaces": target_subspaces,
            "init_warmup": start_step,
            "final_warmup": end_step,
            "mask_interval": period_steps,
            "asa_schedule_exponent": exponent,
        }
        super().__init__(
            "adamss",
            {
                "r": rank,
                "num_subspaces": num_subspaces,
                "subspace_rank": subspace_rank,
                "random_seed": seed,
                **(allocation if target_subspaces is not None else {}),
            },
            target,
            layers,
            adapter_name,
            always,
            seed,
        )
