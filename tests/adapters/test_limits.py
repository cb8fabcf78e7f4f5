"""What peft would put in and compute wrong is refused before training, and MonteCLoRA's noise resumes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lightning_peft import Adapter, QuantizedPrecision
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.errors import ConfigError
from tests.adapters.test_adapter import SaveAll, fit, pytestmark  # noqa: F401  (peft's warnings)
from tests.contract.harness import TinyModule, assert_same_weights, loader, trainer, weights

MODEL = "gqa_decoder"


def test_oft_on_convolutions(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    before = {name: value.clone() for name, value in weights(module).items()}
    adapter = Adapter("oft", {"oft_block_size": 3, "target_modules": ["conv"]})
    with pytest.raises(ConfigError, match=r"oft on the convolution 'blocks\.0\.conv'.*'boft', 'lora' or 'loha'"):
        fit(tmp_path, adapter, module=module, data="conv_net")
    assert_same_weights(weights(module), before)  # and nothing is left in the model
    fit(tmp_path, Adapter("lora", {"r": 2, "target_modules": ["conv"]}), module=module, data="conv_net")


@pytest.mark.parametrize("method", ["loha", "lokr", "hra", "delora"])
def test_methods_that_read_packed_weights(method: str, tmp_path: Path) -> None:
    module = TinyModule(MODEL)
    run = trainer(
        tmp_path,
        [Adapter(method, {"r": 2, "target_modules": ["q_proj"]})],
        plugins=[QuantizedPrecision("nf4", skip=["head", "embeddings"])],
    )
    with pytest.raises(ConfigError, match=rf"{method} cannot work on the quantised layer|peft cannot put"):
        run.fit(module, loader(MODEL), loader(MODEL, shuffle=False))


def test_xlora_without_adapters(tmp_path: Path) -> None:
    module = TinyModule(MODEL)
    module.model.config.use_cache = False
    with pytest.raises(ConfigError, match="chooses among trained LoRAs"):
        fit(tmp_path, Adapter("xlora"), module=module)


def test_a_bias_that_the_base_layer_has_not_cannot_be_merged(tmp_path: Path) -> None:
    adapter = Adapter("beft", {"target_modules": ["q_proj"]})
    fit(tmp_path, adapter)
    with pytest.raises(ConfigError, match="cannot be merged into the base"):
        merge_adapters(adapter.handle)


def test_noise_of_monteclora_goes_on_after_a_resume(tmp_path: Path) -> None:
    config = {"r": 2, "monteclora_config": {"buffer_size": 4}, "target_modules": ["q_proj"]}
    module, _ = fit(tmp_path, Adapter("lora", copy.deepcopy(config)), SaveAll(tmp_path))
    for point in sorted(tmp_path.glob("*.ckpt"))[1:7:2]:  # also where a lot of noise is used up between
        resumed, _ = fit(tmp_path, Adapter("lora", copy.deepcopy(config)), ckpt=point)
        assert_same_weights(weights(resumed), weights(module))
    other, _ = fit(tmp_path, Adapter("lora", copy.deepcopy(config), seed=1))
    assert not all(torch.equal(v, weights(module)[n]) for n, v in weights(other).items())
