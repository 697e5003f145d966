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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..elastic.cost import Budget, Cost
from ..elastic.space import SearchSpace
from ..elastic.subnet import Subnet
from ..elastic.supernet import Supernet
from ..errors import BudgetError, RunError
from .calibrate import calibrate
from .checks import require
from .modes import device_of, inspecting


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
    batch_of_candidates: int = 8
    """Most candidates that one worker is given at a time."""

    def __post_init__(self) -> None:
        for name in (
            "generations",
            "population",
            "parents",
            "calibration_images",
            "scoring_images",
            "batch_of_candidates",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1", "raise it")
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
    """0 when it is scored first, 1 when it was promoted."""

    @property
    def key(self) -> str:
        """Names the subnet and the number of images; no key is asked for twice."""
        return f"{self.subnet.id}-{self.images or 'all'}"


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


class Explorer:
    """Evolution under several budgets at once, with successive halving [ours].

    Generation 0 holds the uniform-width subnet of each budget and random subnets near the
    budgets; later ones hold offspring of the best candidates of each budget. Each
    generation is scored on a few images; the best of it, budget by budget, are scored again
    on all. A candidate made for one budget serves every other one that it keeps.

    Args:
        space: where to search.
        budgets: at least one.
        options: size of the search.
        seed: with the scores, decides the outcome.
        held_out: the number of held-out images, where known: if it is not more than
            `options.scoring_images`, every candidate is scored on all of them at once.

    Raises:
        ValueError: there is no budget, or the population is smaller than their number.
        BudgetError: no subnet keeps one of the budgets.
    """

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
            new.append(Scored(candidate.subnet, score, images, generation, cost))
            self._scored[candidate.key] = new[-1]
        again = {scored.subnet for scored in new}  # on more images: their first score is void
        for budget, elders in self._elders.items():
            kept = [scored for scored in elders if scored.subnet not in again]
            self._elders[budget] = self._leading([*kept, *new], budget)
        if not self._open:
            self._advance()

    def _advance(self) -> None:
        """From a generation to its promoted part, and from there to the next generation."""
        if self._rung == 0 and self.options.promote > 0 and self._first_images:
            self._rung = 1
            promoted = [self._promoted(cohort) for cohort in self._cohorts]
            self._open = self._candidates(promoted, 0)
            return
        self._rung = 0
        self._generation += 1
        if self._generation >= self.options.generations:
            return
        self._cohorts = self._breed()
        self._open = self._candidates(self._cohorts, self._first_images)

    def _candidates(self, cohorts: Iterable[Iterable[Subnet]], images: int) -> dict[str, Candidate]:
        """By key."""
        found = (
            Candidate(subnet, images, self._generation, self._rung)
            for cohort in cohorts
            for subnet in cohort
        )
        return {candidate.key: candidate for candidate in found}

    def _promoted(self, cohort: Sequence[Subnet]) -> list[Subnet]:
        ranked = sorted(
            cohort, key=lambda s: (self._scored[f"{s.id}-{self._first_images}"].score, s.id)
        )
        return ranked[: math.ceil(self.options.promote * len(ranked))]

    # -- breeding -------------------------------------------------------------------

    def _breed(self) -> list[list[Subnet]]:
        """New subnets for each budget, all different from each other and from the known."""
        rng = random.Random(f"{self._seed}:{self._generation}")
        cohorts: list[list[Subnet]] = [[] for _ in self.budgets]
        parents = [[s.subnet for s in self._elders[budget]] for budget in self.budgets]
        if self._generation == 0:
            for cohort, budget in zip(cohorts, self.budgets, strict=True):
                self._add(cohort, self.space.uniform_within(budget))
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
            self._scored.values(), key=lambda s: (s.generation, s.images == 0, s.subnet.id)
        )

    def _best_known(self) -> list[Scored]:
        """One entry for each subnet: its score on the most images."""
        return list({scored.subnet: scored for scored in self._scored.values()}.values())

    def _leading(self, found: Iterable[Scored], budget: Budget) -> list[Scored]:
        """The best that keep the budget, as many as have offspring, best first; a score on all
        images goes before others."""
        return self._fitting(found, budget)[: self.options.parents]

    def _fitting(self, found: Iterable[Scored], budget: Budget) -> list[Scored]:
        full = self.space.cost()
        fitting = [scored for scored in found if budget.admits(scored.cost, of=full)]
        fitting.sort(key=lambda s: (s.images != 0, s.score, s.subnet.id))
        return fitting

    def best(self, budget: Budget) -> Scored:
        """The best candidate that keeps the budget, by its score on the most images.

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
        """All scored candidates that keep the budget and have a finite score, best first.

        Args:
            budget: any one.
        """
        return [s for s in self._fitting(self._best_known(), budget) if math.isfinite(s.score)]

    def front(self) -> list[Scored]:
        """Candidates that none beats in both price and score, from cheap to expensive.

        The price is MACs, or what the budgets bound where none bounds MACs. Only scores on the most
        images are compared with each other.
        """
        by_macs = any(budget.macs is not None for budget in self.budgets)
        by_params = any(budget.params is not None for budget in self.budgets)

        def price(scored: Scored) -> float:
            if by_macs or not (by_params or scored.cost.latency_s is not None):
                return scored.cost.macs
            return scored.cost.params if by_params else cast(float, scored.cost.latency_s)

        found = [s for s in self._best_known() if math.isfinite(s.score)]
        precise = [s for s in found if s.images == 0] or found
        front: list[Scored] = []
        for scored in sorted(precise, key=lambda s: (price(s), s.score, s.subnet.id)):
            if not front or scored.score < front[-1].score:
                front.append(scored)
        return front


def reference_logits(net: Supernet, images: Iterable[Tensor]) -> Tensor:
    """The main network's logits [N, C] in eval mode, for `score`; computed once and shared.

    Args:
        net: the supernet.
        images: batches [B, C, H, W], N images in all.
    """
    device = device_of(net)
    with inspecting(net):
        return torch.cat([net(batch.to(device)) for batch in images])


def score(
    net: Supernet,
    subnet: Subnet,
    calibration: Iterable[Tensor],
    images: Iterable[Tensor],
    main_logits: Tensor,
) -> float:
    """The distillation loss of a slice: mean KL(z_M || z_a) over the images, lower is better.

    BatchNorm statistics are measured on `calibration`, the rest runs in eval mode without
    gradients; the network is left as it was [paper; recalibration: ST].

    Args:
        net: the supernet.
        subnet: the slice to score.
        calibration: batches of training images [B, ...].
        images: batches of held-out training images [B, ...], N in all.
        main_logits: of the main network for those images in that order, [N, C].

    Raises:
        ValueError: the images are not N, or there are none.
    """
    stats = calibrate(net, subnet, calibration)
    device = device_of(net)
    count, losses = 0, []
    with inspecting(net):
        for batch in images:
            student = net(batch.to(device), subnet, stats=stats).float()
            teacher = main_logits[count : count + len(batch)].to(device).float()
            count += len(batch)
            if len(teacher) < len(batch):
                break
            losses.append(
                F.kl_div(
                    F.log_softmax(student, dim=1),
                    F.log_softmax(teacher, dim=1),
                    reduction="sum",
                    log_target=True,
                )
            )
    require(
        0 < count == len(main_logits),
        "the number of images",
        count,
        f"as many as rows of main_logits ({len(main_logits)}), at least 1",
        "score the images that the logits were computed for",
    )
    return math.fsum(torch.stack(losses).tolist()) / count
