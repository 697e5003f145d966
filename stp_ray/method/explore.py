"""Exploration guided by distillation: constrained evolution over the space of subnets.

The explorer is a state machine without tensors: `ask` for candidates, score them anywhere
in any order, `tell` the scores. Its outcome depends on the seed and the scores alone, so a
search is resumed by telling a new explorer the scores that were kept.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ..elastic.cost import Budget, Cost
from ..elastic.space import SearchSpace
from ..elastic.subnet import Subnet
from ..errors import BudgetError, RunError
from .checks import require


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """Options of the search [ours]. Raises ValueError for a value out of range."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}  # noqa: RUF012

    generations: int = 8
    """Generations of the evolution, the seeded one included."""
    population: int = 32
    """New candidates in a generation, shared out among the budgets."""
    parents: int = 16
    """The best candidates of each budget that have offspring."""
    mutation: float = 0.1
    """Probability that a mutation changes an axis or a block, in (0, 1]."""
    crossover: float = 0.5
    """Share of the offspring that two parents have together; the rest are mutations of one."""
    calibration_images: int = 512
    """Training images that a candidate's BatchNorm statistics are measured on."""
    scoring_images: int = 512
    """Held-out training images that every candidate is scored on first."""
    promote: float = 0.25
    """Share of a generation, for each budget, that is scored again on all held-out images
    (successive halving); 0 for none."""
    tuning_steps: int = 25
    """Steps of distillation that a copy of a promoted candidate gets before it is scored again; 0
    scores it as it is."""
    finalists: int = 3
    """The best candidates of each budget that are scored once more when the generations are over; 0
    for none."""
    final_steps: int = 200
    """Steps of distillation that a copy of a finalist gets before that."""
    tuning_images: int = 4096
    """Training images that all those steps learn from."""
    batch_of_candidates: int = 8
    """Most candidates that one worker is given at a time."""

    def __post_init__(self) -> None:
        for name in (
            "generations",
            "population",
            "parents",
            "calibration_images",
            "scoring_images",
            "tuning_images",
            "batch_of_candidates",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1", "raise it")
        for name, usual in (("tuning_steps", 25), ("finalists", 3)):
            value = getattr(self, name)
            require(value >= 0, name, value, "0 or more", f"{usual} is usual")
        require(
            self.finalists == 0 or self.final_steps > self.tuning_steps,
            "final_steps",
            self.final_steps,
            f"more than tuning_steps ({self.tuning_steps})",
            "raise it, or set finalists to 0",
        )
        require(0 < self.mutation <= 1, "mutation", self.mutation, "in (0, 1]", "0.1 is usual")
        for name in ("crossover", "promote"):
            require(
                0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]", "lower it"
            )


@dataclass(frozen=True)
class Candidate:
    """A subnet to score."""

    subnet: Subnet
    images: int
    """Held-out images to score it on; 0 for all of them."""
    generation: int
    """The generation that it belongs to, counted from 0."""
    rung: int
    """0 when it is scored first, 1 when it was promoted, 2 as a finalist."""
    steps: int = 0
    """Steps of distillation before it is scored."""

    @property
    def key(self) -> str:
        """Names the subnet and what it is scored on; no key is asked for twice."""
        tuned = f"-tuned-{self.steps}" if self.steps else ""
        return f"{self.subnet.id}-{self.images or 'all'}{tuned}"


@dataclass(frozen=True)
class Scored:
    """A candidate with its score and price."""

    subnet: Subnet
    """What was scored."""
    score: float
    """Mean distillation loss of an image, in nats; lower is better."""
    images: int
    """Held-out images that it was scored on; 0 for all of them."""
    generation: int
    """The generation that it belongs to, counted from 0."""
    cost: Cost
    """What it costs."""
    steps: int = 0
    """Steps of distillation before it was scored."""

    @property
    def fidelity(self) -> tuple[int, bool]:
        """Sorts what says more before what says less: after more steps, then on all images.
        Scores of different fidelity are not compared."""
        return -self.steps, self.images != 0


