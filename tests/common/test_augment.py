from __future__ import annotations

import pytest
import torch

from fedge.learning import draws
from fedge.learning.augment import augment

ALL = ("flip", "shift:2", "noise:0.1", "mask:0.2")


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return draws.key(seed, torch.arange(count))


def batch(n: int = 64) -> torch.Tensor:
    return torch.arange(n * 2 * 3 * 4, dtype=torch.float32).reshape(n, 2, 3, 4) + 1


@pytest.mark.parametrize("name", ALL)
def test_shape_and_type_stay_and_the_input_is_left_as_it_is(name: str) -> None:
    x = batch()
    found = augment(x, (name,), keys(len(x)))
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, batch())
    assert not torch.equal(found, x)


def test_no_names_give_the_batch_itself() -> None:
    x = batch()
    assert augment(x, (), keys(len(x))) is x


def test_the_keys_decide_and_torchs_own_state_is_not_touched() -> None:
    state = torch.get_rng_state()
    first, again, other = (augment(batch(), ALL, keys(64, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors_about_half_of_the_images_from_left_to_right() -> None:
    x = batch()
    found = augment(x, ("flip",), keys(len(x)))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(found, x, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(found, x, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 20 <= sum(mirrored) <= 44


def test_shift_moves_whole_pixels_and_repeats_the_edges() -> None:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(200, 1, 3, 3)
    found = {tuple(map(tuple, image[0].tolist())) for image in augment(x, ("shift:1",), keys(len(x)))}
    rows, columns = [(0, 0, 1), (0, 1, 2), (1, 2, 2)], [(0, 0, 1), (0, 1, 2), (1, 2, 2)]
    grid = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    by_hand = {tuple(tuple(float(grid[r][c]) for c in cs) for r in rs) for rs in rows for cs in columns}
    assert found == by_hand


def test_a_shift_farther_than_the_image_leaves_an_edge() -> None:
    assert augment(batch(), ("shift:9",), keys(64)).shape == batch().shape


def test_channels_move_together() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4).expand(8, 2, 3, 4)
    found = augment(x, ("shift:1", "flip"), keys(len(x)))
    assert torch.equal(found[:, 0], found[:, 1])


def test_noise_has_the_deviation_that_its_name_says() -> None:
    found = augment(torch.zeros(100, 100), ("noise:0.5",), keys(100))
    assert found.std().item() == pytest.approx(0.5, rel=0.05)
    assert found.mean().item() == pytest.approx(0, abs=0.02)


def test_mask_sets_about_the_share_to_zero_and_leaves_the_rest() -> None:
    found = augment(torch.ones(100, 100), ("mask:0.2",), keys(100))
    assert set(found.unique().tolist()) == {0, 1}
    assert found.mean().item() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("name", ["flip", "shift:1"])
def test_an_image_augmentation_refuses_features(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"augmentation '{name}' is for images; these inputs have shape \(2, 3\)"
    ):
        augment(torch.zeros(2, 3), (name,), keys(2))


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="'turn:3' is unknown"):
        augment(torch.zeros(2, 3), ("turn:3",), keys(2))


def test_an_example_draws_the_same_whatever_stands_beside_it() -> None:
    x = batch()
    some = torch.tensor([3, 17])
    assert torch.equal(augment(x, ALL, keys(64))[some], augment(x[some], ALL, keys(64)[some]))
