"""What a run found in the numbers, in words: buffers that differ, NaN and infinity."""

from __future__ import annotations

from streamsoup.errors import MismatchError, NonFiniteError
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan

_NAMED = 3  # ingredients in one sentence


def check_copied(plan: Plan, outcome: Outcome, buffers: str) -> list[str]:
    """Refuse non-float tensors that differ between ingredients, or note that the first's were taken.

    Raises
    ------
    MismatchError
        If `buffers` is ``identical`` and some differ.
    """
    first = plan.checkpoints[0].path
    sentences = []
    for tensor in sorted(outcome.differs):
        differing = sorted(outcome.differs[tensor])
        others = ", ".join(plan.checkpoints[i].path for i in differing[:_NAMED])
        others += f" (and {len(differing) - _NAMED} more)" if len(differing) > _NAMED else ""
        name, dtype = plan.table.names[tensor], plan.out_dtype(tensor).name
        sentences.append(f"{name}: {dtype} buffer in {others} differs from the one in {first}.")
    if sentences and buffers == "identical":
        raise MismatchError(sentences, advice="Give --buffers first to take those of the first ingredient.")
    return [f"{sentence} The first ingredient's was taken." for sentence in sentences]


def check_finite(plan: Plan, outcome: Outcome, nonfinite: str) -> list[str]:
    """Refuse NaN and infinity, or note where they are.

    Raises
    ------
    NonFiniteError
        If `nonfinite` is ``error``; it lists every offending ingredient and tensor. If it is ``keep``, of numbers that
        are too large for the output.
    """
    names, single = plan.table.names, plan.accumulate == "float32"
    found = [
        f"{names[tensor]}: {count:,} NaN or infinite element(s) in {plan.checkpoints[ingredient].path}."
        for (ingredient, tensor), count in sorted(outcome.nonfinite.items())
    ]
    spoilt = set() if plan.method.fixed else {tensor for _, tensor in outcome.nonfinite}
    for tensor, count in sorted(outcome.overflowed.items()):
        if tensor in spoilt:  # what was measured of it is NaN, and so is all that follows
            continue
        dtype = plan.out_dtype(tensor).torch_name or "a running sum"
        dtype += single * ", or their sum was for float32"
        found.append(f"{names[tensor]}: {count:,} element(s) of the soup are too large for {dtype}.")
    if nonfinite == "keep" and outcome.nonfinite:
        found = found[len(outcome.nonfinite) :]
    if found and nonfinite in ("error", "keep"):
        advice = []
        if outcome.nonfinite and nonfinite == "error":
            advice.append("Leave these ingredients out, or resume with --nonfinite warn.")
        if outcome.overflowed:
            advice.append("Leave --accumulate out, or choose a wider --dtype." if single else "Choose a wider --dtype.")
        raise NonFiniteError(found, " ".join(advice))
    if nonfinite == "keep" and outcome.nonfinite:
        (_, tensor), count = min(outcome.nonfinite), sum(outcome.nonfinite.values())
        tensors = len({t for _, t in outcome.nonfinite})
        return [f"{count:,} NaN or infinite element(s) in {tensors:,} tensor(s) were kept, first in {names[tensor]}."]
    return found if nonfinite == "warn" else []