class Explorer:
    """Evolution under several budgets at once, with successive halving [ours].

    Generation 0 holds the uniform-width subnet of each budget, filled up to it, and random
    subnets near the budgets; later ones hold offspring of the best candidates of each budget. Each
    generation is scored on a few images; the best of it, budget by budget, are scored again
    on all, after a short distillation, and the best of all generations after a longer one. A
    candidate made for one budget serves every other one that it keeps. One that is scored as it is
    goes behind those that use the budget: a small slice can score better than a larger one that
    would learn more.

    Args:
        space: where to search.
        budgets: at least one.
        options: size of the search.
        seed: with the scores, decides the outcome.
        held_out: the number of held-out images, where known: if it is not more than
            `options.scoring_images`, every candidate is scored on all of them at once, and again
            only if it is tuned for that.

    Raises:
        ValueError: there is no budget, or the population is smaller than their number.
        BudgetError: no subnet keeps one of the budgets.
    """

    #: What a candidate that uses a budget takes of it at least, as a share of what the filled
    #: uniform-width subnet takes.
    USED = 0.9
    #: Mutations tried for an offspring that is not known yet, before a random subnet is.
    TRIES = 16

    def __init__(
        self,
        space: SearchSpace,
        budgets: Sequence[Budget],
        options: Exploration,
        seed: int,
        *,
        held_out: int | None = None,
    ) -> None:
        require(len(budgets) > 0, "budgets", list(budgets), "at least one", "name a budget")
        require(
            options.population >= len(budgets),
            "population",
            options.population,
            f"at least one candidate for each of the {len(budgets)} budgets",
            "raise it",
        )
        for budget in budgets:
            space.require(budget)
        self.space = space
        self.budgets = tuple(budgets)
        self.options = options
        self._seed = seed
        whole = held_out is not None and held_out <= options.scoring_images
        self._first_images = 0 if whole else options.scoring_images
        self._scored: dict[str, Scored] = {}
        self._known: set[Subnet] = set()
        self._uniform = {each: self._filled(each) for each in self.budgets}
        self._elders: dict[Budget, list[Scored]] = {budget: [] for budget in self.budgets}
        self._generation = 0
        self._rung = 0
        self._cohorts = self._breed()
        self._open = self._candidates(self._cohorts, self._first_images)

    # -- ask and tell ---------------------------------------------------------------

    def ask(self) -> list[Candidate]:
        """What has to be scored next: what is left of a generation or of its promoted part.

        The same list again until some of it has been told; empty when the search is over.
        """
        return list(self._open.values())

    def tell(self, scores: Mapping[str, float]) -> None:
        """Take in scores by `Candidate.key`, all of those asked for or some of them.

        A score that is not a number counts as the worst.

        Raises:
            ValueError: a key that is not asked for.
        """
        unknown = sorted(scores.keys() - self._open.keys())
        require(
            not unknown, "score", unknown[:3], "keys of candidates asked for", "tell these alone"
        )
        if not scores:
            return
        told = [self._open.pop(key) for key in scores]
        costs = self.space.costs([candidate.subnet for candidate in told])
        new = []
        for candidate, cost in zip(told, costs, strict=True):
            score = float(scores[candidate.key])
            score = math.inf if math.isnan(score) else score
            images, generation = candidate.images, candidate.generation
            new.append(Scored(candidate.subnet, score, images, generation, cost, candidate.steps))
            self._scored[candidate.key] = new[-1]
        again = {scored.subnet for scored in new}  # at a higher fidelity: their first score is void
        # What diverges at a higher fidelity gives its place back to one that it had taken it from.
        diverged = any(math.isinf(scored.score) for scored in new)
        for budget, elders in self._elders.items():
            kept = [scored for scored in elders if scored.subnet not in again]
            found = self._best_known() if diverged else [*kept, *new]
            self._elders[budget] = self._leading(found, budget)
        while not self._open and self._rung < 2:  # a generation may have nothing that is new
            self._advance()

    def _advance(self) -> None:
        """From a generation to its promoted part, from there to the next generation, and from the
        last one to the finalists."""
        options = self.options
        again = self._first_images > 0 or options.tuning_steps > 0
        if self._rung == 0 and options.promote > 0 and again:
            self._rung = 1
            promoted = [self._promoted(cohort) for cohort in self._cohorts]
            self._open = self._candidates(promoted, 0, steps=options.tuning_steps)
            return
        self._generation += 1
        if self._generation == options.generations:
            self._rung = 2
            finalists = [self._finalists(budget) for budget in self.budgets]
            self._open = self._candidates(finalists, 0, steps=options.final_steps)
            return
        self._rung = 0
        self._cohorts = self._breed()
        self._open = self._candidates(self._cohorts, self._first_images)

    def _candidates(
        self, cohorts: Iterable[Iterable[Subnet]], images: int, *, steps: int = 0
    ) -> dict[str, Candidate]:
        """By key."""
        found = (
            Candidate(subnet, images, self._generation, self._rung, steps)
            for cohort in cohorts
            for subnet in cohort
        )
        return {candidate.key: candidate for candidate in found}

    def _promoted(self, cohort: Sequence[Subnet]) -> list[Subnet]:
        first = self._candidates([cohort], self._first_images)
        ranked = sorted(first.values(), key=lambda c: (self._scored[c.key].score, c.subnet.id))
        count = math.ceil(self.options.promote * len(ranked))
        return [candidate.subnet for candidate in ranked[:count]]

    def _finalists(self, budget: Budget) -> list[Subnet]:
        return [scored.subnet for scored in self.ranked(budget)[: self.options.finalists]]

    # -- breeding -------------------------------------------------------------------

    def _breed(self) -> list[list[Subnet]]:
        """New subnets for each budget, all different from each other and from the known."""
        rng = random.Random(f"{self._seed}:{self._generation}")
        cohorts: list[list[Subnet]] = [[] for _ in self.budgets]
        parents = [[s.subnet for s in self._elders[budget]] for budget in self.budgets]
        if self._generation == 0:
            for cohort, budget in zip(cohorts, self.budgets, strict=True):
                self._add(cohort, self._uniform[budget][0])
        for index in range(self.options.population):
            place = index % len(self.budgets)
            if len(cohorts[place]) > index // len(self.budgets):
                continue  # the uniform-width subnet has this place
            elders = parents[place]
            for _ in range(self.TRIES):
                child = self._child(elders, self.budgets[place], rng)
                if self._add(cohorts[place], child):
                    break
            else:
                self._add(cohorts[place], self.space.sample(rng, self.budgets[place]))
        return cohorts

    def _filled(self, budget: Budget) -> tuple[Subnet, float]:
        """The uniform-width subnet, filled up to the budget, and how much of it that uses."""
        subnet = self.space.fill(self.space.uniform_within(budget), budget)
        return subnet, budget.use(self.space.cost(subnet), of=self.space.cost())

    def _add(self, cohort: list[Subnet], subnet: Subnet) -> bool:
        if subnet in self._known:
            return False
        self._known.add(subnet)
        cohort.append(subnet)
        return True

    def _child(self, elders: Sequence[Subnet], budget: Budget, rng: random.Random) -> Subnet:
        if not elders:
            return self.space.sample(rng, budget)
        if len(elders) >= 2 and rng.random() < self.options.crossover:
            one, other = rng.sample(elders, 2)
            return self.space.crossover(one, other, rng, budget)
        return self.space.mutate(rng.choice(elders), rng, self.options.mutation, budget)

    # -- what was found -------------------------------------------------------------

    @property
    def scored(self) -> list[Scored]:
        """Everything scored so far, each fidelity apart, in an order that the seed decides."""
        return sorted(
            self._scored.values(), key=lambda s: (s.generation, s.steps, s.images == 0, s.subnet.id)
        )

    def _best_known(self) -> list[Scored]:
        """One entry for each subnet: its score of the highest fidelity."""
        return list({scored.subnet: scored for scored in self._scored.values()}.values())

    def _leading(self, found: Iterable[Scored], budget: Budget) -> list[Scored]:
        """The best that keep the budget, as many as have offspring, best first."""
        return self._fitting(found, budget)[: self.options.parents]

    def _fitting(self, found: Iterable[Scored], budget: Budget) -> list[Scored]:
        """Those that keep the budget, best first: by fidelity, then by score, but what was scored
        as it is and leaves much of the budget behind the others; what has no finite score goes
        last."""
        full = self.space.cost()
        fitting = [scored for scored in found if budget.admits(scored.cost, of=full)]
        if fitting:
            _, used = self._uniform.get(budget) or self._filled(budget)
            fitting.sort(
                key=lambda s: (
                    math.isinf(s.score),
                    not s.steps and budget.use(s.cost, of=full) < self.USED * used,
                    s.fidelity, s.score, s.subnet.id,
                )
            )  # fmt: skip
        return fitting

    def best(self, budget: Budget) -> Scored:
        """The best candidate that keeps the budget, by its score of the highest fidelity; without
        tuned scores the best of those that use the budget, if any does.

        Raises:
            BudgetError: none was scored that keeps it.
            RunError: none of those has a finite score.
        """
        known = budget in self._elders
        ranked = self._elders[budget] if known else self._leading(self._best_known(), budget)
        if not ranked:
            raise BudgetError(
                f"none of the {len(self._scored)} scored candidates keeps the budget "
                f"{budget.label}; expected at least one; explore with this budget among others"
            )
        if not math.isfinite(ranked[0].score):
            raise RunError(
                f"no candidate within the budget {budget.label} has a finite score; expected a "
                "supernet whose outputs are finite; train it again with a lower lr"
            )
        return ranked[0]

    def ranked(self, budget: Budget) -> list[Scored]:
        """All scored candidates that keep the budget and have a finite score, best first; what
        was scored as it is and leaves much of the budget goes last.

        Args:
            budget: any one.
        """
        return [s for s in self._fitting(self._best_known(), budget) if math.isfinite(s.score)]

    def front(self) -> list[Scored]:
        """Candidates that none beats in both price and score, from cheap to expensive.

        The price is MACs, or what the budgets bound where none bounds MACs. Only scores of the
        highest fidelity are compared with each other.
        """
        by_macs = any(budget.macs is not None for budget in self.budgets)
        by_params = any(budget.params is not None for budget in self.budgets)

        def price(scored: Scored) -> float:
            if by_macs or not (by_params or scored.cost.latency_s is not None):
                return scored.cost.macs
            return scored.cost.params if by_params else cast(float, scored.cost.latency_s)

        found = [s for s in self._best_known() if math.isfinite(s.score)]
        highest = min((s.fidelity for s in found), default=None)
        precise = [s for s in found if s.fidelity == highest]
        front: list[Scored] = []
        for scored in sorted(precise, key=lambda s: (price(s), s.score, s.subnet.id)):
            if not front or scored.score < front[-1].score:
                front.append(scored)
        return front
