from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_peft import LoFiT, LoFiTSelection
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.native import LoFiTConfig
from lightning_peft.adapters.native.lofit import top_heads
from lightning_peft.errors import ConfigError
from tests.adapters.native.life import live
from tests.adapters.native.models import batch, build, loss, output
from tests.adapters.native.test_three_factor import layers, shake
from tests.contract.harness import TinyModule, assert_same_weights, loader, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
]

O = "model.layers.{}.self_attn.o_proj"  # noqa: E741
HEADS = {O.format(0): [3, 1], O.format(1): [2]}
GQA = "gqa_decoder"


def test_life_with_grouped_queries(tmp_path: Path) -> None:
    base, x = build("llama"), batch("llama")
    assert base.config.num_key_value_heads < base.config.num_attention_heads == 4
    config = LoFiTConfig(heads=HEADS, init_std=0.0)
    handle = live(base, x, config, 3 * 8, tmp_path, merges=False)  # heads times the width of one
    trained = output(handle, x)
    with pytest.warns(UserWarning, match="without a bias"):
        handle.merge_adapter()
    torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-5)
    handle.unmerge_adapter()
    torch.testing.assert_close(output(handle, x), trained, rtol=1e-4, atol=1e-5)
    assert not [name for name in handle.state_dict() if name.endswith("bias")]
    with pytest.warns(UserWarning, match="attention_bias"):
        merged: Any = merge_adapters(handle)
    torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-5)
    assert merged.model.layers[0].self_attn.o_proj.bias is not None
    assert merged.model.layers[0].mlp.down_proj.bias is None


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_life_where_there_is_a_bias(name: str, tmp_path: Path) -> None:
    pattern = {"gpt2": r".*attn\.c_proj", "bert": r".*attention\.output\.dense"}[name]
    live(build(name), batch(name), LoFiTConfig(target_modules=pattern, init_std=0.0), 2 * 32, tmp_path)


def test_selection_trains_all_scales_and_is_not_merged(tmp_path: Path) -> None:
    config = LoFiTConfig(stage="select", target_modules=["o_proj"], init_std=0.0)
    handle = live(build("llama"), batch("llama"), config, 2 * 32, tmp_path, merges=False)
    with pytest.raises(ConfigError, match="only choose the heads"):
        merge_adapters(handle)


@pytest.mark.parametrize("stage", ["select", "offset"])
def test_values_and_gradients_are_those_of_the_formula(stage: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(12, 5)).double()
        z, C = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    heads = {"heads": {"0": [3, 1]}} if stage == "offset" else {"target_modules": ["0"]}
    handle = get_peft_model(copy.deepcopy(model), LoFiTConfig(stage=stage, num_heads=4, init_std=0.5, **heads))
    layer: Any = layers(handle)["base_model.model.0"]
    W, b = model[0].weight, model[0].bias
    expected = torch.zeros(2, 4, 5, dtype=torch.float64)
    values = layer.tensor("scale" if stage == "select" else "offset", "default").detach().clone().requires_grad_()
    for head in range(4):  # each head's own slice of the projection
        part = slice(3 * head, 3 * head + 3)
        z_head = z[..., part]
        if stage == "select":
            z_head = (1 + values[head]) * z_head
        elif head in (3, 1):
            z_head = z_head + values[0 if head == 3 else 1]
        expected = expected + z_head @ W[:, part].T
    expected = expected + b
    y = handle(z)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    (y * C).sum().backward()
    (expected * C).sum().backward()
    parameter = layer.tensor("scale" if stage == "select" else "offset", "default")
    assert values.grad is not None
    torch.testing.assert_close(parameter.grad, values.grad, rtol=1e-9, atol=1e-10)
    if stage == "offset":
        merged: Any = handle.merge_and_unload()
        torch.testing.assert_close(merged(z), y, rtol=1e-10, atol=1e-10)


def test_initial_values() -> None:
    handle = get_peft_model(build("llama"), LoFiTConfig(stage="select", target_modules=["o_proj"]))
    scales = torch.cat([layer.tensor("scale", "default").flatten() for layer in layers(handle).values()])
    assert scales.std().item() == pytest.approx(1e-3, rel=0.3)
    assert scales.mean().abs().item() < 5e-4


def test_two_adapters_with_heads_of_their_own() -> None:
    base, x = build("llama"), batch("llama")
    handle: Any = get_peft_model(copy.deepcopy(base), LoFiTConfig(heads=HEADS, init_std=0.3))
    first = output(handle, x)
    handle.add_adapter("other", LoFiTConfig(heads={O.format(1): [0, 2]}, init_std=0.3, seed=4))
    handle.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(output(handle, x), first)
    layer: Any = layers(handle)[f"base_model.model.{O.format(1)}"]
    z = torch.randn(2, 3, 32)
    expected = z.clone().view(2, 3, 4, 8)
    expected[:, :, 2] += layer.lofit_offset["default"][0]
    expected[:, :, 0] += layer.lofit_offset["other"][0]
    expected[:, :, 2] += layer.lofit_offset["other"][1]
    torch.testing.assert_close(layer(z), layer.base_layer(expected.view(2, 3, 32)))
    handle.set_adapter("default")
    assert torch.equal(output(handle, x), first)


