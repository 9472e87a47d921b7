"""What a soup of a running sum's members says of itself: its recipe, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping

from streamsoup.checkpoints import Opening, identify, identity_to_json
from streamsoup.pool import Pool
from streamsoup.recipe import Ingredient, Recipe
from streamsoup.saving import Origin
from streamsoup.sums.live_members import LiveMembers
from streamsoup.sums.members import Member


def recipe_of(pool: Pool, live: LiveMembers, members: tuple[Member, ...]) -> Recipe:
    """Return the recipe of some members, whether or not all of them are on disk."""
    options, named = pool.options, Opening()
    if options.opening != named and not live.among(members):
        named = pool.opening_of([m.path for m in members])
    return Recipe(
        tuple(Ingredient(m.path, m.weight) for m in members),
        dtype=options.dtype,
        shard_bytes=options.shard_bytes,
        buffers=options.buffers,
        nonfinite=options.nonfinite,
        **named.to_options(),
    )


def origin_of(
    pool: Pool, live: LiveMembers, members: tuple[Member, ...], digests: Mapping[str, str], *, is_exact: bool
) -> Origin:
    """Gather what a soup of some members, which was just made, says of itself."""
    unread = live.among(members)
    recipe = recipe_of(pool, live, members)
    identities = [[] if m.path in unread else identity_to_json(identify(pool.open(m.path))) for m in members]
    known = [digests.get(m.path, "") for m in members]
    repeatable = is_exact and not unread and members[0].path == pool.first.path
    return Origin(recipe, identities, known, (*pool.notes, *live.notes(members)), repeatable)
