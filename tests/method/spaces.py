"""Search spaces written by hand, and strategies that draw them: no tracing needed."""

from hypothesis import strategies as st

from stp_ray.elastic.cost import Budget, Extent, Term
from stp_ray.elastic.space import ResidualBlock, SearchSpace, WidthAxis


def make_space(widths: list[int], inner: list[int]) -> SearchSpace:
    """A chain of layers with these full widths; behind each, where `inner` has one for it, a
    residual block with a hidden axis of that width."""
    axes = [_axis(f"stage{i}", width) for i, width in enumerate(widths)]
    blocks, macs, params = [], [], []
    before = Extent(3)
    for i in range(len(widths)):
        stage = Extent(0, ((f"stage{i}", 1),))
        macs.append(Term(16, (before, stage)))
        params.append(Term(1, (before, stage)))
        before = stage
        if i < len(inner):
            axes.append(_axis(f"hidden{i}", inner[i]))
            blocks.append(ResidualBlock(f"block{i}", (f"hidden{i}",)))
            hidden, gates = Extent(0, ((f"hidden{i}", 1),)), frozenset([f"block{i}"])
            macs.append(Term(32, (stage, hidden), gates))
            params.append(Term(2, (stage, hidden), gates))
    macs.append(Term(10, (before,)))
    params.append(Term(10, (before,)))
    return SearchSpace(axes, blocks, macs, params)


def slowed(space: SearchSpace) -> SearchSpace:
    """The same with a latency: 10 ns for each MAC."""
    return space.timed([Term(10**7 * t.coefficient, t.extents, t.gates) for t in space.terms])


def _axis(name: str, size: int) -> WidthAxis:
    return WidthAxis(name, size, tuple(range(max(1, size // 8), size + 1)))


spaces = st.builds(
    make_space,
    st.lists(st.integers(2, 24), min_size=1, max_size=4),
    st.lists(st.integers(2, 24), max_size=4),
)


@st.composite
def spaces_with_budget(draw: st.DrawFn) -> tuple[SearchSpace, Budget]:
    """A space and a MACs or params budget that at least its smallest subnet keeps."""
    space = draw(spaces)
    kind = draw(st.sampled_from(["macs", "params"]))
    least, full = getattr(space.cost(space.smallest), kind), getattr(space.cost(), kind)
    return space, Budget(**{kind: draw(st.integers(least, full))})
