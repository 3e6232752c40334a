r"""Do the intervals of the unbiased cosine hold what they promise? A simulation with a known answer.

    python tests/benchmarks/statistics_coverage.py [--draws 1000] [--seed 0] [--processes 1]

Two paired contrasts of n pairs each in 4096 dimensions. A pair's difference is a fixed signal plus
normal noise with variances proportional to `i ** -0.75` over dimensions i = 1..4096 ("anisotropic";
half of the variance lies in 200 dimensions), in which four dimensions beyond the 700th can have k times
the mean variance ("massive k"). Signals lie at random in the same space, with the anisotropy of the
noise but no part in the massive dimensions. Their angle is exact.

Reliability is the share of a sampled direction's expected squared norm that is signal,
`|mu|^2 / (|mu|^2 + trace(noise covariance) / n)`: the cosine to expect between the direction and the
same one from n new pairs. It fixes the length of the signals.

The 2n x 2n Gram matrix of the noise, and its products with two orthonormal signal axes, are drawn
once as vectors; the Gram matrices of every cosine and reliability follow from them exactly. Rows of
the table therefore share their draws, and their errors: at 1,000 draws, a coverage of 95 % is known
to 0.7 % (one standard error).

Seeds 0 and 1 are for the tables. The construction and its constants (`LEAST_SHARE`, `LEAST_LINEAR`,
and `WIDENING` of the permutation test) were chosen on seeds 1000 and 1001.

Other intervals that were tried (coverage of the 95 % interval at 64 pairs, unless said otherwise):

* leave-one-out jackknife of the off-diagonal estimate: 95 to 100 %; percentile bootstrap: 97 to 100 %.
  Both take the sampled direction for the true one and count the quadratic part of the noise two and
  three times.
* Fieller with the jackknife's variance: 94 to 100 %, above 98 % in half of the rows. With the
  quadratic part subtracted and each piece clipped at 0: 94 to 99.9 %.
* Fieller with Student's t and the variance `max(J - Q, 0.6 J)`, without resampling: 92.4 to 97.8 %,
  98 % at most with 256 pairs. The misses are on one side: 0.3 and 4 % at a cosine of 0.9. With the
  variance `max(J - Q, J / 2)`: 92.5 to 97.0 %.
* the same with a second-order Edgeworth correction for the ratio's skewness: 89 to 98 %. With a
  Cornish-Fisher expansion of the residual's own cumulants instead: 89 to 97 %.
* bootstrap-t with the quantiles at the estimate: 91 to 100 %. Weak signals have estimates far from the
  truth, and the quantiles depend on the cosine.
* bootstrap-t with the quantiles at the interval's ends, resampling around the sampled directions: 92.0
  to 92.6 % with 256 pairs, reliability 0.3 and 0.6 and a cosine of 0 or 0.1. Quantiles 5 % farther out
  correct this: 93.2 to 97.8 %. Resampling under the hypothesis, the present interval, reaches 93.6 to
  97.5 % without that factor, and misses on both sides.
* the present interval with a least share of 1/2 and a least linear part of 0: 92.7 to 96.2 %, with 16
  pairs 91.7 % at worst; with 0.6 and 0: 92.8 to 97.6 %, with 16 pairs 91.6 % at worst.
* plain ratio of unbiased products, without the correction for the ratio's bias: off by 0.03 at a
  reliability of 0.3 and a cosine of 0.9. The correction `1 - x` in place of `1 / (1 + x)` is too large
  where norms are weak.
* permutation of one contrast's labels with the inner product as the statistic: misses the share of the
  noise that the permuted signal adds, up to half of the variance.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import isnan, nan
from pathlib import Path

import torch
from torch import Tensor

from refusal_lens.uncertainty import Gram, permutation_null
from refusal_lens.uncertainty.cosine import estimate_cosine

COSINES = (-0.5, 0.0, 0.1, 0.5, 0.9)
RELIABILITIES = (0.3, 0.6, 0.9)
PAIRS = (16, 64, 256)
D_MODEL = 4096
DECAY = 0.75
MASSIVE_DIMENSIONS = (700, 1500, 2600, 4000)
RESAMPLES = 2000
CHUNK = 100
RESULTS = Path(__file__).parent / "results" / "statistics_coverage.md"


@dataclass(frozen=True)
class Setting:
    """One block of the grid: how many pairs, and how many times the mean the massive variances are."""

    pairs: int
    massive: float
    required: bool = True

    @property
    def noise(self) -> str:
        return f"massive {self.massive:g}" if self.massive else "anisotropic"


GRID = [Setting(pairs, massive) for massive in (0, 100) for pairs in PAIRS]
HARDER = [Setting(64, massive, required=False) for massive in (300, 1000)]


@dataclass(frozen=True)
class Row:
    """What 1,000 draws of one cell say."""

    setting: Setting
    reliability: float
    cosine: float
    plain: float
    bias: float
    coverage: float
    width_ratio: float
    undecided: float
    rejected: float

    @property
    def misses(self) -> list[str]:
        if self.undecided == 1:
            return ["all NaN"] if self.setting.pairs >= 64 else []
        found = []
        if self.setting.pairs < 64:
            if self.coverage < 0.90:
                found.append("coverage")
        else:
            if abs(self.bias) > 0.02:
                found.append("bias")
            if not 0.93 <= self.coverage <= 0.98:
                found.append("coverage")
            if self.width_ratio > 1.4:
                found.append("width")
        if not isnan(self.rejected) and not 0.03 <= self.rejected <= 0.07:
            found.append("test")
        return found


def variances(setting: Setting) -> tuple[Tensor, Tensor]:
    """Variance per dimension, and that of the anisotropic part, which the signals follow."""
    bulk = torch.arange(1, D_MODEL + 1).double() ** -DECAY
    variance = bulk.clone()
    if setting.massive:
        variance[list(MASSIVE_DIMENSIONS)] = setting.massive * bulk.mean()
    return variance, bulk


def draw_noise(
    setting: Setting, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices of the noise of 2n rows, and their products with two orthonormal signal axes."""
    variance, bulk = variances(setting)
    deviation, shape = variance.sqrt().float(), bulk.sqrt()
    drawn = []
    for _ in range(draws):
        axes = torch.randn(2, D_MODEL, generator=generator) * shape
        axes = torch.linalg.qr(axes.T.double()).Q.float()
        rows = torch.randn(2 * setting.pairs, D_MODEL, generator=generator) * deviation
        drawn.append(((rows @ rows.T).double(), *(rows @ axes).double().T))
    gram, along_u, along_v = (torch.stack(part) for part in zip(*drawn, strict=True))
    return gram, along_u, along_v


