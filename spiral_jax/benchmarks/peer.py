"""transformers' GPT-NeoX in PyTorch, which ours is timed beside. Needs the extra `hf`."""

from collections.abc import Callable
from typing import Any

from spiral_jax.convert.architecture import config_to_huggingface
from spiral_jax.model.config import ModelConfig


def gpt_neox(model: ModelConfig, length: int) -> Any:
    """A `torch.nn.Module` of a transformer's shape, for sequences of at most `length` tokens."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config_to_huggingface(model, length)))


def update_of(peer: Any) -> Callable[[], None]:
    """Clips the gradients that its parameters hold, and applies them by AdamW."""
    import torch

    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()

    return update
