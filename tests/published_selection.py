"""Arditi et al.'s selection of a direction, in plain Hugging Face code written from the paper.

The reference for the package's scores and speed; it uses nothing of the package.

    mean activations  at the input of block l, at the last tokens of the template (section 2.3)
    ablation          x - r (r.x), r of norm 1, at the input of every block and the output of every
                      attention and MLP (equation 4, section 2.4)
    addition          x + r, r as it is, at the input of block l (equation 3)
    refusal score     log(p + e) - log(1 - p + e), e = 1e-8, in float64 (section B.1)
    KL                between the next-token distributions of the harmless prompts (section C)

Reference: Arditi et al. 2024, arXiv:2406.11717.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-8


class PublishedSelection:
    """The published method on one model: prompts come as text, 32 to a batch."""

    def __init__(self, hf: Any, tokenizer: Any, refusal_ids: Sequence[int], batch_size: int = 32):
        self.hf, self.tokenizer = hf.eval(), tokenizer
        self.blocks = hf.model.layers
        self.refusal_ids, self.batch_size = list(refusal_ids), batch_size

    def batches(self, prompts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(prompts), self.batch_size):
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                for prompt in prompts[start : start + self.batch_size]
            ]
            self.tokenizer.pad_token = self.tokenizer.eos_token
            batch = self.tokenizer(
                texts,
                padding=True,
                padding_side="left",
                add_special_tokens=False,
                return_tensors="pt",
            )
            mask = batch["attention_mask"]
            # Rotary positions from the first real token on, as without padding.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {
                "input_ids": batch["input_ids"],
                "attention_mask": mask,
                "position_ids": positions,
            }
            yield {name: values.to(self.hf.device) for name, values in inputs.items()}

    @torch.no_grad()
    def mean_activations(self, prompts: Sequence[str], n_positions: int) -> Tensor:
        """`[pos layer d_model]`, float64: what enters each block, at the last positions."""
        shape = n_positions, len(self.blocks), self.hf.config.hidden_size
        total = torch.zeros(shape, dtype=torch.float64, device=self.hf.device)

        def reader(layer: int):
            def read(module, arguments):
                total[:, layer] += arguments[0][:, -n_positions:].double().sum(0)

            return read

        with ExitStack() as hooks:
            for layer, block in enumerate(self.blocks):
                handle = block.register_forward_pre_hook(reader(layer))
                hooks.callback(handle.remove)
            for batch in self.batches(prompts):
                self.hf(**batch)
        return total / len(prompts)

    @contextmanager
    def ablating(self, direction: Tensor) -> Iterator[None]:
        unit = direction / (direction.norm() + EPSILON)

        def without(x: Tensor) -> Tensor:
            return x - (x @ unit)[..., None] * unit

        def at_input(module, arguments):
            return (without(arguments[0]), *arguments[1:])

        def at_output(module, arguments, output):
            if isinstance(output, tuple):
                return (without(output[0]), *output[1:])
            return without(output)

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(at_input).remove)
                for writer in (block.self_attn, block.mlp):
                    hooks.callback(writer.register_forward_hook(at_output).remove)
            yield

    @contextmanager
    def adding(self, direction: Tensor, layer: int) -> Iterator[None]:
        def at_input(module, arguments):
            return (arguments[0] + direction, *arguments[1:])

        handle = self.blocks[layer].register_forward_pre_hook(at_input)
        yield
        handle.remove()

    @torch.no_grad()
    def last_logits(self, prompts: Sequence[str]) -> Tensor:
        return torch.cat([self.hf(**batch).logits[:, -1] for batch in self.batches(prompts)])

    def refusal_score(self, logits: Tensor) -> float:
        p = logits.double().softmax(-1)[:, self.refusal_ids].sum(-1)
        return ((p + EPSILON).log() - (1 - p + EPSILON).log()).mean().item()

    def scores(
        self, directions: Tensor, harmful: Sequence[str], harmless: Sequence[str]
    ) -> dict[str, Tensor]:
        """`ablation`, `addition` and `kl` of each of `[pos layer d_model]`, `[pos layer]`."""
        unchanged = self.log_probabilities(harmless)
        found = {name: torch.empty(directions.shape[:2]) for name in ("ablation", "addition", "kl")}
        for position in range(directions.shape[0]):
            for layer in range(directions.shape[1]):
                direction = directions[position, layer]
                for name, score in self.candidate(
                    direction, layer, harmful, harmless, unchanged
                ).items():
                    found[name][position, layer] = score
        return found

    def candidate(
        self,
        direction: Tensor,
        layer: int,
        harmful: Sequence[str],
        harmless: Sequence[str],
        unchanged: Tensor,
    ) -> dict[str, float]:
        """The three scores of one direction; `unchanged` are the harmless log-probabilities."""
        direction = direction.to(self.hf.dtype)
        with self.ablating(direction):
            ablated = self.last_logits(harmful)
            changed = self.log_probabilities(harmless)
        with self.adding(direction, layer):
            added = self.last_logits(harmless)
        return {
            "ablation": self.refusal_score(ablated),
            "addition": self.refusal_score(added),
            "kl": (unchanged.exp() * (unchanged - changed)).sum(-1).mean().item(),
        }

    def log_probabilities(self, prompts: Sequence[str]) -> Tensor:
        """Of the next token, in float64."""
        return self.last_logits(prompts).double().log_softmax(-1)
