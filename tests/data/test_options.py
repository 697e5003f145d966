import pytest

from stp_ray.data import DataOptions


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("holdout", 0),
        ("crop_padding", -1),
        ("mixup", -0.1),
        ("mixup", float("nan")),
        ("resident_limit_mb", 0),
        ("limit", 1),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.5, 0.0)),
        ("max_corrupt", 1.5),
        ("loading", "sometimes"),
        ("decode", "elsewhere"),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} .*; expected .*; change data\.{field}$"):
        DataOptions(**{field: value})


def test_two_kinds_of_crop_are_refused():
    with pytest.raises(ValueError, match="one kind of crop"):
        DataOptions(crop_padding=4, random_resized_crop=True)


def test_pydantic_embeds_the_options_with_their_descriptions():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(DataOptions)
    assert adapter.validate_python({"name": "digits", "mean": [0, 0, 0]}).mean == (0.0, 0.0, 0.0)
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python({"nmae": "digits"})
    properties = adapter.json_schema()["properties"]
    assert all(properties[name]["description"] for name in properties)
