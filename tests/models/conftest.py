"""Tiny models and a tiny tokenizer, written to a folder once and loaded with the real ``from_pretrained``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.models.tiny_models import BERT, LLAMA, save_tokenizer, tiny_trainer


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    values = dict(LLAMA)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder)
    save_tokenizer(folder, pad=False)
    return str(folder)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoConfig, AutoModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    values = dict(BERT)
    AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def trainer(tmp_path: Path):
    return partial(tiny_trainer, tmp_path)
