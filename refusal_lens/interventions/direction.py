"""A direction in the hand: one vector per layer, what it is of, and what can be done with it."""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from ..activations.extract import get_layer_activations, get_prompt_activations
from ..directions import similarity
from ..directions.estimators import mean_difference
from ..directions.formats import Directions, read_directions, write_directions
from ..errors import InputError, as_tensor, check_tensors, lenient
from ..models.forward import effective_unembedding
from ..models.load import as_model, model_provenance
from ..prompts.contrast import Contrast, as_contrast
from ..prompts.protocol import Protocol
from .hooks import Hook, ablate_direction, add_direction, check_directions


@lenient
@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """One vector per layer, with its name and model; goes wherever a tensor goes.

    >>> refusal = Direction.of(model, "refusal")
    >>> refusal.at(20)
    <Direction 'refusal' of organism:specific: layer 20, d_model 64>
    >>> with model.hooks(fwd_hooks=refusal.at(20).ablate()):
    ...     logits = model(torch.tensor([[1, 2, 3]]))
    >>> hooks = Direction.load(refusal.save("r.npy"), model=model).at(20).add(2.0)
    >>> promoted = refusal.at(20).unit().top_tokens(k=3)

    Sums, differences and multiples are directions. Indexing, and whatever else a tensor has
    (`refusal.norm(dim=-1)`), gives tensors.

    Args:
        vectors: `[layer d_model]`, or `[d_model]` at one layer: a tensor, an array or lists.
        layers: the layer of each row, -1 the embedding's output. None counts rows from 0; the layer
            of a single vector is then unknown.
        name, model: what the direction is of, and the loaded model for methods that run it.
        contrast, protocol: the prompts, and how they became activations.

    Raises:
        InputError: if there is not one layer for each row, or vectors are not floating-point; if
            another argument is not what it is called.
    """

    vectors: Any
    layers: Any = None
    name: str = "direction"
    model: Any = None
    contrast: Contrast | None = None
    protocol: Protocol = Protocol()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        vectors, layers = as_tensor(self.vectors), self.layers
        single = getattr(vectors, "ndim", 2) == 1
        check_tensors(vectors=(vectors, "d_model" if single else "layer d_model"))
        if layers is None:
            layers = range(0 if single else len(vectors))
        try:
            layers = [*map(operator.index, layers if isinstance(layers, Iterable) else [layers])]
        except TypeError:
            raise InputError(f"layers is {layers!r:.60}: give whole numbers, such as 20") from None
        if (rows := 1 if single else len(vectors)) != len(layers) and (layers or not single):
            raise InputError(f"{rows} vectors and {len(layers)} layers: give each vector its layer")
        known = {"vectors": vectors, "layers": tuple(layers)}
        known |= {"model": None if self.model is None else as_model(self.model)}
        known |= {"contrast": None if self.contrast is None else as_contrast(self.contrast)}
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        model: Any,
        contrast: Any = "refusal",
        *,
        estimator: Callable[[Tensor, Tensor], Tensor] = mean_difference,
        protocol: Protocol = Protocol(),  # noqa: B008
        **options: Any,
    ) -> "Direction":
        """The direction of a contrast in a model, both also by name.

        `estimator` is one of `directions.estimators`; `options` are `get_layer_activations`'s.
        """
        model, contrast = as_model(model), as_contrast(contrast)
        read = lenient(get_layer_activations)
        vectors = estimator(*read(model, contrast, protocol=protocol, **options))
        first = -(protocol.hook == "resid_pre")  # layer l's input is layer l - 1's output
        layers = range(first, len(vectors) + first)
        return cls(vectors, layers, contrast.name, model, contrast, protocol)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None, **options: Any) -> "Direction":
        """Read what `save`, a run or another project wrote; `options` are `read_directions`'s."""
        found = read_directions(path, **options)
        return cls(found.vectors, found.layers, found.contrast or Path(path).stem, model)

    def save(self, path: str | Path) -> Path:
        """Write `NAME.safetensors` or `NAME.npy` for `load`, and return the path."""
        known: dict[str, Any] = {"contrast": self.name, "position": self.protocol.positions[0]}
        known |= {"model": self.model and model_provenance(self.model)["model"]}
        rows = torch.atleast_2d(self.vectors)
        return write_directions(Directions(rows, self.layers or None, str(path), **known), path)

    def at(self, layer: int) -> "Direction":
        """The direction of one layer, `[d_model]`; InputError if there is none."""
        if layer not in self.layers:
            raise InputError(f"{self.name!r} has no layer {layer!r:.20}: it has {self._layers()}")
        row = torch.atleast_2d(self.vectors)[self.layers.index(layer)]
        return replace(self, vectors=row, layers=layer)

    def unit(self) -> "Direction":
        """The direction at norm 1; NaN at layers where it is rounding noise."""
        unit = similarity.unit(torch.atleast_2d(self.vectors)).view_as(self.vectors)
        return replace(self, vectors=unit.to(self.vectors.dtype))

    def project(self, of: Any) -> Float[Tensor, "*rows"]:
        """Components along the unit direction, in units of the residual stream.

        >>> Direction([3, 4]).project([[1, 0], [3, 4]])
        tensor([0.6000, 5.0000])

        `of` holds activations `[... layer d_model]`, for one layer's direction `[... d_model]`; or
        a prompt or prompts, which the model runs. Returns `[... layer]` or `[...]`. InputError if
        the shapes differ, or if prompts have no activations at a layer.
        """
        prompts = [of] if isinstance(of, str) else of
        if isinstance(prompts, (list, tuple)) and any(isinstance(each, str) for each in prompts):
            options: Any = {"protocol": self.protocol, "progress": False}
            model, first = self._model(), -(self.protocol.hook == "resid_pre")
            columns = [layer - first for layer in self.layers]
            if not columns or not 0 <= min(columns) <= max(columns) < model.cfg.n_layers:
                last, hook = model.cfg.n_layers - 1 + first, self.protocol.hook
                problem = f"{self.name!r} has {self._layers()}: {hook} of prompts has layers"
                raise InputError(f"{problem} {first} to {last}, so choose one of these")
            rows = get_prompt_activations(model, prompts, **options)[:, 0][:, columns]
            rows = rows if self.vectors.ndim > 1 else rows[:, 0]
        else:
            check_tensors(activations=(rows := as_tensor(of), "*prompt d_model"))
        if rows.shape[-self.vectors.ndim :] != self.vectors.shape:
            what = f"activations {list(rows.shape)} on a direction {list(self.vectors.shape)}"
            raise InputError(f"{what}: hand over those of its layers, [... layer d_model]")
        return (rows.double() * self.unit().vectors.double().to(rows.device)).sum(-1).float()

    def ablate(self, model: Any = None) -> list[Hook]:
        """Hooks that ablate one layer's direction at every layer; see `ablate_direction`."""
        return ablate_direction(self._model(model), self._one())

    def add(self, coefficient: float = 1.0, model: Any = None) -> list[Hook]:
        """Hooks that add a multiple of the direction after its own layer; see `add_direction`."""
        vector = float(coefficient) * self._one()
        if not self.layers:
            raise InputError(f"{self.name!r} knows no layer: say Direction(..., layers=20)")
        return add_direction(self._model(model), vector, self.layers[0])

    def top_tokens(self, k: int = 10, model: Any = None) -> list[str]:
        """The `k` tokens whose logits one layer's direction raises most by its direct path."""
        model, vector = self._model(model), self._one()
        check_directions(model, vector)
        logits = vector.float().cpu() @ effective_unembedding(model)
        best = logits.argsort(descending=True)[:k].tolist()
        return [model.tokenizer.decode([token]) for token in best]

    def _model(self, model: Any = None) -> Any:
        if model is None and self.model is None:
            raise InputError(f"{self.name!r} knows no model: hand it over as model=...")
        return self.model if model is None else as_model(model)

    def _one(self) -> Tensor:
        if self.vectors.ndim > 1 and len(self.vectors) > 1:
            advice = f"choose one, as in .at({self.layers[-1]})"
            raise InputError(f"{self.name!r} has {self._layers()}: {advice}")
        return self.vectors.flatten()

    def _layers(self) -> str:
        if len(self.layers) > 1:
            return f"layers {self.layers[0]} to {self.layers[-1]}"
        return f"layer {self.layers[0]}" if self.layers else "no known layer"

    def _joined(self, how: Callable[[Any, Any], Tensor], other: Any) -> "Direction":
        theirs, own = as_tensor(other), list(self.vectors.shape)
        if not isinstance(theirs, (int, float, Tensor)):
            raise InputError(f"other is {other!r:.60}: take a Direction, a tensor or a number")
        shape = list(getattr(theirs, "shape", own))
        if (shape and shape != own) or getattr(other, "layers", self.layers) != self.layers:
            raise InputError(f"{own} of {self._layers()} and {shape}: take one layer, r.at(20)")
        return replace(self, vectors=how(self.vectors, theirs))

    __add__ = __radd__ = partialmethod(_joined, operator.add)
    __sub__ = partialmethod(_joined, operator.sub)
    __mul__ = __rmul__ = partialmethod(_joined, operator.mul)
    __truediv__ = partialmethod(_joined, operator.truediv)
    __neg__ = partialmethod(_joined, operator.mul, -1)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.vectors[rows]

    def __len__(self) -> int:
        return len(self.vectors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.vectors.detach().cpu().float().numpy().astype(dtype or "float32")

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: getattr(x, "vectors", x), (args, kwargs or {}))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "vectors":
            raise AttributeError(name)
        return getattr(self.vectors, name)

    def __repr__(self) -> str:
        origin = "" if self.model is None else f" of {model_provenance(self.model)['model']}"
        width = self.vectors.shape[-1]
        return f"<Direction {self.name!r}{origin}: {self._layers()}, d_model {width}>"
