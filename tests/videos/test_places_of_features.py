"""In a capture, the code finds places for features only where there are features: of images, of videos, or of both."""

from __future__ import annotations

import pytest
import torch

from peftfx.views.capturing.written_tokens import no_places_without_features

IMAGE, VIDEO = 7, 8
IDS = torch.tensor([[IMAGE, 3, VIDEO, IMAGE], [4, VIDEO, 5, 6]])


def joined(images: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
    """Add features at the tokens of both, as code with features for deeper layers does."""
    embedded = torch.zeros(2, 4, 2)
    of_images, of_videos = IDS == IMAGE, IDS == VIDEO
    both = of_images | of_videos
    first, other = of_images[both], of_videos[both]
    whole = images.new_zeros(both.sum(), 2)
    whole[first, :] = images
    whole[other, :] = videos
    embedded[both, :] = embedded[both, :] + whole
    return embedded


@pytest.mark.parametrize(("images", "videos"), [(2, 2), (2, 0), (0, 2), (0, 0)])
def test_masks_of_both_show_what_has_features(images: int, videos: int) -> None:
    some = {IMAGE: torch.full((images, 2), 1.0), VIDEO: torch.full((videos, 2), 2.0)}
    with no_places_without_features(some):
        found = joined(some[IMAGE], some[VIDEO])
    want = (IDS == IMAGE) * float(images > 0) + (IDS == VIDEO) * 2.0 * (videos > 0)
    torch.testing.assert_close(found, want[..., None].expand(-1, -1, 2))


@pytest.mark.parametrize("count", [1, 0])
def test_what_is_written_into_a_mask_counts(count: int) -> None:
    features = torch.full((count, 2), 1.0)
    with no_places_without_features({IMAGE: features}):
        mask, other, embedded = IDS == IMAGE, torch.ones_like(IDS, dtype=torch.bool), torch.zeros(2, 4, 2)
        mask[:, 0] = False
        other.logical_and_(mask)
        embedded[mask] = features
        again = embedded.masked_fill(other[..., None], 3.0)
    assert embedded.any(-1).nonzero().tolist() == [[0, 3]] * count
    assert (again == 3.0).all(-1).nonzero().tolist() == [[0, 3]] * count


def test_ids_of_tokens_are_changed_without_features_too() -> None:
    with no_places_without_features({IMAGE: torch.zeros(0, 2)}):
        ids = IDS.masked_fill(IDS == IMAGE, 0)
    assert not (ids == IMAGE).any()
