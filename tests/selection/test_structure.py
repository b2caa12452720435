"""The verdict on structure, and its pictures."""

import pytest
import torch

from abliterator.selection import participation_ratio


def test_participation_ratio_counts_directions():
    eye = torch.eye(6, dtype=torch.float64)
    assert participation_ratio(eye[:4]) == pytest.approx(4)
    assert participation_ratio(eye[[0, 0, 0]] * torch.tensor([[1.0], [2.0], [-3.0]])) == (
        pytest.approx(1)
    )
    two = torch.stack([eye[0], eye[0] + eye[1]])  # 45 degrees: eigenvalues 1 +- cos
    assert participation_ratio(two) == pytest.approx(4 / (2 + 2 * 0.5))


def test_pictures_are_the_same_twice_and_take_missing_values(tmp_path):
    pytest.importorskip("matplotlib")
    from abliterator.plots import draw_cosines, draw_curves, draw_front

    for name in "ab":
        draw_cosines(tmp_path / f"{name}.png", [[1.0, 0.5], [0.5, 1.0]], [4, 7])
        curves = {"KL, nats": [0.1, 0.2], "compliance": [None, 0.5], "coherence": [None, None]}
        draw_curves(tmp_path / f"{name}2.png", [(4, -1), (7, -1)], curves, chosen=[7])
        draw_curves(tmp_path / f"{name}3.png", [(4, -1), (4, -2)], curves)
        edits = {"mean": [(0.1, 0.5), (0.2, 0.9)], "other": [(0.0, 0.1)]}
        draw_front(tmp_path / f"{name}4.png", edits, controls=[(0.3, 0.0)], base=0.1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a2.png").read_bytes() == (tmp_path / "b2.png").read_bytes()
    assert (tmp_path / "a4.png").read_bytes() == (tmp_path / "b4.png").read_bytes()
