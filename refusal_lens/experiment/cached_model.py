"""A model that is loaded only when the cache lacks a result."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..activations.batching import plan_batches
from ..activations.extract import read_residual_stream
from ..activations.progress import RunBar
from ..activations.store import Cache, digest
from ..errors import InputError
from ..models.hub import find_checkpoint
from ..models.load import load_model, load_tokenizer, placement, tokenizer_of
from ..prompts.tokenize import ChatInputs, build_inputs_with_chat_template, refuse_padding
from .config import Config
from .distributed import divide, in_shares, is_main, own_device
from .serialise import pack, unpack

if TYPE_CHECKING:
    from ..models import HookedModel

ALGORITHM = 5  # increase when a change of this package changes cached numbers
PACKAGES = ("transformer_lens", "transformers", "torch")

Answer = TypeVar("Answer")


class CachedModel:
    """The model of a run, and its cached results; raises InputError without model or device.

    Args:
        config: model, revision, device, dtype, protocol and batch size.
        cache: store of activations and other results, or its folder; unused with `model`.
        model: a loaded model to use instead. Its name does not identify it, so nothing is stored.
    """

    def __init__(
        self,
        config: Config,
        cache: Cache | str | Path | None,
        *,
        model: "HookedModel | None" = None,
    ):
        self.config, self.cache = config, cache if isinstance(cache, Cache) else Cache(cache)
        self.identity: dict[str, Any] = {}
        if model is not None:
            self.model, self.cache = model, Cache(None)
            self.tokenizer: Any = tokenizer_of(model)
            return
        n_devices, device = config.n_devices, own_device(config.device, config.n_devices)
        self._device, self._dtype = placement(config.model, device, config.dtype, n_devices)
        checkpoint = find_checkpoint(config.model, revision=config.revision)
        self._revision = checkpoint.revision
        self.tokenizer = load_tokenizer(config.model, revision=self._revision)
        local_files = [(path.name, path.stat().st_mtime_ns) for path in checkpoint.files()]
        files = [checkpoint.fingerprint(), local_files]
        # Everything about the model and the software that can change a number.
        self.identity = {
            "algorithm": ALGORITHM,
            "model": config.model,
            "files": [self._revision, *files] if checkpoint.adapters else self._revision or files,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._device.type,
            "matmul precision": torch.get_float32_matmul_precision(),
            "versions": {package: version(package) for package in ("refusal_lens", *PACKAGES)},
        }

    @cached_property
    def model(self) -> "HookedModel":
        """The model, loaded on first use."""
        options: Any = {"device": self._device, "dtype": self._dtype, "revision": self._revision}
        return load_model(self.config.model, n_devices=self.config.n_devices, **options)

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
            tensors = self.cache.load(key)
            with suppress(InputError, KeyError):
                return [unpack(json.loads(bytes(tensors["tree"].tolist())), tensors, types)]
            return []

        [found] = divide([stored])  # the processes must agree whether to compute
        answer = found[0] if found else compute()
        if not found and is_main():
            tree, tensors = pack(answer)
            text = json.dumps(tree).encode()
            self.cache.store(key, tensors | {"tree": torch.tensor([*text], dtype=torch.uint8)})
        return answer

    def prompt_activations(
        self,
        prompts: Sequence[str],
        *,
        labels: Sequence[str] | None = None,
        progress: bool | RunBar = True,
    ) -> Float[Tensor, "prompt pos layer d_model"]:
        """Return what `get_prompt_activations` returns; compute only the missing activations.

        The processes share the missing prompts and store every batch at once. An interrupted run
        resumes with the remaining batches and gives the same bits. Equal tokens are run once.
        """
        protocol = self.config.protocol
        refuse_padding(protocol)
        inputs = build_inputs_with_chat_template(self.tokenizer, prompts, protocol=protocol)
        names = _row_names(inputs)
        rows = dict(zip(names, range(len(names)), strict=True))
        [found] = divide([lambda: self.cache.load(self.identity, rows)])
        if missing := [row for name, row in rows.items() if name not in found]:
            model = self.model
            options: Any = {"batch_size": self.config.batch_size, "labels": labels}
            [plan] = divide([lambda: plan_batches(model, inputs, only=missing, **options)])
            options["progress"] = progress if is_main() else False

            def run(share: slice) -> dict[str, Float[Tensor, "pos layer d_model"]]:
                computed: dict[str, Tensor] = {}
                only = [row for batch in plan[share] for row in batch]
                for batch, values in read_residual_stream(model, inputs, only=only, **options):
                    finished = {names[row]: value for row, value in zip(batch, values, strict=True)}
                    self.cache.store(self.identity, finished)
                    computed |= finished
                return computed

            for computed in in_shares(run):
                found |= computed
        activations = torch.empty(len(names), *found[names[0]].shape)
        for row, name in enumerate(names):
            activations[row] = found[name]
        return activations


def _row_names(inputs: ChatInputs) -> list[str]:
    """Hash the tokens, the positions and the hook of each row."""
    names = []
    for tokens, mask, read_at in zip(inputs.tokens, inputs.mask, inputs.read_at, strict=True):
        start = len(mask) - int(mask.sum())
        names.append(digest([tokens[start:].tolist(), (read_at - start).tolist(), inputs.hook]))
    return names
