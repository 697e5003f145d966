"""How much of a model the search reaches, at the model's own size: shapes alone, no arithmetic."""

import pytest

from benchmarks.models import DOCS, MORE_TIMM, look

from .zoo import FULL_SIZE, TIMM, torchvision_names

#: Smallest subnets, as a share of the MACs.
LEAST = [
    ("torchvision", "resnet50", 0.05),
    ("torchvision", "mobilenet_v2", 0.05),
    ("timm", "deit_small_patch16_224", 0.05),
    ("torchvision", "swin_t", 0.05),
]


@pytest.mark.parametrize(("library", "name", "most"), LEAST)
def test_the_smallest_subnet_is_small(library, name, most):
    row = look(library, name)
    assert row.least <= most
    assert row.share == 1 and row.frozen == ()


@pytest.mark.models
@pytest.mark.parametrize("name", FULL_SIZE)
def test_almost_all_of_every_family_is_elastic(name):
    row = look("torchvision", name)
    assert row.share >= (0.9 if name.startswith(("vit", "swin")) else 0.95)


def test_the_page_lists_every_model_and_its_exceptions():
    page = (DOCS / "models.md").read_text()
    for name in [*torchvision_names(), *TIMM, *MORE_TIMM]:
        assert f"\n| {name} | " in page or f"\n- {name}: " in page, name
    assert "80 of 80 are traced" in page
    short = page.split("### What falls short, ")[1:]
    assert [part.partition("\n")[0] for part in short] == ["torchvision", "timm"]
    assert "None: of each" in short[0].split("###")[0]
    for name in ("resnest14d", "lcnet_050"):
        assert f"{name} (" in short[1].split("###")[0]
        assert f"- {name}, " in short[1]
