"""A panel for Jupyter: the cosine of two directions, and what adding one of them does."""

from typing import Any

import torch

from .. import plotting
from ..errors import InputError
from ..experiment.config import spread
from ..experiment.results import Results
from ..interventions import addition_effects, openings_of
from ..interventions.reply_openings import REFUSAL
from ..models.load import as_model
from ..plotting.text import escaped


def panel(results: Results, model: Any) -> Any:
    """Return widgets for a pair of concepts, a layer and a coefficient, above a figure.

    The figure has the pair's cosine, and refusal log-odds of some prompts while the pair's second
    direction, times the coefficient, is added at the layer. InputError without ipywidgets.
    >>> widgets = panel(results, model)
    """
    try:
        from ipywidgets import FloatSlider, IntSlider, interactive
    except ImportError:
        raise InputError("for a panel: pip install 'refusal_lens[notebooks]'") from None
    model, config = as_model(model), results.config
    parts = {f"{results.names.refusal} vs {c.name}": p for p, c in results.contrasts.items()}
    sets = {name: spread(prompts, 4) for name, prompts in [*results.prompts().items()][:2]}
    score = openings_of(model.tokenizer, config.refusal_openings or REFUSAL).first_tokens
    options: dict[str, Any] = {"score": score, "protocol": config.protocol, "progress": False}

    def draw(pair: str, layer: int, coefficient: float) -> Any:
        curve = results.similarities[f"refusal_vs_{parts[pair]}"]
        chart = plotting.cosine_by_layer({pair: curve}, highlight=layer)
        direction = coefficient * results.directions[parts[pair]][layer]
        layers = torch.tensor(layer - (config.protocol.hook == "resid_pre"))
        for name, prompts in sets.items():
            found = addition_effects(model, prompts, direction, layers=layers, **options).log_odds
            y = [escaped(name)] * len(prompts)
            chart.add_scatter(x=found.tolist(), y=y, mode="markers", xaxis="x2", yaxis="y2")
        below = {"anchor": "y2", "title": {"text": "refusal log-odds of each prompt (nats)"}}
        chart.update_layout(height=560, yaxis_domain=[0.45, 1], xaxis_anchor="y", xaxis2=below)
        chart.update_layout(yaxis2={"domain": [0, 0.22]}, showlegend=False, hovermode="closest")
        return chart

    moves = {"layer": IntSlider(results.layer, max=results.n_layers - 1, continuous_update=False)}
    moves["coefficient"] = FloatSlider(0, min=-4, max=4, step=0.5, continuous_update=False)
    return interactive(draw, {"auto_display": True}, pair=[*parts][1:], **moves)
