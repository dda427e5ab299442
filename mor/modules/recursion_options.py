"""Options of a router as users give them: checked by name, before any tensor exists."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

from mor.modules.expert_choice import ExpertChoice
from mor.modules.routers import RouterScore
from mor.modules.token_choice import TokenChoice

__all__ = ["recursion_with"]


def recursion_with(
    where: str,
    router: str | None,
    hidden_size: int,
    num_recursions: int,
    options: Mapping[str, Any],
) -> ExpertChoice | TokenChoice | None:
    """The recursion of a router; None for router None.

    Args:
        where: begins the errors.
        router: "expert", "token" or None.
        hidden_size: the width D.
        num_recursions: the number R.
        options: of `ExpertChoice` or `TokenChoice`; `score` also as a dict of `RouterScore`'s
            fields.

    Raises:
        ValueError: an unknown router or option, or a score that is none.
    """
    if router is None:
        if options:
            raise ValueError(
                f"{where}: router=None has no options, got {sorted(options)}; give "
                "router='expert' or 'token' with them"
            )
        return None
    if router not in ("expert", "token"):
        raise ValueError(f"{where}: router: expected expert, token or None, got {router!r}")
    kind = ExpertChoice if router == "expert" else TokenChoice
    known = [*signature(kind).parameters][2:]  # after hidden_size and num_recursions
    if unknown := sorted({*options} - {*known}):
        raise ValueError(f"{where}: {kind.__name__} has no option {unknown}, only {known}")
    options = dict(options)
    if "score" in options:
        options["score"] = _score(where, options["score"])
    recursion: ExpertChoice | TokenChoice = kind(hidden_size, num_recursions, **options)
    return recursion


def _score(where: str, score: Any) -> RouterScore:
    if isinstance(score, RouterScore):
        return score
    names = [field.name for field in fields(RouterScore)]
    if not isinstance(score, Mapping) or {*score} != {*names}:
        raise ValueError(
            f"{where}: score: expected a RouterScore, or a dict of {' and '.join(names)} as in "
            f"{{'function': 'sigmoid', 'alpha': 0.1}}, got {score!r}"
        )
    return RouterScore(**score)
