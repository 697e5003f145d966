import dataclasses

import pytest

from stp_ray.method import Expansion, Exploration, Optimisation, Stimulation

WRONG = [
    (Optimisation, {"epochs": -1}),
    (Optimisation, {"batch_size": 0}),
    (Optimisation, {"optimizer": "adam"}),
    (Optimisation, {"lr": 0.0}),
    (Optimisation, {"lr": float("nan")}),
    (Optimisation, {"momentum": 1.0}),
    (Optimisation, {"weight_decay": -1.0}),
    (Optimisation, {"warmup_epochs": 11.0}),
    (Optimisation, {"min_lr": 2.0}),
    (Optimisation, {"label_smoothing": 1.0}),
    (Optimisation, {"grad_clip": 0.0}),
    (Optimisation, {"precision": "fp8"}),
    (Optimisation, {"ema": 1.0}),
    (Optimisation, {"checkpoint_every": -1}),
    (Stimulation, {"subnets": 0}),
    (Stimulation, {"kd_weight": -1.0}),
    (Stimulation, {"temperature": 0.0}),
    (Stimulation, {"sampler": "best"}),
    (Stimulation, {"divergence": "js"}),
    (Stimulation, {"resolutions": ()}),
    (Stimulation, {"resolutions": (2.0,)}),
    (Expansion, {"p_start": 1.5}),
    (Expansion, {"p_end": -0.5}),
    (Expansion, {"rungs": -1}),
    (Expansion, {"target_ce": -1.0}),
    (Expansion, {"kd_weight": float("inf")}),
    (Expansion, {"temperature": -1.0}),
    (Expansion, {"main": "keep"}),
    (Exploration, {"generations": 0}),
    (Exploration, {"population": 0}),
    (Exploration, {"parents": 0}),
    (Exploration, {"mutation": 0.0}),
    (Exploration, {"crossover": 1.5}),
    (Exploration, {"calibration_images": 0}),
    (Exploration, {"scoring_images": 0}),
    (Exploration, {"promote": -0.1}),
    (Exploration, {"finalists": -1}),
    (Exploration, {"tuning_images": 0}),
    (Exploration, {"final_steps": 25}),
    (Exploration, {"batch_of_candidates": 0}),
]


@pytest.mark.parametrize(("options", "fields"), WRONG, ids=lambda value: str(value)[:40])
def test_a_value_out_of_range_is_named_with_what_was_expected(options, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=rf"^{name} is .*; expected .*; .*") as caught:
        options(**fields)
    assert "\n" not in str(caught.value)


def test_combinations_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="subnets is 1; expected at least 2 with the sandwich"):
        Stimulation(sampler="sandwich")
    with pytest.raises(ValueError, match="rungs is 0; expected at least 1 when the main network"):
        Expansion(rungs=0, main="drop")


@pytest.mark.parametrize("options", [Optimisation, Stimulation, Expansion, Exploration])
def test_options_are_frozen_and_a_config_may_embed_them(options):
    pydantic = pytest.importorskip("pydantic")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options(), dataclasses.fields(options)[0].name, 1)
    adapter = pydantic.TypeAdapter(options)
    assert adapter.validate_python({}) == options()
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"no_such_field": 1})
    described = adapter.json_schema()["properties"]
    assert all(described[f.name].get("description") for f in dataclasses.fields(options))
