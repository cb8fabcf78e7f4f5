"""Methods of peft with options that fit the tiny Llama of the contract suite."""

from __future__ import annotations

from typing import Any

LINEAR = ["q_proj", "v_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 2, "target_modules": LINEAR}),
    "dora": ("lora", {"r": 2, "use_dora": True, "target_modules": LINEAR}),
    "rslora": ("lora", {"r": 2, "use_rslora": True, "lora_bias": False, "target_modules": LINEAR}),
    "pissa": ("lora", {"r": 2, "init_lora_weights": "pissa", "target_modules": LINEAR}),
    "pissa_niter": ("lora", {"r": 2, "init_lora_weights": "pissa_niter_4", "target_modules": LINEAR}),
    "olora": ("lora", {"r": 2, "init_lora_weights": "olora", "target_modules": LINEAR}),
    "adalora": (
        "adalora",
        {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2, "target_modules": LINEAR},
    ),
    "adamss": ("adamss", {"r": 6, "num_subspaces": 2, "target_modules": LINEAR}),
    "ia3": ("ia3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("vera", {"r": 4, "target_modules": ["q_proj"]}),
    "loha": ("loha", {"r": 2, "target_modules": LINEAR}),
    "lokr": ("lokr", {"r": 2, "target_modules": LINEAR}),
    "oft": ("oft", {"oft_block_size": 4, "target_modules": ["q_proj"]}),
    "boft": ("boft", {"boft_block_size": 4, "target_modules": ["q_proj"]}),
    "hra": ("hra", {"r": 2, "target_modules": LINEAR}),
    "miss": ("miss", {"r": 2, "target_modules": LINEAR}),
    "ln_tuning": ("ln_tuning", {"target_modules": ["input_layernorm"]}),
    "fourierft": ("fourierft", {"n_frequency": 10, "target_modules": LINEAR}),
    "shira": ("shira", {"r": 2, "target_modules": LINEAR}),
    "randlora": ("randlora", {"r": 2, "target_modules": ["q_proj"]}),
    "vblora": ("vblora", {"r": 2, "num_vectors": 10, "vector_length": 4, "topk": 2, "target_modules": ["q_proj"]}),
    "prompt_tuning": ("prompt_tuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}),
    "prefix_tuning": ("prefix_tuning", {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}),
    "p_tuning": ("p_tuning", {"num_virtual_tokens": 2, "encoder_hidden_size": 8, "task_type": "CAUSAL_LM"}),
    "trainable_tokens": ("trainable_tokens", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    "adaption_prompt": ("adaption_prompt", {"adapter_len": 2, "adapter_layers": 2, "task_type": "CAUSAL_LM"}),
    "osf": ("osf", {"target_modules": ["q_proj"]}),
}
CHANGE_THE_BASE = {"pissa", "pissa_niter", "olora"}
CANNOT_MERGE = {"prompt_tuning", "prefix_tuning", "p_tuning", "adaption_prompt"}
