import pytest
import torch

from coterie.models.layers import build_layer


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3), (2, 5, 4)])
def test_a_mix_takes_what_autocast_gives_it(shape: tuple[int, ...]) -> None:
    """Its weights stay in float32 where the layers before it give bfloat16."""
    mix = build_layer("mix", {"channels": 2, "parts": 4})
    mix.load_state_dict({"weight": torch.tensor([1.0, 2, 3, 4]), "index": torch.tensor([0, 1, 1, 0])})
    x = torch.ones(shape, dtype=torch.bfloat16)
    mixed = mix(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, torch.full_like(mixed, 5.0))
