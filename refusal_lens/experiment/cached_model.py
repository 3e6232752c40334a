"""A model that is loaded only when the cache lacks a result."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.batching import plan_batches
from ..activations.extract import read_residual_stream
from ..activations.store import Cache
from ..errors import InputError
from ..models.hub import find_checkpoint
from ..models.load import load_model, load_tokenizer, placement
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template, refuse_padding
from .config import Config
from .distributed import divide, is_main, own_device, shares
from .serialise import pack, unpack

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

ALGORITHM = 1  # increase when a change of this package changes cached numbers
PACKAGES = ("transformer_lens", "transformers", "torch")
SMALL = 2**26  # bytes; a larger file is identified by its modification time

Answer = TypeVar("Answer")


class CachedModel:
    """The model of a run, and its cached results; raises InputError without model or device.

    Args:
        config: model, revision, device, dtype, protocol and batch size.
        cache: store of activations and other results; unused with `model`.
        model: a loaded model to use instead. Its name does not identify it, so nothing is stored.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache,
        *,
        model: "HookedTransformer | TransformerBridge | None" = None,
    ):
        self.config, self.cache = config, cache
        if model is not None:
            self.cache = Cache(None)
            tokenizer: Any = model.tokenizer
            self.model, self.tokenizer, self.identity = model, tokenizer, {}
            return
        device, dtype = own_device(config.device), config.torch_dtype()
        self._device, self._dtype = placement(config.model, device, dtype)
        self._checkpoint = find_checkpoint(config.model, revision=config.revision)

    @cached_property
    def model(self) -> "HookedTransformer | TransformerBridge":
        """The model, loaded on first use."""
        return load_model(
            self.config.model,
            device=self._device,
            dtype=self._dtype,
            revision=self._checkpoint.revision,
        )

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer, loaded without the model."""
        return load_tokenizer(self.config.model, revision=self._checkpoint.revision)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything about the model and the software that can change a number."""
        return {
            "algorithm": ALGORITHM,
            "model": self.config.model,
            "files": self._checkpoint.revision or self._local_files(),
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "matmul precision": torch.get_float32_matmul_precision(),
            "versions": {package: version(package) for package in ("refusal_lens", *PACKAGES)},
        }

    def _local_files(self) -> dict[str, str]:
        files = {"sampled weights": self._checkpoint.fingerprint()}
        for path in filter(Path.is_file, self._checkpoint.directory.iterdir()):
            small = path.stat().st_size <= SMALL
            content = path.read_bytes() if small else str(path.stat().st_mtime_ns).encode()
            files[path.name] = hashlib.sha256(content).hexdigest()
        return files

    def remember(
        self,
        what: str,
        decided_by: Mapping[str, Any],
        compute: Callable[[], Answer],
        types: tuple[type, ...] = (),
    ) -> Answer:
        """Return the stored result of `compute`, or compute it in every process and store it.

        Args:
            what: name of the result.
            decided_by: JSON values that determine the result, besides the model.
            compute: a function without arguments; `pack` must accept its result.
            types: the dataclasses and enums in the result.
        """
        key = {"what": what, "model": self.identity, "decided by": dict(decided_by)}

        def stored() -> list[Answer]:
            for tensors, about in self.cache.load("results", key):
                with suppress(InputError):
                    return [unpack(about["tree"], tensors, types)]
            return []

        # The processes must agree whether to compute, so the main process decides.
        [found] = divide([stored])
        if found:
            return found[0]
        answer = compute()
        if is_main():
            tree, tensors = pack(answer)
            self.cache.store("results", key, tensors, {"tree": tree})
        return answer

    def prompt_activations(
        self,
        prompts: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        progress: bool = True,
    ) -> Float[Tensor, "prompt pos layer d_model"]:
        """Return what `get_prompt_activations` returns; compute only the missing activations.

        The processes share the missing prompts and store every batch at once. An interrupted run
        resumes with the remaining batches and gives the same bits. Equal tokens are run once.
        """
        protocol = self.config.protocol
        refuse_padding(protocol)
        inputs = build_inputs_with_chat_template(self.tokenizer, prompts, protocol=protocol)
        names = _row_names(inputs)
        first = {name: row for row, name in reversed([*enumerate(names)])}
        [found] = divide([lambda: self._stored(first)])
        if missing := sorted(row for name, row in first.items() if name not in found):
            model = self.model
            options: dict[str, Any] = {"batch_size": self.config.batch_size, "labels": labels}
            [plan] = divide([lambda: plan_batches(model, inputs, only=missing, **options)])
            options["progress"] = progress and is_main()

            def run(share: list[list[int]]) -> dict[str, Float[Tensor, "pos layer d_model"]]:
                computed: dict[str, Tensor] = {}
                only = [row for batch in share for row in batch]
                for rows, batch in read_residual_stream(model, inputs, only=only, **options):
                    about = {"key": self.identity, "rows": [names[row] for row in rows.tolist()]}
                    self.cache.store("activations", self.identity, {"activations": batch}, about)
                    computed.update(zip(about["rows"], batch, strict=True))
                return computed

            for computed in divide([partial(run, share) for share in shares(plan)]):
                found |= computed
        activations = torch.empty(len(names), *found[names[0]].shape)
        for row, name in enumerate(names):
            activations[row] = found[name]
        return activations

    def _stored(self, names: Collection[str]) -> dict[str, Float[Tensor, "pos layer d_model"]]:
        return {
            name: values
            for tensors, about in self.cache.load("activations", self.identity, names)
            for name, values in zip(about["rows"], tensors["activations"], strict=True)
        }


def _row_names(inputs: ChatInputs) -> list[str]:
    """Hash the tokens, the positions and the hook of each row."""
    names = []
    for tokens, mask, read_at in zip(inputs.tokens, inputs.mask, inputs.read_at, strict=True):
        start = len(mask) - int(mask.sum())
        row = [tokens[start:].tolist(), (read_at - start).tolist(), inputs.hook]
        names.append(hashlib.sha256(json.dumps(row).encode()).hexdigest())
    return names