def add_signals(
    setting: Setting, noise: tuple[Tensor, Tensor, Tensor], reliability: float, cosine: float
) -> Gram:
    """The Gram matrices of the noise with the signals in it: exact, no draw is made here."""
    gram, along_u, along_v = noise
    n = setting.pairs
    length = reliability / (1 - reliability) * float(variances(setting)[0].sum()) / n
    a = torch.tensor([1.0, 0.0]).double() * length**0.5
    b = torch.tensor([cosine, (1 - cosine**2) ** 0.5]).double() * length**0.5
    along = torch.stack([along_u, along_v], dim=-1)
    on_a, on_b = along @ a, along @ b

    def block(one: slice, other: slice, mu: Tensor, nu: Tensor, on_mu: Tensor, on_nu: Tensor):
        return gram[:, one, other] + on_nu[:, one, None] + on_mu[:, None, other] + mu @ nu

    first, second = slice(0, n), slice(n, 2 * n)
    varies = torch.zeros(len(gram), dtype=torch.bool)
    return Gram(
        aa=block(first, first, a, a, on_a, on_a),
        bb=block(second, second, b, b, on_b, on_b),
        ab=block(first, second, a, b, on_a, on_b),
        groups_a=(torch.full((n,), 1 / n).double(),),
        groups_b=(torch.full((n,), 1 / n).double(),),
        constant_a=varies,
        constant_b=varies,
    )


