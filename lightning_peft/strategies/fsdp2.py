"""FSDP2 for any LightningModule: sharded by its blocks, with no ``configure_model``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from lightning_peft.errors import ConfigError, UnsupportedStrategy
from lightning_peft.strategies.materialize import (
    WeightFiles,
    fill_from_rank_zero,
    has_meta_tensors,
    materialize,
    parameters_on_meta,
    seed_of_rank_zero,
    take_from_rank_zero,
)
from lightning_peft.strategies.partial_state import (
    lazy_init_all_trainable,
    load_checkpoint,
    optimizer_state,
    record_partial_state,
    reshard,
)
from lightning_peft.strategies.sharding import (
    checkpoint_activations,
    find_blocks,
    is_sharded_model,
    lay_out_processes,
    no_gradient_sync,
    same_on_all_ranks,
    shard_model,
    shards_integers,
    unsharded_names,
)
from lightning_peft.strategies.tensor_parallel import apply_tensor_parallel, clip_grad_norm

__all__ = ["FSDP2Strategy"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_SHARDED_HERE = "_lightning_peft_sharded"


class FSDP2Strategy(ModelParallelStrategy):
    """Shard weights, gradients and optimizer states over all processes, block by block, of any LightningModule.

    Each block (decoder layer, residual block, ...) is gathered while it computes and freed again; embeddings, head and
    all else form one more group that is there for the whole step. What trains may change at any time. Gradients are
    those of one process on the joined batch.

    Memory per process is about 1/N of weights, gradients and optimizer states, plus one gathered block and the rest
    group. A step sends every weight twice and the gradients of what trains once.

    The order in ``setup``: the precision plugin converts (quantises) the model; blocks are found; every rank takes
    rank 0's weights where they differ; ``fully_shard``; weights of a model without memory are read; optimizers are
    built. A model that ``configure_model`` has sharded itself stays as it is; only parameters that it left out are
    put into a group.

    Args:
        blocks: Class names or globs of class names or module paths whose modules get a group each, such as
            ``["LlamaDecoderLayer"]`` or ``["model.layers.*"]``. None finds the blocks.
        data_parallel_size: Number of processes with data of their own; ``auto`` is all, divided by
            ``tensor_parallel_size``.
        tensor_parallel_size: Number of processes that share each matrix multiplication (and see the same data).
        tensor_parallel_plan: Module glob -> ``colwise``, ``rowwise``, ``colwise_gather_output`` or
            ``embedding_rowwise``, for ``tensor_parallel_size > 1``. None takes the Hugging Face model's own plan.
        num_replicas: Shard within groups and replicate across this many of them (HSDP), to send weights within a node
            only: usually the number of nodes. Must divide the data-parallel size.
        param_dtype: Dtype that weights are gathered and computed in; the optimizer keeps those as built. ``auto`` is
            bfloat16 with ``precision="bf16-mixed"``, otherwise as built. ``float32`` with ``bf16-mixed`` sends twice
            as much and computes exactly as one process does under autocast.
        reduce_dtype: Dtype that gradients are summed over processes in.
        reshard_after_forward: Free a block after its forward pass and gather it again for the backward pass. False
            keeps all blocks gathered between the two: less traffic, memory as without sharding of weights.
        reduce_every_micro_batch: With gradient accumulation, False reduces gradients once per optimizer step and keeps
            whole gradients until then; True reduces in every micro-batch and keeps shards.
        activation_checkpointing: Keep only each block's input for the backward pass and compute the block again.
            Frozen blocks below the lowest trainable one are not computed again.
        cpu_offload: Keep shards, gradients and optimizer states in CPU memory, and step there.
        weights: A safetensors file or a folder of them (a Hugging Face model folder), for a model built without
            memory: ``with trainer.init_module(empty_init=True): model = ...``. Each rank reads its own parts.
        save_distributed_checkpoint: Save a folder with a file per rank; False gathers one file on rank 0, which a run
            on one device reads too. Either is loaded by any number of processes.
        process_group_backend: Backend of ``torch.distributed``; None chooses by device.
        timeout: How long a collective call may wait.

    Raises:
        ConfigError: Sizes that do not divide, blocks that match nothing, and other settings that cannot work; raised on
            every rank.
        UnsupportedStrategy: A precision or model that FSDP2 cannot serve.

    Example:
        >>> from lightning_peft import FSDP2Strategy
        >>> strategy = FSDP2Strategy(activation_checkpointing=True)
        >>> strategy.strategy_name
        'fsdp2'

        ``Trainer(strategy="fsdp2")`` is short for the defaults once ``lightning_peft`` is imported.
    """

    strategy_name = "fsdp2"
    saves_partial_state = True

    def __init__(
        self,
        blocks: list[str] | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        tensor_parallel_plan: dict[str, str] | None = None,
        num_replicas: int = 1,
        param_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        reshard_after_forward: bool = True,
        reduce_every_micro_batch: bool = False,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        weights: str | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        for name, value in (
            ("data_parallel_size", data_parallel_size),
            ("tensor_parallel_size", tensor_parallel_size),
            ("num_replicas", num_replicas),
        ):
            if value != "auto" and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"FSDP2Strategy: {name} is a number of processes, at least 1; not {value!r}.")
        for name, dtype, choices in (
            ("param_dtype", param_dtype, ("auto", "float32", "bfloat16")),
            ("reduce_dtype", reduce_dtype, ("float32", "bfloat16")),
        ):
            if dtype not in choices:
                raise ConfigError(f"FSDP2Strategy: {name}={dtype!r} is none of {', '.join(choices)}.")
        if tensor_parallel_plan is not None and tensor_parallel_size == 1:
            raise ConfigError("FSDP2Strategy: tensor_parallel_plan has no effect with tensor_parallel_size=1.")
        if isinstance(blocks, str):
            raise ConfigError(f"FSDP2Strategy: blocks is a list of names, such as [{blocks!r}].")
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._wished_data_parallel_size = data_parallel_size
        self.blocks = blocks
        self.tensor_parallel_plan = tensor_parallel_plan
        self.num_replicas = num_replicas
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_micro_batch = reduce_every_micro_batch
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self.weights = weights

    # ------------------------------------------------------------------ processes

    def setup_environment(self) -> None:
        """Start the process group and lay the processes out as replicas x shards x tensor parallel.

        Raises:
            ConfigError: On every rank, if the sizes do not multiply to the number of processes.
        """
        world_size = self.num_nodes * self.num_processes
        tensor, replicas = int(self._tensor_parallel_size), self.num_replicas
        wished = self._wished_data_parallel_size
        data = world_size // tensor if wished == "auto" else int(wished)
        if data * tensor != world_size:
            sizes = f"tensor_parallel_size={tensor}" if wished == "auto" else f"data_parallel_size={wished} x {tensor}"
            raise ConfigError(
                f"FSDP2Strategy: {world_size} processes cannot be laid out with {sizes}. Leave data_parallel_size at "
                f"'auto' and choose a tensor_parallel_size that divides {world_size}."
            )
        if data % replicas:
            raise ConfigError(
                f"FSDP2Strategy: num_replicas={replicas} does not divide the {data} data-parallel processes."
            )
        self._data_parallel_size = data
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self._device_mesh = lay_out_processes(self.root_device.type, replicas, data // replicas, tensor)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"  # norms of offloaded gradients are summed on the CPU
        return super()._get_process_group_backend()

    @property
    def _shard_mesh(self) -> DeviceMesh:
        if self.num_replicas > 1:
            return self.device_mesh["replicate", "shard"]
        return self.device_mesh["data_parallel"]

    # ------------------------------------------------------------------ the model

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build modules under the precision's dtype; with ``empty_init``, parameters get no memory yet."""
        context: AbstractContextManager[Any] = parameters_on_meta() if empty_init else nullcontext()
        with context, self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        """Convert, shard, fill and lazily initialise the model, then build the optimizers."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self._check_precision()
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)
        module = self.lightning_module
        assert module is not None
        self.parallelize(module)
        self.model_to_device()
        self.barrier()
        lazy_init_all_trainable(module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if int(self._tensor_parallel_size) > 1:  # torch's own function takes gradients of one mesh only
            plugin: Any = self.precision_plugin
            plugin.clip_grad_by_norm = lambda optimizer, value: clip_grad_norm(plugin.main_params(optimizer), value)
        if fitting and not self.cpu_offload:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _check_precision(self) -> None:
        precision = getattr(self.precision_plugin, "precision", None)
        if precision in ("16-mixed", "16-true"):
            raise UnsupportedStrategy(
                f"FSDP2Strategy does not support precision={precision!r}: float16 needs a loss scale that all ranks "
                "agree on. Use bf16-mixed, bf16-true or 32-true."
            )

    def parallelize(self, module: LightningModule) -> None:
        """Shard ``module`` in place and give it its weights; nothing is done to what is sharded already."""
        if is_sharded_model(module):
            self._complete(module)
            return
        held = take_from_rank_zero(module)
        files = self._weight_files(module) if held is None else None
        if dist.get_world_size() > 1:
            different = same_on_all_ranks(module)
            if different:
                rank_zero_info(
                    f"{len(different)} tensor(s) differed between ranks, such as {different[0]}; rank 0's are taken."
                )
        if int(self._tensor_parallel_size) > 1:
            apply_tensor_parallel(module, self.device_mesh["tensor_parallel"], self.tensor_parallel_plan)
        blocks = find_blocks(module, self.blocks)
        if self.activation_checkpointing:
            checkpoint_activations(module, blocks)
        self._shard(module, blocks)
        place = torch.device("cpu") if self.cpu_offload else self.root_device
        if held is not None:
            fill_from_rank_zero(module, held, place, self.root_device)
        elif has_meta_tensors(module):
            fresh = materialize(module, place, self.root_device, files, seed_of_rank_zero())
            if fresh:
                more = f", ... ({len(fresh)} in all)" if len(fresh) > 4 else ""
                rank_zero_info(f"Not in {self.weights} and initialised: {', '.join(fresh[:4])}{more}")

    def _weight_files(self, module: LightningModule) -> WeightFiles | None:
        if self.weights is None:
            return None
        if not any(p.is_meta for p in module.parameters()):
            rank_zero_warn(
                f"FSDP2Strategy: weights={self.weights!r} has no effect, because the model has its weights already. "
                "Build it without memory: with trainer.init_module(empty_init=True): ..."
            )
            return None
        return WeightFiles(self.weights)

    def _complete(self, module: LightningModule) -> None:
        """Put what the user's own ``fully_shard`` calls left out into one more group."""
        left_out = unsharded_names(module)
        if left_out:
            rank_zero_info(f"{len(left_out)} parameter(s) in no fully_shard group get one, such as {left_out[0]}.")
            self._shard(module, {})
        elif self.blocks is not None and not hasattr(module, _SHARDED_HERE):
            rank_zero_warn("FSDP2Strategy: blocks has no effect, because configure_model shards the model itself.")
        if has_meta_tensors(module):
            place = torch.device("cpu") if self.cpu_offload else self.root_device
            materialize(module, place, self.root_device, self._weight_files(module), seed_of_rank_zero())

    def _shard(self, module: LightningModule, blocks: dict[str, nn.Module]) -> None:
        policy, root_policy = self._policies(module)
        offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if self.cpu_offload else OffloadPolicy()
        steps = [name for name in _STEPS if is_overridden(name, module)]
        shard_model(
            module,
            blocks,
            self._shard_mesh,
            policy=policy,
            root_policy=root_policy,
            offload=offload,
            reshard_after_forward=self.reshard_after_forward,
        )
        for name in steps:  # they run the model's parts, so that the root's weights have to be there
            register_fsdp_forward_method(module, name)
        setattr(module, _SHARDED_HERE, True)

    def _policies(self, module: nn.Module) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy]:
        """Mixed precision of the blocks and of the root group."""
        autocast = getattr(self.precision_plugin, "precision", None) == "bf16-mixed"
        bfloat16 = self.param_dtype == "bfloat16" or (self.param_dtype == "auto" and autocast)
        if bfloat16 and not shards_integers() and any(not p.is_floating_point() for p in module.parameters()):
            bfloat16 = False  # older torch would cast quantised weights as well
        dtype = torch.bfloat16 if bfloat16 else None
        reduce = getattr(torch, self.reduce_dtype)
        blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce)
        # the root's inputs are the batch: autocast takes what it needs, and targets keep their precision
        return blocks, MixedPrecisionPolicy(dtype, reduce, cast_forward_inputs=not autocast)

    def model_to_device(self) -> None:
        """Move what is not sharded (buffers, metrics) to the device."""
        assert self.model is not None
        if not self.cpu_offload:
            super().model_to_device()
            return
        for module in self.model.modules():
            if not any(True for _ in module.parameters()):
                module.to(self.root_device)  # metrics, whose states are no buffers
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.root_device)

    # ------------------------------------------------------------------ training

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients unreduced within an accumulation window, unless they shall be sharded at once."""
        if self.reduce_every_micro_batch or self.model is None:
            yield
            return
        with no_gradient_sync(self.model):
            yield

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, and free what is gathered: it holds the weights before the step."""
        result = super().optimizer_step(*args, **kwargs)
        self._free()
        return result

    def on_validation_end(self) -> None:
        """Free the root's group, which a pass without gradients leaves gathered."""
        self._free()

    def on_test_end(self) -> None:
        """Free the root's group, which a pass without gradients leaves gathered."""
        self._free()

    def on_predict_end(self) -> None:
        """Free the root's group, which a pass without gradients leaves gathered."""
        self._free()

    def _free(self) -> None:
        if self.model is not None:
            reshard(self.model)

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Collect the weights: shards, or all of them on rank 0."""
        assert self.model is not None
        reshard(self.model)
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collect the state of ``optimizer`` as it is, of frozen parameters too."""
        return optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save, with a note of what was trainable and what had state."""
        record_partial_state(self, checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a sharded or a full checkpoint of any number of processes."""
        return load_checkpoint(self, checkpoint_path, weights_only)
