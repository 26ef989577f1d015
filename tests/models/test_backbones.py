import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.models.backbones import BACKBONES, MLP, Backbone

mlps = st.builds(
    MLP,
    input_shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    width=st.integers(1, 9),
    depth=st.integers(1, 4),
)


@given(mlps, st.integers(1, 3))
def test_the_units_chain_from_the_input_to_the_features(backbone: MLP, batch: int) -> None:
    units = backbone.build()
    assert len(units) == backbone.units
    x = torch.randn(batch, *backbone.input_shape)
    for unit in units:
        assert any(True for _ in unit.parameters())
        x = unit(x)
    assert x.shape == (batch, backbone.features)


@given(mlps)
def test_a_backbone_round_trips_through_json(backbone: MLP) -> None:
    document = json.loads(json.dumps(backbone.to_dict()))
    assert BACKBONES[document["name"]].from_dict(document) == backbone


@given(mlps)
def test_every_build_is_fresh_and_drawn_from_torchs_generator(backbone: MLP) -> None:
    def weights(units: nn.ModuleList) -> torch.Tensor:
        return torch.cat([parameter.flatten() for parameter in units.parameters()]).detach()

    torch.manual_seed(0)
    first, second = weights(backbone.build()), weights(backbone.build())
    torch.manual_seed(0)
    assert torch.equal(weights(backbone.build()), first)
    assert not torch.equal(first, second)


def test_an_mlp_is_relu_after_linear_on_the_flat_input() -> None:
    torch.manual_seed(0)
    stem, hidden = MLP(input_shape=(2, 3), width=4, depth=2).build()
    (w1, b1), (w2, b2) = stem.parameters(), hidden.parameters()
    x = torch.randn(5, 2, 3)
    expected = (((x.reshape(5, 6) @ w1.T + b1).clamp(min=0)) @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(hidden(stem(x)), expected)


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_the_default_is_among_the_choices_to_search(backbone: type[Backbone]) -> None:
    assert backbone.default_width in backbone.widths
    assert backbone.default_depth in backbone.depths


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_shape", ()),
        ("input_shape", (3, 0)),
        ("input_shape", (2**20, 2**20)),
        ("input_shape", [3]),
        ("input_shape", (3.0,)),
        ("width", 0),
        ("width", 10**9),
        ("width", 2.0),
        ("width", True),
        ("depth", 0),
        ("depth", 10**9),
        ("depth", math.nan),
    ],
)
def test_a_bad_size_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be"):
        MLP(**{"input_shape": (3,), "width": 2, "depth": 1, field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [{"name": "cnn"}, {"width": None}, {"colour": "red"}, {"input_shape": 3}, {"input_shape": ["3"]}],
)
def test_a_document_of_another_backbone_or_with_other_keys_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MLP.from_dict(MLP(input_shape=(3,), width=2, depth=1).to_dict() | change)


def test_a_document_with_a_missing_key_is_refused() -> None:
    document = MLP(input_shape=(3,), width=2, depth=1).to_dict()
    del document["width"]
    with pytest.raises(ValueError, match="with the keys"):
        MLP.from_dict(document)