def test_quantised_base() -> None:
    from lightning_peft.precision import merge_adapter, quantize

    model, x = build("llama"), batch("llama")
    quantize(model, "nf4")
    expected = output(model, x)
    handle: Any = get_peft_model(model, LoFiTConfig(heads=HEADS, init_std=0.0))
    assert torch.equal(output(handle, x), expected)
    shake(handle)
    loss(handle, x).backward()
    trained = output(handle, x)
    with pytest.raises(ConfigError, match="dequantize=True"):
        handle.merge_adapter()
    with pytest.warns(UserWarning, match="without a bias"):
        merge_adapter(model, dequantize=True)
    torch.testing.assert_close(output(model, x), trained, rtol=1e-3, atol=1e-3)


def test_top_heads() -> None:
    scores = {"b": [0.1, 0.9, 0.5], "a": [0.5, 0.2, 0.95]}
    assert top_heads(scores, 2) == {"b": [1], "a": [2]}
    assert top_heads(scores, 3) == {"b": [1, 2], "a": [2]}, "of equal scores the first"
    assert top_heads(scores, 6) == {"b": [0, 1, 2], "a": [0, 1, 2]}
    for count in (0, 7):
        with pytest.raises(ConfigError, match=f"{count} heads of 6"):
            top_heads(scores, count)


class OneHead(TinyModule):
    """Its loss depends on how one head of the second block is scaled, whatever the model does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        value = super().training_step(batch, batch_idx)
        layer = self.model.get_submodule("model.layers.1.self_attn.o_proj")
        return value * 0 + (layer.tensor("scale", "default")[1] - 1).square().sum()


def fit(path: Path, callback: Any, module: Any, ckpt: Path | None = None, steps: int = 6) -> tuple[Any, Any]:
    torch.manual_seed(1 if ckpt is None else 9)
    run = trainer(path, [callback], max_steps=steps, max_epochs=2)
    run.fit(module, loader(GQA), loader(GQA, shuffle=False), ckpt_path=ckpt)
    assert run.global_step == steps
    return module, run


def test_the_two_runs(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    selection = LoFiTSelection(fraction=0.07, l1=1e-3, heads_file=str(file), init_std=0.0)
    module, _ = fit(tmp_path, selection, OneHead(GQA))
    blocks = len(selection.scores())
    heads = module.model.config.num_attention_heads
    assert blocks == module.model.config.num_hidden_layers
    assert all(len(values) == heads for values in selection.scores().values())
    assert json.loads(file.read_text()) == selection.heads() == {"model.layers.1.self_attn.o_proj": [1]}
    penalty = selection._driver.loss()  # type: ignore[union-attr]
    total = sum(p.abs().sum() for name, p in module.named_parameters() if "lofit_scale" in name)
    torch.testing.assert_close(penalty, 1e-3 * total)
    assert penalty > 0
    assert selection.needs_whole_parameters, "refused where parameters are sharded"

    tuning = LoFiT(heads=str(file), init_std=0.0)
    module, _ = fit(tmp_path, tuning, TinyModule(GQA))
    head_dim = module.model.config.hidden_size // heads
    sizes = [p.numel() for name, p in module.named_parameters() if name in tuning.trainable_names and "lofit" in name]
    assert sizes == [head_dim]
    _, half = fit(tmp_path, LoFiT(heads=str(file), init_std=0.0), TinyModule(GQA), steps=3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all("lofit_offset" in name for name in saved)
    resumed, _ = fit(tmp_path, LoFiT(heads=str(file), init_std=0.0), TinyModule(GQA), tmp_path / "half.ckpt")
    assert_same_weights(weights(resumed), weights(module))
    tuning.export(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(TinyModule(GQA).model, tmp_path / "peft").eval()
    x = next(iter(loader(GQA)))[0]
    torch.testing.assert_close(loaded(x).logits, module.model.eval()(x).logits, rtol=1e-5, atol=1e-6)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different indices"):
        LoFiT(heads={"a": [1, 1]})
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        LoFiT(heads=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="belong to stage='offset'"):
        LoFiTConfig(stage="select", heads={"a": [0]})
    with pytest.raises(ConfigError, match=r"fraction=0"):
        LoFiTSelection(fraction=0)
    with pytest.raises(ConfigError, match=r"l1=-1"):
        LoFiTSelection(l1=-1.0)
    with pytest.raises(ConfigError, match=r"has 4 heads, from 0: head 4"):
        get_peft_model(build("llama"), LoFiTConfig(heads={O.format(0): [4]}))
    with pytest.raises(ConfigError, match=r"self_attn\.o_prj.*self_attn\.o_proj"):
        get_peft_model(build("llama"), LoFiTConfig(heads={"model.layers.0.self_attn.o_prj": [0], O.format(1): [0]}))
    with pytest.raises(ConfigError, match=r"Say num_heads="):
        get_peft_model(build("vit"), LoFiTConfig(target_modules=["proj"]))
    with pytest.raises(ConfigError, match="not those of 3 heads"):
        get_peft_model(build("vit"), LoFiTConfig(target_modules=["proj"], num_heads=3))
