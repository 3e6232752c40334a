"""Tensors -> plotly figures: functions that compute, show and write nothing.

A concept (refusal, negativity, ...) keeps its colour in every figure, and no two styles differ by
colour only. Prompts and names are shown verbatim, never as markup. Functions raise `InputError` for
arguments that do not fit together, impossible layers or cells, negative norms and unknown themes.
To save a figure, use plotly's `write_html`, or `write_image` with kaleido and Chrome.

>>> page = plotting.page(plotting.cosine_by_layer({"refusal vs negativity": cosine_similarity(r, n)}))
"""

from ..errors import lenient_package

__getattr__, __dir__, __all__ = lenient_package(__name__, __file__)