def simulate(
    setting: Setting,
    *,
    draws: int,
    cosines: tuple[float, ...] = COSINES,
    reliabilities: tuple[float, ...] = RELIABILITIES,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """All rows of one setting. Draws stand where layers otherwise do."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    cells = list(product(reliabilities, cosines))
    found: dict[tuple[float, float], list[Tensor]] = {cell: [] for cell in cells}
    for start in range(0, draws, CHUNK):
        noise = draw_noise(setting, min(CHUNK, draws - start), generator)
        for reliability, cosine in cells:
            gram = add_signals(setting, noise, reliability, cosine)
            options = {"n_resamples": resamples, "confidence": 0.95, "generator": generator}
            estimate = estimate_cosine(gram, **options)
            p = torch.full_like(gram.plain, nan)
            if cosine == 0:
                p = permutation_null(gram, **options).p_value
            found[reliability, cosine].append(
                torch.stack([gram.plain, estimate.unbiased, estimate.lower, estimate.upper, p])
            )
    return [summarise(setting, *cell, torch.cat(parts, dim=1)) for cell, parts in found.items()]


def summarise(setting: Setting, reliability: float, cosine: float, found: Tensor) -> Row:
    plain, estimate, lower, upper, p = found
    decided = ~estimate.isnan()
    estimate, lower, upper = estimate[decided], lower[decided], upper[decided]
    some = bool(decided.any())
    true_width = float(estimate.quantile(0.975) - estimate.quantile(0.025)) if some else nan
    return Row(
        setting=setting,
        reliability=reliability,
        cosine=cosine,
        plain=float(plain.mean()),
        bias=float(estimate.mean()) - cosine,
        coverage=float(((lower <= cosine) & (cosine <= upper)).double().mean()),
        width_ratio=float((upper - lower).median()) / true_width if true_width > 0 else nan,
        undecided=1 - float(decided.double().mean()),
        rejected=float((p <= 0.05).double().mean()) if cosine == 0 else nan,
    )


def table(rows: list[Row], draws: int, seed: int = 0) -> str:
    """The rows in Markdown, what they must meet, and which don't."""
    lines = [
        "# Coverage of the unbiased cosine's 95 % interval",
        "",
        f"`python tests/benchmarks/statistics_coverage.py --draws {draws} --seed {seed}`, {RESAMPLES} "
        "resamples "
        "each. How it is drawn, what reliability means and what was tried before: that file's first "
        "lines. Bias, coverage and width are of the draws that got an estimate; NaN is the share "
        "that got a reason instead. Width is the median interval's over the central 95 % of the "
        "estimates themselves. Test is how often the permutation test at 5 % rejects where the true "
        "cosine is 0.",
        "",
        "Required at 64 pairs and more: bias within 0.02, coverage 93 to 98 %, width at most 1.4; at "
        "16 pairs: coverage at least 90 %; test 3 to 7 %. One standard error of a coverage is "
        f"{(0.95 * 0.05 / draws) ** 0.5:.1%}.",
        "",
    ]
    required = [row for row in rows if row.setting.required]
    missed = [row for row in required if row.misses]
    lines += [f"{len(required) - len(missed)} of {len(required)} required rows meet it.", ""]
    for row in missed:
        lines.append(
            f"- misses {' and '.join(row.misses)}: {row.setting.noise}, {row.setting.pairs} pairs, "
            f"reliability {row.reliability}, cosine {row.cosine}"
        )
    header = (
        "| noise | pairs | reliability | cosine | plain | bias | coverage | width | NaN | test | |"
    )
    for title, required in (("Required", True), ("Harder noise, beyond what is required", False)):
        lines += ["", f"## {title}", "", header, "|---" * 11 + "|"]
        for row in (row for row in rows if row.setting.required == required):
            test = "" if isnan(row.rejected) else f"{row.rejected:.1%}"
            lines.append(
                f"| {row.setting.noise} | {row.setting.pairs} | {row.reliability} | {row.cosine} "
                f"| {row.plain:.3f} | {row.bias:+.3f} | {row.coverage:.1%} | {row.width_ratio:.2f} "
                f"| {row.undecided:.1%} | {test} | {', '.join(row.misses)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = GRID + HARDER
    with ProcessPoolExecutor(arguments.processes) as pool:
        options = {"draws": arguments.draws, "seed": arguments.seed}
        jobs = [pool.submit(simulate, setting, **options) for setting in settings]
        rows = [row for job in jobs for row in job.result()]
    text = table(rows, arguments.draws, arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
