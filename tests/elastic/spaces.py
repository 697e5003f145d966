"""Search spaces for property tests, random all the way down to their cost terms."""

from dataclasses import replace

from hypothesis import strategies as st

from stp_ray.elastic import Budget, ResidualBlock, SearchSpace, WidthAxis
from stp_ray.elastic.cost import Extent, Term


@st.composite
def axes(draw: st.DrawFn, name: str) -> WidthAxis:
    choices = draw(st.sets(st.integers(1, 40), min_size=1, max_size=8))
    return WidthAxis(name, max(choices), tuple(sorted(choices)))


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[WidthAxis], list[ResidualBlock], list[Term], list[Term]]:
    """What a search space is made of."""
    width_axes = [draw(axes(f"axis{i}")) for i in range(draw(st.integers(1, 5)))]
    names = [axis.name for axis in width_axes]
    left = iter(draw(st.permutations(names)))
    own: dict[str, list[str]] = {}
    within: dict[str, tuple[str, ...]] = {}
    for i in range(draw(st.integers(0, 3))):
        axes_here = [name for name, _ in zip(left, range(draw(st.integers(0, 2))), strict=False)]
        outer = draw(st.sampled_from([None, *own]))
        within[f"block{i}"] = (outer, *within[outer]) if outer else ()
        for name in within[f"block{i}"]:
            own[name] += axes_here
        own[f"block{i}"] = axes_here
    blocks = [ResidualBlock(name, tuple(own[name]), within=within[name]) for name in own]
    parts = st.lists(st.tuples(st.sampled_from(names), st.integers(1, 9)), max_size=3)
    extents = st.builds(Extent, st.integers(0, 9), parts.map(tuple))
    gates = (
        st.frozensets(st.sampled_from(list(own)), max_size=2).map(
            lambda names: names.union(*(within[name] for name in names))
        )
        if blocks
        else st.just(frozenset())
    )
    terms = st.lists(
        st.builds(Term, st.integers(1, 50), st.lists(extents, max_size=4).map(tuple), gates),
        max_size=6,
    )
    # an ungated constant keeps the cheapest subnet from being free
    return width_axes, blocks, [Term(7, ()), *draw(terms)], [Term(3, ()), *draw(terms)]


spaces = tables().map(lambda parts: SearchSpace(*parts))


@st.composite
def timed_spaces(draw: st.DrawFn) -> SearchSpace:
    """A space with terms of latency, some of which count whole vectors."""
    width_axes, blocks, macs, params = draw(tables())
    amounts = st.integers(1, 10**5)  # of the longest extents, still a latency that is countable
    sizes = st.sampled_from([1, 4, 16])

    def slowed(term: Term) -> Term:
        extents = tuple(replace(extent, multiple=draw(sizes)) for extent in term.extents)
        return Term(draw(amounts), extents, term.gates)

    return SearchSpace(width_axes, blocks, macs, params).timed([slowed(term) for term in macs])


@st.composite
def timed_spaces_with_budget(draw: st.DrawFn) -> tuple[SearchSpace, Budget]:
    """A space with terms of latency and a budget on that, alone or with others, that its smallest
    subnet keeps."""
    space = draw(timed_spaces())
    least, full = space.cost(space.smallest), space.cost()
    seconds = least.latency_s + draw(st.floats(0, 1)) * (full.latency_s - least.latency_s)
    seconds *= 1 + 1e-9
    bounds: dict[str, float | int] = {"latency_ms": 1e3 * seconds}
    if draw(st.booleans()):
        bounds = {"latency": min(seconds / full.latency_s, 1.0)}
    if draw(st.booleans()):
        bounds["macs"] = draw(st.integers(least.macs, full.macs))
    return space, Budget(**bounds)


@st.composite
def spaces_with_budget(draw: st.DrawFn) -> tuple[SearchSpace, Budget]:
    """A space and a budget on MACs, params or both that its smallest subnet keeps."""
    space = draw(spaces)
    least, full = space.cost(space.smallest), space.cost()
    kinds = draw(st.sampled_from([("macs",), ("params",), ("macs", "params")]))
    bounds: dict[str, float | int] = {}
    for kind in kinds:
        low, high = getattr(least, kind), getattr(full, kind)
        absolute = draw(st.integers(low, high))
        fraction = absolute / high
        as_share = draw(st.booleans()) and fraction * high >= low
        bounds[kind] = fraction if as_share else absolute
    return space, Budget(**bounds)
