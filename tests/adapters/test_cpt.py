"""CPT: in-context learning at the start, loss and gradient of the plain formula, projection, types from the batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from lightning_peft import CPT, load_from_checkpoint
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError
from tests.adapters.test_adapter import MODEL, SaveAll
from tests.contract.harness import TinyModule, _pretrained, assert_same_weights, dataset, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning"),
]

IDS, TYPES = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]  # two examples
DECAY, EPSILON = 0.5, 0.2
WIDTH = 8
BALL = EPSILON * (WIDTH / 2048) ** 0.5


class Typed(TinyModule):
    """Batches carry types: the last two tokens of a row are label."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[:2])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[:2]))


def data() -> ResumableDataLoader:
    x, y = dataset(MODEL).tensors
    return ResumableDataLoader(TensorDataset(x, y, types_of(x)), batch_size=2)


def types_of(x: Tensor) -> Tensor:
    types = torch.full_like(x, 2)
    types[:, -2:] = 4
    return types


def make(**options: Any) -> CPT:
    return CPT(IDS, TYPES, **{"type_mask": 2, "epsilon": EPSILON, "template_epsilon": EPSILON, **options})


def fit(path: Path, *callbacks: Any, ckpt: Path | None = None) -> Typed:
    torch.manual_seed(1 if ckpt is None else 9)
    module = Typed(MODEL)
    run = trainer(path, callbacks, max_epochs=2, val_check_interval=0.5)
    run.fit(module, data(), data(), ckpt_path=ckpt)
    return module


def put_in(path: Path, callback: CPT) -> Typed:
    module = Typed(MODEL)
    trainer(path, [callback]).validate(module, data(), verbose=False)
    return module


def batch() -> Tensor:
    return dataset(MODEL).tensors[0][:4]


def test_it_starts_as_in_context_learning(tmp_path: Path) -> None:
    module, x = put_in(tmp_path, make()), batch()
    context = torch.tensor(IDS).expand(len(x), -1)
    with torch.no_grad():
        expected = copy.deepcopy(_pretrained(MODEL)).eval()(input_ids=torch.cat([context, x], 1)).logits
        assert torch.equal(module.model.eval()(input_ids=x).logits, expected)  # type: ignore[operator]


def test_loss_and_gradient_are_those_of_the_plain_formula(tmp_path: Path) -> None:
    callback = make(label_decay=DECAY)
    module, x = put_in(tmp_path, callback), batch()
    offsets: Any = callback.handle.prompt_encoder["default"].delta_embedding.weight
    assert offsets.shape == (len(IDS), WIDTH)
    start = torch.randn(offsets.shape, generator=torch.Generator().manual_seed(1)) * 1e-4  # inside the ball
    moves = torch.tensor([kind % 4 != 0 for kind in TYPES])
    start *= moves[:, None]
    with torch.no_grad():
        offsets.copy_(start)
    offsets.requires_grad_(True)
    types = types_of(x)
    driver: Any = callback._driver
    driver.batch((x, x, types))
    loss = module.model.eval()(input_ids=x, labels=x).loss  # type: ignore[operator]
    loss.backward()
    assert torch.equal(types, types_of(x))  # peft writes into what it is given

    base: Any = copy.deepcopy(_pretrained(MODEL)).eval()
    plain = start.clone().requires_grad_()
    table = base.get_input_embeddings().weight.detach()
    context = table[torch.tensor(IDS)] + plain
    embeddings = torch.cat([context.expand(len(x), -1, -1), table[x]], 1)
    logits = base(inputs_embeds=embeddings).logits
    tokens = torch.cat([torch.tensor(IDS).expand(len(x), -1), x], 1)
    weight_of = {3: DECAY**2, 7: DECAY, len(IDS) + x.shape[1] - 2: 1.0, len(IDS) + x.shape[1] - 1: 1.0}
    terms = [
        weight * functional.cross_entropy(logits[:, place - 1], tokens[:, place], reduction="none")
        for place, weight in weight_of.items()
    ]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    expected.backward()
    assert plain.grad is not None
    torch.testing.assert_close(offsets.grad, plain.grad * moves[:, None])


def test_fit_stays_in_the_ball_and_resumes_exactly(tmp_path: Path) -> None:
    callback = make()
    module = fit(tmp_path, callback, SaveAll(tmp_path))
    (name,) = callback.trainable_names
    offsets = module.get_parameter(name)
    assert offsets.numel() == len(IDS) * WIDTH
    handle: Any = callback.handle
    placed = handle.prompt_encoder["default"].get_projection()
    lengths = placed.norm(dim=1)
    assert (lengths <= BALL * (1 + 1e-5)).all()
    assert all((length > 0) == (kind % 4 != 0) for length, kind in zip(lengths.tolist(), TYPES, strict=True))
    points = sorted(tmp_path.glob("*.ckpt"))
    assert set(torch.load(points[4], weights_only=True)["state_dict"]) >= {name}
    assert_same_weights(weights(fit(tmp_path, make(), ckpt=points[4])), weights(module))
    again = load_from_checkpoint(Typed, points[-1], model=MODEL)
    assert_same_weights(weights(again), weights(module))
    pretrained = dict(_pretrained(MODEL).named_parameters())
    assert all(torch.equal(handle.base_model.get_parameter(key), value) for key, value in pretrained.items())
    assert (callback.export(tmp_path / "saved") / "adapter_model.safetensors").is_file()


def test_without_types_all_labelled_tokens_count(tmp_path: Path) -> None:
    callback = CPT(IDS, TYPES)
    module, x = put_in(tmp_path, callback).eval(), batch()
    labels = x.clone()
    labels[:, :-2] = -100
    with torch.no_grad():
        free = module.model(input_ids=x, labels=labels).loss  # type: ignore[operator]
        typed = module.model(input_ids=x, labels=x, input_type_mask=types_of(x)).loss  # type: ignore[operator]
    torch.testing.assert_close(free, typed)


def test_mistakes(tmp_path: Path) -> None:
    for options, message in (
        ({"context_ids": []}, "context_ids="),
        ({"context_types": [1, 2]}, "8 context_ids and 2 context_types"),
        ({"context_types": [4] * 8}, "no token that may move"),
        ({"epsilon": 0.0}, "above 0"),
        ({"label_decay": 1.5}, r"in \(0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            CPT(**{"context_ids": IDS, "context_types": TYPES, **options})
    with pytest.raises(ConfigError, match="type_mask=5: the batch is a sequence of 3"):
        fit(tmp_path, make(type_mask=5))
    with pytest.raises(ConfigError, match="one type per token"):
        fit(tmp_path, make(type_mask=1))

    class OwnLoss(Typed):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch[0]).logits.sum()  # type: ignore[operator]

    module = OwnLoss(MODEL)
    with pytest.raises(ConfigError, match="call it with labels"):
        trainer(tmp_path, [make()], max_epochs=1).fit(module, data(), data())
